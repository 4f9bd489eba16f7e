"""Puts every rank's state of a generation in place; also of one that goes on without a snapshot of its last step.

    1 told      who has applied the step tells those that only have it ready, and they apply it       (all)
    2 exact     own memory, snapshot, parity, checkpoint; replicas send                               (each its own)
    3 stages    live ranks say what their layers are and how large their gradients were               (all)
    4 parcels   for each lost rank: each of its sources sends the present, weights, moments of shared layers
    5 load      a lost rank combines them, or lays the present over its older snapshot

1, 3 and 4 only happen if the Form has a rung that needs them. Who sends what to whom follows from the Form and the
plan, so all ranks agree without asking; parcels are sent in one order over all ranks, so none waits in a circle. Not
here: the recipes (neighbours.py), the decision (ladder.py). Invariant: until its state is whole, a rank that is being
rebuilt has none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from holdfast.proto.lease import Phase

from ..comm.group import Group
from ..gather import Gathered, Kept
from ..joining import Formed
from .ladder import INEXACT, announce, stage_numbers
from .neighbours import Average, Copy, Layout, Recipe, combine, describe, plan_rebuild
from .peer import Parcel, receive_parcel, send_parcel, transfer_state
from .present import compose_present, present_of

if TYPE_CHECKING:
    from ..engine import Engine
    from ..lease import Lease

log = logging.getLogger(__name__)

Tensors = dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Restored:
    """Where this rank's state came from, as (rung, bytes, pieces)."""

    sources: list[tuple[str, int, int]]
    note: str = ""
    """How it was made, if it is not exact."""


def restore_state(engine: Engine, group: Group | None, formed: Formed, lease: Lease) -> Restored:
    """Become the state after formed.resume_step. Raises Fenced, PeerLost, SnapshotError."""
    step, forward = formed.resume_step, engine.forward
    mine = formed.sources[engine.rank]
    lossy = sorted(rank for rank, source in formed.sources.items() if source.rung in INEXACT)
    told = None
    if group is not None and any(source.rung == "ready" for source in formed.sources.values()):
        told, born = _told(engine, group, step, lease)
        if mine.rung == "ready":
            engine.roll_forward(told, born)
    forward.pending = None  # what others have not applied is done again
    lease.renew(Phase.RECOVERING)
    sources = [] if mine.rung == "stale" else engine.snapshots.restore(formed) + engine.checkpoints.restore(formed)
    if group is None:
        return Restored(sources)
    lease.renew(Phase.WAITING)
    sources += transfer_state(engine, group, formed)
    restored = Restored(sources)
    if lossy:
        restored = _rebuild(engine, group, formed, lossy, sources, lease)
    if formed.inexact_since:
        forward.since = min(forward.since or formed.inexact_since, formed.inexact_since)
    if told is not None:
        forward.told, forward.told_step = told, step  # whoever is left can tell it again
    lease.renew(Phase.RECOVERING)
    return restored


# ---- 1: the barrier that some did not hear the end of ------------------------------------------------


def _told(engine: Engine, group: Group, step: int, lease: Lease) -> tuple[Gathered, int]:
    """What the barrier of `step` told, and the generation in which it was applied."""
    forward, mine = engine.forward, None
    if forward.told is not None and forward.told_step == engine.step == step:
        mine = {"gathered": asdict(forward.told), "born": engine.born}
    lease.renew(Phase.WAITING)
    rows = [json.loads(row) for row in group.allgather_bytes(json.dumps(mine).encode())]
    row = next(row for row in rows if row is not None)
    gathered = row["gathered"]
    return Gathered(**{**gathered, "kept": Kept(**gathered["kept"])}), row["born"]


# ---- 3 to 5: stages that are not what they were --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stages:
    """What all ranks know before the first parcel."""

    layout: Layout
    live: tuple[int, ...]
    trains: frozenset[int]
    """Live ranks with an optimizer."""
    recipes: Mapping[int, tuple[Recipe, ...]]

    def giver(self, rank: int) -> int:
        """Whose present a lost rank takes: of the live rank that is nearest in the model."""
        mine = self.layout.hosted(rank)
        candidates = [other for other in self.live if other in self.trains] or list(self.live)

        def distance(other: int) -> int:
            return min((abs(u - v) for u in mine for v in self.layout.hosted(other)), default=0)

        return min(candidates, key=lambda other: (distance(other), other))

    def wanted(self, rank: int, source: int) -> list[tuple[int, bool]]:
        """Units that `source` sends to a lost rank, and whether with their moments."""
        found: dict[tuple[int, bool], None] = {}
        for recipe in self.recipes[rank]:
            if isinstance(recipe, Copy) and recipe.from_rank == source:
                found[recipe.from_unit, recipe.exact] = None
            elif isinstance(recipe, Average):
                found |= {(term.unit, False): None for term in recipe.terms if term.rank == source}
        return list(found)

    def sources(self, rank: int) -> list[int]:
        """Who sends something to a lost rank."""
        return [s for s in self.live if s == self.giver(rank) or self.wanted(rank, s)]


def _rebuild(
    engine: Engine,
    group: Group,
    formed: Formed,
    lossy: list[int],
    exact: list[tuple[str, int, int]],
    lease: Lease,
) -> Restored:
    lease.renew(Phase.WAITING)
    stages = _learn(engine, group, formed, lossy)
    parcels: dict[int, Parcel] = {}
    for rank in lossy:
        for source in stages.sources(rank):
            if source == engine.rank:
                _send(engine, group, rank, stages.wanted(rank, source), giver=source == stages.giver(rank))
            elif rank == engine.rank:
                parcels[source] = receive_parcel(group, source)
    numbers = stage_numbers({rank: engine.plan.hosted(rank) for rank in formed.sources})
    if engine.rank not in lossy:
        return Restored(exact)
    present = parcels[stages.giver(engine.rank)].metadata["present"]
    if formed.sources[engine.rank].rung == "stale":
        sources = _load_stale(engine, formed, present)
        note = announce({engine.rank: formed.sources[engine.rank]}, numbers, formed.resume_step)
    else:
        sources = _load_combined(engine, formed.resume_step, present, parcels, stages.recipes[engine.rank])
        note = f"stage {numbers[engine.rank]} is rebuilt: {describe(stages.recipes[engine.rank])}"
    log.warning("step %d is not exact: %s", formed.resume_step, note)
    return Restored(sources, note)


def _learn(engine: Engine, group: Group, formed: Formed, lossy: list[int]) -> _Stages:
    """What every rank's layers are, and the gradients of the live ones."""
    mine: dict[str, Any] = {
        "kinds": {str(unit): kind for unit, kind in engine.kinds().items()},
        "norms": {str(unit): norm for unit, norm in engine.forward.norms.items()},
        "trains": engine.state.optimizer is not None,
    }
    rows = [json.loads(row) for row in group.allgather_bytes(json.dumps(mine).encode())]
    kinds = {int(unit): str(kind) for row in rows for unit, kind in row["kinds"].items()}
    units = range(engine.plan.units)
    layout = Layout(tuple(kinds[unit] for unit in units), tuple(engine.plan.holders(unit) for unit in units))
    live = tuple(rank for rank, source in sorted(formed.sources.items()) if source.rung in ("live", "ready"))
    norms = {int(unit): float(norm) for rank in live for unit, norm in rows[rank]["norms"].items()}
    options = engine.config.neighbours
    recipes = {
        rank: plan_rebuild(layout, rank, live, norms, options, swapped=engine.layout.swap).recipes
        if formed.sources[rank].rung == "neighbours"
        else ()
        for rank in lossy
    }
    return _Stages(layout, live, frozenset(rank for rank in live if rows[rank]["trains"]), recipes)


def _send(engine: Engine, group: Group, rank: int, wanted: list[tuple[int, bool]], *, giver: bool) -> None:
    """One parcel: weights of `wanted`; moments, and all else that belongs to a layer, of those it is to get exactly."""
    metadata = engine.metadata()
    moments = {unit for unit, exact in wanted if exact}
    units = {unit for unit, _ in wanted}
    tensors = [
        (entry.name, entry.state, entry.tensor)
        for entry in engine.state.entries()
        if _unit(entry.name) in (units if entry.state in ("weight", "buffer") else moments)
    ]
    scalars = metadata.get("scalars", {})
    contents = {
        "present": present_of(metadata) if giver else None,
        "scalars": {name: values for name, values in scalars.items() if _unit(name) in moments},
        "rebuilt": {str(unit): since for unit, since in engine.forward.boosts.since.items() if unit in moments},
    }
    send_parcel(group, rank, contents, tensors)


def _load_stale(engine: Engine, formed: Formed, present: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Own older snapshot, moments too, with the present laid over what all ranks must agree on."""
    groups = engine.state.metadata().get("groups", [])

    def over(own: Mapping[str, Any]) -> dict[str, Any]:
        since = present.get("lossy", {}).get("since", 0)
        rebuilt = own.get("lossy", {}).get("rebuilt", {})
        return {**compose_present(own, groups, present), "lossy": {"since": since, "rebuilt": rebuilt}}

    return engine.snapshots.restore(formed, over)


def _load_combined(
    engine: Engine,
    step: int,
    present: Mapping[str, Any],
    parcels: Mapping[int, Parcel],
    recipes: tuple[Recipe, ...],
) -> list[tuple[str, int, int]]:
    """What the recipes make of what was sent; optimizer state is fresh but for layers that came exactly."""
    tensors: Tensors = {}
    for recipe in recipes:
        made = combine(recipe, lambda unit, rank: _of_unit(parcels[rank].tensors, unit))
        for name, tensor in made.items():
            path, _, state = name.rpartition("@")
            if state in ("weight", "buffer") or (isinstance(recipe, Copy) and recipe.exact):
                tensors[f"{recipe.unit}.{path}", state] = tensor
    rebuilt = {unit: since for parcel in parcels.values() for unit, since in parcel.metadata["rebuilt"].items()}
    rebuilt |= {str(r.unit): step for r in recipes if isinstance(r, Average) or not r.exact}
    own = engine.metadata()
    meta = compose_present(own, own.get("groups", []), present)
    meta["scalars"] = {name: v for parcel in parcels.values() for name, v in parcel.metadata["scalars"].items()}
    meta["lossy"] = {"since": present.get("lossy", {}).get("since", 0), "rebuilt": rebuilt}
    engine.load(step, tensors, meta)
    size = sum(parcel.nbytes for parcel in parcels.values())
    return [("neighbours", size, len(tensors))]


def _of_unit(tensors: Tensors, unit: int) -> dict[str, torch.Tensor]:
    """A unit's tensors by "path@state"; 16-bit ones as float32, which an average is made in."""
    found: dict[str, torch.Tensor] = {}
    for (name, state), tensor in tensors.items():
        if _unit(name) == unit:
            small = tensor.is_floating_point() and tensor.element_size() < 4
            found[f"{name.partition('.')[2]}@{state}"] = tensor.float() if small else tensor
    return found


def _unit(name: str) -> int:
    return int(name.partition(".")[0])

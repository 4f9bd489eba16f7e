"""From the ranks' shares of one step to the tensors and metadata of one checkpoint. No files, no torch.

    rank 0: weights, moments, steps of units 0..2; groups; scheduler ...  ┐
    rank 1: ... of units 3..5                                             ├──▶ parts + Details ──▶ save_universal
    rank 2: replica of rank 0: its part of the same units                 ┘

What belongs to the model goes in by name, once, whoever held it; what belongs to a rank (generators, the user's
objects) is kept for each rank as it was encoded, so that the same layout gets it back exactly. Invariants:

* a tied parameter becomes an alias only if every state of both copies has the same bits;
* buffers of replicas that differ are all kept; the first replica's is the model's;
* shares that were not made in the same generation are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from holdfast.proto.errors import SnapshotIncomplete

from ..memory import metadata as blob
from ..memory.digest import digest_of
from ..memory.table import ArenaEntry
from ..universal.model import Group, Role
from ..universal.save import Part
from ..universal.write import Details
from .copy import Taken
from .told import Told

STEP_FORMATS: Final = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}
MODEL_STATES: Final = ("weight", "buffer")


@dataclass(frozen=True, slots=True)
class Extra:
    """A tensor in a rank's metadata: its place in the checkpoint."""

    name: str
    state: str


@dataclass(slots=True)
class Share:
    """One rank's share, its metadata read."""

    taken: Taken | Told
    extras: list[Extra]
    meta: Mapping[str, Any]

    @property
    def origin(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.meta["origin"]
        return found


@dataclass(frozen=True, slots=True)
class Composed:
    """What save_universal() wants, and what is to be said of it."""

    parts: list[Part]
    details: Details
    loss: float | None
    validates: bool
    validation_due: bool

    def rated(self, metric: float | None) -> Details:
        """The details, with the figure by which the best checkpoints are picked."""
        what = "validation_loss" if self.validates else "loss"
        trainer = {**self.details.metadata["trainer"], "metric": metric, "metric_is": what}
        return replace(self.details, metadata={**self.details.metadata, "trainer": trainer})


def compose(taken: Sequence[Taken | Told], *, job: str, time_s: float) -> Composed:
    """Put the shares of one step together. SnapshotIncomplete if they are not of one history."""
    shares = [_share(one) for one in sorted(taken, key=lambda one: one.slot)]
    generations = {share.origin["generation"] for share in shares}
    if len(generations) > 1:
        raise SnapshotIncomplete("the ranks' states were made in different generations", generations=generations)
    tensors, steps, step_dtype = _tensors(shares)
    aliases = _aliases(shares, tensors, steps)
    groups = _groups(shares, aliases)
    trained = {name for group in groups for name in group.params}
    parts = [
        Part(name, state, e.dtype, e.shape, e.start, e.stop, one.data(e), _role(name, state, trained))
        for (name, state), held in tensors.items()
        if name not in aliases
        for one, e in held
    ]
    parts += _extra_parts(shares)
    report = shares[0].meta["report"]
    loss = float(report["loss"]) if report is not None else None
    first = shares[0].origin
    details = Details(
        metadata=_topics(shares, job=job, time_s=time_s, loss=loss, step_dtype=step_dtype),
        groups=groups,
        steps={name: value for name, value in sorted(steps.items()) if name not in aliases},
        aliases=aliases,
        completeness=dict.fromkeys(("params", "optimizer", "scheduler", "scaler", "data", "rng", "user"), "exact"),
    )
    return Composed(parts, details, loss, bool(first["validates"]), bool(first["validation_due"]))


def _share(taken: Taken | Told) -> Share:
    extras = []
    for entry in taken.entries:
        if entry.state == "extra":
            extras.append(Extra(f"slot{taken.slot}.{entry.name}", "rng" if entry.name.startswith("rng.") else "extra"))
    return Share(taken, extras, blob.decode(taken.metadata, extras))


# ---- tensors ------------------------------------------------------------------------------------------------

_Holders = list[tuple[Taken | Told, ArenaEntry]]
Held = dict[tuple[str, str], _Holders]


def _tensors(shares: Sequence[Share]) -> tuple[Held, dict[str, int | float], str]:
    """Who holds which state; each parameter's step as a number, and the type of the tensor that it was."""
    held: Held = {}
    steps: dict[str, int | float] = {}
    for share in shares:
        replica = int(share.origin["replica"])
        for entry in share.taken.entries:
            if entry.state == "extra":
                continue
            state = entry.state
            first = held.get((entry.name, "buffer")) if state == "buffer" else None
            if first and not _same(first, [(share.taken, entry)]):
                state = f"buffer.replica{replica}"
            held.setdefault((entry.name, state), []).append((share.taken, entry))
        for name, values in share.meta.get("scalars", {}).items():
            if type(values.get("step")) in (int, float):
                steps[name] = values["step"]
    kinds = {(e.dtype, e.shape) for (_, state), found in held.items() if state == "step" for _, e in found}
    dtype, shape = next(iter(kinds), ("", ()))
    if len(kinds) != 1 or shape != () or dtype not in STEP_FORMATS:
        return held, steps, ""  # tensors like any other
    for name, state in [key for key in held if key[1] == "step"]:
        one, entry = held.pop((name, state))[0]
        (value,) = struct.unpack(STEP_FORMATS[dtype], one.view(entry))
        steps[name] = int(value) if math.isfinite(value) and value == int(value) else value
    return held, steps, dtype


def _aliases(shares: Sequence[Share], held: Held, steps: Mapping[str, int | float]) -> dict[str, str]:
    """Tied name -> the name that has the states, where both copies are equal to the bit."""
    states: dict[str, set[str]] = {}
    for name, state in held:
        states.setdefault(name, set()).add(state)
    aliases: dict[str, str] = {}
    for first, second in sorted({(first, second) for share in shares for first, second in share.origin["ties"]}):
        owner = aliases.get(first, first)
        equal = (
            owner != second
            and states.get(owner) is not None
            and states.get(owner) == states.get(second)
            and steps.get(owner) == steps.get(second)
            and all(_same(held[owner, state], held[second, state]) for state in states[owner])
        )
        if equal:
            aliases[second] = owner
    return aliases


def _same(these: _Holders, those: _Holders) -> bool:
    """Whether two tensors have the same bits. Where other hosts tell of theirs, only if both are cut alike."""
    ours, theirs = ({(entry.start, entry.stop): (one, entry) for one, entry in held} for held in (these, those))
    if ours.keys() == theirs.keys():
        return all(one.digest(entry) == theirs[at][0].digest(theirs[at][1]) for at, (one, entry) in ours.items())
    first, second = _whole(these), _whole(those)
    return first is not None and first == second


def _whole(held: _Holders) -> bytes | None:
    """Digest of all elements, each once: holders keep parts (ZeRO-1). None if some lie on other hosts."""
    parts = []
    reached = 0
    for one, entry in sorted(held, key=lambda each: (each[1].start, -each[1].stop)):
        if isinstance(one, Told):
            return None
        if entry.stop > reached:
            item = entry.nbytes // (entry.stop - entry.start)
            parts.append(one.view(entry)[(max(reached, entry.start) - entry.start) * item :])
            reached = entry.stop
    return digest_of(*parts) if parts else digest_of(b"")


def _role(name: str, state: str, trained: set[str]) -> Role:
    if state.startswith("buffer"):
        return "buffer"
    if state == "weight":
        return "param" if name in trained else "frozen"
    return "optim"


def _extra_parts(shares: Sequence[Share]) -> Iterator[Part]:
    for share in shares:
        entries = [entry for entry in share.taken.entries if entry.state == "extra"]
        for extra, e in zip(share.extras, entries, strict=True):
            yield Part(extra.name, extra.state, e.dtype, e.shape, e.start, e.stop, share.taken.data(e), "opaque")


# ---- metadata -----------------------------------------------------------------------------------------------


def _groups(shares: Sequence[Share], aliases: Mapping[str, str]) -> tuple[Group, ...]:
    """The ranks' parameter groups, those with the same index and settings as one."""
    merged: dict[tuple[int, str], tuple[dict[str, Any], list[str]]] = {}
    for share in shares:
        for index, group in enumerate(share.meta.get("groups", ())):
            hyper = {key: plain(value) for key, value in group.items() if key != "names"}
            _, names = merged.setdefault((index, repr(hyper)), (hyper, []))
            names += [name for name in group["names"] if name not in aliases]
    ordered = [merged[key] for key in sorted(merged, key=lambda key: key[0])]
    seen: set[str] = set()
    groups: list[Group] = []
    for hyper, names in ordered:
        own = [name for name in dict.fromkeys(names) if name not in seen]
        seen.update(own)
        groups.append(Group(len(groups), hyper, tuple(own)))
    return tuple(groups)


def _topics(shares: Sequence[Share], *, job: str, time_s: float, loss: float | None, step_dtype: str) -> dict[str, Any]:
    first = shares[0]
    kept = ("seed", "shuffle", "microbatch_size", "microbatches", "exact", "world_size", "replicas", "units")
    trainer = {
        "step": first.taken.step,
        "job": job,
        "time": round(time_s, 3),
        "loss": loss,
        "step_dtype": step_dtype,
        "generation": first.origin["generation"],
        **{key: first.origin[key] for key in kept},
    }
    topics: dict[str, Any] = {
        "trainer": trainer,
        "scaler": plain(first.meta["scaler"]),
        "slots": {
            str(share.taken.slot): {
                "blob": share.taken.metadata,
                "extras": [[extra.name, extra.state] for extra in share.extras],
            }
            for share in shares
        },
    }
    scheduler = next((share.meta["scheduler"] for share in shares if share.meta.get("scheduler") is not None), None)
    return topics if scheduler is None else {**topics, "scheduler": plain(scheduler)}


def plain(value: Any) -> Any:
    """A value for people and other tools, as JSON; exactly it is in the slots' blobs."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Extra):
        return f"{value.name}:{value.state}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)

"""What a rank takes from the ranks that wrote a checkpoint, when the layout may be another one. No files.

    parameters, moments, steps    by name: the same for every layout (disk.py reads them)
    groups, scheduler             the group of the rank's own parameters, wherever they were
    generators, user's objects    of the old rank that hosted this rank's last unit, in the same replica if there is
                                  one: exact in the same layout, else the nearest thing
    scaler, data position, report of any: all ranks had the same

Between steps nothing of ours draws from a generator, and inside a step all are keyed by (seed, step, microbatch,
layer): generators matter only to user code between steps. Invariant: same arguments, same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from holdfast.ckpt.memory import metadata as blob
from holdfast.ckpt.universal.model import Checkpoint
from holdfast.proto.errors import ConfigError, HoldfastError

from ..origin import replica_of, unchanging

if TYPE_CHECKING:
    from ..engine import Engine

PER_GROUP: Final = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "base_momentums", "max_momentums"})
"""Lists in the state of torch's schedulers that have one item for each parameter group."""
MATTERS: Final = {
    "seed": "seed",
    "shuffle": "shuffle",
    "microbatch_size": "microbatch size",
    "microbatches": "number of microbatches",
    "exact": "setting of exact",
    "compute": "build of torch or number of threads",
}


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor in some rank's metadata that was not read yet."""

    name: str
    state: str


@dataclass(frozen=True, slots=True)
class Old:
    """The ranks that wrote a checkpoint: slot -> its metadata, tensors as Refs."""

    where: str
    step: int
    step_dtype: str
    slots: Mapping[int, Mapping[str, Any]]
    aliases: Mapping[str, str]
    states_by_name: Mapping[str, tuple[str, ...]]
    """Parameter -> the optimizer's states of it."""

    @staticmethod
    def of(checkpoint: Checkpoint) -> Old:
        """Raises ConfigError with one line for a checkpoint that training did not write."""
        trainer, listed = checkpoint.metadata.get("trainer"), checkpoint.metadata.get("slots")
        where = str(checkpoint.root)
        if not isinstance(trainer, dict) or not isinstance(listed, dict) or not listed:
            raise ConfigError(f"{where} was not written by training: it has no section of a trainer to go on from")
        try:
            slots = {
                int(slot): blob.decode(kept["blob"], [Ref(name, state) for name, state in kept["extras"]])
                for slot, kept in listed.items()
            }
            step, step_dtype = int(trainer["step"]), str(trainer["step_dtype"])
        except (HoldfastError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where} has a section of a trainer that cannot be read: {error}") from None
        states: dict[str, tuple[str, ...]] = {}
        for (name, state), tensor in checkpoint.states.items():
            if tensor.role == "optim":
                states[name] = (*states.get(name, ()), state)
        return Old(where, step, step_dtype, dict(sorted(slots.items())), checkpoint.aliases, states)

    @property
    def first(self) -> Mapping[str, Any]:
        """The origin of the lowest slot."""
        found: Mapping[str, Any] = next(iter(self.slots.values()))["origin"]
        return found

    @property
    def units(self) -> int:
        """Layers of the model."""
        return int(self.first["units"])

    @property
    def replicas(self) -> int:
        """Copies of the pipeline."""
        return int(self.first["replicas"])

    @property
    def optimizer(self) -> str:
        """Class of the optimizer; empty if nothing was trained."""
        return next(
            (str(meta["origin"]["optimizer"]) for meta in self.slots.values() if meta["origin"]["optimizer"]), ""
        )

    def user_names(self) -> set[str]:
        """Names of the user's objects."""
        return set(next(iter(self.slots.values()))["user"])

    def differences(self, engine: Engine) -> list[str]:
        """What of the new run would make it compute other numbers than the old one."""
        now = unchanging(engine)
        return [text for key, text in MATTERS.items() if self.first.get(key) != now[key]]

    def nearest(self, engine: Engine) -> int:
        """The slot whose generators and user's objects this rank takes."""
        hosted = engine.plan.worked(engine.rank)
        replica = replica_of(engine)
        holders = [s for s, meta in self.slots.items() if hosted and hosted[-1] in meta["origin"]["hosted"]]
        same = [slot for slot in holders if self.slots[slot]["origin"]["replica"] == replica]
        return (same or holders or list(self.slots))[0]

    def group_of(self) -> dict[str, tuple[int, int]]:
        """Parameter -> (slot, index of its group there)."""
        return {
            name: (slot, index)
            for slot, meta in sorted(self.slots.items(), reverse=True)
            for index, group in enumerate(meta.get("groups", ()))
            for name in group["names"]
        }


def compose(engine: Engine, old: Old, read: Callable[[str, str], torch.Tensor]) -> dict[str, Any]:
    """The metadata with which Engine.load() makes this rank go on. `read` gets a tensor by name and state."""
    nearest = old.slots[old.nearest(engine)]
    meta = dict(nearest)
    meta["scalars"] = {
        name: values
        for name in engine.state.names()
        if (values := _scalars(old, old.aliases.get(name, name))) is not None
    }
    meta.pop("groups", None)
    meta.pop("scheduler", None)
    meta["lossy"] = _lossy(old, engine.plan.hosted(engine.rank))
    if engine.state.optimizer is not None:
        pairs = _pairs(engine, old)
        meta["groups"] = [old.slots[slot]["groups"][index] for slot, index in pairs]
        schedulers = {slot: old.slots[slot].get("scheduler") for slot, _ in pairs}
        if engine.state.scheduler is not None:
            if None in schedulers.values():
                raise ConfigError(f"{old.where} has no state of a scheduler: it was written without one")
            meta["scheduler"] = merge_scheduler(schedulers, pairs)
    resolved: dict[str, Any] = _resolve(meta, read)
    return resolved


def _lossy(old: Old, hosted: Sequence[int]) -> dict[str, Any]:
    """What of the old run was not exact (forward.py), and which of the units hosted now were rebuilt in it."""
    found = [meta["lossy"] for meta in old.slots.values() if "lossy" in meta]
    since = min((lossy["since"] for lossy in found if lossy["since"]), default=0)
    rebuilt = {unit: step for lossy in found for unit, step in lossy["rebuilt"].items() if int(unit) in hosted}
    return {"since": since, "rebuilt": rebuilt}


def _scalars(old: Old, name: str) -> Any:
    return next((meta["scalars"][name] for meta in old.slots.values() if name in meta.get("scalars", {})), None)


def _pairs(engine: Engine, old: Old) -> list[tuple[int, int]]:
    """For each group of this rank's optimizer (slot, index) of the group that its parameters were in."""
    where = old.group_of()
    pairs: list[tuple[int, int]] = []
    for number, group in enumerate(engine.state.metadata()["groups"]):
        found = [where[name] for name in group["names"] if name in where]
        if len(found) < len(group["names"]):
            lost = next(name for name in group["names"] if name not in where)
            raise ConfigError(f"{old.where} has {lost} in no group of the optimizer: it was not trained there")
        kinds = {_text(old.slots[slot]["groups"][index]) for slot, index in found}
        if len(kinds) > 1:
            raise ConfigError(
                f"{old.where}: the parameters of group {number} of the optimizer were in groups with different settings"
            )
        pairs.append(found[0] if found else next(iter(where.values())))
    return pairs


def _text(group: Mapping[str, Any]) -> str:
    return repr({key: value for key, value in group.items() if key != "names"})


def merge_scheduler(states: Mapping[int, Any], pairs: Sequence[tuple[int, int]]) -> Any:
    """A scheduler's state with its lists of one item per group made of the groups `pairs`, (slot, index) each."""
    return _merged(states[pairs[0][0]], states, pairs)


def _merged(base: Any, states: Mapping[int, Any], pairs: Sequence[tuple[int, int]]) -> Any:
    if isinstance(base, dict):
        merged = type(base)()
        for key, value in base.items():
            inner = {slot: state[key] for slot, state in states.items()}
            each = key in PER_GROUP and isinstance(value, list)
            merged[key] = [inner[slot][index] for slot, index in pairs] if each else _merged(value, inner, pairs)
        return merged
    if isinstance(base, list):
        parts = [_merged(v, {slot: state[i] for slot, state in states.items()}, pairs) for i, v in enumerate(base)]
        return parts
    return base


def _resolve(value: Any, read: Callable[[str, str], torch.Tensor]) -> Any:
    """`value` with every Ref read."""
    if isinstance(value, Ref):
        return read(value.name, value.state)
    if isinstance(value, dict):
        resolved = type(value)()
        for key, item in value.items():
            resolved[key] = _resolve(item, read)
        return resolved
    if isinstance(value, (list, tuple)):
        return type(value)(_each(value, read))
    return value


def _each(values: Sequence[Any], read: Callable[[str, str], torch.Tensor]) -> Iterator[Any]:
    for item in values:
        yield _resolve(item, read)

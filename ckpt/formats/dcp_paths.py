"""What a key of a distributed checkpoint stands for, told from its path. Pure.

    ("model", "blocks.0.w")                       value of a parameter
    ("optim", "state", "blocks.0.w", "exp_avg")   state of a parameter          nested, as get_state_dict gives it
    ("optim", "state.blocks.0.w.exp_avg")         the same, flattened           as torchtitan saves it
    ("optim", "param_groups", 0, "lr")            hyper-parameter of a group
    ("optim", "param_groups.blocks.0.w.lr")       the same, flattened
    ("optimizer", "state", "exp_avg", "w")        Megatron's order
    ("step",)                                     the job's own

Invariant: each key stands for exactly one thing, and two keys never stand for the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from ..universal.errors import CorruptError, MappingError
from ..universal.model import Role
from .torchzip import plain

ROOTS: Final = ("app", "model", "state_dict", "module", "model_state_dict")
OPTIMIZERS: Final = ("optim", "optimizer", "optimizer_state_dict", "optim_state_dict")
MASTERS: Final = ("fp32_param", "fp32", "master", "param")

Kind = Literal["value", "optim", "step", "group", "client"]


@dataclass(frozen=True, slots=True)
class Meaning:
    kind: Kind
    name: str
    state: str = "weight"
    role: Role = "param"
    key: str = ""
    """A hyper-parameter's name; its group's number or parameter is in `name`."""


@dataclass(slots=True)
class Places:
    """Meanings of all keys, and the groups as far as they have been read."""

    meanings: dict[str, Meaning] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, name: str) -> Meaning:
        return self.meanings[name]

    @property
    def optimizer(self) -> bool:
        return any(meaning.kind in ("optim", "step") for meaning in self.meanings.values())

    @property
    def parameters(self) -> set[str]:
        return {meaning.name for meaning in self.meanings.values() if meaning.kind == "value"}

    def hyper(self, meaning: Meaning, value: Any) -> None:
        self.found.setdefault(meaning.name, {})[meaning.key] = value

    def settle(self, trained: set[str], chunks: Mapping[str, int]) -> None:
        """Tell buffers and frozen parameters from trained ones, once the groups are known.

        Nothing names them, but FSDP shards parameters and not buffers: what no group has is frozen if it lies in
        several chunks, and a buffer if in one. Saved by one rank, a frozen parameter is taken for a buffer.
        """
        for name, meaning in self.meanings.items():
            if trained and meaning.kind == "value" and meaning.name not in trained:
                frozen = chunks.get(meaning.name, 0) > 1
                state, role = ("weight", "frozen") if frozen else ("buffer", "buffer")
                self.meanings[name] = replace(meaning, state=state, role=role)  # type: ignore[arg-type]

    def groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """(hyper-parameters, parameters) of each group; flattened ones are put together by equal hyper-parameters."""
        numbered = {int(name): hyper for name, hyper in self.found.items() if name.isdigit() and "params" in hyper}
        found: list[tuple[dict[str, Any], list[str]]] = []
        for _, hyper in sorted(numbered.items()):
            params = hyper.pop("params")
            if not isinstance(params, (list, tuple)) or not all(isinstance(name, str) for name in params):
                raise MappingError("an optimizer whose parameters are numbered, not named")
            found.append((hyper, list(params)))
        together: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, hyper in self.found.items():
            if not (name.isdigit() and int(name) in numbered):
                key = repr(sorted((k, repr(plain(v))) for k, v in hyper.items()))
                together.setdefault(key, (hyper, []))[1].append(name)
        return found + list(together.values())


def where(paths: Mapping[str, tuple[Any, ...]], names: Iterable[str], *, megatron: bool = False) -> Places:
    """The meaning of each name; `paths` is planner_data, and may lack names."""
    full = {name: paths.get(name) or _split(name) for name in names}
    rooted = any(path[0] in ROOTS and len(path) > 1 for path in full.values())
    places = Places()
    seen: dict[Meaning, str] = {}
    for name, path in full.items():
        meaning = _megatron(name) if megatron else _meaning(path, rooted)
        if seen.setdefault(meaning, name) != name:
            raise CorruptError("two keys for one thing", one=seen[meaning], other=name)
        places.meanings[name] = meaning
    return places


def _split(name: str) -> tuple[Any, ...]:
    """A path for a key that planner_data does not list: its first part, if that is a known one."""
    first, _, rest = name.partition(".")
    return (first, rest) if rest and first in (*ROOTS, *OPTIMIZERS) else (name,)


def _meaning(path: tuple[Any, ...], rooted: bool) -> Meaning:
    parts = [str(part) for part in path]
    for at in range(1, len(parts)):
        if parts[at - 1] in OPTIMIZERS:
            found = _optimizer(parts[at], parts[at + 1 :])
            if found is not None:
                return found
    stripped = list(parts)
    while len(stripped) > 1 and stripped[0] in ROOTS:
        stripped.pop(0)
    if rooted and len(stripped) == len(parts):
        return Meaning("client", ".".join(parts), "opaque", "opaque")
    return Meaning("value", ".".join(stripped))


def _optimizer(head: str, rest: list[str]) -> Meaning | None:
    if head == "state" and len(rest) >= 2:
        return _state(".".join(rest[:-1]), rest[-1])
    if head == "param_groups" and len(rest) == 2:
        return Meaning("group", rest[0], key=rest[1])
    for word, make in (("state.", _state), ("param_groups.", _flat_group)):
        if head.startswith(word):
            name, _, key = ".".join([head, *rest]).removeprefix(word).rpartition(".")
            return make(name, key) if name else None
    return None


def _state(name: str, state: str) -> Meaning:
    if state == "step":
        return Meaning("step", name, "step")
    return Meaning("optim", name, "fp32" if state in MASTERS else state, "param" if state in MASTERS else "optim")


def _flat_group(name: str, key: str) -> Meaning:
    number, _, rest = name.partition(".")
    return Meaning("group", number if number.isdigit() and not rest else name, key=key)


def _megatron(name: str) -> Meaning:
    """optimizer.state.exp_avg.NAME; everything under optimizer.distributed is a bucket layout without names."""
    parts = name.split(".")
    if "optimizer" in parts[:2] and "distributed" in parts[:3]:
        raise MappingError(
            "Megatron's dp_reshardable optimizer format, which has buckets in place of parameters; "
            "save with --dist-ckpt-optim-fully-reshardable",
            name=name,
        )
    if parts[0] == "optimizer" and len(parts) > 3 and parts[1] == "state":
        return _state(".".join(parts[3:]), parts[2])
    if parts[0] in ("optimizer", "opt_param_scheduler", "rng_state", "iteration") or "/shard_" in name:
        return Meaning("client", name, "opaque", "opaque")
    return Meaning("value", name)

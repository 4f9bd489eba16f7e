"""Collects what a reader of a format finds, piece by piece, and makes a Checkpoint of it.

    builder.add("w", "exp_avg", "F32", (13, 10), slab, role="optim")   ...   builder.checkpoint(...)

Readers find a tensor's pieces in several files, and find some tensors twice (replicas). This keeps the first
of two equal pieces, and refuses what disagrees. Invariants:

* all pieces of a tensor agree on dtype, shape and role;
* groups name each parameter once, steps are typed (whole numbers are int), metadata is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..universal.errors import CorruptError
from ..universal.model import Checkpoint, Group, Kept, Role, Slab, TensorState, validate
from .torchzip import Stored, plain

CLIENT: Final = "$client/"
"""Tensors that belong to no parameter (a generator's state in somebody's metadata) are named after their place."""


@dataclass(slots=True)
class Builder:
    """What has been found so far."""

    facts: dict[tuple[str, str], tuple[str, tuple[int, ...], Role]] = field(default_factory=dict)
    slabs: dict[tuple[str, str], dict[object, Slab]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    steps: dict[str, int | float] = field(default_factory=dict)
    hyper: dict[int, dict[str, Any]] = field(default_factory=dict)
    members: dict[int, dict[str, None]] = field(default_factory=dict)
    repeated: dict[tuple[str, str], list[Slab]] = field(default_factory=dict)
    """Slabs of what other slabs hold already, and which should have the same bytes."""

    def add(
        self, name: str, state: str, dtype: str, shape: tuple[int, ...], slab: Slab | None, *, role: Role = "param"
    ) -> None:
        """One piece of a tensor; a piece of the same place that is already known is a replica and is left out."""
        key = (name, state)
        known = self.facts.setdefault(key, (dtype, shape, role))
        if known != (dtype, shape, role):
            raise CorruptError(
                "two pieces of one tensor disagree",
                name=name,
                state=state,
                file=slab.span.file if slab else "",
                one=f"{known[0]}{list(known[1])}",
                other=f"{dtype}{list(shape)}",
            )
        found = self.slabs.setdefault(key, {})
        if slab is not None and slab.elements:
            found.setdefault(slab.box if slab.flat is None else slab.flat, slab)

    def whole(self, name: str, state: str, tensor: Stored, *, role: Role = "param") -> None:
        """A tensor that lies in one piece."""
        self.add(name, state, tensor.dtype, tensor.shape, tensor.slab(), role=role)

    def step(self, name: str, step: float) -> None:
        value = int(step) if float(step).is_integer() else float(step)
        if self.steps.setdefault(name, value) != value:
            raise CorruptError(
                "one parameter at two steps: files of different saves", name=name, one=self.steps[name], other=value
            )

    def group(self, index: int, hyper: Mapping[str, Any], params: Mapping[str, Any] | list[str]) -> None:
        """A part of a group; parts of several pipeline stages add up, if their hyper-parameters are equal."""
        value = {key: plain(item) for key, item in hyper.items() if key != "params"}
        if self.hyper.setdefault(index, value) != value:
            raise CorruptError("one optimizer group with two sets of hyper-parameters", group=index)
        self.members.setdefault(index, {}).update(dict.fromkeys(params))

    def split_client(self, value: Any, path: str = "") -> Any:
        """`value` as JSON; tensors in it become opaque tensors of the checkpoint, so that their bytes come along."""
        if isinstance(value, Stored):
            name = CLIENT + path
            if (name, "opaque") not in self.facts:
                self.whole(name, "opaque", value, role="opaque")
            return {"$tensor": name}
        if isinstance(value, dict):
            pairs = ((key if isinstance(key, str) else f"$key:{key!r}", item) for key, item in value.items())
            return {key: self.split_client(item, f"{path}.{key}" if path else key) for key, item in pairs}
        if isinstance(value, (list, tuple)):
            return [self.split_client(item, f"{path}.{i}") for i, item in enumerate(value)]
        return plain(value)

    def checkpoint(
        self, root: Path, form: str, *, metadata: Mapping[str, Any], completeness: Mapping[str, Kept]
    ) -> Checkpoint:
        """All of it, validated."""
        states = {
            key: TensorState(key[0], key[1], dtype, shape, tuple(self.slabs.get(key, {}).values()), role)
            for key, (dtype, shape, role) in self.facts.items()
        }
        names = {name for name, _ in states}
        aliases = {alias: owner for alias, owner in self.aliases.items() if alias not in names}
        groups = tuple(
            Group(i, self.hyper[index], tuple(self.members[index])) for i, index in enumerate(sorted(self.hyper))
        )
        found = Checkpoint(
            root=root,
            format=form,
            states=states,
            aliases=aliases,
            groups=groups,
            steps=self.steps,
            metadata=metadata,
            completeness=completeness,
            copies={key: tuple(slabs) for key, slabs in self.repeated.items()},
        )
        validate(found)
        return found

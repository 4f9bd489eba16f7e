"""A checkpoint that several hosts write: who holds what, who writes what, and one manifest from theirs. Pure.

    holdings of all ──▶ holders(step): slot -> host        each slot's share is taken on one host
    chosen parts    ──▶ assign(): host -> Pieces           disjoint, complete; what is replicated is written once
    parts' manifests ─▶ merge(): tensors, files, moves     part-00001/optim/step-00001-of-00001 ─▶ step-00002-of-00003

A piece that is a range of a tensor lies in its host's part as a tensor of its own, and in the merged manifest as a flat
slab of the whole one. Invariants:

* every element of every tensor is in exactly one host's pieces;
* merge() takes nothing that was not asked for, and refuses a part in which something is missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from holdfast.proto.errors import ProtocolViolation

from ..universal.errors import CorruptError, IncompleteError
from ..universal.layout import Layout, StatePlan
from ..universal.model import Checkpoint, FileFacts, Role, Slab, TensorState
from ..universal.save import Part
from .told import Place

Holdings = Mapping[int, Collection[int]]
"""Slot -> steps that a host holds whole."""
_NUMBERED: Final = re.compile(r"(?P<family>.*?)(-\d{5}-of-\d{5})?\.safetensors\Z")


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of a tensor, which are written by the host that holds `slot`."""

    slot: int
    entry: int
    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether this is all of its tensor."""
        elements = 1
        for length in self.shape:
            elements *= length
        return (self.start, self.stop) == (0, elements)

    def plan(self) -> StatePlan:
        """As what it is written."""
        if self.whole:
            return StatePlan(self.name, self.state, self.dtype, self.shape, self.role)
        name = f"{self.name}[{self.start}:{self.stop}]"
        return StatePlan(name, self.state, self.dtype, (self.stop - self.start,), self.role)

    def to_json(self) -> list[Any]:
        """For the host that writes it."""
        return [self.slot, self.entry, self.name, self.state, self.dtype, list(self.shape), self.role, self.start,
                self.stop]  # fmt: skip

    @staticmethod
    def of(value: Any) -> Piece:
        """From JSON."""
        try:
            slot, entry, name, state, dtype, shape, role, start, stop = value
            return Piece(int(slot), int(entry), str(name), str(state), str(dtype), tuple(map(int, shape)), role,
                         int(start), int(stop))  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ProtocolViolation("not a piece", reason=str(error)[:200]) from error


@dataclass(frozen=True, slots=True)
class Move:
    """A file of a host's part, and its name in the checkpoint."""

    host: int
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Merged:
    """What the parts are together."""

    layout: Layout
    facts: Mapping[str, FileFacts]
    moves: tuple[Move, ...]


# ---- before -------------------------------------------------------------------------------------------------


def holders(held: Mapping[int, Holdings], slots: Iterable[int], step: int) -> dict[int, int]:
    """Slot -> the first host that holds it whole after `step`. Slots that nobody holds are not in it."""
    found: dict[int, int] = {}
    for slot in slots:
        host = next((host for host in sorted(held) if step in held[host].get(slot, ())), None)
        if host is not None:
            found[slot] = host
    return found


def common(held: Mapping[int, Holdings], slots: Iterable[int]) -> list[int]:
    """The steps that some host holds of every slot, ascending."""
    found: set[int] | None = None
    for slot in slots:
        steps = {step for holdings in held.values() for step in holdings.get(slot, ())}
        found = steps if found is None else found & steps
    return sorted(found or ())


def assign(
    chosen: Mapping[StatePlan, Sequence[tuple[Part, int, int]]], hosts: Mapping[int, int]
) -> dict[int, list[Piece]]:
    """Host -> what it writes. `chosen`: as choose_parts() gives it; `hosts`: slot -> host."""
    work: dict[int, list[Piece]] = {}
    for plan, ranges in chosen.items():
        for part, start, stop in ranges:
            assert isinstance(part.data, Place)
            place = part.data
            piece = Piece(
                place.slot, place.entry, plan.name, plan.state, plan.dtype, plan.shape, plan.role, start, stop
            )
            work.setdefault(hosts[place.slot], []).append(piece)
    return work


# ---- after --------------------------------------------------------------------------------------------------


def merge(work: Mapping[int, Sequence[Piece]], parts: Mapping[int, Checkpoint]) -> Merged:
    """One checkpoint's tensors and files from those of the parts. IncompleteError: a host did not write its pieces."""
    moves = _moves(parts)
    names = {(move.host, move.source): move.target for move in moves}
    slabs: dict[StatePlan, list[Slab]] = {}
    for host, pieces in sorted(work.items()):
        part = parts.get(host)
        if part is None:
            raise IncompleteError("a host has not written its part", host=host)
        if len(part.states) != len(pieces):
            raise CorruptError("a part with other tensors than were asked for", host=host)
        for piece in pieces:
            plan = piece.plan()
            found = part.states.get((plan.name, plan.state))
            if found is None or (found.dtype, found.shape, found.role) != (plan.dtype, plan.shape, plan.role):
                raise IncompleteError("a host has not written a piece", host=host, name=plan.name, state=plan.state)
            tensor = StatePlan(piece.name, piece.state, piece.dtype, piece.shape, piece.role)
            slabs.setdefault(tensor, []).extend(
                _placed(piece, slab, names[host, slab.span.file]) for slab in found.slabs
            )
    states = {
        (plan.name, plan.state): TensorState(plan.name, plan.state, plan.dtype, plan.shape, tuple(found), plan.role)
        for plan, found in slabs.items()
    }
    facts = {names[host, path]: told for host, part in parts.items() for path, told in part.files.items()}
    return Merged(Layout((), dict(sorted(states.items()))), facts, moves)


def _moves(parts: Mapping[int, Checkpoint]) -> tuple[Move, ...]:
    """Files of one family are numbered over all hosts."""
    families: dict[str, list[tuple[int, str]]] = {}
    for host, part in sorted(parts.items()):
        for path in sorted(part.files):
            match = _NUMBERED.match(path)
            if match is None:
                raise CorruptError("a part with a file of no family", host=host, file=path)
            families.setdefault(match["family"], []).append((host, path))
    return tuple(
        Move(host, path, f"{family}-{number:05}-of-{len(members):05}.safetensors")
        for family, members in sorted(families.items())
        for number, (host, path) in enumerate(members, 1)
    )


def _placed(piece: Piece, slab: Slab, file: str) -> Slab:
    """A slab of a part as one of the checkpoint."""
    span = replace(slab.span, file=file)
    if piece.whole:
        return replace(slab, span=span)
    assert slab.box is not None
    ((low, high),) = slab.box
    return replace(slab, span=span, box=None, flat=(piece.start + low, piece.start + high))

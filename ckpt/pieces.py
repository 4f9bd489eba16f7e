"""Pieces: which part of which logical tensor. The one algebra that all kept state speaks. Pure.

    tensor "layers.3.attn.q.weight", state "exp_avg", 12 elements
    |0 1 2 3 4 5|6 7 8 9 10 11|      Piece(..., start=0, stop=6)   Piece(..., start=6, stop=12)

A piece is a flat range of elements of one state of one parameter; moving state between layouts is the
intersection of such ranges. A piece says nothing about where its bytes lie, and holds none. Invariants:

* 0 <= start <= stop <= number of elements of `shape`, and `dtype` is one that we can keep;
* two pieces of one (name, state) that differ in dtype or shape are an error, never a conversion.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from holdfast.proto.errors import ConfigError, SnapshotCorrupt, SnapshotIncomplete

from .dtypes import ITEM_BYTES as ALL_BYTES

ITEM_BYTES: Final[Mapping[str, int]] = MappingProxyType({k: n for k, n in ALL_BYTES.items() if k != "F8_E8M0"})
"""Bytes of one element, of the dtypes that are kept in memory: a scale without sign and fraction is in files only."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop), in row-major order, of one state of one logical tensor."""

    name: str
    """Parameter path, such as "layers.3.attn.q.weight"."""
    state: str
    """What of it: "weight", "exp_avg", "exp_avg_sq", "buffer", "rng", ..."""
    dtype: str
    shape: tuple[int, ...]
    """Shape of the whole logical tensor, not of the piece."""
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ConfigError("a dtype that cannot be kept", name=self.name, state=self.state, dtype=self.dtype)
        if any(length < 0 for length in self.shape) or not 0 <= self.start <= self.stop <= self.elements:
            raise ConfigError(
                "a piece outside of its tensor",
                name=self.name,
                state=self.state,
                shape=list(self.shape),
                start=self.start,
                stop=self.stop,
            )

    @property
    def elements(self) -> int:
        """Elements of the whole logical tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of this piece."""
        return (self.stop - self.start) * ITEM_BYTES[self.dtype]

    def intersect(self, other: Piece) -> Piece | None:
        """What both hold; None when they share no element. A disagreement on dtype or shape is an error."""
        if (self.name, self.state) != (other.name, other.state):
            return None
        _agree(self, other)
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        if start >= stop:
            return None
        return Piece(self.name, self.state, self.dtype, self.shape, start, stop)


def _agree(one: Piece, other: Piece) -> None:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise SnapshotCorrupt(
            "two pieces of one tensor disagree",
            name=one.name,
            state=one.state,
            one=f"{one.dtype}{list(one.shape)}",
            other=f"{other.dtype}{list(other.shape)}",
        )


def gaps(pieces: Iterable[Piece], name: str, state: str) -> tuple[tuple[int, int], ...]:
    """Ranges of (name, state) that no piece holds, ascending. No piece at all is SnapshotIncomplete."""
    held = sorted((p for p in pieces if (p.name, p.state) == (name, state)), key=lambda p: (p.start, p.stop))
    if not held:
        raise SnapshotIncomplete("no piece of this tensor", name=name, state=state)
    missing = []
    reached = 0
    for piece in held:
        _agree(held[0], piece)
        if piece.start > reached:
            missing.append((reached, piece.start))
        reached = max(reached, piece.stop)
    if reached < held[0].elements:
        missing.append((reached, held[0].elements))
    return tuple(missing)


def cover(pieces: Iterable[Piece], name: str, state: str) -> None:
    """Raise SnapshotIncomplete, naming the ranges, unless the pieces hold all of (name, state)."""
    missing = gaps(pieces, name, state)
    if missing:
        raise SnapshotIncomplete("elements are missing", name=name, state=state, missing=list(missing))


def assign_owners(sizes: Mapping[str, int], holders: Sequence[int]) -> dict[str, int]:
    """Who of `holders`, all of whom hold everything in `sizes` (name -> bytes), keeps which name.

    The largest name first, always to the holder with least so far, ties to the lowest holder: no holder
    has more than the mean plus the largest name. The result depends on neither argument's order, so every
    replica computes the same one without asking.
    """
    if not holders or len(set(holders)) != len(holders):
        raise ConfigError("owners need holders, each once", holders=list(holders))
    loads = [(0, holder) for holder in sorted(holders)]
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, holder = loads[0]
        owners[name] = holder
        heapq.heapreplace(loads, (load + sizes[name], holder))
    return owners

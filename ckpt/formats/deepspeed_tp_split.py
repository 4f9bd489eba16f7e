"""One parameter over tensor-parallel ranks, as boxes: cut, copied, put together part by part, or by a map. Pure.

        rank 0 | q0 k0 v0 |  ──▶  Split: shape of the whole, and for each rank its pieces,
        rank 1 | q1 k1 v1 |       a box of the rank's part that is a box of the whole

Invariants:

* pieces have the same shape on both sides, lie inside of both, and fill the rank's part (but for vocabulary padding);
* a block that several ranks hold is a piece of the first of them and a copy of the others.

Not here: which parameter is cut how (deepspeed_tp_rules.py); whether the pieces of all ranks fill the whole
(Builder.checkpoint() validates that).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final

from ..universal.errors import CorruptError, MappingError
from ..universal.geometry import full_box, intersect, row_major, volume
from ..universal.model import Box
from .torchzip import is_counts

INFO: Final = "universal_checkpoint_info"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a rank's part, and where it lies in the whole."""

    local: Box
    whole: Box


@dataclass(frozen=True, slots=True)
class Split:
    """One parameter over the tensor-parallel ranks."""

    shape: Shape
    """Of the whole."""
    locals: tuple[Shape, ...]
    """Of each rank's part."""
    pieces: tuple[tuple[Piece, ...], ...]
    """Of each rank."""
    copies: tuple[tuple[Piece, ...], ...]
    """Of each rank: blocks that a rank before it has too."""


def listed(value: object) -> Sequence[Any]:
    if value is not None and not isinstance(value, (list, tuple)):
        raise CorruptError("a list expected", key=INFO, found=type(value).__name__)
    return value or ()


def counts(value: object) -> list[int]:
    found = tuple(listed(value))
    if not is_counts(found):
        raise CorruptError("a list of counts expected", key=INFO, found=found)
    return list(found)


def mapping(value: object) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise CorruptError("a dictionary expected", key=INFO, found=type(value).__name__)
    return value or {}


def replicated(name: str, parts: Sequence[Shape]) -> Split:
    if len(set(parts)) != 1:
        raise CorruptError("copies of one parameter with different shapes", name=name, shapes=list(parts))
    all_of_it = Piece(full_box(parts[0]), full_box(parts[0]))
    others = ((),) * (len(parts) - 1)
    return Split(parts[0], tuple(parts), ((all_of_it,), *others), ((), *(((all_of_it,),) * (len(parts) - 1))))


def joined(name: str, parts: Sequence[Shape], dim: int, widths: Sequence[Sequence[int]]) -> Split:
    """Parts one after the other along `dim`, and within each part the ranks; widths[part][rank]."""
    others = {(*shape[:dim], *shape[dim + 1 :]) for shape in parts}
    fits = all(
        dim < len(shape) and sum(part[rank] for part in widths) == shape[dim] for rank, shape in enumerate(parts)
    )
    if len(others) != 1 or not fits:
        raise MappingError("parts that do not make up a parameter", name=name, shapes=list(parts), dim=dim)
    starts = list(accumulate((sum(part) for part in widths), initial=0))
    shape = (*parts[0][:dim], starts[-1], *parts[0][dim + 1 :])
    pieces = []
    for rank, part_shape in enumerate(parts):
        edges = list(accumulate((part[rank] for part in widths), initial=0))
        found = []
        for (low, high), part, start in zip(pairwise(edges), widths, starts, strict=False):
            at = start + sum(part[:rank])
            local, whole = list(full_box(part_shape)), list(full_box(shape))
            local[dim], whole[dim] = (low, high), (at, at + high - low)
            if low < high:
                found.append(Piece(tuple(local), tuple(whole)))
        pieces.append(tuple(found))
    return Split(shape, tuple(parts), tuple(pieces), ((),) * len(parts))


def clipped(name: str, split: Split, rows: object) -> Split:
    """Without the rows that only fill up a vocabulary."""
    if type(rows) is not int or not split.shape or not rows > 0:
        raise CorruptError("a vocabulary without its size", name=name, size=rows)
    shape = (min(rows, split.shape[0]), *split.shape[1:])
    limit = full_box(shape)

    def cut(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        return tuple(within(piece, limit, piece.whole) for piece in pieces if intersect(piece.whole, limit))

    return Split(shape, split.locals, tuple(map(cut, split.pieces)), tuple(map(cut, split.copies)))


def within(piece: Piece, box: Box, side: Box) -> Piece:
    """The part of a piece of which `side`, one of its two boxes, lies in `box`."""
    shared = intersect(side, box)
    assert shared is not None
    moved = [(low - start, high - start) for (low, high), (start, _) in zip(shared, side, strict=True)]

    def part(of: Box) -> Box:
        return tuple((start + low, start + high) for (start, _), (low, high) in zip(of, moved, strict=True))

    return Piece(part(piece.local), part(piece.whole))


def affine(name: str, parts: Sequence[Shape] | None, value: object) -> Split:
    """The pieces of every rank, given as views of the whole and of the part. `parts`: what the ranks have, if known."""
    entry = mapping(value)
    shape = tuple(listed(entry.get("logical_shape")))
    ranks = {str(rank): mapping(given) for rank, given in mapping(entry.get("ranks")).items()}
    count = len(ranks) if parts is None else len(parts)
    if not is_counts(shape) or ranks.keys() != {str(rank) for rank in range(count)} or not ranks:
        raise CorruptError("an affine map that does not fit the ranks", name=name, shape=shape, ranks=sorted(ranks)[:8])
    locals_: list[Shape] = []
    pieces: list[tuple[Piece, ...]] = []
    copies: list[tuple[Piece, ...]] = []
    for rank in range(count):
        given = ranks[str(rank)]
        local = tuple(listed(given.get("shard_shape")))
        if not is_counts(local) or (parts is not None and local != parts[rank]):
            raise MappingError("a part of another shape than its map says", name=name, rank=rank, shape=local)
        own: dict[bool, list[Piece]] = {True: [], False: []}
        for piece in listed(given.get("pieces")):
            found = mapping(piece)
            if found.get("scale", 1.0) != 1.0:
                raise MappingError("a scaled piece: its optimizer state cannot be moved", name=name, rank=rank)
            holders = listed(found.get("locations")) or [rank]
            if not is_counts(tuple(holders)):
                raise CorruptError("a piece of impossible ranks", name=name, ranks=holders)
            local_box = boxed_view(name, found.get("shape"), found.get("dest"), local)
            whole_box = boxed_view(name, found.get("shape"), found.get("source"), shape)
            own[min(holders) == rank].append(Piece(local_box, whole_box))
        if sum(volume(piece.local) for found in own.values() for piece in found) != math.prod(local):
            raise CorruptError("pieces that do not fill a rank's part", name=name, rank=rank)
        locals_.append(local)
        pieces.append(tuple(own[True]))
        copies.append(tuple(own[False]))
    return Split(shape, tuple(locals_), tuple(pieces), tuple(copies))


def boxed_view(name: str, lengths: object, view: object, shape: Shape) -> Box:
    """The box of a dense tensor that a view [offset, [strides]] of these lengths is."""
    sizes, pair = tuple(listed(lengths)), listed(view)
    offset, steps = (pair[0], tuple(listed(pair[1]))) if len(pair) == 2 else (-1, ())
    strides = row_major(shape)
    if is_counts(sizes) and is_counts((offset,)) and len(sizes) == len(shape) == len(steps):
        starts = []
        for step, length in zip(strides, shape, strict=True):
            start, offset = divmod(offset, step) if length and step else (0, offset)
            starts.append(start)
        box = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
        walks = all(size < 2 or step == own for size, step, own in zip(sizes, steps, strides, strict=True))
        if walks and not offset and all(stop <= n for (_, stop), n in zip(box, shape, strict=True)):
            return box
    raise MappingError("a piece that is no box of its tensor: not supported", name=name, piece=[lengths, view])

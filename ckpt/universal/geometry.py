"""Boxes and flat ranges of a tensor: intersections, cover, and what to copy where. Pure, in whole elements.

    stored slab   ──▶ tiles ──┐
                              ├── intersect ──▶ Copy(source, target, dims)      dims: (count, step, step)
    wanted region ──▶ tiles ──┘            └── one run, if both lie side by side in the tensor

A flat range of an n-D tensor is at most 2n - 1 boxes, so everything becomes boxes with strides: nothing here
walks elements, and nothing here knows bytes or files. Invariants:

* copies() of a region and slabs that cover it write each wanted element exactly once;
* check_cover() accepts exactly the slabs whose elements are those of the tensor, each once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .errors import CorruptError, IncompleteError, UsageError
from .model import Box, Flat, Region, Slab, TensorState


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a dense row-major tensor."""
    return tuple(accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def full_box(shape: Sequence[int]) -> Box:
    return tuple((0, length) for length in shape)


def share(shape: Sequence[int], dim: int, rank: int, world: int) -> Box:
    """What a rank has of a tensor that is cut along `dim` in parts of ceil(n / world), as DTensor's Shard(dim) cuts it.

    All of it where the tensor has no such dim.
    """
    box = list(full_box(shape))
    if dim < len(box):
        each = -(-shape[dim] // world)
        box[dim] = (min(rank * each, shape[dim]), min((rank + 1) * each, shape[dim]))
    return tuple(box)


def intersect(one: Box, other: Box) -> Box | None:
    """What both hold; None if that is no element."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def boxes_of_flat(flat: Flat, shape: Sequence[int]) -> list[Box]:
    """The flat range as disjoint boxes, in row-major order: rows cut at the start, whole rows, the rest."""
    start, stop = flat
    if start >= stop:
        return []
    if not shape:
        return [()]
    if len(shape) == 1:
        return [((start, stop),)]
    rest = tuple(shape[1:])
    row = math.prod(rest)
    first, skipped = divmod(start, row)
    last, taken = divmod(stop, row)

    def in_row(index: int, low: int, high: int) -> list[Box]:
        return [((index, index + 1), *box) for box in boxes_of_flat((low, high), rest)]

    if first == last:
        return in_row(first, skipped, taken)
    found = in_row(first, skipped, row) if skipped else []
    first += bool(skipped)
    if first < last:
        found.append(((first, last), *full_box(rest)))
    return found + (in_row(last, 0, taken) if taken else [])


def pieces_of(box: Box, elements_max: int) -> Iterator[Box]:
    """The box cut, in row-major order, into boxes of at most `elements_max` where its last dimension allows it."""
    if any(start >= stop for start, stop in box):
        return
    if not box or math.prod(stop - start for start, stop in box) <= elements_max:
        yield box
        return
    (first, last), rest = box[0], box[1:]
    row = math.prod(stop - start for start, stop in rest)
    if row > elements_max:
        for index in range(first, last):
            for part in pieces_of(rest, elements_max):
                yield ((index, index + 1), *part)
        return
    rows = elements_max // row
    for low in range(first, last, rows):
        yield ((low, min(low + rows, last)), *rest)


def is_flat(region: Region) -> bool:
    """Whether a region is a flat range and not a box."""
    return len(region) == 2 and isinstance(region[0], int)


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of the tensor in some memory: its first element at `offset`, steps of `strides` elements."""

    box: Box
    offset: int
    strides: tuple[int, ...]


def flat_tiles(flat: Flat, shape: Sequence[int]) -> list[Tile]:
    """Tiles of memory that holds the flat range densely."""
    strides = row_major(shape)
    return [
        Tile(box, sum(low * step for (low, _), step in zip(box, strides, strict=True)) - flat[0], strides)
        for box in boxes_of_flat(flat, shape)
    ]


def slab_tiles(slab: Slab, shape: Sequence[int]) -> list[Tile]:
    """Where the elements of a slab lie in its span."""
    if slab.flat is not None:
        return flat_tiles(slab.flat, shape)
    assert slab.box is not None
    return [Tile(slab.box, 0, slab.strides or row_major(slab.shape))] if volume(slab.box) else []


def region_size(region: Region | None, shape: Sequence[int], label: str = "") -> int:
    """Elements of a wanted region; UsageError if some are outside of the tensor. None: all of it."""
    if region is None:
        return math.prod(shape)
    if is_flat(region):
        start, stop = region
        assert isinstance(start, int)
        assert isinstance(stop, int)
        if not 0 <= start <= stop <= math.prod(shape):
            raise UsageError("a flat range outside of the tensor", tensor=label, range=region, shape=tuple(shape))
        return stop - start
    box: Box = region  # type: ignore[assignment]  # is_flat() told them apart
    if len(box) != len(shape) or any(not 0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True)):
        raise UsageError("a box outside of the tensor", tensor=label, box=box, shape=tuple(shape))
    return volume(box)


def region_tiles(region: Region | None, shape: Sequence[int], label: str = "") -> tuple[list[Tile], int]:
    """Where the elements of a wanted region go in a dense buffer, and how many they are. None: all of it."""
    size = region_size(region, shape, label)
    if region is not None and is_flat(region):
        return flat_tiles(region, shape), size  # type: ignore[arg-type]  # is_flat() told them apart
    box: Box = full_box(shape) if region is None else region  # type: ignore[assignment]
    lengths = tuple(stop - start for start, stop in box)
    return ([Tile(box, 0, row_major(lengths))] if size else []), size


def flat_of(region: Region | None, shape: Sequence[int]) -> Flat | None:
    """The flat range that a region is; None if its elements do not lie side by side in the tensor."""
    if region is None:
        return 0, math.prod(shape)
    if is_flat(region):
        return region  # type: ignore[return-value]  # is_flat() told them apart
    box: Box = region  # type: ignore[assignment]
    start, size, whole = 0, 1, True
    for (low, high), length, step in reversed(list(zip(box, shape, row_major(shape), strict=True))):
        if not whole and high - low != 1:
            return None
        start, size, whole = start + low * step, size * (high - low), whole and high - low == length
    return start, start + size


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements to copy: from `source`, to `target`, counted off by dims, the largest source step first."""

    source: int
    target: int
    dims: tuple[tuple[int, int, int], ...]
    """(count, source step, target step); dims that can be walked as one are one."""

    @property
    def extent(self) -> int:
        """Source elements from the first to behind the last."""
        return sum((count - 1) * step for count, step, _ in self.dims) + 1

    @property
    def run(self) -> int:
        """Elements that lie side by side on both sides; 1 if none do."""
        return self.dims[-1][0] if self.dims and self.dims[-1][1:] == (1, 1) else 1

    @property
    def elements(self) -> int:
        return math.prod(count for count, _, _ in self.dims)


def _copy(source: Tile, target: Tile, box: Box) -> Copy:
    def at(tile: Tile) -> int:
        lows = zip(box, tile.box, tile.strides, strict=True)
        return tile.offset + sum((low - first) * step for (low, _), (first, _), step in lows)

    counts = zip(box, source.strides, target.strides, strict=True)
    walked = [(stop - start, ours, theirs) for (start, stop), ours, theirs in counts if stop - start > 1]
    walked.sort(key=lambda dim: -dim[1])
    merged: list[tuple[int, int, int]] = []
    for count, ours, theirs in walked:
        if merged and merged[-1][1:] == (count * ours, count * theirs):
            count *= merged.pop()[0]
        merged.append((count, ours, theirs))
    return Copy(at(source), at(target), tuple(merged))


def copies(sources: Sequence[Tile], targets: Sequence[Tile]) -> Iterator[Copy]:
    """What to copy so that `targets` have all that `sources` hold of them."""
    for source in sources:
        for target in targets:
            box = intersect(source.box, target.box)
            if box is not None:
                yield _copy(source, target, box)


def taken(slab: Slab, region: Region | None, shape: Sequence[int]) -> list[Copy]:
    """What to copy from a slab into a dense buffer of the region."""
    ours, theirs = _slab_flat(slab, shape), flat_of(region, shape)
    if ours is not None and theirs is not None:
        return _run(ours, theirs)
    return list(copies(slab_tiles(slab, shape), region_tiles(region, shape)[0]))


def given(region: Region | None, slab: Slab, shape: Sequence[int]) -> list[Copy]:
    """What to copy from a dense buffer of the region into a slab."""
    theirs, ours = flat_of(region, shape), _slab_flat(slab, shape)
    if ours is not None and theirs is not None:
        return _run(theirs, ours)
    return list(copies(region_tiles(region, shape)[0], slab_tiles(slab, shape)))


def _slab_flat(slab: Slab, shape: Sequence[int]) -> Flat | None:
    if slab.flat is not None:
        return slab.flat
    return flat_of(slab.box, shape) if slab.strides is None else None


def _run(source: Flat, target: Flat) -> list[Copy]:
    """What two flat ranges share, as the one copy that it is: as boxes it would be up to 2n - 1 of them."""
    low, high = max(source[0], target[0]), min(source[1], target[1])
    if low >= high:
        return []
    dims = ((high - low, 1, 1),) if high - low > 1 else ()
    return [Copy(low - source[0], low - target[0], dims)]


def check_cover(tensor: TensorState) -> None:
    """Raise unless the slabs hold each element once: IncompleteError for a gap, CorruptError for the rest."""
    where = {"name": tensor.name, "state": tensor.state}
    boxes: list[tuple[Box, Slab]] = []
    flats: list[tuple[Flat, Slab]] = []
    for slab in tensor.slabs:
        outside = slab.box is not None and (
            len(slab.box) != len(tensor.shape)
            or any(stop > length for (_, stop), length in zip(slab.box, tensor.shape, strict=True))
        )
        if outside or (slab.flat is not None and slab.flat[1] > tensor.elements):
            raise CorruptError(
                "a slab outside of its tensor", **where, file=slab.span.file, range=slab.box or slab.flat
            )
        if slab.dtype != tensor.dtype:
            raise CorruptError("a slab of another dtype", **where, file=slab.span.file, dtype=slab.dtype)
        if slab.flat is not None and slab.elements:
            flats.append((slab.flat, slab))
        elif slab.box is not None and slab.elements:
            boxes.append((slab.box, slab))
    if boxes and flats:
        boxes += [(box, slab) for flat, slab in flats for box in boxes_of_flat(flat, tensor.shape)]
    held = sum(slab.elements for slab in tensor.slabs)
    if boxes:
        _check_disjoint_boxes(boxes, where)
        if held != tensor.elements:
            missing = _uncovered(full_box(tensor.shape), [box for box, _ in boxes])
            raise IncompleteError("elements are missing", **where, missing=missing or tensor.elements - held)
    else:
        _check_flats(sorted(flats, key=lambda pair: pair[0]), tensor.elements, where)


def _check_flats(flats: list[tuple[Flat, Slab]], elements: int, where: dict[str, str]) -> None:
    for (one, _), (other, slab) in pairwise(flats):
        if other[0] < one[1]:
            raise CorruptError("two slabs hold the same elements", **where, file=slab.span.file, range=other)
    edges = [0, *(edge for flat, _ in flats for edge in flat), elements]
    missing = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    if missing:
        raise IncompleteError("elements are missing", **where, missing=missing[:4])


def _check_disjoint_boxes(boxes: list[tuple[Box, Slab]], where: dict[str, str]) -> None:
    """A sweep along the dim that tells most boxes apart; only boxes that share its range are compared."""
    dims = range(len(boxes[0][0]))
    axis = max(dims, key=lambda dim: len({box[dim] for box, _ in boxes}), default=None)
    if axis is None:  # scalars: each box holds the one element
        if len(boxes) > 1:
            raise CorruptError("two slabs hold the same elements", **where, file=boxes[1][1].span.file)
        return
    active: list[Box] = []
    for box, slab in sorted(boxes, key=lambda pair: pair[0][axis]):
        active = [other for other in active if other[axis][1] > box[axis][0]]
        if any(intersect(box, other) for other in active):
            raise CorruptError("two slabs hold the same elements", **where, file=slab.span.file, range=box)
        active.append(box)


_NAMED_MAX = 64
"""Boxes that are subtracted to name a gap: each may cut a remainder into 2n parts."""


def _uncovered(whole: Box, boxes: list[Box]) -> list[Box]:
    """Up to four boxes that nothing holds; [] if there are too many boxes to name them cheaply."""
    if len(boxes) > _NAMED_MAX:
        return []
    left = [whole]
    for box in boxes:
        left = [part for piece in left for part in _minus(piece, box)]
    return left[:4]


def _minus(box: Box, hole: Box) -> list[Box]:
    shared = intersect(box, hole)
    if shared is None:
        return [box]
    parts: list[Box] = []
    inner = list(box)
    for dim, ((start, stop), (low, high)) in enumerate(zip(box, shared, strict=True)):
        if start < low:
            parts.append((*inner[:dim], (start, low), *inner[dim + 1 :]))
        if high < stop:
            parts.append((*inner[:dim], (high, stop), *inner[dim + 1 :]))
        inner[dim] = (low, high)
    return parts

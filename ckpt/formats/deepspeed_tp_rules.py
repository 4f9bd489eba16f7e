"""How DeepSpeed's tensor-parallel ranks share each parameter: from its universal_checkpoint_info to boxes. Pure.

    category     cut along dim 0 (the default), along dim 1 (rows), not at all (replicated), part by part (fused)
    affine map   the pieces of every rank, by themselves                                       (0.19 and later)

        rank 0 | q0 k0 v0 |  ──▶  Split: shape of the whole, and for each rank its pieces,
        rank 1 | q1 k1 v1 |       a box of the rank's part that is a box of the whole

Megatron-DeepSpeed and DeepSpeed's AutoTP write that information beside the model; without it a split cannot be
told, and is refused. Patterns are the file's own regular expressions: what could take long to match is refused
too. Invariants:

* pieces have the same shape on both sides, lie inside of both, and fill the rank's part (but for vocabulary padding);
* a block that several ranks hold is a piece of the first of them and a copy of the others.

Not here: whether the pieces of all ranks fill the whole (Builder.checkpoint() validates that).
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
from .name_patterns import Patterns
from .torchzip import is_counts

INFO: Final = "universal_checkpoint_info"
AFFINE_VERSION: Final = 1
FUSED_MAX: Final = 4096
"""Equal parts of one parameter."""
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


@dataclass(frozen=True, slots=True)
class Fused:
    """Parameters that consist of parts, each of which is cut by itself: query, key and value in one matrix."""

    shape: tuple[Any, ...]
    """At `dim`: lengths of the parts, or how many equal ones; elsewhere lengths, or -1."""
    dim: int

    def lengths(self, name: str, whole: int) -> list[int]:
        """Of the parts along `dim`, of a parameter of this length there."""
        given = self.shape[self.dim]
        count = given if isinstance(given, int) else 0
        if not isinstance(given, tuple) and not 0 < count <= min(whole, FUSED_MAX):
            raise MappingError("an impossible number of fused parts", name=name, parts=given, length=whole)
        found = list(given) if isinstance(given, tuple) else [whole // count] * count
        if sum(found) != whole:
            raise MappingError("fused parts that do not add up to the parameter", name=name, parts=given, length=whole)
        return found


def _check_dims(name: str, fused: Fused, shape: Shape) -> None:
    given = [*fused.shape[: fused.dim], -1, *fused.shape[fused.dim + 1 :]]
    if len(given) != len(shape) or any(n not in (-1, own) for n, own in zip(given, shape, strict=True)):
        raise MappingError("fused parts in other dimensions than the parameter's: not supported", name=name)


class Rules:
    """The information, checked. Raises CorruptError for what no DeepSpeed writes."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._replicated = Patterns(info.get("tp_replicated_parameter_patterns") or [], "replicated")
        self._averaged = Patterns(info.get("parameter_to_average_patterns") or [], "averaged")
        self._rows = Patterns(info.get("parameter_with_row_parallelism_patterns") or [], "row parallel")
        self._vocabulary = Patterns(info.get("vocabulary_parameter_patterns") or [], "vocabulary")
        self._halves = Patterns(info.get("parameter_with_2_sub_params_cat_dim_0") or [], "two parts")
        entries = [_mapping(entry) for entry in _listed(info.get("parameter_with_sub_params"))]
        fused = [(pattern, entry) for entry in entries for pattern in _listed(entry.get("patterns"))]
        self._fused = Patterns([pattern for pattern, _ in fused], "fused")
        self._parts = {pattern: _fused(entry) for pattern, entry in fused}
        lists = (self._replicated, self._averaged, self._rows, self._vocabulary, self._halves, self._fused)
        self._lists: tuple[Patterns, ...] = lists
        self._widths = _mapping(info.get("sub_param_shard_widths"))
        unsupported = _mapping(info.get("autotp_unsupported_parameter_patterns"))
        self._unsupported = Patterns(list(unsupported), "unsupported")
        affine = _mapping(info.get("affine_map"))
        version = affine.get("version", AFFINE_VERSION)
        if affine and version != AFFINE_VERSION:
            raise MappingError("affine maps of a version that is not understood", version=version, known=AFFINE_VERSION)
        self._maps = _mapping(affine.get("params"))
        self._affine = Patterns(list(self._maps), "affine maps")
        self._vocabulary_size = info.get("original_vocab_size")
        self.kept: dict[str, str] = {}
        """Parameters that were split in a way that the patterns do not tell for other ranks, and why."""

    def split(self, name: str, parts: Sequence[Shape]) -> Split:
        """How `name` is split, of which the ranks hold tensors of these shapes."""
        if len({len(shape) for shape in parts}) != 1:
            raise CorruptError("tensor-parallel ranks with parts of other dimensions", name=name, shapes=list(parts))
        self._use(name)
        pattern = self._affine.match(name)
        if pattern is not None:  # it is the whole truth; the lists are for converters that know no maps
            return _affine(name, parts, self._maps[pattern])
        if self._replicated.match(name):
            found = _replicated(name, parts)
        elif self._averaged.match(name):
            raise MappingError("ranks with other values of one parameter, to be averaged: not supported", name=name)
        else:
            found = _joined(name, parts, *self._cut(name, parts))
        if len(set(found.locals)) > 1:
            self.kept[name] = "ranks have parts of different lengths"
        if self._vocabulary.match(name):
            whole, found = found.shape, _clipped(name, found, self._vocabulary_size)
            if found.shape != whole:
                self.kept[name] = "rows that fill up a vocabulary belong to the ranks"
        return found

    def _use(self, name: str) -> None:
        """Every list that names it has been of use, whichever decides."""
        for one in self._lists:
            one.match(name)
        if self._unsupported.match(name):
            raise MappingError("DeepSpeed itself says that it cannot tell how this was split", name=name)

    def check_used(self) -> None:
        """Raise MappingError if a pattern named nothing: these parameters have other names than those it speaks of."""
        unused = sorted(pattern for one in self._lists for pattern in one.unused)
        if unused:
            raise MappingError("patterns that name no parameter of this checkpoint", patterns=unused[:4])

    def divide(self, name: str, shape: Shape, tp: int) -> Split:
        """How a parameter of this shape is to be split over `tp` ranks: as a map says, or in equal shares."""
        self._use(name)
        pattern = self._affine.match(name)
        if pattern is None:
            return self._by_category(name, shape, tp)
        known = _affine(name, None, self._maps[pattern])
        if known.shape != shape:
            raise MappingError("a map for a parameter of another shape", name=name, shape=shape, map=known.shape)
        if len(known.locals) == tp:
            return known
        if self._by_category(name, shape, len(known.locals)) != known:
            raise MappingError("its map is for so many ranks only", name=name, tp=len(known.locals), asked=tp)
        return self._by_category(name, shape, tp)

    def _by_category(self, name: str, shape: Shape, tp: int) -> Split:
        if self._averaged.match(name):
            raise MappingError("a parameter that ranks have other values of, to be averaged: not supported", name=name)
        if self._replicated.match(name):
            return _replicated(name, [shape] * tp)
        dim, sizes = self._sizes(name, shape)
        if dim >= len(shape) or any(size % tp for size in sizes):
            raise MappingError("a parameter that the ranks do not divide", name=name, tp=tp, dim=dim, lengths=sizes)
        part = (*shape[:dim], sum(sizes) // tp, *shape[dim + 1 :])
        return _joined(name, [part] * tp, dim, [[size // tp] * tp for size in sizes])

    def hints(self, name: str, shape: Shape) -> dict[str, Any]:
        """What DeepSpeed's universal loader wants to be told of a parameter, beside its whole."""
        if self._replicated.match(name):
            return {}
        dim, sizes = self._sizes(name, shape)
        found: dict[str, Any] = {"cat_dim": dim}
        if self._halves.match(name):
            found["param_n_sub_params"] = 2
        elif len(sizes) > 1:
            found = {"sub_param_shape": (*shape[:dim], tuple(sizes), *shape[dim + 1 :]), "partition_dim": dim}
        return {**found, "vocab_tensor": True} if self._vocabulary.match(name) else found

    def _sizes(self, name: str, shape: Shape) -> tuple[int, list[int]]:
        """Along which dim it is cut, and the lengths of its parts there."""
        if self._halves.match(name):
            if not shape or shape[0] % 2:
                raise MappingError("two parts of an odd length", name=name, shape=shape)
            return 0, [shape[0] // 2] * 2
        if pattern := self._fused.match(name):
            fused = self._parts[pattern]
            _check_dims(name, fused, shape)
            return fused.dim, fused.lengths(name, shape[fused.dim])
        dim = 1 if self._rows.match(name) else 0
        return dim, [shape[dim]] if dim < len(shape) else [0]

    def _cut(self, name: str, parts: Sequence[Shape]) -> tuple[int, list[list[int]]]:
        """Along which dim, and how long each rank's piece of each part is there."""
        if self._halves.match(name):
            return 0, [[shape[0] // 2 if shape else 0 for shape in parts]] * 2
        if pattern := self._fused.match(name):
            fused = self._parts[pattern]
            _check_dims(name, fused, parts[0])
            return fused.dim, self._widths_of(name, parts, fused, pattern)
        dim = 1 if self._rows.match(name) else 0
        return dim, [[shape[dim] if dim < len(shape) else 0 for shape in parts]]

    def _widths_of(self, name: str, parts: Sequence[Shape], fused: Fused, pattern: str) -> list[list[int]]:
        """As recorded (since version 0.4), or equal shares."""
        recorded = self._widths.get(pattern)
        if recorded is not None:
            widths = [_counts(one) for one in _listed(recorded)]
            if any(len(one) != len(parts) for one in widths):
                raise CorruptError("widths of fused parts that do not fit the ranks", name=name)
            if any(len(set(one)) > 1 for one in widths):
                self.kept[name] = "ranks have fused parts of different lengths"
            return widths
        sizes = fused.lengths(name, sum(shape[fused.dim] for shape in parts))
        if any(size % len(parts) for size in sizes):
            raise MappingError("fused parts that the ranks do not divide, and no widths", name=name, parts=sizes)
        return [[size // len(parts)] * len(parts) for size in sizes]


def _listed(value: object) -> Sequence[Any]:
    if value is not None and not isinstance(value, (list, tuple)):
        raise CorruptError("a list expected", key=INFO, found=type(value).__name__)
    return value or ()


def _counts(value: object) -> list[int]:
    found = tuple(_listed(value))
    if not is_counts(found):
        raise CorruptError("a list of counts expected", key=INFO, found=found)
    return list(found)


def _mapping(value: object) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise CorruptError("a dictionary expected", key=INFO, found=type(value).__name__)
    return value or {}


def _fused(value: Mapping[str, Any]) -> Fused:
    shape, dim = value.get("shape"), value.get("partition_dim")
    inner = tuple(tuple(n) if isinstance(n, (list, tuple)) else n for n in _listed(shape))
    numbers = all(is_counts(n) if isinstance(n, tuple) else type(n) is int for n in inner)
    if not numbers or type(dim) is not int or not 0 <= dim < len(inner):
        raise CorruptError("fused parameters of an impossible shape", shape=shape, dim=dim)
    return Fused(inner, dim)


def _replicated(name: str, parts: Sequence[Shape]) -> Split:
    if len(set(parts)) != 1:
        raise CorruptError("copies of one parameter with different shapes", name=name, shapes=list(parts))
    all_of_it = Piece(full_box(parts[0]), full_box(parts[0]))
    others = ((),) * (len(parts) - 1)
    return Split(parts[0], tuple(parts), ((all_of_it,), *others), ((), *(((all_of_it,),) * (len(parts) - 1))))


def _joined(name: str, parts: Sequence[Shape], dim: int, widths: Sequence[Sequence[int]]) -> Split:
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


def _clipped(name: str, split: Split, rows: object) -> Split:
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


def info_for(info: Mapping[str, Any], tp: int, source_tp: int) -> dict[str, Any]:
    """The same for a job of `tp` ranks: without what holds for the source's ranks only, with DeepSpeed's tuples."""
    found = {key: value for key, value in info.items() if key != "affine_map" or tp == source_tp}
    if "parameter_with_sub_params" in info:
        entries = [dict(_mapping(entry)) for entry in _listed(info["parameter_with_sub_params"])]
        found["parameter_with_sub_params"] = [{**entry, "shape": _fused(entry).shape} for entry in entries]
    if "sub_param_shard_widths" in info:
        widths: dict[str, list[list[int]]] = {}
        for pattern, given in _mapping(info["sub_param_shard_widths"]).items():
            if tp == source_tp:
                widths[pattern] = given
                continue
            sizes = [sum(_counts(one)) for one in _listed(given)]
            if sizes and not any(size % tp for size in sizes):
                widths[pattern] = [[size // tp] * tp for size in sizes]
        found["sub_param_shard_widths"] = widths
    return found


# ---- affine maps ---------------------------------------------------------------------------------------------


def _affine(name: str, parts: Sequence[Shape] | None, value: object) -> Split:
    """The pieces of every rank, given as views of the whole and of the part. `parts`: what the ranks have, if known."""
    entry = _mapping(value)
    shape = tuple(_listed(entry.get("logical_shape")))
    ranks = {str(rank): _mapping(given) for rank, given in _mapping(entry.get("ranks")).items()}
    count = len(ranks) if parts is None else len(parts)
    if not is_counts(shape) or ranks.keys() != {str(rank) for rank in range(count)} or not ranks:
        raise CorruptError("an affine map that does not fit the ranks", name=name, shape=shape, ranks=sorted(ranks)[:8])
    locals_: list[Shape] = []
    pieces: list[tuple[Piece, ...]] = []
    copies: list[tuple[Piece, ...]] = []
    for rank in range(count):
        given = ranks[str(rank)]
        local = tuple(_listed(given.get("shard_shape")))
        if not is_counts(local) or (parts is not None and local != parts[rank]):
            raise MappingError("a part of another shape than its map says", name=name, rank=rank, shape=local)
        own: dict[bool, list[Piece]] = {True: [], False: []}
        for piece in _listed(given.get("pieces")):
            found = _mapping(piece)
            if found.get("scale", 1.0) != 1.0:
                raise MappingError("a scaled piece: its optimizer state cannot be moved", name=name, rank=rank)
            holders = _listed(found.get("locations")) or [rank]
            if not is_counts(tuple(holders)):
                raise CorruptError("a piece of impossible ranks", name=name, ranks=holders)
            local_box = _boxed(name, found.get("shape"), found.get("dest"), local)
            whole_box = _boxed(name, found.get("shape"), found.get("source"), shape)
            own[min(holders) == rank].append(Piece(local_box, whole_box))
        if sum(volume(piece.local) for found in own.values() for piece in found) != math.prod(local):
            raise CorruptError("pieces that do not fill a rank's part", name=name, rank=rank)
        locals_.append(local)
        pieces.append(tuple(own[True]))
        copies.append(tuple(own[False]))
    return Split(shape, tuple(locals_), tuple(pieces), tuple(copies))


def _boxed(name: str, lengths: object, view: object, shape: Shape) -> Box:
    """The box of a dense tensor that a view [offset, [strides]] of these lengths is."""
    sizes, pair = tuple(_listed(lengths)), _listed(view)
    offset, steps = (pair[0], tuple(_listed(pair[1]))) if len(pair) == 2 else (-1, ())
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

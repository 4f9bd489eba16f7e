"""Which parameter DeepSpeed's tensor-parallel ranks share in which way: from its universal_checkpoint_info. Pure.

    category     cut along dim 0 (the default), along dim 1 (rows), not at all (replicated), part by part (fused)
    affine map   the pieces of every rank, by themselves                                       (0.19 and later)

Megatron-DeepSpeed and DeepSpeed's AutoTP write that information beside the model; without it a split cannot be
told, and is refused. Invariants:

* what does not fit together is an error that names the parameter, never a guess;
* what is written for other ranks says nothing that holds for the source's only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..universal.errors import CorruptError, MappingError
from .deepspeed_tp_split import Shape, Split, affine, clipped, counts, joined, listed, mapping, replicated
from .name_patterns import Patterns
from .torchzip import is_counts

UNSUPPORTED: Final = "autotp_unsupported_parameter_patterns"
AFFINE_VERSION: Final = 1
FUSED_MAX: Final = 4096
"""Equal parts of one parameter."""


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
        entries = [mapping(entry) for entry in listed(info.get("parameter_with_sub_params"))]
        fused = [(pattern, entry) for entry in entries for pattern in listed(entry.get("patterns"))]
        self._fused = Patterns([pattern for pattern, _ in fused], "fused")
        self._parts = {pattern: _fused(entry) for pattern, entry in fused}
        lists = (self._replicated, self._averaged, self._rows, self._vocabulary, self._halves, self._fused)
        self._lists: tuple[Patterns, ...] = lists
        self._widths = mapping(info.get("sub_param_shard_widths"))
        unsupported = mapping(info.get(UNSUPPORTED))
        self._unsupported = Patterns(list(unsupported), "unsupported")
        maps = mapping(info.get("affine_map"))
        version = maps.get("version", AFFINE_VERSION)
        if maps and version != AFFINE_VERSION:
            raise MappingError("affine maps of a version that is not understood", version=version, known=AFFINE_VERSION)
        self._maps = mapping(maps.get("params"))
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
            return affine(name, parts, self._maps[pattern])
        if self._replicated.match(name):
            found = replicated(name, parts)
        elif self._averaged.match(name):
            raise MappingError("ranks with other values of one parameter, to be averaged: not supported", name=name)
        else:
            found = joined(name, parts, *self._cut(name, parts))
        if len(set(found.locals)) > 1:
            self.kept[name] = "ranks have parts of different lengths"
        if self._vocabulary.match(name):
            whole, found = found.shape, clipped(name, found, self._vocabulary_size)
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
        known = affine(name, None, self._maps[pattern])
        if known.shape != shape:
            raise MappingError("a map for a parameter of another shape", name=name, shape=shape, map=known.shape)
        if len(known.locals) == tp:
            return known
        if self._by_category(name, shape, len(known.locals)) != known:
            raise MappingError("its map is for so many ranks only", name=name, tp=len(known.locals), asked=tp)
        return self._by_category(name, shape, tp)

    def needs_map(self, name: str) -> bool:
        """Whether its map says something else than the patterns would."""
        pattern = self._affine.match(name)
        if pattern is None:
            return False
        known = affine(name, None, self._maps[pattern])
        try:
            return self._by_category(name, known.shape, len(known.locals)) != known
        except MappingError:
            return True

    def _by_category(self, name: str, shape: Shape, tp: int) -> Split:
        if self._averaged.match(name):
            raise MappingError("a parameter that ranks have other values of, to be averaged: not supported", name=name)
        if self._replicated.match(name):
            return replicated(name, [shape] * tp)
        dim, sizes = self._sizes(name, shape)
        if dim >= len(shape) or any(size % tp for size in sizes):
            raise MappingError("a parameter that the ranks do not divide", name=name, tp=tp, dim=dim, lengths=sizes)
        part = (*shape[:dim], sum(sizes) // tp, *shape[dim + 1 :])
        return joined(name, [part] * tp, dim, [[size // tp] * tp for size in sizes])

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
            widths = [counts(one) for one in listed(recorded)]
            if any(len(one) != len(parts) for one in widths):
                raise CorruptError("widths of fused parts that do not fit the ranks", name=name)
            if any(len(set(one)) > 1 for one in widths):
                self.kept[name] = "ranks have fused parts of different lengths"
            return widths
        sizes = fused.lengths(name, sum(shape[fused.dim] for shape in parts))
        if any(size % len(parts) for size in sizes):
            raise MappingError("fused parts that the ranks do not divide, and no widths", name=name, parts=sizes)
        return [[size // len(parts)] * len(parts) for size in sizes]


def _fused(value: Mapping[str, Any]) -> Fused:
    shape, dim = value.get("shape"), value.get("partition_dim")
    inner = tuple(tuple(n) if isinstance(n, (list, tuple)) else n for n in listed(shape))
    numbers = all(is_counts(n) if isinstance(n, tuple) else type(n) is int for n in inner)
    if not numbers or type(dim) is not int or not 0 <= dim < len(inner):
        raise CorruptError("fused parameters of an impossible shape", shape=shape, dim=dim)
    return Fused(inner, dim)


def info_for(
    info: Mapping[str, Any], tp: int, source_tp: int, names: Iterable[str] = (), kept: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The same for a job of `tp` ranks: without what holds for the source's ranks only, with DeepSpeed's tuples.

    Of the parameters `names`, those that only a map describes which is left out, and those that were `kept`, are listed
    as DeepSpeed lists what it cannot describe: nobody is to split them by a pattern.
    """
    found = {key: value for key, value in info.items() if key != "affine_map" or tp == source_tp}
    if tp != source_tp:
        rules = Rules(info)
        lost = {name: "its map is for other ranks" for name in names if rules.needs_map(name)} | dict(mapping(kept))
        if lost:
            refused = {rf"^{re.escape(name)}$": why for name, why in lost.items()}
            found[UNSUPPORTED] = {**mapping(info.get(UNSUPPORTED)), **refused}
    if "parameter_with_sub_params" in info:
        entries = [dict(mapping(entry)) for entry in listed(info["parameter_with_sub_params"])]
        found["parameter_with_sub_params"] = [{**entry, "shape": _fused(entry).shape} for entry in entries]
    if "sub_param_shard_widths" in info:
        widths: dict[str, list[list[int]]] = {}
        for pattern, given in mapping(info["sub_param_shard_widths"]).items():
            if tp == source_tp:
                widths[pattern] = given
                continue
            sizes = [sum(counts(one)) for one in listed(given)]
            if sizes and not any(size % tp for size in sizes):
                widths[pattern] = [[size // tp] * tp for size in sizes]
        found["sub_param_shard_widths"] = widths
    return found

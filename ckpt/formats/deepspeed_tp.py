"""Tensor-parallel parts of parameters in DeepSpeed's files, as pieces of the wholes; and wholes as the parts of a rank.

    read    Sharded(builder, rank, splits).add(part) ──▶ builder.add(whole, piece), ...      nothing is copied
    write   Part(reader, splits, rank)               ──▶ a Reader of what this rank is to have

Which element goes where: deepspeed_tp_rules.py. Invariants: what a rank is given, in pieces of any size, is what it
has of the wholes; a slab never leaves the tensor that was saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..dtypes import ITEM_BYTES
from ..universal.errors import CorruptError, IncompleteError, MappingError
from ..universal.geometry import full_box, intersect, region_tiles, row_major, slab_tiles
from ..universal.model import Box, Checkpoint, Region, Role, Slab, Span, TensorState
from ..universal.read import Reader
from ..universal.view import View
from .building import Builder
from .deepspeed_experts import LOCAL
from .deepspeed_modules import buffers_of, frozen_shapes, shapes_of, shared_of
from .deepspeed_tp_rules import Rules
from .deepspeed_tp_split import INFO, Piece, Shape, Split, within
from .objects import unplain
from .torchzip import Stored


@dataclass(slots=True)
class Sharded(Builder):
    """What one tensor-parallel rank adds to a builder: its parts, as pieces of the wholes."""

    rank: int = 0
    splits: Mapping[str, Split] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    """Parameters that an earlier pipeline stage has given already: tied ones. Theirs are copies, to be compared."""

    @classmethod
    def of(
        cls, builder: Builder, rank: int, splits: Mapping[str, Split], given: frozenset[str] = frozenset()
    ) -> Sharded:
        """Adds to `builder` itself."""
        return cls(
            builder.facts,
            builder.slabs,
            builder.aliases,
            builder.steps,
            builder.hyper,
            builder.members,
            builder.repeated,
            rank,
            splits,
            given,
        )

    def add(self, name: str, state: str, dtype: str, shape: Shape, slab: Slab | None, *, role: Role = "param") -> None:
        """As Builder.add; what no split names (a buffer) should be the same on every rank."""
        split = self.splits.get(name)
        if split is None:
            again = self.rank > 0 or name in self.given
            Builder.add(self, name, state, dtype, shape, None if again else slab, role=role)
            if again and slab is not None and slab.elements:
                self.repeated.setdefault((name, state), []).extend(boxed(slab, shape))
            return
        if shape != split.locals[self.rank]:
            raise CorruptError("a part of another shape than the model lists", name=name, state=state, shape=shape)
        Builder.add(self, name, state, dtype, split.shape, None, role=role)
        if slab is None:
            return
        copies = list(split.copies[self.rank])
        for piece in split.pieces[self.rank]:
            if name in self.given:
                copies.append(piece)
                continue
            for moved in _moved(slab, shape, piece):
                Builder.add(self, name, state, dtype, split.shape, moved, role=role)
        for piece in copies:
            self.repeated.setdefault((name, state), []).extend(_moved(slab, shape, piece))


def boxed(slab: Slab, shape: Shape) -> Iterable[Slab]:
    """A slab of a whole, as boxes of it."""
    return _moved(slab, shape, Piece(full_box(shape), full_box(shape)))


def _moved(slab: Slab, shape: Shape, piece: Piece) -> Iterable[Slab]:
    """What a slab of a rank's part holds of a piece, as slabs of the whole."""
    item = ITEM_BYTES[slab.dtype]
    for tile in slab_tiles(slab, shape):
        if intersect(tile.box, piece.local) is None:
            continue
        shared = within(piece, tile.box, piece.local)
        lengths = tuple(high - low for low, high in shared.local)
        at = tile.offset + _offset(shared.local, tile.box, tile.strides)
        reach = sum((length - 1) * step for length, step in zip(lengths, tile.strides, strict=True)) + 1
        own = zip(lengths, tile.strides, row_major(lengths), strict=True)
        dense = all(length == 1 or step == dense_step for length, step, dense_step in own)
        span = Span(slab.span.file, slab.span.offset + at * item, reach * item)
        yield Slab(span, slab.dtype, box=shared.whole, strides=None if dense else tile.strides)


def _offset(box: Box, outer: Box, strides: tuple[int, ...]) -> int:
    """Elements from the start of a box to that of one inside of it."""
    return sum((low - start) * step for (low, _), (start, _), step in zip(box, outer, strides, strict=True))


@dataclass(frozen=True, slots=True)
class Splits:
    """Of all parameters."""

    by_name: Mapping[str, Split]
    kept: Mapping[str, str]
    """Parameters whose split is not to be had for other ranks, and why."""


def splits_of(main: Mapping[str, Any], models: Mapping[int, Mapping[str, Any]], tp: int) -> Splits:
    """Of every parameter, over `tp` ranks. `models`: model-parallel rank -> its model_states."""
    info = main.get(INFO)
    if not isinstance(info, Mapping) or not info:
        raise MappingError(
            f"tensor-parallel, but how parameters are split is not in the files: no {INFO} "
            "(DeepSpeed's AutoTP and Megatron-DeepSpeed write it)",
            tp=tp,
        )
    parts: dict[str, dict[int, Shape]] = {}
    for mp, model in models.items():
        for name, shape in _shapes(model):
            parts.setdefault(name, {})[mp % tp] = shape
    if info.get("expert_parameter_patterns") or any(map(LOCAL.fullmatch, parts)):
        raise MappingError("experts on tensor-parallel ranks are not understood", tp=tp)
    rules = Rules(info)
    missing = next((name for name, found in parts.items() if len(found) != tp), None)
    if missing is not None:
        raise IncompleteError("a parameter that not all tensor-parallel ranks list", name=missing, tp=tp)
    splits = {name: rules.split(name, [found[rank] for rank in range(tp)]) for name, found in parts.items()}
    rules.check_used()
    return Splits(splits, rules.kept)


def _shapes(model: Mapping[str, Any]) -> Iterable[tuple[str, Shape]]:
    """Of all parameters; ZeRO-1 lists frozen ones nowhere, but has them in the module."""
    for group in shapes_of(model, ""):
        yield from group.items()
    yield from frozen_shapes(model, "").items()
    buffers, shared = buffers_of(model, ""), shared_of(model, "")
    module = model.get("module")
    for name, tensor in module.items() if isinstance(module, Mapping) else ():
        if isinstance(tensor, Stored) and tensor.elements and name not in buffers and name not in shared:
            yield str(name), tensor.shape


# ---- writing -----------------------------------------------------------------------------------------------------


def divided(checkpoint: Checkpoint, tp: int) -> dict[str, Split]:
    """Every parameter of a checkpoint, to be split over `tp` ranks as the job that saved it says."""
    rules = Rules(info_of(checkpoint))
    kept = (checkpoint.metadata.get("source") or {}).get("kept") or {}
    found: dict[str, Split] = {}
    for tensor in checkpoint.states.values():
        if tensor.role in ("param", "frozen") and tensor.name not in found:
            if tensor.name in kept:
                raise MappingError(
                    f"cannot be split again: {kept[tensor.name]}; tp=1 and deepspeed-universal can be written",
                    name=tensor.name,
                )
            found[tensor.name] = rules.divide(tensor.name, tensor.shape, tp)
    rules.check_used()
    return found


def info_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """How parameters are split. Raises MappingError if the source does not say."""
    info = (checkpoint.metadata.get("client") or {}).get(INFO)
    if not isinstance(info, Mapping) or not info:
        raise MappingError(f"how parameters are to be split over tensor-parallel ranks is not in the source: no {INFO}")
    found: dict[str, Any] = unplain(info)
    return found


class Part(View):
    """What one tensor-parallel rank is to have of a checkpoint, as if that were all."""

    def __init__(self, reader: Reader, splits: Mapping[str, Split], rank: int) -> None:
        self._splits = splits
        self._rank = rank
        states = {key: self._part(tensor) for key, tensor in reader.checkpoint.states.items()}
        super().__init__(replace(reader.checkpoint, states=states, copies={}), [reader])

    def _part(self, tensor: TensorState) -> TensorState:
        split = self._splits.get(tensor.name)
        if split is None:
            return tensor
        if tensor.shape != split.shape:
            raise MappingError(
                "a state of another shape than its parameter cannot be split", name=tensor.name, state=tensor.state
            )
        return replace(tensor, shape=split.locals[self._rank], slabs=())

    def close(self) -> None:
        """The reader is shared by all ranks' parts, and not closed."""

    def fill(self, tensor: TensorState, region: Region, out: memoryview) -> None:
        import numpy

        reader, split = self.sources[0], self._splits.get(tensor.name)
        if split is None:
            reader.read(tensor.name, tensor.state, region, out)
            return
        item = ITEM_BYTES[tensor.dtype]
        flat = numpy.frombuffer(out, numpy.dtype((numpy.void, item)))
        for tile in region_tiles(region, tensor.shape)[0]:
            for piece in (*split.pieces[self._rank], *split.copies[self._rank]):
                if intersect(tile.box, piece.local) is None:
                    continue
                shared = within(piece, tile.box, piece.local)
                lengths = tuple(high - low for low, high in shared.local)
                at = _offset(shared.local, tile.box, tile.strides) + tile.offset
                steps = tuple(step * item for step in tile.strides)
                there = numpy.lib.stride_tricks.as_strided(flat[at:], lengths, steps)
                data = reader.read(tensor.name, tensor.state, shared.whole)
                there[...] = numpy.frombuffer(data, flat.dtype).reshape(lengths)

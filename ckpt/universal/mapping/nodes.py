"""Tensors computed by regions: a tree of shape changes over stored tensors, asked for boxes from the root.

    Merge(0) ── Transpose ── Factor(0, (8, 2, 64)) ── Leaf("q.weight", "exp_avg")
      read(box) ─────────▶ boxes, boxes, ... ──────────────▶ blocks, read once and kept for a while

Elements are moved as unsigned integers of their size, so no value is ever interpreted; only Cast and Scale
compute. Invariants:

* read(box) returns exactly the elements of the box, in an array of its lengths;
* what is asked of the leaves is within a small factor of the box, whatever the tree.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ...dtypes import ITEM_BYTES
from ..convert import convert
from ..errors import LossyError, MappingError
from ..geometry import copies, flat_tiles, region_tiles, row_major
from ..model import Box, TensorState
from ..read import BLOCK_BYTES, Reader
from ..strided import copy as strided_copy

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
WASTE_MAX: Final = 4
"""Read a whole row of a factored axis if at least this part of it is wanted, instead of a call for each piece."""


class Blocks:
    """Blocks of source tensors that were read lately. Permuted reads come back to them again and again."""

    def __init__(self, reader: Reader, budget: int) -> None:
        self._reader = reader
        self._budget = budget
        self._held: OrderedDict[tuple[str, str, int], memoryview] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, tensor: TensorState, index: int, step: int) -> memoryview:
        """Elements [index * step, ..) of the tensor, `step` of them or what is left."""
        key = (tensor.name, tensor.state, index)
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found
        low = index * step
        data = memoryview(self._reader.read(*tensor.key, (low, min(low + step, tensor.elements))))
        with self._lock:
            if key not in self._held:
                self._held[key] = data
                self._bytes += data.nbytes
                while self._bytes > self._budget and len(self._held) > 1:
                    self._bytes -= self._held.popitem(last=False)[1].nbytes
        return data


class Node(ABC):
    """A tensor that can be asked for boxes."""

    shape: Shape

    @abstractmethod
    def read(self, box: Box) -> Array:
        """The elements of a box."""


class Leaf(Node):
    """A tensor of the source."""

    def __init__(self, reader: Reader, tensor: TensorState, blocks: Blocks) -> None:
        self.shape = tensor.shape
        self.reader: Final = reader
        self.tensor: Final = tensor
        self._blocks = blocks

    def read(self, box: Box) -> Array:
        item = ITEM_BYTES[self.tensor.dtype]
        targets, size = region_tiles(box, self.shape)
        lengths = tuple(high - low for low, high in box)
        out = np.empty(size, f"u{item}")
        if not size:
            return out.reshape(lengths)
        strides = row_major(self.shape)
        low = sum(start * step for (start, _), step in zip(box, strides, strict=True))
        high = sum((stop - 1) * step for (_, stop), step in zip(box, strides, strict=True)) + 1
        if high - low == size and size * item >= BLOCK_BYTES:
            self.reader.read(*self.tensor.key, (low, high), out.data.cast("B"))
            return out.reshape(lengths)
        step = BLOCK_BYTES // item
        for index in range(low // step, -(-high // step)):
            held = (index * step, min((index + 1) * step, self.tensor.elements))
            found = list(copies(flat_tiles(held, self.shape), targets))
            data = self._blocks.get(self.tensor, index, step) if found else memoryview(b"")
            for part in found:
                strided_copy(data, part.source, out.data.cast("B"), part.target, part.dims, item)
        return out.reshape(lengths)


class Slice(Node):
    """A range of one axis."""

    def __init__(self, node: Node, axis: int, low: int, high: int) -> None:
        self.shape = (*node.shape[:axis], high - low, *node.shape[axis + 1 :])
        self._node, self._axis, self._low = node, axis, low

    def read(self, box: Box) -> Array:
        start, stop = box[self._axis]
        return self._node.read(_with(box, self._axis, (start + self._low, stop + self._low)))


class Concat(Node):
    """Several, side by side along one axis."""

    def __init__(self, nodes: Sequence[Node], axis: int) -> None:
        first = nodes[0].shape
        self.shape = (*first[:axis], sum(node.shape[axis] for node in nodes), *first[axis + 1 :])
        self._nodes, self._axis = nodes, axis

    def read(self, box: Box) -> Array:
        parts = []
        at, (low, high) = 0, box[self._axis]
        for node in self._nodes:
            length = node.shape[self._axis]
            start, stop = max(low, at), min(high, at + length)
            if start < stop:
                parts.append(node.read(_with(box, self._axis, (start - at, stop - at))))
            at += length
        if not parts:
            return self._nodes[0].read(_with(box, self._axis, (0, 0)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self._axis)


class Transpose(Node):
    """Axes in another order."""

    def __init__(self, node: Node, order: Sequence[int]) -> None:
        self.shape = tuple(node.shape[axis] for axis in order)
        self._node, self._order = node, tuple(order)

    def read(self, box: Box) -> Array:
        inner = [box[self._order.index(axis)] for axis in range(len(box))]
        return self._node.read(tuple(inner)).transpose(self._order)


class Factor(Node):
    """One axis of A * B elements as two, of A and of B."""

    def __init__(self, node: Node, axis: int, outer: int, inner: int) -> None:
        self.shape = (*node.shape[:axis], outer, inner, *node.shape[axis + 1 :])
        self._node, self._axis, self._inner = node, axis, inner

    def read(self, box: Box) -> Array:
        axis, inner = self._axis, self._inner
        (a, b), (low, high) = box[axis], box[axis + 1]
        rest = (*box[:axis], (0, 0), *box[axis + 2 :])
        if b - a > 1 and 0 < (high - low) * WASTE_MAX < inner:
            rows = [self._node.read(_with(rest, axis, (i * inner + low, i * inner + high))) for i in range(a, b)]
            return np.stack(rows, axis)
        if b - a == 1:
            found = self._node.read(_with(rest, axis, (a * inner + low, a * inner + high)))
            return np.expand_dims(found, axis)
        found = self._node.read(_with(rest, axis, (a * inner, b * inner)))
        shape = (*found.shape[:axis], b - a, inner, *found.shape[axis + 1 :])
        return found.reshape(shape)[(*[slice(None)] * (axis + 1), slice(low, high))]


class Merge(Node):
    """Two neighbouring axes as one. The inverse of Factor."""

    def __init__(self, node: Node, axis: int) -> None:
        outer, inner = node.shape[axis : axis + 2]
        self.shape = (*node.shape[:axis], outer * inner, *node.shape[axis + 2 :])
        self._node, self._axis, self._inner = node, axis, inner

    def read(self, box: Box) -> Array:
        axis, inner = self._axis, self._inner
        low, high = box[axis]
        parts = [self._rows(box, *piece) for piece in _rows_of(low, high, inner)]
        if not parts:
            return self._rows(box, 0, 0, 0, inner)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)

    def _rows(self, box: Box, first: int, last: int, low: int, high: int) -> Array:
        axis = self._axis
        found = self._node.read((*box[:axis], (first, last), (low, high), *box[axis + 1 :]))
        shape = found.shape
        return found.reshape((*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))


def _rows_of(low: int, high: int, inner: int) -> list[tuple[int, int, int, int]]:
    """[low, high) of a merged axis as (first row, last row, from, to): a rest, whole rows, a rest."""
    if low >= high:
        return []
    (first, skipped), (last, taken) = divmod(low, inner), divmod(high, inner)
    if first == last:
        return [(first, first + 1, skipped, taken)]
    found = [(first, first + 1, skipped, inner)] if skipped else []
    first += bool(skipped)
    if first < last:
        found.append((first, last, 0, inner))
    return found + ([(last, last + 1, 0, taken)] if taken else [])


class Pad(Node):
    """Zeros behind the end of one axis."""

    def __init__(self, node: Node, axis: int, size: int, dtype: str) -> None:
        self.shape = (*node.shape[:axis], size, *node.shape[axis + 1 :])
        self._node, self._axis, self._item = node, axis, ITEM_BYTES[dtype]

    def read(self, box: Box) -> Array:
        length = self._node.shape[self._axis]
        low, high = box[self._axis]
        out = np.zeros([stop - start for start, stop in box], f"u{self._item}")
        if low < length and out.size:
            held = self._node.read(_with(box, self._axis, (low, min(high, length))))
            out[(*[slice(None)] * self._axis, slice(0, held.shape[self._axis]))] = held
        return out


class Unpadded(Slice):
    """The part of an axis before its padding, which is checked to be zeros when it is first read."""

    def __init__(self, node: Node, axis: int, size: int, label: str) -> None:
        super().__init__(node, axis, 0, size)
        self._label = label
        self._checked = False

    def read(self, box: Box) -> Array:
        if not self._checked:
            whole = self._node.shape
            row = max(1, math.prod(whole) // max(whole[self._axis], 1))
            step = max(1, BLOCK_BYTES // 8 // row)
            for low in range(self.shape[self._axis], whole[self._axis], step):
                high = min(low + step, whole[self._axis])
                if self._node.read(_with(tuple((0, n) for n in whole), self._axis, (low, high))).any():
                    raise LossyError("padding that is not zero would be lost", tensor=self._label, rows=(low, high))
            self._checked = True
        return super().read(box)


class Same(Node):
    """Copies of one tensor: the first, after comparing; or their mean."""

    def __init__(self, nodes: Sequence[Node], label: str, dtype: str, check: str, tolerance: float) -> None:
        self.shape = nodes[0].shape
        self._nodes, self._label, self._dtype = nodes, label, dtype
        self._check, self._tolerance = check, tolerance

    def read(self, box: Box) -> Array:
        first = self._nodes[0].read(box)
        if self._check == "first":
            return first
        others = [node.read(box) for node in self._nodes[1:]]
        if self._check == "mean":
            values = [_values(array, self._dtype, "F64") for array in (first, *others)]
            mean = np.sort(np.stack(values), axis=0).sum(axis=0) / len(values)
            return _bits(mean, "F64", self._dtype).reshape(first.shape)
        for index, other in enumerate(others, 1):
            if np.array_equal(first, other):
                continue
            if self._tolerance > 0:
                with np.errstate(invalid="ignore"):
                    apart = np.abs(_values(first, self._dtype, "F64") - _values(other, self._dtype, "F64"))
                if bool((apart <= self._tolerance).all()):
                    continue
            raise MappingError("copies that should be equal differ", tensor=self._label, copy=index, box=box)
        return first


class Cast(Node):
    """Values in another dtype."""

    def __init__(self, node: Node, source: str, target: str) -> None:
        self.shape = node.shape
        self._node, self._source, self._target = node, source, target

    def read(self, box: Box) -> Array:
        found = self._node.read(box)
        with np.errstate(over="ignore", invalid="ignore"):
            return _bits(np.ascontiguousarray(found), self._source, self._target).reshape(found.shape)


class Scale(Node):
    """Values times a factor, rounded once."""

    def __init__(self, node: Node, dtype: str, factor: float) -> None:
        self.shape = node.shape
        self._node, self._dtype, self._factor = node, dtype, factor

    def read(self, box: Box) -> Array:
        found = self._node.read(box)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = _values(found, self._dtype, "F64") * self._factor
            return _bits(scaled, "F64", self._dtype).reshape(found.shape)


def _values(array: Array, source: str, target: str) -> Array:
    return convert(np.ascontiguousarray(array).data.cast("B"), source, target) if array.size else np.empty(0)


def _bits(array: Array, source: str, target: str) -> Array:
    item = ITEM_BYTES[target]
    if not array.size:
        return np.empty(0, f"u{item}")
    data = convert(np.ascontiguousarray(array).data.cast("B"), source, target)
    return np.frombuffer(np.ascontiguousarray(data).data.cast("B"), f"u{item}")


def _with(box: Box, axis: int, value: tuple[int, int]) -> Box:
    return (*box[:axis], value, *box[axis + 1 :])

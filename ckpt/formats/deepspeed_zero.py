"""From the flat partitions of DeepSpeed's ZeRO to slabs of parameters; no bytes are copied.

    ZeRO-1, 2   group:  | a a a a a a a | b b b b b | pad |      one flat run of whole parameters, cut into dp parts
                rank:   |    0     |     1    |    2     |       param_slice_mappings says who has what, and where
    ZeRO-3      rank 0: | a a . | b b . |  rank 1: | a a . | b . . |     every parameter cut into dp parts by itself

The traps: the last rank's fp32 partition is saved without the padding that its moments have; parameters may be
padded one by one (parameter_alignment) and reordered (round_robin_gradients), so offsets inside of a partition
are taken from the mappings, and a parameter's own offset is what the ranks before have of it. Without mappings
(before 0.6) the flat run is recomputed, aligned to 2 x dp; with round_robin_gradients too, because there the
mappings are wrong: DeepSpeed (seen in 0.19.8) computes them as if the parameters had not been reordered, while
param_shapes has them in the order in which they lie. Invariants:

* a slab never leaves the tensor that was saved, whatever a mapping says;
* what a group's ranks hold of a parameter adds up to the parameter, or the checkpoint is refused: by
  Builder.checkpoint(), which validates, and by `sliced` for mappings that claim too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..universal.errors import CorruptError
from .building import Builder
from .inert import Instance
from .torchzip import Stored, is_counts, number

FP32: Final = "fp32"
Rename = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Partition:
    """One rank's part of one group: the master copy and every state of the same length, and the step."""

    file: str
    fp32: Stored
    states: Mapping[str, Stored]
    step: float | None

    def tensors(self) -> list[tuple[str, Stored]]:
        return [(FP32, self.fp32), *self.states.items()]


def partition(root: Path, file: str, fp32: Any, state: Mapping[str, Any], step: Any) -> Partition:
    """Sort the optimizer's state of one flat tensor into tensors like it, and its step."""
    if not isinstance(fp32, Stored):
        raise CorruptError("a partition without its fp32 tensor", file=file)
    found = {}
    for name, value in state.items():
        if name == "step":
            step = value
        elif isinstance(value, Stored) and len(value.shape) == 1 and value.elements >= fp32.elements:
            found[str(name)] = value
    return Partition(file, fp32, found, number(root, step))


def fragment(value: Any, file: str) -> tuple[int, int]:
    """(elements, where in the partition) of a fragment_address: numel and start, by name or in this order."""
    found: tuple[Any, ...] = ()
    if isinstance(value, Instance):
        found = (value.get("numel"), value.get("start")) if isinstance(value.state, dict) else value.args
    if len(found) != 2 or not is_counts(found):
        raise CorruptError("a slice mapping that cannot be understood", file=file)
    return found[0], found[1]


def sliced(
    builder: Builder,
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Sequence[tuple[Partition, Mapping[str, Any]]],
    rename: Rename,
) -> None:
    """A ZeRO-1 or 2 group: partitions in the order of their ranks, each with its param_slice_mappings."""
    reached = dict.fromkeys(shapes, 0)
    for part, mapping in ranks:
        for name, address in mapping.items():
            count, at = fragment(address, part.file)
            if name not in shapes:
                raise CorruptError("a slice of a parameter that the model does not list", file=part.file, name=name)
            start = reached[name]
            reached[name] = start + count
            if reached[name] > math.prod(shapes[name]):
                raise CorruptError("ranks hold more of a parameter than there is", file=part.file, name=name)
            add(builder, part, rename(name), shapes[name], start, count, at)


def original_order(names: Sequence[str], ranks: int) -> list[str]:
    """Undo round_robin_gradients, which puts every n-th parameter first, then the ones after those."""
    places = [place for first in range(ranks) for place in range(first, len(names), ranks)]
    return [name for _, name in sorted(zip(places, names, strict=True))]


def recomputed(
    builder: Builder, shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[Partition], rename: Rename
) -> None:
    """A ZeRO-1 or 2 group without mappings to trust: parameters side by side, cut into equal parts."""
    align = 2 * len(ranks)
    total = sum(math.prod(shape) for shape in shapes.values())
    size = -(-total // align) * align // len(ranks)
    at = 0
    for name, shape in shapes.items():
        elements, start = math.prod(shape), 0
        while start < elements:
            rank, inside = divmod(at + start, size)
            count = min(elements - start, size - inside)
            add(builder, ranks[rank], rename(name), shape, start, count, inside)
            start += count
        at += elements


def add(builder: Builder, part: Partition, name: str, shape: tuple[int, ...], start: int, count: int, at: int) -> None:
    """Elements [start, start + count) of a parameter lie at `at` of the partition, in every state."""
    for state, tensor in part.tensors():
        slab = tensor.flat_slab(start, start + count, at)
        builder.add(name, state, tensor.dtype, shape, slab, role="param" if state == FP32 else "optim")
    if part.step is not None:
        builder.step(name, part.step)


def scattered(
    builder: Builder,
    group: Mapping[str, tuple[int, ...]],
    rank: int,
    world: int,
    parts: list[Partition],
    position: tuple[int, int],
) -> tuple[int, int]:
    """One rank's parts of a ZeRO-3 group; `position` is (sub-group, offset in it), and so is what is returned.

    A parameter never lies in two sub-groups; one is left when it has no room for the next slice.
    """
    index, at = position
    for name, shape in group.items():
        elements = math.prod(shape)
        share = -(-elements // world)
        while index < len(parts) and parts[index].fp32.elements < at + share:
            if at < parts[index].fp32.elements:
                raise CorruptError("a flat group that ends inside of a parameter", file=parts[index].file, name=name)
            index, at = index + 1, 0
        if index == len(parts):
            raise CorruptError(
                "fewer elements than the parameters have", file=parts[-1].file if parts else "", name=name
            )
        start = min(rank * share, elements)
        add(builder, parts[index], name, shape, start, min(share, elements - start), at)
        at += share
    return index, at

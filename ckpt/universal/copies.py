"""Copies of what a checkpoint holds elsewhere: whether they agree. Tensor-parallel ranks each keep a layer norm.

    Checkpoint.copies ──▶ differing(reader) ──▶ the copies with other bytes than the state itself

Replicas that drifted apart are a fault of the run that saved them, which only a comparison shows: whoever reads one of
them would go on without a word. Memory is a block of each side, whatever the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from ..dtypes import ITEM_BYTES
from .errors import LossyError
from .files import Files
from .geometry import full_box, pieces_of
from .model import Box, Checkpoint, Slab, TensorState
from .read import BLOCK_BYTES, Reader
from .view import View


def differing(reader: Reader) -> Iterator[tuple[TensorState, Slab]]:
    """Every copy, of all that `reader` stands upon, that has other bytes than its tensor."""
    if isinstance(reader, View):
        for source in reader.sources:
            yield from differing(source)
    elif reader.checkpoint.copies:
        yield from _differing(reader.checkpoint)


def agree(reader: Reader, *, allow_lossy: bool = False) -> None:
    """Raise LossyError if copies differ, unless it was agreed to take the first rank's."""
    found = None if allow_lossy else next(differing(reader), None)
    if found is not None:
        tensor, slab = found
        raise LossyError(
            "ranks that should hold the same hold different values of a parameter; the first rank's would be taken",
            name=tensor.name,
            state=tensor.state,
            file=slab.span.file,
            range=(slab.span.offset, slab.span.stop),
        )


def _differing(checkpoint: Checkpoint) -> Iterator[tuple[TensorState, Slab]]:
    """Each block of a tensor is read once for all of its copies."""
    files = Files(checkpoint.root, links=True)
    try:
        with Reader(checkpoint, verify=False) as ours:
            for (name, state), slabs in sorted(checkpoint.copies.items()):
                tensor = checkpoint.tensor(name, state)
                if tensor.nbytes <= BLOCK_BYTES and all(slab.strides is None for slab in slabs):
                    yield from ((tensor, slab) for slab in _of_small(ours, files, tensor, slabs))
                    continue
                for box, group in groupby(sorted(slabs, key=_box), key=_box):
                    yield from ((tensor, slab) for slab in _others(ours, tensor, box, list(group)))
    finally:
        files.close()


def _of_small(ours: Reader, files: Files, tensor: TensorState, slabs: Iterable[Slab]) -> Iterator[Slab]:
    """A norm of a hundred layers on a thousand ranks: read once, and each copy as it lies there."""
    import numpy

    item = numpy.dtype((numpy.void, ITEM_BYTES[tensor.dtype]))
    whole = numpy.frombuffer(ours.read(tensor.name, tensor.state), item).reshape(tensor.shape)
    for slab in slabs:
        data = bytearray(slab.nbytes)
        files.read_into(slab.span.file, slab.span.offset, data)
        if whole[tuple(slice(start, stop) for start, stop in _box(slab))].tobytes() != data:
            yield slab


def _box(slab: Slab) -> Box:
    assert slab.box is not None, "copies are boxes"
    return slab.box


def _others(ours: Reader, tensor: TensorState, box: Box, slabs: list[Slab]) -> list[Slab]:
    """Those of several copies of one box that have other bytes than the tensor there."""
    shape = tuple(stop - start for start, stop in box)
    alone = {
        (str(at), tensor.state): TensorState(
            str(at), tensor.state, slab.dtype, shape, (replace(slab, box=full_box(shape)),)
        )
        for at, slab in enumerate(slabs)
    }
    checkpoint = ours.checkpoint
    found: dict[int, Slab] = {}
    with Reader(Checkpoint(checkpoint.root, checkpoint.format, alone), verify=False) as theirs:
        for part in pieces_of(full_box(shape), BLOCK_BYTES // ITEM_BYTES[tensor.dtype]):
            there = tuple((a + low, a + high) for (a, _), (low, high) in zip(box, part, strict=True))
            data = bytes(ours.read(tensor.name, tensor.state, there))  # bytes: views are compared one by one
            for at, slab in enumerate(slabs):
                if at not in found and bytes(theirs.read(str(at), tensor.state, part)) != data:
                    found[at] = slab
    return [found[at] for at in sorted(found)]

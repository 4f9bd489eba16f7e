"""A checkpoint that is computed while it is read: what mapping and merging are, for whoever writes it.

    Reader of files ──▶ View: other names, shapes, values ──▶ any writer, which cannot tell the difference

A view has tensors without slabs; its read() computes the region that was asked for, and no more. Invariants:

* equal regions give equal bytes, whatever was read before, and in whatever pieces;
* memory is a few regions, so whoever reads in blocks stays within a few blocks.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from ..dtypes import ITEM_BYTES
from .geometry import region_size
from .model import Checkpoint, Region, TensorState
from .read import BLOCK_BYTES, Reader, buffer


class View(Reader):
    """A Reader whose tensors are computed from those of other readers, which it closes."""

    def __init__(self, checkpoint: Checkpoint, sources: Iterable[Reader]) -> None:
        super().__init__(checkpoint, verify=False)
        self.sources: tuple[Reader, ...] = tuple(sources)
        self._count = threading.Lock()

    @abstractmethod
    def fill(self, tensor: TensorState, region: Region, out: memoryview) -> None:
        """Put the elements of the region, row-major, into `out`."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files of all sources."""
        return sum(source.bytes_read for source in self.sources)

    def read(self, name: str, state: str, region: Region | None = None, out: Any = None, *, dtype: str = "") -> Any:
        """As Reader.read()."""
        tensor = self.checkpoint.tensor(name, state)
        if dtype and dtype != tensor.dtype:
            return self._converted(tensor, region, out, dtype)
        size = region_size(region, tensor.shape, f"{name}:{state}")
        nbytes = size * ITEM_BYTES[tensor.dtype]
        view = buffer(out, nbytes, tensor)
        with self._count:
            self.bytes_wanted += nbytes
        if not size:
            return view
        self.fill(tensor, (0, tensor.elements) if region is None or region == () else region, view)
        return view

    def read_many(self, wanted: Iterable[tuple[str, str, Region | None, Any]]) -> None:
        """As Reader.read_many(), one after the other."""
        for name, state, region, out in wanted:
            self.read(name, state, region, out)

    def opaque(self, name: str) -> bytes:
        """The bytes of an opaque file: those of the first source that has it."""
        for source in self.sources:
            if name in source.checkpoint.opaque:
                return source.opaque(name)
        return super().opaque(name)

    def close(self) -> None:
        super().close()
        for source in self.sources:
            source.close()


def is_optimizer(tensor: TensorState) -> bool:
    """Whether a state is the optimizer's memory: not a value of the model, not the master copy of one."""
    model = tensor.role == "opaque" or tensor.state in ("weight", "buffer", "fp32", "rng")
    return tensor.role == "optim" or not model


def blocks(
    tensor: TensorState, low: int = 0, high: int | None = None, nbytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, int]]:
    """Flat ranges of at most `nbytes`, whose edges are the same whatever range is asked for."""
    step = max(1, nbytes // ITEM_BYTES[tensor.dtype])
    high = tensor.elements if high is None else high
    for start in range(low // step * step, high, step):
        yield max(start, low), min(start + step, high)

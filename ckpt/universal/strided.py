"""Copying between buffers by a Copy of geometry.py: numpy views, no Python loop over elements.

    buffer[u8] ──▶ view(offset, dims) ──▶ one strided copy

Elements are copied as unsigned integers of their size: no value is ever interpreted, so a NaN keeps its bits. numpy is
imported at the first copy: what lies side by side needs none, and a command that only reads tables starts without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Dims = Sequence[tuple[int, int, int]]
"""(count, source step, target step) in elements, as in Copy.dims."""


def view(buffer: Any, offset: int, counts: Sequence[int], steps: Sequence[int], item: int) -> np.ndarray[Any, Any]:
    """Elements of `item` bytes in a byte buffer; offset and steps in elements. numpy checks the bounds."""
    import numpy as np

    strides = [step * item for step in steps]
    return np.ndarray(tuple(counts), f"u{item}", buffer=buffer, offset=offset * item, strides=strides)


def copy(source: Any, source_at: int, target: Any, target_at: int, dims: Dims, item: int) -> None:
    """Copy the elements that `dims` count off."""
    counts = [dim[0] for dim in dims]
    taken = view(source, source_at, counts, [dim[1] for dim in dims], item)
    view(target, target_at, counts, [dim[2] for dim in dims], item)[...] = taken


def dense(dims: Dims, side: int) -> bool:
    """Whether the elements lie side by side on one side (1 source, 2 target), in some order of the dims."""
    expected = 1
    for dim in sorted(dims, key=lambda dim: dim[side]):
        if dim[side] != expected:
            return False
        expected *= dim[0]
    return True

"""Between torch and arenas: dtypes by safetensors' names, entries of tensors, tensors over arena memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch

from holdfast.ckpt.dtypes import TORCH_NAMES
from holdfast.ckpt.memory.arena import HEADER_BYTES, ArenaEntry, arena_bytes, layout
from holdfast.ckpt.memory.table import aligned

from .state import Entry

KEPT: Final = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""What a state may be of: sums, digests and moments of the others are not tested."""
DTYPES: dict[torch.dtype, str] = {getattr(torch, TORCH_NAMES[kind]): kind for kind in KEPT}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def arena_entry(entry: Entry) -> ArenaEntry:
    """A tensor of the state, or the range of one that is here, as an entry of an arena."""
    tensor = entry.tensor
    shape = tuple(tensor.shape) if entry.whole is None else entry.whole
    start = entry.start if entry.whole is not None else 0
    return ArenaEntry(entry.name, entry.state, DTYPES[tensor.dtype], shape, start, start + tensor.numel())


def shape_here(entry: ArenaEntry) -> tuple[int, ...]:
    """Shape of what an entry holds: of the whole tensor, or of a flat range of it."""
    held = entry.stop - entry.start
    return entry.shape if held == entry.elements else (held,)


def tensor_of(view: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over arena memory (shared, not copied)."""
    if not view.nbytes:
        return torch.empty(shape, dtype=_TORCH[dtype])
    return torch.frombuffer(view, dtype=_TORCH[dtype]).view(shape)


def as_cpu(tensor: Any) -> torch.Tensor:
    """A copy in host memory."""
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach().cpu().clone()


def whole_sizes(
    entries: Iterable[Entry], future: Iterable[Entry], metadata: Any, *, replicated: bool
) -> tuple[int, int]:
    """Bytes of the image and of the arena of `entries`, and of what the optimizer will add to them.

    The image of replicated state ends before the extra tensors. It may hold nothing: small models have fewer parameters
    than holders. It is protected all the same, so it counts a page.
    """
    shapes = [arena_entry(entry) for entry in entries]
    known = {(entry.name, entry.state) for entry in shapes}
    owned = {entry.name for entry in shapes}
    for entry in future:
        if entry.name in owned and (entry.name, entry.state) not in known:
            shapes.append(arena_entry(entry))
    inside = [shape for shape in shapes if not replicated or shape.state != "extra"]
    image = aligned(layout(inside)[1], HEADER_BYTES) - HEADER_BYTES
    return max(image, HEADER_BYTES), arena_bytes(shapes, metadata)

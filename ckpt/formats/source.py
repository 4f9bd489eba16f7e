"""How a writer of a format asks for bytes: in order, in pieces, within one buffer, converted where it says so.

    Reader (of any checkpoint) ──▶ stream(reader, name, state, start, stop) ──▶ 4 MiB, 4 MiB, rest

Invariants:

* a stream yields exactly the bytes of its range;
* memory is one buffer per stream, whatever the size of the tensor; a piece is valid until the next is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from ..dtypes import ITEM_BYTES
from ..universal.errors import IncompleteError, LossyError, UsageError
from ..universal.geometry import pieces_of
from ..universal.model import Box, Checkpoint, TensorState
from ..universal.read import Reader

PIECE_BYTES: Final = 4 << 20
MASTER: Final = "fp32"
WEIGHT: Final = "weight"
BUFFER: Final = "buffer"


def stream(
    reader: Reader, name: str, state: str, start: int = 0, stop: int | None = None, *, dtype: str = ""
) -> Iterator[memoryview]:
    """Bytes of elements [start, stop) of a tensor, row-major, as `dtype`."""
    tensor = reader.checkpoint.tensor(name, state)
    dtype = dtype or tensor.dtype
    item = ITEM_BYTES[dtype]
    stop = tensor.elements if stop is None else stop
    step = PIECE_BYTES // item
    buffer = memoryview(bytearray(max(min(step, stop - start), 0) * item))
    for at in range(start, stop, step):
        end = min(at + step, stop)
        piece = buffer[: (end - at) * item]
        reader.read(tensor.name, state, (at, end), piece, dtype=dtype)
        yield piece


def box_stream(reader: Reader, name: str, state: str, box: Box) -> Iterator[memoryview]:
    """Bytes of a box of a tensor, row-major, in boxes of at most a piece (or of one row of the last dimension)."""
    item = ITEM_BYTES[reader.checkpoint.tensor(name, state).dtype]
    for part in pieces_of(box, PIECE_BYTES // item):
        size = math.prod(stop - start for start, stop in part)
        piece = memoryview(bytearray(size * item))
        reader.read(name, state, part, piece)
        yield piece


def zeros(nbytes: int) -> Iterator[bytes]:
    """Padding."""
    while nbytes > 0:
        piece = min(nbytes, PIECE_BYTES)
        yield bytes(piece)
        nbytes -= piece


def float_dtype(asked: str) -> str:
    """A dtype for weights, by a common name of it: bf16, fp32, F32 ..."""
    names = {"bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32", "float32": "F32"}
    found = names.get(asked.lower(), asked.upper())
    if found not in ("BF16", "F16", "F32", "F64"):
        raise UsageError("an unknown dtype for weights", dtype=asked, known=sorted(names))
    return found


def parameters(checkpoint: Checkpoint) -> list[str]:
    """Names of parameters and buffers, each once, in the order of the checkpoint; no optimizer-only names."""
    return list(dict.fromkeys(name for (name, _), tensor in checkpoint.states.items() if tensor.role != "opaque"))


def value_of(checkpoint: Checkpoint, name: str) -> TensorState:
    """The model's own value of a parameter or buffer; the master copy where nothing else was saved."""
    for state in (WEIGHT, BUFFER, MASTER):
        found = checkpoint.states.get((name, state))
        if found is not None:
            return found
    raise IncompleteError("a parameter without a value", name=name)


def master_of(checkpoint: Checkpoint, name: str) -> TensorState:
    """What the optimizer steps on: the fp32 copy, or the weight itself if that is float32."""
    found = checkpoint.states.get((name, MASTER))
    if found is None:
        found = value_of(checkpoint, name)
        if found.dtype != "F32":
            raise LossyError(
                "no float32 master copy was saved: the target would train on from rounded weights",
                name=name,
                dtype=found.dtype,
            )
    return found

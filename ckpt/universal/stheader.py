"""The header of a safetensors file: read with caps, written with the bytes that the reference reader wants.

    | 8 bytes: n, little-endian | n bytes of JSON {name: {dtype, shape, data_offsets}} | data, no holes |

Knows nothing of what the tensors mean, and reads no data. Invariants of a parsed header:

* entries lie side by side, in the order of their offsets, from the start of the data to the end of the file;
* each entry has exactly the bytes of its dtype and shape.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..dtypes import ITEM_BYTES
from .disk import explained
from .errors import CorruptError
from .jsonio import parse
from .model import ELEMENTS_MAX, RANK_MAX

HEADER_BYTES_MAX: Final = 100_000_000
"""The reference reader's own limit."""
ENTRIES_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. Offsets count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    entries: tuple[Entry, ...]
    """In the order of their bytes."""
    metadata: Mapping[str, str]
    data_start: int
    """Where data begins; equal to the bytes of the header with its length."""


def read_header(path: Path) -> Header:
    """The header of a file, checked against the size of the file."""
    with explained(path, "reading a safetensors header"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES_MAX):
            raise CorruptError("a header longer than its file or the limit", file=str(path), header_bytes=length)
        return parse_header(file.read(length), size, str(path))


def parse_header(data: bytes, file_bytes: int, label: str) -> Header:
    """The header from its JSON bytes; CorruptError naming `label` for anything out of order."""
    value = parse(data, label)
    if not isinstance(value, dict) or len(value) > ENTRIES_MAX:
        raise CorruptError("not a safetensors header", file=label)
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(text, str) for text in metadata.values()):
        raise CorruptError("metadata that is not text", file=label)
    start = 8 + len(data)
    entries = sorted((_entry(name, facts, start, label) for name, facts in value.items()), key=_order)
    reached = start
    for entry in entries:
        if entry.offset != reached:
            raise CorruptError("tensors that overlap or leave a hole", file=label, tensor=entry.name)
        reached += entry.nbytes
    if reached != file_bytes:
        raise CorruptError(
            "a file whose size is not that of its tensors", file=label, bytes=file_bytes, expected=reached
        )
    return Header(tuple(entries), metadata, start)


def _order(entry: Entry) -> tuple[int, int, str]:
    return entry.offset, entry.nbytes, entry.name


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= ELEMENTS_MAX


def _entry(name: str, facts: Any, start: int, label: str) -> Entry:
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError("an entry that is no tensor", file=label, tensor=name)
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CorruptError("an unknown dtype", file=label, tensor=name, dtype=str(dtype)[:20])
    if not isinstance(shape, list) or len(shape) > RANK_MAX or not all(map(_count, shape)):
        raise CorruptError("an impossible shape", file=label, tensor=name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_count, offsets)):
        raise CorruptError("impossible offsets", file=label, tensor=name)
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise CorruptError("offsets that do not fit the shape", file=label, tensor=name, shape=tuple(shape))
    return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str], *, pad_to: int = 64
) -> bytes:
    """The first bytes of a file whose data is `tensors`, (name, dtype, shape, bytes), side by side in this order.

    Padded with blanks, as the format allows, so that data begins at a multiple of `pad_to`.
    """
    listed: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for name, dtype, shape, nbytes in tensors:
        listed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [reached, reached + nbytes]}
        reached += nbytes
    data = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-(8 + len(data)) % pad_to)
    return len(data).to_bytes(8, "little") + data

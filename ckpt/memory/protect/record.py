"""The seal record: what a sealed half is, in a few hundred bytes and eight more for each block. Pure.

    image  = bytes [4096, image_end) of the arena: in stripes       tail = [image_end, end of the table): mirrored
    chunks = ranges of the image, each with the xxh3-64 of its 1 MiB blocks (the last one short)

With its record a block is judged alone, a header is written anew, and a rebuilt half is compared as a whole.
Invariants: chunks lie in order, without overlap, in the image; from_json() returns nothing that does not hold
that, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from holdfast.proto.errors import ProtocolViolation, SnapshotError

from ..table import HEADER_BYTES, Table
from .options import BLOCK_BYTES

DIGEST_BYTES: Final = 8
_BYTES_MAX: Final = 1 << 50
_CHUNKS_MAX: Final = 1 << 16


def digest_of_block(data: memoryview | bytes | bytearray) -> bytes:
    """xxh3-64 of one block; the GIL is free meanwhile."""
    return xxhash.xxh3_64_digest(data)


def blocks_of(nbytes: int) -> int:
    """How many blocks `nbytes` are."""
    return -(-nbytes // BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Bytes [start, stop) of the image and the digests of their blocks, counted from `start`."""

    start: int
    stop: int
    digests: bytes

    def digest(self, block: int) -> bytes:
        """Of one block."""
        return self.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]

    def span(self, block: int) -> tuple[int, int]:
        """Image bytes of one block."""
        start = self.start + block * BLOCK_BYTES
        return start, min(start + BLOCK_BYTES, self.stop)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(block, start, stop) of all."""
        for block in range(blocks_of(self.stop - self.start)):
            yield block, *self.span(block)


@dataclass(frozen=True, slots=True)
class Record:
    """One sealed half."""

    slot: int
    step: int
    fill: int
    plan: str
    incarnation: int
    table_offset: int
    table_bytes: int
    data_bytes: int
    image_end: int
    data_digest: str
    table_digest: str
    placement: int
    """Under which the chunks were cut; -1: under none, and the image is one chunk."""
    chunks: tuple[Blocks, ...]

    @property
    def image_bytes(self) -> int:
        """Size of what is in stripes."""
        return self.image_end - HEADER_BYTES

    @property
    def tail_bytes(self) -> int:
        """Size of what is mirrored."""
        return self.table_offset + self.table_bytes - self.image_end

    def chunk(self, start: int) -> Blocks:
        """The chunk that begins at `start`; an empty one where the image has ended already."""
        found = next((chunk for chunk in self.chunks if chunk.start == start), None)
        if found is None:
            raise SnapshotError("a record without that chunk", slot=self.slot, step=self.step, start=start)
        return found

    def same_state(self, other: Record) -> bool:
        """Whether both are of the same bytes, whatever the fill."""
        ours = (self.slot, self.step, self.plan, self.data_bytes, self.data_digest, self.image_end)
        return ours == (other.slot, other.step, other.plan, other.data_bytes, other.data_digest, other.image_end)

    def to_json(self) -> dict[str, Any]:
        """As a value of JSON."""
        value = {name: getattr(self, name) for name in _INTEGERS + _HEXES}
        value["chunks"] = [[chunk.start, chunk.stop, chunk.digests.hex()] for chunk in self.chunks]
        return value

    @classmethod
    def from_json(cls, value: object) -> Record:
        """Checked in every field; ProtocolViolation for anything odd."""
        if not isinstance(value, dict) or set(value) != {*_INTEGERS, *_HEXES, "chunks"}:
            raise ProtocolViolation("a seal record with other fields")
        for name in _INTEGERS:
            low = -1 if name == "placement" else 0
            if type(value[name]) is not int or not low <= value[name] <= _BYTES_MAX:
                raise ProtocolViolation("a seal record with a bad number", field=name)
        for name, length in zip(_HEXES, _HEX_BYTES, strict=True):
            if len(_hex(value[name])) != length:
                raise ProtocolViolation("a seal record with a bad digest", field=name)
        if not HEADER_BYTES <= value["image_end"] <= value["table_offset"]:
            raise ProtocolViolation("a seal record whose image does not end before its table")
        if HEADER_BYTES + value["data_bytes"] > value["table_offset"]:
            raise ProtocolViolation("a seal record whose data does not end before its table")
        chunks = _chunks(value["chunks"], value["image_end"] - HEADER_BYTES)
        return cls(**{name: value[name] for name in _INTEGERS + _HEXES}, chunks=chunks)


_INTEGERS: Final = (
    "slot",
    "step",
    "fill",
    "incarnation",
    "table_offset",
    "table_bytes",
    "data_bytes",
    "image_end",
    "placement",
)
_HEXES: Final = ("plan", "data_digest", "table_digest")
_HEX_BYTES: Final = (32, 16, 16)


def _hex(value: object) -> bytes:
    try:
        return bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        return b""


def _chunks(rows: object, image_bytes: int) -> tuple[Blocks, ...]:
    if not isinstance(rows, list) or len(rows) > _CHUNKS_MAX:
        raise ProtocolViolation("a seal record without chunks")
    chunks, end = [], 0
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or type(row[0]) is not int or type(row[1]) is not int:
            raise ProtocolViolation("a seal record with a bad chunk")
        start, stop, digests = row[0], row[1], _hex(row[2])
        if not end <= start <= stop or (stop > image_bytes and stop > start):
            raise ProtocolViolation("a seal record whose chunks overlap, or leave the image")
        if len(digests) != DIGEST_BYTES * blocks_of(stop - start):
            raise ProtocolViolation("a seal record with too many or too few digests")
        chunks.append(Blocks(start, stop, digests))
        end = stop
    return tuple(chunks)


def image_end_of(table: Table, table_offset: int) -> int:
    """Where the image ends: at the first `extra` entry of replicated state, which differs between replicas."""
    if isinstance(table.metadata, dict) and table.metadata.get("replicated") is True:
        offsets = [entry.offset for entry in table.entries if entry.state == "extra"]
        return min(offsets, default=table_offset)
    return table_offset


def cut(ranges: Iterable[tuple[int, int]], image_bytes: int) -> list[tuple[int, int]]:
    """Ranges of a placement, clipped to the image; the rest that no chunk covers comes last, as one range."""
    found, end = [], 0
    for start, stop in sorted(ranges):
        found.append((start, max(start, min(stop, image_bytes))))
        end = stop
    if end < image_bytes:
        found.append((end, image_bytes))
    return found


def measure(
    data: memoryview, ranges: Iterable[tuple[int, int]], *, first: int, data_bytes: int
) -> tuple[tuple[Blocks, ...], str]:
    """Digests of the blocks of each range, and of all data, in one pass: each block is in the cache for both.

    `data` is the whole arena; ranges count from `first`, where the data begins.
    """
    whole = xxhash.xxh3_128()
    position, end = first, first + data_bytes
    chunks = []
    for start, stop in ranges:
        digests = bytearray()
        for block_start in range(start, stop, BLOCK_BYTES):
            block_stop = first + min(block_start + BLOCK_BYTES, stop)
            digests += digest_of_block(data[first + block_start : block_stop])
            whole.update(data[position : min(block_stop, end)])
            position = max(position, min(block_stop, end))
        chunks.append(Blocks(start, stop, bytes(digests)))
    for start in range(position, end, BLOCK_BYTES):
        whole.update(data[start : min(start + BLOCK_BYTES, end)])
    return tuple(chunks), whole.hexdigest()

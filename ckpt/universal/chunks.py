"""Chunks: the unit of digesting, compressing, journaling. How large they are, their digests, their codec.

    slab's bytes  |  chunk 0  |  chunk 1  | .. |        each: xxh3-128 of what is stored
                      └─ zstd-planes: [b0 b1 b2 b3][b0 b1 ...] ▶ b0 b0 .. b1 b1 .. ▶ zstd, one frame

To verify what it reads, a reader reads whole chunks: chunks are therefore small for small tensors (1/128 of
the tensor, so that a quarter of it costs a few percent more) and at most 4 MiB for large ones. The
compressor, and numpy for it, are imported when they are used: archives are an extra. Invariants:

* a chunk is a whole number of elements, of every dtype;
* decompress() returns exactly the bytes asked for, or raises; it allocates no more than that.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

import xxhash

from ..dtypes import ITEM_BYTES
from .errors import CorruptError, UsageError
from .model import Slab

Buffer = bytes | bytearray | memoryview

CHUNK_BYTES_MIN: Final = 16 << 10
CHUNK_BYTES_MAX: Final = 4 << 20
ARCHIVE_CHUNK_BYTES_MIN: Final = 256 << 10
"""Smaller ones compress visibly worse."""
CHUNKS_PER_SLAB: Final = 128
GAIN_MIN: Final = 0.05
"""A chunk that compression makes less than this much smaller is kept as it is: decoding costs time for ever."""
LEVEL: Final = 3


def digest(data: Buffer) -> str:
    """xxh3-128, as the format writes it."""
    return xxhash.xxh3_128_hexdigest(data)


def chunk_bytes_for(nbytes: int, *, archive: bool = False) -> int:
    """Chunk size for a slab: the power of two at or below 1/128 of it, within the limits."""
    least = ARCHIVE_CHUNK_BYTES_MIN if archive else CHUNK_BYTES_MIN
    share = nbytes // CHUNKS_PER_SLAB
    return min(max(1 << max(share.bit_length() - 1, 0), least), CHUNK_BYTES_MAX)


def stored_offsets(slab: Slab) -> list[int]:
    """Where each chunk's stored bytes begin, relative to the span; one more for the end."""
    if slab.codec != "raw":
        return [0, *accumulate(slab.stored)]
    return [*range(0, slab.nbytes, slab.chunk_bytes), slab.nbytes] if slab.chunks else [0]


class Codec:
    """zstd over byte planes. One per thread: the library's objects are not shared."""

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UsageError("compressed chunks need the package zstandard: pip install 'holdfast[archive]'") from error
        import numpy

        self._zstd: Any = zstandard
        self._np: Any = numpy
        self._compressor: Any = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        self._decompressor: Any = zstandard.ZstdDecompressor()

    def compress(self, data: Buffer, dtype: str) -> bytes | None:
        """The stored form of a chunk; None if it is not worth it."""
        raw = self._np.frombuffer(data, self._np.uint8)
        planes = self._np.ascontiguousarray(raw.reshape(-1, ITEM_BYTES[dtype]).T)
        packed: bytes = self._compressor.compress(planes)
        return packed if len(packed) <= raw.nbytes * (1 - GAIN_MIN) else None

    def decompress(self, stored: Buffer, nbytes: int, dtype: str, file: str) -> Buffer:
        """The bytes of a chunk from its stored form."""
        if len(stored) == nbytes:
            return stored
        try:
            # Asked first: the frame says how much it will allocate.
            size = self._zstd.frame_content_size(stored)
            planes = self._decompressor.decompress(stored) if size == nbytes else b""
        except self._zstd.ZstdError as error:
            raise CorruptError("a chunk that cannot be decompressed", file=file, reason=str(error)) from error
        if len(planes) != nbytes:
            raise CorruptError("a chunk of another size than listed", file=file, bytes=size, expected=nbytes)
        item = ITEM_BYTES[dtype]
        raw = self._np.frombuffer(planes, self._np.uint8)
        return memoryview(self._np.ascontiguousarray(raw.reshape(item, -1).T)).cast("B")

"""Compressing a finished file, chunk by chunk, into a file of the same name. Seekable afterwards.

    optim/exp_avg-00001-of-00001.safetensors      raw: F32 [768, 3072] ...
        read, compare with the digests, compress ──▶  .new ──▶ fsync ──▶ rename over it
    optim/exp_avg-00001-of-00001.safetensors      U8 [stored bytes] under the same names

Twice the disk of one file at a time, memory of a few chunks. A crash leaves the raw file or the compressed
one, whole, under the name; a leftover .new is overwritten by whoever takes the write up.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from .chunks import Codec, chunk_bytes_for, digest
from .disk import Disk
from .errors import CorruptError
from .journal import Packed
from .layout import PlannedFile
from .model import Slab, Span
from .stheader import build_header, parse_header

SUFFIX = ".new"


def packed_slab(raw: Slab, offset: int, chunk_bytes: int, stored: tuple[int, ...], digests: tuple[str, ...]) -> Slab:
    """The slab of a tensor after compression. CorruptError if the parts do not fit."""
    span = Span(raw.span.file, offset, sum(stored))
    return replace(raw, span=span, codec="zstd-planes", chunk_bytes=chunk_bytes, stored=stored, digests=digests)


def compress_file(
    disk: Disk, folder: Path, file: PlannedFile, slabs: Sequence[Slab], jobs: int
) -> tuple[bytes, Packed]:
    """Replace a finished file by its compressed form; its new header, and its slabs in the order given.

    `slabs` are those of the file in the order of their bytes, with digests.
    """
    path = folder / file.path
    fresh = path.with_name(path.name + SUFFIX)
    names = [entry.name for entry in parse_header(file.header[8:], file.nbytes, file.path).entries]
    metadata = parse_header(file.header[8:], file.nbytes, file.path).metadata
    # Stored sizes are known at the end, and never have more digits than the raw ones.
    room = len(build_header([(n, "U8", (s.nbytes,), s.nbytes) for n, s in zip(names, slabs, strict=True)], metadata))
    packed: Packed = []
    at = room
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    target = disk.open(fresh)
    try:
        os.ftruncate(target, 0)
        with ThreadPoolExecutor(jobs, thread_name_prefix="archive") as pool:
            for slab in slabs:
                start, sizes, digests = at, [], []
                for data in _compressed(pool, jobs, source, slab):
                    disk.pwrite(target, memoryview(data), at)
                    sizes.append(len(data))
                    digests.append(digest(data))
                    at += len(data)
                size = chunk_bytes_for(slab.nbytes, archive=True)
                packed.append((start, size, tuple(sizes), tuple(digests)))
        rows = [(name, "U8", (sum(p[2]),), sum(p[2])) for name, p in zip(names, packed, strict=True)]
        header = build_header(rows, metadata)
        body = header[8:] + b" " * (room - len(header))
        header = len(body).to_bytes(8, "little") + body
        disk.pwrite(target, memoryview(header), 0)
        disk.fsync(target)
        disk.rename(fresh, path)
    finally:
        os.close(source)
        os.close(target)
    return header, packed


def _compressed(pool: ThreadPoolExecutor, jobs: int, source: int, slab: Slab) -> Iterator[bytes]:
    """The stored form of each chunk, in order, `jobs` at a time."""
    size = chunk_bytes_for(slab.nbytes, archive=True)
    local = threading.local()

    def one(start: int) -> bytes:
        if not hasattr(local, "codec"):
            local.codec = Codec()
        data = os.pread(source, min(size, slab.nbytes - start), slab.span.offset + start)
        # Chunk sizes are powers of two and archives have the larger ones, so old chunks end where new ones do.
        for low in range(0, len(data), slab.chunk_bytes):
            part = memoryview(data)[low : low + slab.chunk_bytes]
            if digest(part) != slab.digests[(start + low) // slab.chunk_bytes]:
                raise CorruptError("what was written reads differently", file=slab.span.file, offset=start + low)
        return local.codec.compress(data, slab.dtype) or data

    starts = range(0, slab.nbytes, size)
    for first in range(0, len(starts), jobs):
        yield from pool.map(one, starts[first : first + jobs])

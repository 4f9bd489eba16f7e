"""One sequential pass over a file: the digest of every chunk in it, and of the bytes between the slabs.

    |header|chunk|chunk|chunk .. |gap|chunk ..|        runs of neighbours are read together, up to 2 MiB
     rest   ────── on_chunk ─────  rest

Adopting computes digests with it, verifying compares them. Reading and digesting are spread over `jobs`
threads: both release the interpreter. Memory is one run per job. Invariants: every byte of the file is read
once (bytes of overlapping slabs, which only foreign files have: once per slab).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import xxhash

from .chunks import digest, stored_offsets
from .files import Files, block
from .model import Slab

RUN_BYTES: Final = 2 << 20
"""What a core keeps in its own cache between reading and digesting: larger runs go to memory and back."""

OnChunk = Callable[[int, int, int, int, str], None]
"""Index of the slab, of the chunk, offset in the file, bytes, digest. Called from any thread."""
OnRun = Callable[[int], None]
"""Bytes that were read together, after their chunks. Called from any thread."""


_Part = tuple[int, int, int, int]
"""Offset in the file, bytes, index of the slab, of the chunk. A plain tuple: there are tens of thousands a second."""


def gaps(slabs: Sequence[Slab], file_bytes: int) -> list[tuple[int, int]]:
    """Byte ranges of a file that no slab covers."""
    found = []
    reached = 0
    for span in sorted((slab.span for slab in slabs), key=lambda span: span.offset):
        if span.offset > reached:
            found.append((reached, span.offset))
        reached = max(reached, span.stop)
    return [*found, (reached, file_bytes)] if reached < file_bytes else found


def rest_digest(files: Files, path: str, slabs: Sequence[Slab], file_bytes: int) -> str:
    """xxh3-128 of the bytes that no slab covers."""
    state = xxhash.xxh3_128()
    for low, high in gaps(slabs, file_bytes):
        for start in range(low, high, RUN_BYTES):
            data = bytearray(min(RUN_BYTES, high - start))
            files.read_into(path, start, data)
            state.update(data)
    return state.hexdigest()


def scan(
    files: Files,
    path: str,
    slabs: Sequence[Slab],
    pool: ThreadPoolExecutor,
    jobs: int,
    on_chunk: OnChunk,
    on_run: OnRun,
) -> None:
    """Call `on_chunk` for every chunk of the slabs, which all lie in `path` and have chunks."""
    local = threading.local()

    def run(parts: list[_Part]) -> None:
        base = parts[0][0]
        total = parts[-1][0] + parts[-1][1] - base
        if not hasattr(local, "memory") or local.memory.nbytes < total:
            local.memory = block(max(RUN_BYTES, total))
        memory: memoryview = local.memory
        files.read_into(path, base, memory[:total])
        for offset, nbytes, slab, chunk in parts:
            on_chunk(slab, chunk, offset, nbytes, digest(memory[offset - base : offset - base + nbytes]))
        on_run(total)

    runs = _runs(slabs)
    waiting: list[Future[None]] = []
    try:
        for parts in runs:
            waiting.append(pool.submit(run, parts))
            if len(waiting) > 2 * jobs:
                waiting.pop(0).result()
        for future in waiting:
            future.result()
    finally:
        for future in waiting:
            future.cancel()


def _runs(slabs: Sequence[Slab]) -> Iterator[list[_Part]]:
    """Chunks that lie side by side, together up to RUN_BYTES, by ascending offset."""
    parts: list[_Part] = []
    end = limit = -1
    for index, slab in sorted(enumerate(slabs), key=lambda pair: pair[1].span.offset):
        start = slab.span.offset
        for chunk, (low, high) in enumerate(itertools.pairwise(stored_offsets(slab))):
            if start + low != end or start + high > limit:
                if parts:
                    yield parts
                parts = []
                limit = start + low + RUN_BYTES
            parts.append((start + low, high - low, index, chunk))
            end = start + high
    if parts:
        yield parts

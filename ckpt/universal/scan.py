"""One sequential pass over a file: the digest of every chunk in it, and of the bytes between the slabs.

    |header|chunk|chunk|chunk .. |gap|chunk ..|        runs of neighbours are read together, up to 2 MiB
     rest   ────── on_chunks ────  rest

Adopting computes digests with it, verifying compares them. Reading and digesting are spread over `jobs`
threads: both release the interpreter. Memory is one run per job. Invariants: every byte of the file is read
once (bytes of overlapping slabs, which only foreign files have: once per slab).
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import xxhash

from .chunks import digest, stored_offsets
from .files import Files, block
from .model import Slab

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

RUN_BYTES: Final = 2 << 20
"""Stays in a core's own cache between reading and digesting."""

OnChunks = Callable[[int, int, Sequence[int], list[str]], None]
"""Index of the slab, of the first chunk, the chunks' edges in the file (one more than chunks), their digests. Called
from any thread. Several chunks at a time: there are tens of thousands a second, and each call costs what 16 KiB do."""
OnRun = Callable[[int], None]
"""Bytes that were read together, after their chunks. Called from any thread."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring chunks of one slab that are read together."""

    slab: int
    first: int
    edges: list[int]
    """In the file."""


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
    on_chunks: OnChunks,
    on_run: OnRun,
) -> None:
    """Call `on_chunks` for all chunks of the slabs, which all lie in `path` and have chunks."""
    local = threading.local()

    def run(parts: list[_Part]) -> None:
        base = parts[0].edges[0]
        total = parts[-1].edges[-1] - base
        if not hasattr(local, "memory") or local.memory.nbytes < total:
            local.memory = block(max(RUN_BYTES, total))
        memory: memoryview = local.memory
        files.read_into(path, base, memory[:total])
        for part in parts:
            found = [digest(memory[low - base : high - base]) for low, high in itertools.pairwise(part.edges)]
            on_chunks(part.slab, part.first, part.edges, found)
        on_run(total)

    runs = _runs(slabs)
    taking = threading.Lock()
    over = threading.Event()

    def work() -> None:
        try:
            while not over.is_set():
                with taking:
                    parts = next(runs, None)
                if parts is None:
                    return
                run(parts)
        except BaseException:
            over.set()  # one error ends all
            raise

    futures = [pool.submit(work) for _ in range(jobs)]
    try:
        from concurrent.futures import wait

        wait(futures)
    finally:  # whoever interrupts us closes the files
        over.set()
    for future in futures:
        future.result()


def _runs(slabs: Sequence[Slab]) -> Iterator[list[_Part]]:
    """Chunks that lie side by side, together up to RUN_BYTES, by ascending offset."""
    parts: list[_Part] = []
    end = limit = -1
    for index, slab in sorted(enumerate(slabs), key=lambda pair: pair[1].span.offset):
        edges = [slab.span.offset + low for low in stored_offsets(slab)]
        first = 0
        while first + 1 < len(edges):
            if edges[first] != end or edges[first + 1] > limit:
                if parts:
                    yield parts
                parts = []
                limit = edges[first] + RUN_BYTES
            # At least one chunk, and all more that end within the limit.
            last = max(bisect.bisect_right(edges, limit) - 1, first + 1)
            parts.append(_Part(index, first, edges[first : last + 1]))
            first, end = last, edges[last]
    if parts:
        yield parts

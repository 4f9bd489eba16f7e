"""Which chunks of a slab are written, and their digests, whatever the order in which bytes arrive.

    written(lo, hi)      chunk 0 ████████   whole: digested from memory while it is still in the cache
                         chunk 1 ███░░░██   in parts: hashed as they come if they come in order,
                                            else read back once it is complete

Does no writing itself. Invariants:

* a chunk is done once, and never changes after: what arrives for it again is skipped, or compared;
* memory is one hash state per chunk that is neither empty nor done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import xxhash

from .chunks import digest
from .errors import UsageError
from .model import Slab, TensorState


class _Partial:
    """A chunk of which some bytes are there. Offsets within the chunk."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.hash: Any = xxhash.xxh3_128()
        self.hashed: int = 0

    def add(self, start: int, data: memoryview) -> None:
        stop = start + data.nbytes
        if start == self.hashed:
            self.hash.update(data)
            self.hashed = stop
        merged = []
        for low, high in self.ranges:
            if high < start or stop < low:
                merged.append((low, high))
            else:
                start, stop = min(low, start), max(high, stop)
        self.ranges = sorted([*merged, (start, stop)])


class SlabProgress:
    """One slab being filled. Callers hold a lock around everything but `fresh`."""

    def __init__(self, index: int, file: int, tensor: TensorState, slab: Slab) -> None:
        self.index: Final = index
        self.file: Final = file
        self.tensor: Final = tensor
        self.slab: Final = slab
        self.digests: list[str | None] = [None] * slab.chunks
        self.left: int = slab.chunks
        self._partial: dict[int, _Partial] = {}

    def fresh(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Runs of [low, high) in bytes of the slab that lie in chunks not done: what is worth writing."""
        size = self.slab.chunk_bytes
        start: int | None = None
        for chunk in range(low // size, -(-high // size)):
            if self.digests[chunk] is None:
                start = max(low, chunk * size) if start is None else start
            elif start is not None:
                yield start, chunk * size
                start = None
        if start is not None:
            yield start, high

    def written(
        self, low: int, data: memoryview, whole: dict[int, str], read_back: Callable[[int, int], bytes]
    ) -> list[tuple[int, int, str]]:
        """Note that `data` is in the file at byte `low` of the slab; the chunks that this completes.

        `whole`: digests of the chunks that `data` has all of, computed by the caller without the lock.
        """
        size, end = self.slab.chunk_bytes, self.slab.nbytes
        done: list[tuple[int, int, str]] = []
        for chunk in range(low // size, -(-(low + data.nbytes) // size)):
            first, last = chunk * size, min((chunk + 1) * size, end)
            known = self.digests[chunk]
            if chunk in whole:
                if known is not None and known != whole[chunk]:
                    raise UsageError(
                        "two writers disagree on the same bytes",
                        name=self.tensor.name,
                        state=self.tensor.state,
                        file=self.slab.span.file,
                        range=(first, last),
                    )
                found = whole[chunk]
            else:
                if known is not None:
                    continue
                partial = self._partial.setdefault(chunk, _Partial())
                start, stop = max(first, low), min(last, low + data.nbytes)
                partial.add(start - first, data[start - low : stop - low])
                if partial.ranges != [(0, last - first)]:
                    continue
                in_order = partial.hashed == last - first
                found = partial.hash.hexdigest() if in_order else digest(read_back(first, last))
            if known is None:
                self.settle(chunk, found)
                done.append((self.index, chunk, found))
        return done

    def settle(self, chunk: int, found: str) -> None:
        """The chunk is in its place for good."""
        if self.digests[chunk] is None:
            self.left -= 1
        self.digests[chunk] = found
        self._partial.pop(chunk, None)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of the slab that are not done, side by side ones as one."""
        yield from self.fresh(0, self.slab.nbytes)

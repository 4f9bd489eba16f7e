"""Reading any region of any tensor, verified, without reading much else.

    region ─▶ copies per slab ─▶ byte ranges ─▶ blocks <= 4 MiB ─▶ pread ─▶ digests ─▶ scatter into `out`
                                 (of whole chunks, if verified)            straight into `out` where it lies so

No mmap: a page fault at a time is the slowest way to read from a network. Memory is one block per job,
whatever the tensor. Converts only when asked. Invariants:

* with verify, no byte reaches the caller's buffer from a chunk whose digest differs without an error;
* an element that no slab holds is an error, never whatever was in the buffer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from ..dtypes import ITEM_BYTES
from ..pages import enlarge
from ..threads import threads
from .chunks import Codec, digest, stored_offsets
from .convert import convert
from .errors import CorruptError, IncompleteError, UsageError
from .files import Files, block
from .geometry import Copy, is_flat, region_size, taken
from .model import Checkpoint, Region, Slab, TensorState
from .strided import copy as strided_copy

BLOCK_BYTES: Final = 4 << 20
GAP_BYTES: Final = 16 << 10
"""Bytes nobody asked for that are read along, where a second call would cost as much. Unverified reads only."""

Range = tuple[int, int]


def needed(found: Iterable[Copy], item: int, gap: int) -> list[Range]:
    """Byte ranges of the span that copies read, ascending, merged where at most `gap` bytes lie between."""
    ranges: list[Range] = []
    for copy in found:
        ranges += [(low * item, high * item) for low, high in _ranges(copy.source, copy.dims, max(gap // item, 0))]
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _ranges(start: int, dims: tuple[tuple[int, int, int], ...], gap: int) -> Iterator[Range]:
    extents = [1]
    for count, step, _ in reversed(dims):
        extents.append((count - 1) * step + extents[-1])
    if not dims or all(step - extents[-2 - at] <= gap for at, (_, step, _) in enumerate(dims)):
        yield start, start + extents[-1]
        return
    count, step, _ = dims[0]
    for index in range(count):
        yield from _ranges(start + index * step, dims[1:], gap)


def clip(copy: Copy, low: int, high: int) -> Iterator[Copy]:
    """The parts of a copy whose source elements lie in [low, high)."""
    if copy.source >= high or copy.source + copy.extent <= low:
        return
    if low <= copy.source and copy.source + copy.extent <= high:
        yield copy
        return
    count, ours, theirs = copy.dims[0]
    rest = copy.dims[1:]
    inner = copy.extent - (count - 1) * ours
    if not ours:  # an expanded dim: each index reads the same
        first, last, begin, end = 0, count, 0, 0
    else:
        first = max(0, (low - copy.source - inner) // ours + 1)
        last = min(count, -(-(high - copy.source) // ours))
        begin = min(max(first, -(-(low - copy.source) // ours)), last)
        end = max(begin, min(last, (high - inner - copy.source) // ours + 1))
    if begin < end:
        dims = ((end - begin, ours, theirs), *rest) if end - begin > 1 else rest
        yield Copy(copy.source + begin * ours, copy.target + begin * theirs, dims)
    for index in [*range(first, begin), *range(max(end, begin), last)]:
        yield from clip(Copy(copy.source + index * ours, copy.target + index * theirs, rest), low, high)


class Reader:
    """Reads one checkpoint. Safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint, *, verify: bool = True, jobs: int = 1) -> None:
        if jobs < 1:
            raise UsageError("at least one job", jobs=jobs)
        self.checkpoint: Final = checkpoint
        self.bytes_wanted = 0
        """Bytes that callers asked for."""
        self._verify = verify
        self._files = Files(checkpoint.root, links=checkpoint.format != "holdfast" or checkpoint.home is not None)
        self._local = threading.local()
        self._pool = threads(jobs, "checkpoint-read") if jobs > 1 else None

    @property
    def bytes_read(self) -> int:
        """Bytes read from files: divided by bytes_wanted, the read amplification."""
        return self._files.bytes_read

    def read(self, name: str, state: str, region: Region | None = None, out: Any = None, *, dtype: str = "") -> Any:
        """The elements of `region` (a box, a flat range, None: all), row-major, in `out` or a new byte buffer.

        `dtype`: convert to it. Otherwise the bytes are as stored.
        """
        tensor = self.checkpoint.tensor(name, state)
        if dtype and dtype != tensor.dtype:
            return self._converted(tensor, region, out, dtype)
        size = region_size(region, tensor.shape, f"{name}:{state}")
        view = buffer(out, size * ITEM_BYTES[tensor.dtype], tensor)
        self._run(self._tasks(tensor, region, view))
        return view

    def read_many(self, wanted: Iterable[tuple[str, str, Region | None, Any]]) -> None:
        """Several reads, (name, state, region, out), spread over the jobs together."""
        tasks: list[Callable[[], None]] = []
        for name, state, region, out in wanted:
            tensor = self.checkpoint.tensor(name, state)
            size = region_size(region, tensor.shape, f"{name}:{state}")
            tasks += self._tasks(tensor, region, buffer(out, size * ITEM_BYTES[tensor.dtype], tensor))
        self._run(tasks)

    def stream(self, name: str, state: str, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, memoryview]]:
        """All of a tensor as (start, stop, bytes) by flat ranges; the buffer is used again for the next one."""
        tensor = self.checkpoint.tensor(name, state)
        item = ITEM_BYTES[tensor.dtype]
        step = max(1, block_bytes // item)
        buffer = memoryview(bytearray(min(step, tensor.elements) * item))
        for start in range(0, tensor.elements, step):
            stop = min(start + step, tensor.elements)
            part = buffer[: (stop - start) * item]
            self.read(name, state, (start, stop), part)
            yield start, stop, part

    def opaque(self, name: str) -> bytes:
        """The bytes of an opaque file."""
        span = self.checkpoint.opaque.get(name)
        if span is None:
            raise IncompleteError("no such opaque file", name=name)
        data = bytearray(span.nbytes)
        self._files.read_into(span.file, span.offset, data)
        return bytes(data)

    # ---- from regions to tasks ----------------------------------------------------------------------------

    def _tasks(self, tensor: TensorState, region: Region | None, out: memoryview) -> list[Callable[[], None]]:
        size = region_size(region, tensor.shape)
        item = ITEM_BYTES[tensor.dtype]
        self.bytes_wanted += size * item
        enlarge(out)
        tasks: list[Callable[[], None]] = []
        held = 0
        for slab in tensor.slabs:
            found = taken(slab, region, tensor.shape)
            if not found:
                continue
            held += sum(copy.elements for copy in found)
            whole = (bool(slab.digests) and self._verify) or slab.codec != "raw"
            for low, high in self._blocks(slab, found, item, whole=whole):
                inside = [c for c in found if c.source * item < high and (c.source + c.extent) * item > low]
                tasks.append(partial(self._block, tensor, slab, inside, low, high, out))
        if held != size:
            problem = "elements are missing" if held < size else "elements are held twice"
            raise IncompleteError(problem, name=tensor.name, state=tensor.state, region=region, held=held, wanted=size)
        return tasks

    def _blocks(self, slab: Slab, found: list[Copy], item: int, *, whole: bool) -> Iterator[Range]:
        """What to read at once: at most BLOCK_BYTES; whole chunks if `whole`."""
        chunk = slab.chunk_bytes if whole else item
        ranges = needed(found, item, chunk if whole else GAP_BYTES)
        step = max(BLOCK_BYTES // chunk, 1) * chunk
        reached = 0
        for low, high in ranges:
            low, high = max(low // chunk * chunk, reached), min(-(-high // chunk) * chunk, slab.nbytes)
            while low < high:
                stop = min((low // step + 1) * step if whole else low + step, high)
                yield low, stop
                low = reached = stop

    def _run(self, tasks: list[Callable[[], None]]) -> None:
        if self._pool is None or len(tasks) < 2:
            for task in tasks:
                task()
            return
        futures = [self._pool.submit(task) for task in tasks]
        try:
            for future in futures:
                future.result()
        finally:  # no thread may write into `out` after we are gone
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()

    # ---- one block ----------------------------------------------------------------------------------------

    def _block(self, tensor: TensorState, slab: Slab, found: list[Copy], low: int, high: int, out: memoryview) -> None:
        item = ITEM_BYTES[tensor.dtype]
        if slab.codec != "raw":
            data = self._decoded(tensor, slab, low, high)
        else:
            direct = self._direct(found, low, high, item, out)
            data = direct if direct is not None else self._scratch("raw", high - low)
            self._files.read_into(slab.span.file, slab.span.offset + low, data)
            if slab.digests and self._verify:
                size = slab.chunk_bytes
                for start in range(low, high, size):
                    part = data[start - low : min(start + size, high) - low]
                    self._check(tensor, slab, start // size, slab.span.offset + start, part)
            if direct is not None:
                return
        for copy in found:
            for part_ in clip(copy, low // item, high // item):
                strided_copy(data, part_.source - low // item, out, part_.target, part_.dims, item)

    @staticmethod
    def _direct(found: list[Copy], low: int, high: int, item: int, out: memoryview) -> memoryview | None:
        """The part of `out` that the block can be read into as it is, if it is all wanted, and side by side."""
        if len(found) != 1 or len(found[0].dims) > 1 or found[0].run != found[0].elements:
            return None
        copy = found[0]
        first, last = copy.source * item, (copy.source + copy.elements) * item
        if low < first or high > last:
            return None
        start = copy.target * item + low - first
        return out[start : start + high - low]

    def _decoded(self, tensor: TensorState, slab: Slab, low: int, high: int) -> memoryview:
        """Bytes [low, high) of a compressed slab, whole chunks."""
        offsets = stored_offsets(slab)
        size = slab.chunk_bytes
        first, last = low // size, -(-high // size)
        stored = self._scratch("stored", offsets[last] - offsets[first])
        self._files.read_into(slab.span.file, slab.span.offset + offsets[first], stored)
        data = self._scratch("raw", high - low)
        if not hasattr(self._local, "codec"):
            self._local.codec = Codec()
        for chunk in range(first, last):
            part = stored[offsets[chunk] - offsets[first] : offsets[chunk + 1] - offsets[first]]
            if slab.digests and self._verify:
                self._check(tensor, slab, chunk, slab.span.offset + offsets[chunk], part)
            start = chunk * size - low
            want = min(size, slab.nbytes - chunk * size)
            data[start : start + want] = self._local.codec.decompress(part, want, slab.dtype, slab.span.file)
        return data

    def _check(self, tensor: TensorState, slab: Slab, chunk: int, offset: int, data: memoryview) -> None:
        found = digest(data)
        if found != slab.digests[chunk]:
            raise CorruptError(
                "a digest differs",
                name=tensor.name,
                state=tensor.state,
                file=slab.span.file,
                range=(offset, offset + data.nbytes),
                expected=slab.digests[chunk],
                found=found,
            )

    def _scratch(self, use: str, nbytes: int) -> memoryview:
        """Memory of this thread, used again: fresh pages would cost more than the read."""
        held = getattr(self._local, use, None)
        if held is None or held.nbytes < nbytes:
            held = block(max(nbytes, BLOCK_BYTES))
            setattr(self._local, use, held)
        part: memoryview = held[:nbytes]
        return part

    def _converted(self, tensor: TensorState, region: Region | None, out: Any, dtype: str) -> memoryview:
        """A read with conversion, by parts along the flat range or dim 0: memory of a few blocks."""
        size = region_size(region, tensor.shape, f"{tensor.name}:{tensor.state}")
        view = buffer(out, size * ITEM_BYTES[dtype], tensor)
        done = 0
        for part in _parts(region, tensor, size):
            data = convert(self.read(tensor.name, tensor.state, part), tensor.dtype, dtype)
            view[done : done + data.nbytes] = data.data.cast("B")
            done += data.nbytes
        return view

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parts(region: Region | None, tensor: TensorState, size: int) -> Iterator[Region]:
    step = BLOCK_BYTES // ITEM_BYTES[tensor.dtype]
    if not size:
        return
    if region is None or region == () or is_flat(region):
        start = region[0] if region else 0
        assert isinstance(start, int)
        for low in range(start, start + size, step):
            yield low, min(low + step, start + size)
        return
    (first, last), *rest = region  # type: ignore[misc]  # a box
    rows = max(1, step // (size // (last - first)))
    for low in range(first, last, rows):
        yield ((low, min(low + rows, last)), *rest)


def buffer(out: Any, nbytes: int, tensor: TensorState) -> memoryview:
    """`out` as bytes to fill, or new ones; UsageError if it is not what a read fills."""
    if out is None:
        import numpy

        out = numpy.empty(nbytes, numpy.uint8)  # a bytearray would be zeroed first
    view = memoryview(out)
    if view.nbytes != nbytes or view.readonly or not view.c_contiguous:
        raise UsageError(
            "not a writable, contiguous buffer of the right size",
            name=tensor.name,
            state=tensor.state,
            bytes=view.nbytes,
            expected=nbytes,
        )
    return view.cast("B") if nbytes else memoryview(bytearray())

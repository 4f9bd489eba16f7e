"""The hidden folder in which a checkpoint grows: locked, laid out, filled in any order, taken up after a crash.

    Stage ── put(region, bytes) ──▶ chunk-aligned runs ──▶ digest + pwrite ──▶ journal
          └─ a file whose last chunk is in place: fsync, or compress, in a thread of its own

Every byte has its place before it arrives, so memory does not grow with the model. Says nothing about when a
checkpoint exists: that is write.py. Invariants:

* a chunk is journaled after it was written, and believed after a crash only if it still reads the same;
* put() may be called from several threads; a chunk that is done is never written again.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..dtypes import ITEM_BYTES
from .archive import compress_file, packed_slab
from .chunks import Buffer, digest
from .direct import DirectFile
from .disk import Disk, explained
from .errors import IncompleteError, UsageError
from .geometry import Copy, given, region_size
from .journal import FILE_NAME as JOURNAL
from .journal import Journal, Packed, read_journal
from .layout import FILE_BYTES_MAX, Layout, StatePlan, make_layout, plan_digest
from .manifest import COMMIT
from .model import FileFacts, Region, TensorState
from .progress import SlabProgress
from .strided import dense, view

BLOCK_BYTES: Final = 4 << 20
"""Digested and written in one go: large for the disk, small enough to stay in the cache in between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    archive: bool = False
    """Compress chunks (zstd over byte planes). Weights can then be read by our reader only."""
    tile: bool = False
    """Store large optimizer tensors as tiles along dim 1: cheap to read for tensor-parallel targets."""
    resume: bool = False
    """Take up an interrupted write of the same plan; and leave one behind if this one fails."""
    fsync: bool = True
    direct: bool = False
    """Write past the page cache where that is possible: for more than memory holds, or what nobody reads next."""
    file_bytes_max: int = FILE_BYTES_MAX
    jobs: int = 2
    """Threads that compress; and those of save_universal()."""
    id: str = ""
    """Tells two saves apart; random if empty."""


class Stage:
    """The folder and files of one write."""

    def __init__(self, target: Path, states: Sequence[StatePlan], options: WriteOptions, disk: Disk) -> None:
        plan = plan_digest(states, tile=options.tile, archive=options.archive, file_bytes_max=options.file_bytes_max)
        self.folder: Final = target.parent / f".{target.name}.tmp-{plan[:16]}"
        self.bytes_written = 0
        """Payload bytes written by this process: what a resumed write did not have to do again."""
        self.id = ""
        self.layout = Layout((), {})
        self._target = target
        self._options = options
        self._disk = disk
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self._direct: list[DirectFile] = []
        self._progress: dict[tuple[str, str], list[SlabProgress]] = {}
        self._by_file: list[list[SlabProgress]] = []
        self._headers: list[bytes] = []
        self._packed: dict[int, Packed] = {}
        self._finishing: dict[int, Future[None]] = {}
        self._journal: Journal | None = None
        with explained(self.folder, "making the folder of a checkpoint"):
            disk.mkdir(self.folder)
            self._take_lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-finish")
        try:
            self._begin(plan, states)
        except BaseException:
            self.close(remove=not options.resume)
            raise

    def _begin(self, plan: str, states: Sequence[StatePlan]) -> None:
        options = self._options
        told = read_journal(self.folder) if options.resume else None
        if told is not None and told.plan != plan:
            told = None
        self.id = told.id if told is not None else options.id or os.urandom(16).hex()
        self.layout = make_layout(
            states, tile=options.tile, file_bytes_max=options.file_bytes_max, checkpoint_id=self.id
        )
        self._clear({JOURNAL, *(file.path for file in self.layout.files)} if told is not None else set())
        self._track()
        with explained(self.folder, "reserving space for a checkpoint"):
            self._journal = Journal(self._disk, self.folder, plan, self.id, fresh=told is None)
            self._open_files(told.packed if told is not None else {})
            if told is not None:
                self._believe(told.chunks)
        for index, members in enumerate(self._by_file):
            if index not in self._packed and all(member.left == 0 for member in members):
                self._finish(index)

    def _take_lock(self) -> None:
        self._locked = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._locked)
            self._locked = -1
            raise UsageError("another process is writing this checkpoint", target=str(self._target)) from None

    def _clear(self, keep: set[str]) -> None:
        """Remove what an interrupted write left, but for the files to `keep`. The folder itself is locked: it stays.

        COMMIT goes first: what is left of a folder must not look whole at any time.
        """
        with explained(self.folder, "removing an interrupted write"):
            self._disk.unlink(self.folder / COMMIT)
            for path in sorted(self.folder.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    continue
                if path.relative_to(self.folder).as_posix() not in keep:
                    self._disk.unlink(path)

    def _track(self) -> None:
        count = 0
        files = {file.path: index for index, file in enumerate(self.layout.files)}
        self._by_file = [[] for _ in files]
        for key, tensor in self.layout.states.items():
            self._progress[key] = []
            for slab in tensor.slabs:
                progress = SlabProgress(count, files[slab.span.file], tensor, slab)
                count += 1
                self._progress[key].append(progress)
                self._by_file[progress.file].append(progress)
        for members in self._by_file:
            members.sort(key=lambda member: member.slab.span.offset)

    def _open_files(self, packed: Mapping[int, Packed]) -> None:
        folders = {Path(file.path).parent for file in self.layout.files} | {Path("state")}
        for folder in sorted(folders):
            self._disk.mkdir(self.folder / folder)
        self._headers = [file.header for file in self.layout.files]
        local = threading.local()
        for index, file in enumerate(self.layout.files):
            fd = self._disk.open(self.folder / file.path)
            self._fds.append(fd)
            if self._options.direct and not self._options.archive:  # which reads all of it again, to compress
                self._direct.append(DirectFile(self._disk, self.folder / file.path, fd, local))
            if index in packed and self._believe_packed(index, packed[index]):
                continue
            self._disk.allocate(fd, file.nbytes)
            self._disk.pwrite(fd, memoryview(file.header), 0)

    # ---- taking up an interrupted write -------------------------------------------------------------------

    def _believe(self, chunks: Mapping[tuple[int, int], str]) -> None:
        """Read what the journal says is there; what reads differently is written again."""
        for index, members in enumerate(self._by_file):
            for member in members if index not in self._packed else ():
                slab = member.slab
                for chunk in range(slab.chunks):
                    known = chunks.get((member.index, chunk))
                    start = chunk * slab.chunk_bytes
                    size = min(slab.chunk_bytes, slab.nbytes - start)
                    if known and digest(os.pread(self._fds[index], size, slab.span.offset + start)) == known:
                        member.settle(chunk, known)

    def _believe_packed(self, index: int, packed: Packed) -> bool:
        members = self._by_file[index]
        if len(packed) != len(members) or not packed:
            return False
        for offset, _, stored, digests in packed:
            for size, known in zip(stored, digests, strict=True):
                if digest(os.pread(self._fds[index], size, offset)) != known:
                    return False
                offset += size
        if self._options.fsync:  # who was killed may not have waited for the disk
            self._disk.fsync(self._fds[index])
        self._packed[index] = packed
        self._headers[index] = os.pread(self._fds[index], packed[0][0], 0)
        for member in members:
            for chunk in range(member.slab.chunks):
                member.settle(chunk, "0" * 32)  # of raw bytes that are gone; the packed digests count
        return True

    # ---- put ----------------------------------------------------------------------------------------------

    def missing(self, name: str, state: str) -> list[tuple[int, int]]:
        """Flat ranges of elements that are still wanted, ascending. With tiles: whole rows around them."""
        found: list[tuple[int, int]] = []
        with self._lock:
            for member in self._members(name, state):
                tensor, slab = member.tensor, member.slab
                item = ITEM_BYTES[tensor.dtype]
                for low, high in member.missing():
                    low, high = low // item, high // item
                    if slab.shape != tensor.shape and slab.elements:
                        narrow, row = slab.elements // slab.shape[0], tensor.elements // tensor.shape[0]
                        low, high = low // narrow * row, -(-high // narrow) * row
                    found.append((low, high))
        merged: list[tuple[int, int]] = []
        for low, high in sorted(found):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], high))
            else:
                merged.append((low, high))
        return merged

    def _members(self, name: str, state: str) -> list[SlabProgress]:
        found = self._progress.get((name, state))
        if found is None:
            raise UsageError("a tensor that was not planned", name=name, state=state)
        return found

    def put(self, name: str, state: str, data: Buffer, region: Region | None = None) -> None:
        """Write the elements of `region` (a box, a flat range, or None for all), row-major in `data`.

        In any order; what is in place already is not written again.
        """
        members = self._members(name, state)
        tensor = members[0].tensor
        size = region_size(region, tensor.shape, f"{name}:{state}")
        item = ITEM_BYTES[tensor.dtype]
        plain = memoryview(data)
        if plain.nbytes != size * item:
            raise UsageError(
                "data of another size than its region", name=name, state=state, bytes=plain.nbytes, expected=size * item
            )
        if not size:
            return
        plain = plain.cast("B")
        with explained(f"{self.folder}/{members[0].slab.span.file}", "writing a checkpoint"):
            for member in members:
                for copy in given(region, member.slab, tensor.shape):
                    self._put_copy(member, copy, plain, item)

    def _put_copy(self, member: SlabProgress, copy: Copy, data: memoryview, item: int) -> None:
        """Gather what is side by side in the slab; what is not, in parts that are."""
        dims = copy.dims
        if dense(dims, 1) and (len(dims) < 2) and dense(dims, 2):
            self._put_run(member, copy.target * item, data[copy.source * item : (copy.source + copy.elements) * item])
            return
        outer = max(dims, key=lambda dim: dim[2])
        rest = tuple(dim for dim in dims if dim is not outer)
        if not dense(dims, 2):
            for at in range(outer[0]):
                part = Copy(copy.source + at * outer[1], copy.target + at * outer[2], rest)
                self._put_copy(member, part, data, item)
            return
        ordered = sorted(dims, key=lambda dim: -dim[2])
        rows = max(1, BLOCK_BYTES // (outer[2] * item))
        for at in range(0, outer[0], rows):
            counts = [min(rows, outer[0] - at), *(dim[0] for dim in ordered[1:])]
            taken = view(data, copy.source + at * outer[1], counts, [dim[1] for dim in ordered], item)
            self._put_run(member, (copy.target + at * outer[2]) * item, memoryview(taken.tobytes()))

    def _put_run(self, member: SlabProgress, low: int, data: memoryview) -> None:
        slab, size, end = member.slab, member.slab.chunk_bytes, member.slab.nbytes
        index = member.file
        fd = self._fds[index]

        def read_back(first: int, last: int) -> bytes:
            return os.pread(fd, last - first, slab.span.offset + first)

        start = low
        while start < low + data.nbytes:
            stop = min((start // BLOCK_BYTES + 1) * BLOCK_BYTES, low + data.nbytes)
            block = data[start - low : stop - low]
            whole = {}
            for chunk in range(-(-start // size), -(-stop // size)):
                first, last = chunk * size, min((chunk + 1) * size, end)
                if last <= stop:
                    whole[chunk] = digest(block[first - start : last - start])
            with self._lock:
                wanted = list(member.fresh(start, stop))
            for first, last in wanted:
                part, at = block[first - start : last - start], slab.span.offset + first
                if self._direct:
                    self._direct[index].pwrite(part, at)
                else:
                    self._disk.pwrite(fd, part, at)
            with self._lock:
                self._settle(index, member, member.written(start, block, whole, read_back), wanted)
            start = stop

    def _settle(
        self, index: int, member: SlabProgress, done: list[tuple[int, int, str]], wanted: list[tuple[int, int]]
    ) -> None:
        assert self._journal is not None
        self.bytes_written += sum(last - first for first, last in wanted)
        if done:
            self._journal.chunks(done)
            if member.left == 0 and all(other.left == 0 for other in self._by_file[index]):
                self._finish(index)

    # ---- finished files -----------------------------------------------------------------------------------

    def _finish(self, index: int) -> None:
        """All chunks of a file are in place. Called once per file: under the lock, or before any put()."""
        if index not in self._finishing:
            self._finishing[index] = self._pool.submit(self._finish_file, index)

    def _finish_file(self, index: int) -> None:
        file = self.layout.files[index]
        if self._options.archive:
            slabs = [replace(m.slab, digests=tuple(d or "" for d in m.digests)) for m in self._by_file[index]]
            with explained(self.folder / file.path, "compressing a checkpoint"):
                header, packed = compress_file(self._disk, self.folder, file, slabs, self._options.jobs)
                with self._lock:
                    assert self._journal is not None
                    self._journal.packed(index, packed)
                    self._headers[index], self._packed[index] = header, packed
        elif self._options.fsync:
            with explained(self.folder / file.path, "making a checkpoint durable"):
                self._disk.fsync(self._fds[index])

    def finished(self) -> tuple[dict[tuple[str, str], TensorState], dict[str, FileFacts]]:
        """Wait for the last file; the tensors with their digests, and the files. IncompleteError if bytes miss."""
        for (name, state), members in self._progress.items():
            if any(member.left for member in members):
                raise IncompleteError("not all was written", name=name, state=state, missing=self.missing(name, state))
        for future in self._finishing.values():
            future.result()
        states: dict[tuple[str, str], TensorState] = {}
        for key, members in self._progress.items():
            slabs = []
            for member in members:
                packed = self._packed.get(member.file)
                if packed is None:
                    slabs.append(replace(member.slab, digests=tuple(d or "" for d in member.digests)))
                else:
                    slabs.append(packed_slab(member.slab, *packed[self._by_file[member.file].index(member)]))
            states[key] = replace(self.layout.states[key], slabs=tuple(slabs))
        sizes = [self._file_bytes(index) for index in range(len(self.layout.files))]
        facts = {
            file.path: FileFacts(size, digest(header))
            for file, size, header in zip(self.layout.files, sizes, self._headers, strict=True)
        }
        return states, facts

    def _file_bytes(self, index: int) -> int:
        packed = self._packed.get(index)
        if packed is None:
            return self.layout.files[index].nbytes
        return len(self._headers[index]) + sum(sum(slab[2]) for slab in packed)

    # ---- the end ------------------------------------------------------------------------------------------

    def close(self, *, remove: bool = False) -> None:
        """Give up thread, descriptors and lock; the folder stays, unless it is to be removed."""
        self._pool.shutdown(cancel_futures=True)  # first: it may be making files
        try:
            if remove:
                with explained(self.folder, "removing an unfinished write"):
                    self._disk.remove_tree(self.folder)
        finally:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            for file in self._direct:
                file.close()
            for fd in [*self._fds, self._locked]:
                os.close(fd)
            self._fds, self._direct = [], []

"""Anonymous shared memory: made, sized, filled with pages, and mapped. Nothing of it has a name to leak.

    manager  create(nbytes) ──▶ memfd, its pages there, its size sealed ─┬─ fd ──▶ rank maps it writable
                                                                         └─ read-only fd ──▶ reader maps
                                                                                             a private view

Memory lives as long as one process holds a descriptor or a mapping. Does not know what is in it (but for
MappedHalf, which joins descriptor, mapping and Half). Invariants:

* the size of what create() returns never changes (F_SEAL_SHRINK): nobody can make another process that
  maps it die of SIGBUS, and is_sealed() refuses memory for which that is not so;
* create() either returns memory whose pages are all there, or raises and leaves nothing;
* a mapping outlives close() while a view of it is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError

from .arena import Half

RESERVE_BYTES: Final = 128 << 20
"""Left to the workers, whose own memory grows while ours is being taken."""
_CHUNK_BYTES: Final = 4 << 20
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_UNLIMITED: Final = 1 << 62
"""cgroup v1 writes "no limit" as a number near 2**63."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much memory can be taken now, and who says so."""

    available_bytes: int
    limit: str


def room(root: str = "/") -> Room:
    """The tightest of the host's available memory and the limits of every cgroup that we are in."""
    found = [Room(available, "host") for available in _host_available(root)]
    for path in _cgroups(root):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(f"{path}/{limit_name}"), _number(f"{path}/{used_name}")
            if limit is not None and used is not None and limit < _UNLIMITED:
                # Inactive page cache is given back before anybody is killed.
                cache = _field(f"{path}/memory.stat", "inactive_file") or 0
                found.append(Room(max(0, limit - used + min(cache, used)), f"cgroup {limit_name}"))
    return min(found, key=lambda one: one.available_bytes, default=Room(_UNLIMITED, "unknown"))


def create(nbytes: int, *, root: str = "/") -> int:
    """A memfd of `nbytes` zero bytes, its pages there and its size sealed. SnapshotError: no room."""
    have = room(root)
    if nbytes > have.available_bytes - RESERVE_BYTES:
        raise SnapshotError(
            "not enough memory for a snapshot",
            needed_bytes=nbytes,
            available_bytes=have.available_bytes,
            reserve_bytes=RESERVE_BYTES,
            limit=have.limit,
        )
    fd = os.memfd_create("holdfast-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        # Takes the memory, or says that it is not there; then each page is written once, here, because a
        # first touch costs a rank many times its copy. write() drops the GIL, madvise() would hold it.
        os.posix_fallocate(fd, 0, nbytes)
        zeros = memoryview(bytes(min(_CHUNK_BYTES, nbytes)))
        done = 0
        while done < nbytes:
            done += os.pwrite(fd, zeros[: nbytes - done], done)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_sealed(fd: int) -> bool:
    """Whether `fd` is memory that cannot shrink under a mapping."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def read_only(fd: int) -> int:
    """A new descriptor of the same memory that cannot be mapped writable."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


class MappedHalf:
    """A descriptor, its mapping, and the Half in it. Owns the descriptor from the first line on.

    Not writable means a private view: writes stay in this process and never reach the arena.
    """

    def __init__(self, fd: int, job: str, *, slot: int, index: int, writable: bool = True) -> None:
        self.slot: Final = slot
        self.index: Final = index
        self._fd = fd
        self._map: mmap.mmap | None = None
        try:
            self.nbytes: Final = os.fstat(fd).st_size
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
            self._map = mmap.mmap(fd, self.nbytes, access=access)
            self.half: Final = Half(self._map, job, writable=writable)
        except (OSError, ValueError) as error:
            self._unmap()
            raise SnapshotCorrupt("cannot map an arena", slot=slot, half=index, reason=str(error)) from error
        except BaseException:
            self._unmap()
            raise

    @property
    def fd(self) -> int:
        """The descriptor, to be offered to the next manager; -1 once closed."""
        return self._fd

    @property
    def memory_number(self) -> int:
        """The same for every descriptor of this memory, and for no other memory while this one is held."""
        return os.fstat(self._fd).st_ino

    def same_memory(self, fd: int) -> bool:
        """Whether `fd` is this very memory."""
        ours, theirs = os.fstat(self._fd), os.fstat(fd)
        return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)

    def close(self) -> None:
        """Let go of it. Views that are still held keep the mapping, until the last of them goes."""
        if self._fd < 0:
            return
        self.half.release()
        self._unmap()

    def _unmap(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # a view is alive: it owns the mapping now
                mapping.close()

    def __enter__(self) -> MappedHalf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _host_available(root: str) -> list[int]:
    kib = _field(os.path.join(root, "proc/meminfo"), "MemAvailable:")
    return [] if kib is None else [kib * 1024]


def _cgroups(root: str) -> list[str]:
    """Directories of our memory cgroups, from our own up to the root, in v1 and v2."""
    found = []
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base = os.path.join(root, "sys/fs/cgroup", "memory" if controllers else "")
        parts = [part for part in path.split("/") if part and part != ".."]
        found += [os.path.join(base, *parts[:depth]) for depth in range(len(parts), -1, -1)]
    return found


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _number(path: str) -> int | None:
    """The number in a file; None for no such file and for "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _field(path: str, name: str) -> int | None:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.split():
            return int(value.split()[0])
    return None

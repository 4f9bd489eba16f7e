"""Every call that changes the disk, in one place; and errors of the file system as one clear line.

    writer ──▶ Disk ──▶ the system            a test hands in a Disk that fails, or dies, at the n-th call

Invariants:

* pwrite() writes all of it or raises;
* after fsync_directory() of a folder a rename in it survives a loss of power (but with `Unsynced`);
* nothing here decides what a checkpoint is.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

from .errors import StorageError

WRITE_BACK_BYTES: Final = 256 << 10
"""Writes from this size on start on their way to the disk at once; smaller ones wait for the fsync."""
_SYNC_FILE_RANGE_WRITE: Final = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained(path: Path | str, doing: str) -> Iterator[None]:
    """OSError inside becomes StorageError: what was done to which file, and what would help."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = _free_bytes(Path(path))
            raise StorageError(f"no space left while {doing}", file=str(path), free_bytes=free) from error
        raise StorageError(f"{error.strerror or error} while {doing}", file=str(path)) from error


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


class Disk:
    """The calls that change something. Raises OSError; callers wrap a whole operation in explained()."""

    durable: ClassVar[bool] = True
    """Whether what fsync() was called for outlives a loss of power."""

    def open(self, path: Path, *, create: bool = True) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        return os.open(path, flags, 0o666)

    def allocate(self, fd: int, nbytes: int) -> None:
        """Give the file its size, with its blocks where the file system can: a full disk is found here."""
        if nbytes:
            try:
                os.posix_fallocate(fd, 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(fd, nbytes)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> None:
        while data.nbytes:
            done = os.pwrite(fd, data, offset)
            if done >= WRITE_BACK_BYTES and self.durable:
                write_back(fd, offset, done)
            data, offset = data[done:], offset + done

    def append(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view.nbytes:
            view = view[os.write(fd, view) :]

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_file(self, path: Path) -> None:
        """Of several new files, fsync after all are written: the first then commits the names of all."""
        self._fsync_path(path, os.O_NOFOLLOW)

    def fsync_directory(self, path: Path) -> None:
        self._fsync_path(path, os.O_DIRECTORY)

    def _fsync_path(self, path: Path, flags: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def write_file(self, path: Path, data: bytes, *, sync: bool = True) -> None:
        """A whole file at once; with `sync`, durable on return."""
        fd = self.open(path)
        try:
            os.ftruncate(fd, 0)
            self.pwrite(fd, memoryview(data), 0)
            if sync:
                self.fsync(fd)
        finally:
            os.close(fd)


class Unsynced(Disk):
    """Leaves it to the system when the disk gets what is written: for targets that can be made again.

    A disk that fails, or is full, only then is nobody's error any more.
    """

    durable: ClassVar[bool] = False

    def fsync(self, fd: int) -> None:
        del fd


def write_back(fd: int, offset: int, nbytes: int) -> None:
    """Have the kernel begin to write a range out, and go on.

    All of it left to one fsync at the end, the disk idles while we compute and we wait while it writes; and a
    writer with much unwritten behind it is slowed down by the kernel, to a fifth of the disk's speed where this
    was measured. A hint: nothing depends on it, and where it is not known it does nothing.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], Any] | None:
    import ctypes

    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call.restype = ctypes.c_int
    found: Callable[[int, int, int, int], Any] = call
    return found

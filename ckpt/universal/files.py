"""Open files of a checkpoint: a bounded number of descriptors, and no way out of the root.

    lease(path) ──▶ descriptor, kept open for the next lease; the least recently used one is closed

Reads whole ranges or raises; counts the bytes. A file of our own format that leads out of its folder by a
link is refused; in other people's folders (Hugging Face's cache is one of links) links are followed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from .chunks import digest
from .disk import explained
from .errors import CorruptError, IncompleteError

OPEN_MAX: Final = 128
PROBE_BYTES: Final = 4096


def block(nbytes: int) -> memoryview:
    """Memory to read into again and again: private, page-aligned, and touched only where it is used."""
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class _Open:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.leases = 0


class Files:
    """Files below a root. Safe to use from several threads."""

    def __init__(self, root: Path, *, links: bool) -> None:
        self.root: Final = root
        self.bytes_read = 0
        self.reads = 0
        self._links = links
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()

    @contextlib.contextmanager
    def lease(self, path: str) -> Iterator[int]:
        """A descriptor of root/path, valid inside the block."""
        with self._lock:
            found = self._open.get(path)
            if found is None:
                found = self._open[path] = _Open(self._fd(path))
            self._open.move_to_end(path)
            found.leases += 1
            idle = [name for name, file in self._open.items() if not file.leases]
            for name in idle[: max(0, len(self._open) - OPEN_MAX)]:
                os.close(self._open.pop(name).fd)
        try:
            yield found.fd
        finally:
            with self._lock:
                found.leases -= 1

    def _fd(self, path: str) -> int:
        full = self.root / path
        if not self._links and not full.resolve().is_relative_to(self.root.resolve()):
            raise CorruptError("a link that leaves the checkpoint", file=path)
        try:
            with explained(full, "reading a checkpoint"):
                # A pipe in place of a file must not hang us.
                return os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except Exception as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise IncompleteError("a file of the checkpoint is not there", file=path) from error
            raise

    def size(self, path: str) -> int:
        with self.lease(path) as fd:
            return os.fstat(fd).st_size

    def read_into(self, path: str, offset: int, out: Any) -> None:
        """Fill `out`, a writable byte buffer, from byte `offset` of the file."""
        view = memoryview(out)
        done = reads = 0
        # Text, not a Path: to put one together takes as long as to read 100 KiB.
        with self.lease(path) as fd, explained(f"{self.root}/{path}", "reading a checkpoint"):
            while done < view.nbytes:
                got = os.preadv(fd, [view[done:]], offset + done)
                reads += 1
                if not got:
                    raise IncompleteError(
                        "the file ends too early", file=path, bytes=offset + done, wanted=offset + view.nbytes
                    )
                done += got
        with self._lock:
            self.bytes_read += done
            self.reads += reads

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].fd)


def probe(files: Files, path: str, size: int) -> str:
    """xxh3-128 of the first and last 4 KiB: tells two files apart without reading them."""
    head = bytearray(min(PROBE_BYTES, size))
    tail = bytearray(min(PROBE_BYTES, size))
    files.read_into(path, 0, head)
    files.read_into(path, size - len(tail), tail)
    return digest(bytes(head) + bytes(tail))

"""Writing past the page cache, where the file system lets us: what a conversion writes, nobody reads next.

    |edge|────────── whole pages: aligned memory ──▶ disk ──────────|edge|
      └─ page cache                                                   └─ page cache

A copy into the cache costs the processor more than all else that a conversion does, throws out what others keep there,
and is throttled where much is dirty. Does not make anything durable: that is fsync's. Invariants:

* a page is written either through the cache or past it, never both: the two cannot overtake each other;
* a file system that does not know how is written to as ever.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Final

from .disk import Disk
from .files import block

PAGE_BYTES: Final = 4096
"""What offset, length and memory are aligned to: no less is asked for by any disk in use."""
DIRECT_BYTES_MIN: Final = 256 << 10
"""Each such write waits for the disk: below this the cache is quicker."""
BLOCK_BYTES: Final = 4 << 20


class DirectFile:
    """A file open twice: `fd`, which stays its owner's, and a descriptor that goes past the cache.

    `local`: where each thread has its aligned memory, one for all files.
    """

    def __init__(self, disk: Disk, path: Path, fd: int, local: threading.local) -> None:
        self.fd: Final = fd
        self._disk: Final = disk
        self._direct = _open(path) if disk.durable else -1  # who does not wait for the disk wants the cache
        self._local = local

    def pwrite(self, data: memoryview, offset: int) -> None:
        """All of `data` at `offset`. Safe to use from several threads, each with its own range."""
        low = -(-offset // PAGE_BYTES) * PAGE_BYTES
        high = (offset + data.nbytes) // PAGE_BYTES * PAGE_BYTES
        if self._direct < 0 or high - low < DIRECT_BYTES_MIN:
            self._disk.pwrite(self.fd, data, offset)
            return
        self._disk.pwrite(self.fd, data[: low - offset], offset)
        for start in range(low, high, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, high)
            self._aligned(data[start - offset : stop - offset], start)
        self._disk.pwrite(self.fd, data[high - offset :], high)

    def _aligned(self, data: memoryview, offset: int) -> None:
        if not hasattr(self._local, "memory"):
            self._local.memory = block(BLOCK_BYTES)
        memory: memoryview = self._local.memory[: data.nbytes]
        memory[:] = data
        try:
            self._disk.pwrite(self._direct, memory, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._disk.pwrite(self.fd, data, offset)  # wants another alignment than anybody's

    def close(self) -> None:
        """Give up the second descriptor."""
        direct, self._direct = self._direct, -1
        if direct >= 0:
            os.close(direct)


def _open(path: Path) -> int:
    flag = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flag) if flag else -1
    except OSError:  # tmpfs, and some network file systems: through the cache, then
        return -1

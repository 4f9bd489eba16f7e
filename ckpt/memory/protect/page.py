"""The shared word: which step this host has protected, readable by every rank without a call.

    memfd, one page:   | sequence | placement + 1 | step + 1 | alarms |        8-byte words, one writer

    protector  sequence odd ▸ placement, step ▸ sequence even          (store)
    rank       sequence even? ▸ words ▸ the same sequence? else again  (read)

Does not say what other hosts have: a step is safe when the *smallest* word of all hosts has reached it.
Invariants: a reader gets a pair that was stored together; nothing stored yet reads as (-1, -1).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from types import TracebackType
from typing import Final

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError

NO_DUTY: Final = (1 << 62) - 1
"""The step of a host that holds no parity: larger than any, so that a minimum over hosts ignores it."""
PAGE_BYTES: Final = 4096
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_TRIES: Final = 1 << 16
_ALARMS: Final = 3


class Page:
    """The reader's end. Owns `fd` from the first line on."""

    def __init__(self, fd: int) -> None:
        try:
            if os.fstat(fd).st_size < PAGE_BYTES:
                raise SnapshotCorrupt("not a protector's page", nbytes=os.fstat(fd).st_size)
            self._map = mmap.mmap(fd, PAGE_BYTES, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")

    def read(self) -> tuple[int, int]:
        """(placement, newest step protected under it by this host); step -1: none yet; NO_DUTY: none to hold."""
        for _ in range(_TRIES):
            before = self._words[0]
            placement, step = self._words[1], self._words[2]
            if not before & 1 and self._words[0] == before:
                return placement - 1, step - 1
        # A writer that died between two stores. Nothing is known then, and nothing is what we say.
        return -1, -1

    def alarms(self) -> int:
        """How often replicas were found to differ: whoever sees it grow asks for the status."""
        return self._words[_ALARMS]

    def close(self) -> None:
        """Let go of the mapping."""
        self._words.release()
        self._map.close()

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PageWriter:
    """The protector's end. One thread at a time."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("holdfast-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, PAGE_BYTES)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self._fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("Q")

    def store(self, placement: int, step: int) -> None:
        """Make (placement, step) what readers see."""
        if placement < -1 or step < -1:
            raise SnapshotError("a negative step on the page", placement=placement, step=step)
        self._words[0] += 1
        self._words[1], self._words[2] = placement + 1, step + 1
        self._words[0] += 1

    def load(self) -> tuple[int, int]:
        """What was stored last."""
        return self._words[1] - 1, self._words[2] - 1

    def alarm(self) -> None:
        """Make every reader look at the status."""
        self._words[_ALARMS] += 1

    def descriptor(self) -> int:
        """A new read-only descriptor; the caller owns it."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Free it; readers keep what they mapped."""
        self._words.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._fd)

"""The page that the saver shares with its host's ranks: a few words, so that neither ever calls the other.

    saver   DUE, BEAT_NS                 first step of which a checkpoint is wanted now; "I live"
    rank 0  LOSS, VALIDATED              validation loss of a step, which is known only after its snapshot began
    rank 0  RESERVED                     the step that every rank holds whole and leaves untouched for the saver

One file of one page that the agent makes before either starts; each word has one writer and is stored at once.
Invariants: a due step that nobody set reads as NO_STEP; a loss is read together with the step that it is of.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum
from pathlib import Path
from typing import Final

from holdfast.proto.errors import ConfigError
from holdfast.proto.ids import NO_STEP

PAGE_BYTES: Final = 4096
_MASK: Final = (1 << 64) - 1


class Word(IntEnum):
    """Index of each 8-byte word."""

    DUE = 0  # step + 1; 0: nothing is wanted
    BEAT_NS = 1  # monotonic clock
    VALIDATED = 2  # step + 1, stored after the loss
    LOSS = 3  # bits of a double
    RESERVED = 4  # step + 1; 0: none


class Page:
    """Either end. Does not own the file's name."""

    def __init__(self, path: Path | str) -> None:
        """Raises ConfigError if there is no such page."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"no page of the saver: {error.strerror}", path=str(path)) from error
        try:
            self._map = mmap.mmap(fd, PAGE_BYTES)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the page of the saver cannot be mapped: {error}", path=str(path)) from error
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")

    @staticmethod
    def create(path: Path) -> None:
        """Make the file, with nothing in it."""
        path.write_bytes(bytes(PAGE_BYTES))

    @property
    def due(self) -> int:
        """The first step of which a checkpoint is wanted; NO_STEP for none."""
        return self._words[Word.DUE] - 1

    @due.setter
    def due(self, step: int) -> None:
        assert step >= NO_STEP
        self._words[Word.DUE] = step + 1

    @property
    def beat_ns(self) -> int:
        """When the saver last said that it lives."""
        return self._words[Word.BEAT_NS]

    @beat_ns.setter
    def beat_ns(self, now_ns: int) -> None:
        self._words[Word.BEAT_NS] = now_ns & _MASK

    @property
    def reserved(self) -> int:
        """The step that all ranks of the job leave untouched, until nothing is due; NO_STEP for none."""
        return self._words[Word.RESERVED] - 1

    @reserved.setter
    def reserved(self, step: int) -> None:
        self._words[Word.RESERVED] = step + 1

    def validated(self, step: int, loss: float) -> None:
        """Rank 0: the validation loss of `step`."""
        self._words[Word.VALIDATED] = 0
        (self._words[Word.LOSS],) = struct.unpack("<Q", struct.pack("<d", loss))
        self._words[Word.VALIDATED] = step + 1

    def validation(self, step: int) -> float | None:
        """The validation loss of `step`, if it is there."""
        if self._words[Word.VALIDATED] != step + 1:
            return None
        (loss,) = struct.unpack("<d", struct.pack("<Q", self._words[Word.LOSS]))
        return float(loss) if self._words[Word.VALIDATED] == step + 1 else None

    def close(self) -> None:
        """Let go of it."""
        self._words.release()
        self._map.close()

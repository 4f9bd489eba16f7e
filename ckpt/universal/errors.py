"""What can go wrong with a checkpoint, by what the person at the terminal does about it.

    CheckpointError              exit
    ├─ UsageError                1    asked for something that cannot be done; nothing has started
    ├─ CorruptError              2    bytes are not what they should be
    ├─ IncompleteError           3    something is missing, or was never committed
    ├─ MappingError              4    names or shapes do not fit the mapping
    ├─ UnsafeError               5    reading it would run code
    ├─ StorageError              6    the disk: no space, no permission, no such file
    └─ LossyError                7    would lose something that nobody agreed to lose

Exit codes are a contract with scripts. Fields say which tensor, state, file and byte range.
"""

from __future__ import annotations

from typing import ClassVar

from holdfast.proto.errors import Effect, HoldfastError


class CheckpointError(HoldfastError):
    """Base: something about a checkpoint on disk."""

    effect: ClassVar[Effect] = "none"


class UsageError(CheckpointError):
    """What was asked for cannot be done; nothing has started."""

    exit_code: ClassVar[int] = 1


class CorruptError(CheckpointError):
    """Bytes, or a structure, that no correct writer leaves behind."""

    exit_code: ClassVar[int] = 2


class IncompleteError(CheckpointError):
    """Something that belongs to the checkpoint is not there."""

    exit_code: ClassVar[int] = 3


class MappingError(CheckpointError):
    """Names, shapes or layouts that do not fit together."""

    exit_code: ClassVar[int] = 4


class UnsafeError(CheckpointError):
    """Reading on would mean to execute what the file says; names the global."""

    exit_code: ClassVar[int] = 5


class StorageError(CheckpointError):
    """The file system said no."""

    exit_code: ClassVar[int] = 6


class LossyError(CheckpointError):
    """A step would lose something, and nobody allowed it."""

    exit_code: ClassVar[int] = 7

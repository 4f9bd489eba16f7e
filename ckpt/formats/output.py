"""A folder, or a file, that appears whole or not at all: what every writer of a foreign format writes into.

    with Folder(target) as folder:      .name.tmp-1f3a.../        fsync'd, then one rename
        write_torch(folder.path / ...)

The files inside are made durable by who writes them. What a crash leaves: before the rename a hidden folder
that no reader looks for, after it the whole output. Invariant: an existing target is never touched.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from ..universal.disk import Disk, explained
from ..universal.errors import UsageError


class Folder:
    """A folder in the making. `single` makes the one file of that name in it the target, instead of the folder."""

    def __init__(self, target: Path, *, disk: Disk | None = None, single: str = "") -> None:
        self.target = Path(os.path.abspath(target))
        self.disk = disk or Disk()
        self.single = single
        self.path = self.target.parent / f".{self.target.name}.tmp-{os.urandom(6).hex()}"
        refuse_existing(self.target)

    def __enter__(self) -> Self:
        with explained(self.path, "making a folder to write to"):
            self.disk.mkdir(self.path)
        return self

    def folder(self, name: str) -> Path:
        """A folder inside."""
        path = self.path / name
        with explained(path, "making a folder"):
            for parent in [*reversed(path.relative_to(self.path).parents), Path(name)]:
                self.disk.mkdir(self.path / parent)
        return path

    def text(self, name: str, text: str) -> None:
        """A small file inside."""
        with explained(self.path / name, "writing a file"):
            self.disk.write_file(self.path / name, text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError):
                self.disk.remove_tree(self.path)
            return
        with explained(self.target, "committing the output"):
            for inner in sorted((p for p in self.path.rglob("*") if p.is_dir()), reverse=True):
                self.disk.fsync_directory(inner)
            self.disk.fsync_directory(self.path)
            refuse_existing(self.target)
            self.disk.rename(self.path / self.single if self.single else self.path, self.target)
            self.disk.fsync_directory(self.target.parent)
            if self.single:
                self.disk.remove_tree(self.path)


def refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise UsageError("the target is there already: choose another name, or remove it", target=str(target))
    if not target.parent.is_dir():
        raise UsageError("the folder to write to is not there", folder=str(target.parent))

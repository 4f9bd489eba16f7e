"""A checkpoint's folder whose files are all in place already: what a Writer commits that several hosts have filled.

    parts of all hosts, each durable ──▶ files moved into one folder ──▶ Assembled ──▶ Writer.take_over() ▸ commit()

Removing it hides it first, so that a commit that comes at the same moment, from a host that was given up, finds either
all files or no folder. Does not look at the files: who wrote them says what is in them. Invariant: the folder is not
under a name that a reader takes for a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .disk import Disk, explained
from .layout import Layout
from .model import FileFacts, TensorState


class Assembled:
    """Stands for a Stage: see write.py."""

    def __init__(self, folder: Path, identity: str, layout: Layout, facts: Mapping[str, FileFacts], disk: Disk) -> None:
        self.folder = folder
        self.id = identity
        self.layout = layout
        self._facts = facts
        self._disk = disk

    def finished(self) -> tuple[dict[tuple[str, str], TensorState], dict[str, FileFacts]]:
        """The tensors with their digests, and the files."""
        return dict(self.layout.states), dict(self._facts)

    def close(self, *, remove: bool = False) -> None:
        """Nothing is held; `remove`: it is to go."""
        if remove:
            remove_hidden(self.folder, self._disk)


def remove_hidden(folder: Path, disk: Disk) -> None:
    """Take a folder away whose writer may still live: from then on it cannot get its name any more."""
    hidden = folder.parent / f".{folder.name.lstrip('.').partition('.')[0]}.removed-{os.urandom(4).hex()}"
    with explained(folder, "removing an unfinished write"):
        try:
            disk.rename(folder, hidden)
        except FileNotFoundError:
            return
        disk.remove_tree(hidden)

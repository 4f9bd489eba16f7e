"""The journal of a write: which chunks are in their place, so that an interrupted one can be taken up.

    ["holdfast-journal",1,PLAN,ID]           first line: which plan, which checkpoint
    ["c",SLAB,CHUNK,"DIGEST"]                one line per finished chunk
    ["z",FILE,[[OFFSET,CHUNK_BYTES,[STORED..],[DIGEST..]]..]]     a file that was compressed: its slabs, in order

Lines are appended without fsync: they outlive a killed process but not a loss of power, and neither may the
data they speak of. So whoever takes up a write reads every chunk again and believes only matching digests.
A torn last line is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .disk import Disk

FILE_NAME: Final = "JOURNAL"
_MAGIC: Final = "holdfast-journal"
_VERSION: Final = 1

Packed = list[tuple[int, int, tuple[int, ...], tuple[str, ...]]]
"""For each slab of a compressed file: offset, chunk size, stored sizes, digests."""


@dataclass(slots=True)
class Told:
    """What a journal says, unverified."""

    plan: str
    id: str
    chunks: dict[tuple[int, int], str] = field(default_factory=dict)
    packed: dict[int, Packed] = field(default_factory=dict)


class Journal:
    """Appends. Not locked: the writer calls it under its own lock."""

    def __init__(self, disk: Disk, folder: Path, plan: str, checkpoint_id: str, *, fresh: bool) -> None:
        self._disk = disk
        self._fd = os.open(folder / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if fresh:
            os.ftruncate(self._fd, 0)
            disk.append(self._fd, _line([_MAGIC, _VERSION, plan, checkpoint_id]))
        else:  # a torn last line must not swallow the next one
            disk.append(self._fd, b"\n")

    def chunks(self, done: Iterable[tuple[int, int, str]]) -> None:
        # Not json.dumps: tens of thousands of lines a second, of two numbers and hexadecimal digits.
        text = "".join(f'["c",{slab},{chunk},"{digest}"]\n' for slab, chunk, digest in done)
        self._disk.append(self._fd, text.encode())

    def packed(self, file: int, slabs: Packed) -> None:
        self._disk.append(self._fd, _line(["z", file, slabs]))

    def close(self) -> None:
        os.close(self._fd)


def _line(value: Sequence[Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def read_journal(folder: Path) -> Told | None:
    """What the journal of a folder says; None without one that can be read."""
    try:
        lines = (folder / FILE_NAME).read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    match _value(lines[0]):
        case ["holdfast-journal", 1, str(plan), str(checkpoint_id)]:
            told = Told(plan, checkpoint_id)
        case _:
            return None
    for line in lines[1:]:
        match _value(line):
            case ["c", int(slab), int(chunk), str(digest)]:
                told.chunks[slab, chunk] = digest
            case ["z", int(file), list(slabs)]:
                told.packed[file] = [(at, size, tuple(stored), tuple(digests)) for at, size, stored, digests in slabs]
    return told


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None

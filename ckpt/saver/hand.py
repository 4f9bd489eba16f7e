"""What one host does for a checkpoint of several: says what it holds, copies its shares, writes its part.

    held() ─▶ slot -> steps     take(step, slots) ─▶ shares, told     write(pieces) ─▶ .step-N.tmp-A/.part-00001.tmp-../
                                memory is kept from take() to drop()                     durable, and its manifest

Whoever leads (team.py) calls it, here or through the network (peers.py). Decides nothing. Invariants:

* it writes below the folder of the attempt only, and only what is in its own memory;
* one attempt at a time: another one that comes while this one writes is refused;
* drop() ends a write that is under way, and gives all memory back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast.proto.errors import ProtocolViolation, SnapshotError, SnapshotIncomplete
from holdfast.proto.ids import NO_STEP

from ..dtypes import ITEM_BYTES
from ..memory.client import SmpClient
from ..universal.disk import Disk, explained
from ..universal.journal import FILE_NAME as JOURNAL
from ..universal.manifest import encode
from ..universal.model import Checkpoint, safe_path
from ..universal.staging import Stage, WriteOptions
from .choose import WHOLE
from .copy import Taken, free, take
from .divide import Piece
from .told import describe

log = logging.getLogger("holdfast.saver")

BLOCK_BYTES: Final = 32 << 20
"""Written in one go; between two of them a write that nobody waits for any more ends."""


@dataclass(frozen=True, slots=True)
class Written:
    """A part that is durable."""

    folder: str
    """Below the folder of the attempt."""
    manifest: bytes


class Hand:
    """See the module's docstring. Any thread."""

    def __init__(self, connect: Callable[[], SmpClient], folder: Path, disk: Disk) -> None:
        self._connect = connect
        self._folder = folder
        self._disk = disk
        self._lock = threading.Lock()
        self._attempt = ""
        self._taken: list[Taken] = []
        self._dropped = threading.Event()

    def held(self) -> dict[int, list[int]]:
        """Slot -> steps that this host holds whole."""
        found: dict[int, list[int]] = {}
        client = self._connect()
        try:
            for half in client.list():
                if half.slot >= 0 and half.state in WHOLE and half.step != NO_STEP:
                    found.setdefault(half.slot, []).append(half.step)
        finally:
            client.close()
        return found

    def take(self, attempt: str, step: int, slots: Iterable[int]) -> list[dict[str, Any]]:
        """Copy these slots' shares into our memory; what they are. SnapshotIncomplete: not to be had (any more)."""
        if not self._lock.acquire(blocking=False):
            raise SnapshotError("another checkpoint is being written", step=step)
        try:
            self._forget()
            client = self._connect()
            try:
                halves = client.list()
                here = {half.slot for half in halves if half.step == step and half.state in WHOLE}
                if missing := sorted(set(slots) - here):
                    raise SnapshotIncomplete("not held here (any more)", step=step, slots=missing)
                self._taken = take(client, step, halves, slots)
            finally:
                client.close()
            self._attempt = attempt
            self._dropped.clear()
            return [describe(one) for one in self._taken]
        except BaseException:
            self._forget()
            raise
        finally:
            self._lock.release()

    def write(self, attempt: str, folder: str, identity: str, number: int, pieces: Sequence[Piece]) -> Written:
        """Write the pieces as part `number` below `folder`, durable."""
        with self._lock:
            if attempt != self._attempt or not attempt:
                raise SnapshotIncomplete("the shares of that checkpoint are not in memory any more")
            root = self._folder / folder
            if not safe_path(folder) or "/" in folder or not root.is_dir():
                raise SnapshotError("the folder of that checkpoint is not there", folder=folder)
            return self._write(root, identity, number, pieces)

    def _write(self, root: Path, identity: str, number: int, pieces: Sequence[Piece]) -> Written:
        by_slot = {one.slot: one for one in self._taken}
        plans = [piece.plan() for piece in pieces]
        stage = Stage(root / f"part-{number:05}", plans, WriteOptions(id=identity), self._disk)
        try:
            for piece, plan in zip(pieces, plans, strict=True):
                data = _bytes_of(by_slot, piece)
                step = max(1, BLOCK_BYTES // ITEM_BYTES[plan.dtype])
                for start in range(0, piece.stop - piece.start, step):
                    if self._dropped.is_set():
                        raise SnapshotIncomplete("nobody waits for this part any more")
                    stop = min(start + step, piece.stop - piece.start)
                    item = ITEM_BYTES[plan.dtype]
                    stage.put(plan.name, plan.state, data[start * item : stop * item], (start, stop))
            states, facts = stage.finished()
            part = Checkpoint(root=stage.folder, format="holdfast", states=states, files=facts, id=identity)
            with explained(stage.folder, "making a part of a checkpoint durable"):
                for path in sorted({folder for name in facts for folder in Path(name).parents}, reverse=True):
                    self._disk.fsync_directory(stage.folder / path)
                self._disk.unlink(stage.folder / JOURNAL)
            return Written(stage.folder.name, encode(part))
        finally:
            stage.close()

    def stop(self, attempt: str) -> None:
        """Nobody waits for what is being written for that attempt."""
        if attempt and attempt == self._attempt:
            self._dropped.set()

    def drop(self, attempt: str) -> None:
        """That attempt is over, well or not."""
        self.stop(attempt)
        if attempt and attempt == self._attempt:
            with self._lock:
                if attempt == self._attempt:
                    self._forget()

    def close(self) -> None:
        """Give all memory back."""
        self.drop(self._attempt)

    def _forget(self) -> None:
        free(self._taken)
        self._taken, self._attempt = [], ""


def _bytes_of(by_slot: dict[int, Taken], piece: Piece) -> memoryview:
    taken = by_slot.get(piece.slot)
    if taken is None or not 0 <= piece.entry < len(taken.entries):
        raise ProtocolViolation("a piece of what is not held here", slot=piece.slot, entry=piece.entry)
    entry = taken.entries[piece.entry]
    low, high = piece.start - entry.start, piece.stop - entry.start
    if not 0 <= low <= high <= entry.stop - entry.start or entry.dtype != piece.dtype:
        raise ProtocolViolation("a piece beyond the entry that it is of", slot=piece.slot, name=piece.name)
    item = ITEM_BYTES[entry.dtype]
    return taken.view(entry)[low * item : high * item]

"""Out of the arenas into memory of our own, and only then is it ours: verified, and of one fill from end to end.

    open ▸ table ▸ copy of the data ▸ digest of the copy == what was sealed, if it was yet ▸ still that fill? ▸ Taken

The copy is the only thing that ranks wait for with their next snapshots, so nothing else happens meanwhile; what
comes after (composing, writing) reads only our own memory. Memory is asked for before it is taken. Invariants:

* a Taken holds exactly the bytes that were sealed, or, where the manager has not judged them yet, those that it will
  judge, whatever the ranks do after;
* free() gives all of it back.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError

from ..memory.arena import Half, State, Word
from ..memory.client import HalfInfo, SmpClient
from ..memory.digest import DIGEST_BYTES, digest_of
from ..memory.memfd import RESERVE_BYTES, room
from ..memory.metadata import unmarked
from ..memory.table import HEADER_BYTES, ArenaEntry
from .choose import WHOLE

_CHUNK_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Taken:
    """One slot's share of the state after `step`, in our memory."""

    slot: int
    step: int
    entries: tuple[ArenaEntry, ...]
    metadata: Any
    """As it was encoded."""
    memory: mmap.mmap

    def view(self, entry: ArenaEntry) -> memoryview:
        """The bytes of one entry."""
        start = entry.offset - HEADER_BYTES
        return memoryview(self.memory)[start : start + entry.nbytes]

    def data(self, entry: ArenaEntry) -> memoryview:
        """The same, for who writes it."""
        return self.view(entry)

    def digest(self, entry: ArenaEntry) -> bytes:
        """Of the bytes of one entry: two copies of a state are compared by it."""
        return digest_of(self.view(entry))

    def free(self) -> None:
        """Give the memory back; if somebody still holds a view (an error's traceback may), when that goes."""
        with contextlib.suppress(BufferError):
            self.memory.close()


def take(client: SmpClient, step: int, halves: Iterable[HalfInfo], slots: Iterable[int]) -> list[Taken]:
    """The shares of all `slots` after `step`. SnapshotIncomplete: overwritten meanwhile, or there is no memory."""
    where = {half.slot: half for half in halves if half.step == step and half.state in WHOLE}
    wanted = sorted(slots)
    needed, have = sum(where[slot].nbytes for slot in wanted), room()
    if needed > have.available_bytes - RESERVE_BYTES:
        raise SnapshotError(
            "not enough memory to copy the snapshots", needed_bytes=needed, available_bytes=have.available_bytes
        )
    taken: list[Taken] = []
    try:
        for slot in wanted:
            taken.append(_take(client, where[slot]))
    except BaseException:
        free(taken)
        raise
    return taken


def free(taken: Iterable[Taken]) -> None:
    """Give the memory of all back."""
    for one in taken:
        one.free()


def _take(client: SmpClient, held: HalfInfo) -> Taken:
    with client.open(held.slot, held.half) as mapped:
        half = mapped.half
        table = half.read(held.step)
        start, nbytes = HEADER_BYTES, _word(half.memory, Word.DATA_BYTES)
        if start + nbytes > half.nbytes:
            raise SnapshotCorrupt("the data does not lie in the arena", slot=held.slot, step=held.step)
        memory = mmap.mmap(-1, max(nbytes, 1))
        try:
            with memoryview(memory) as ours:
                for at in range(0, nbytes, _CHUNK_BYTES):
                    stop = min(at + _CHUNK_BYTES, nbytes)
                    ours[at:stop] = half.memory[start + at : start + stop]
                found = digest_of(ours[:nbytes])
            sealed = _seal(half, held)
            half.confirm(table)
            if sealed is not None and found != sealed:
                client.corrupt(held.slot, held.half, held.step)
                raise SnapshotCorrupt("the data is not what was sealed", slot=held.slot, step=held.step)
        except BaseException:
            memory.close()
            raise
        return Taken(held.slot, table.step, table.entries, unmarked(table.metadata), memory)


def _seal(half: Half, held: HalfInfo) -> bytes | None:
    """The digest that the half's fill was sealed with; None as long as nobody has judged it."""
    state, _, _ = half.peek()  # before the digest, which is stored first
    if state is State.CORRUPT:
        raise SnapshotCorrupt("the half is marked corrupt", slot=held.slot, step=held.step)
    stored = bytes(half.memory[Word.DATA_DIGEST * 8 : Word.DATA_DIGEST * 8 + DIGEST_BYTES])
    return stored if state is State.SEALED else None


def _word(memory: memoryview, word: Word) -> int:
    return int.from_bytes(memory[word * 8 : word * 8 + 8], "little")

"""What this host's snapshot manager holds, mapped, with the seal record of each sealed half.

    SMP ── watch ──▶ refresh(): halves that changed ──▶ digest thread: one pass ──▶ record ──▶ news
                                                  └──▶ trouble(slot, half): CORRUPT, or a damaged header

A half is offered to anybody only with a record, and so after all its bytes were digested here and found to be
what was sealed. Does not repair and does not talk to other hosts. Invariants:

* memory that the manager replaced is forgotten; views of it stay valid while they are kept;
* a record stays with its half while no later fill has begun, however damaged the half is: it is the cure.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError, SnapshotIncomplete

from ..arena import Half, State, Word
from ..client import HalfInfo, SmpClient
from ..digest import digest_of
from ..table import HEADER_BYTES, Table
from . import pen
from .client import PARITY_SLOT
from .news import News
from .options import PAYLOAD_BYTES_MAX
from .record import Record, cut, image_end_of, measure

if TYPE_CHECKING:
    from ..placement import Placement

log = logging.getLogger("holdfast.protect")


@dataclass(slots=True, eq=False)
class Held:
    """One fill of one half."""

    slot: int
    index: int
    memory: int
    half: Half
    state: State
    step: int
    fill: int
    record: Record | None = None
    tail: bytes = b""
    table: Table | None = None
    tried: int = -2
    """The placement under which a record could not be made."""

    @property
    def key(self) -> tuple[int, int]:
        """(slot, half)."""
        return self.slot, self.index

    @property
    def token(self) -> int:
        """Names this fill to peers: both halves may hold the same step, after the same number of fills."""
        return self.fill << 1 | self.index

    def current(self) -> bool:
        """Whether STATE still names this fill: true after the bytes were taken means that they are its bytes."""
        return pen.word_at(self.half, Word.STATE) == self.fill << 8 | State.COPIED

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes of the image."""
        if not 0 <= start <= stop <= self.half.nbytes - HEADER_BYTES:
            raise SnapshotIncomplete("no such bytes in this half", slot=self.slot, start=start, stop=stop)
        return self.half.memory[HEADER_BYTES + start : HEADER_BYTES + stop]


@dataclass(slots=True)
class Local:
    """The manager's halves. refresh() belongs to the watch thread, make_record() to the digest thread."""

    client: SmpClient
    job: str
    news: News
    trouble: Callable[[int, int], None] = lambda slot, half: None
    placement: Placement | None = None
    error: str = ""
    _held: dict[tuple[int, int], Held] = field(default_factory=dict)
    _mapped: dict[tuple[int, int], tuple[int, Half]] = field(default_factory=dict)
    """(slot, half) -> number of the memory, and its only mapping here."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> list[Held]:
        """Every half, whatever it holds."""
        with self._lock:
            return list(self._held.values())

    def sealed(self) -> list[Held]:
        """Every half with a record whose fill is still there."""
        return [held for held in self.all() if held.record is not None and held.current()]

    def at(self, slot: int, index: int) -> Held | None:
        """One half."""
        with self._lock:
            return self._held.get((slot, index))

    def find(self, slot: int, step: int, *, token: int = -1, placement: int | None = None) -> Held | None:
        """A half with a record of that slot and step (and of that fill, and under that placement)."""
        for held in self.sealed():
            record = held.record
            if record is None or (held.slot, held.step) != (slot, step) or token not in (-1, held.token):
                continue
            if placement is None or record.placement == placement:
                return held
        return None

    # ---- the watch thread -------------------------------------------------------------------------------

    def refresh(self, listed: tuple[HalfInfo, ...]) -> None:
        """Take over what the manager says that it holds."""
        keys = {(info.slot, info.half) for info in listed}
        with self._lock:
            for key in [key for key in self._held if key not in keys]:
                del self._held[key]
                self._mapped.pop(key, None)
        troubled = [info for info in listed if self._take(info)]
        self.news.bump()
        for info in troubled:
            self.trouble(info.slot, info.half)

    def _take(self, info: HalfInfo) -> bool:
        """Note one half; whether there is something to repair."""
        key = (info.slot, info.half)
        old = self.at(*key)
        if old is not None and old.memory == info.memory:
            if old.record is not None and not pen.overtaken(old.half, old.record):
                old.state = State[info.state]
                return old.state is not State.SEALED or not pen.header_intact(old.half, old.record, self.job)
            half = old.half
        else:
            half = self.mapping(info.slot, info.half, info.memory)
        state = State[info.state]
        if old is not None and old.half is half and (old.state, old.step, old.fill) == (state, info.step, info.fill):
            return False
        held = Held(info.slot, info.half, info.memory, half, state, info.step, info.fill)
        with self._lock:
            self._held[key] = held
        return state is State.CORRUPT

    def mapping(self, slot: int, index: int, number: int) -> Half:
        """The half in that memory (any thread). Mapped once: to map much memory, and to unmap it, takes time."""
        key = (slot, index)
        with self._lock:
            known, half = self._mapped.get(key, (-1, None))
            if half is not None and known == number:
                return half
        with self.client.arena(slot, index, 1) as mapped:
            number = mapped.memory_number
            # Lives exactly as long as somebody has a view of it.
            half = Half(mmap.mmap(mapped.fd, mapped.nbytes, access=mmap.ACCESS_WRITE), self.job)
        pen.drop(half)  # of a protector that died with it
        with self._lock:
            known, other = self._mapped.get(key, (-1, None))
            if other is not None and known == number:
                return other
            self._mapped[key] = number, half
        return half

    # ---- the digest thread ------------------------------------------------------------------------------

    def undigested(self) -> list[Held]:
        """Sealed halves without a record under the current placement, parity first: it is what ranks wait for."""
        number = self.placement.number if self.placement is not None else -1
        found = []
        for held in self.all():
            if held.state is not State.SEALED or held.tried == number or not held.current():
                continue
            if held.record is None or (held.slot != PARITY_SLOT and held.record.placement != number):
                found.append(held)
        return sorted(found, key=lambda held: (held.slot != PARITY_SLOT, -held.step, held.slot))

    def make_record(self, held: Held) -> None:
        """Digest a half in one pass, and note its record if it is what was sealed."""
        placement = self.placement
        number = placement.number if placement is not None else -1
        try:
            record, tail, table = self._measure(held, placement)
        except SnapshotCorrupt as error:
            held.tried = number
            log.warning("slot %d half %d step %d is not what was sealed: %s", *held.key, held.step, error)
            self.client.corrupt(held.slot, held.index, held.step)
            return
        except SnapshotError as error:
            held.tried = number
            if held.current():
                self.error = str(error)
            return
        held.tail, held.table, held.record = tail, table, record
        self.news.bump()

    def _measure(self, held: Held, placement: Placement | None) -> tuple[Record, bytes, Table]:
        half = held.half
        table = half.read(held.step)
        words = pen.words_of(half)
        offset, length, data_bytes = words[Word.TABLE_OFFSET], words[Word.TABLE_BYTES], words[Word.DATA_BYTES]
        image_end = image_end_of(table, offset)
        if held.slot == PARITY_SLOT:
            number = table.incarnation
            places = [(entry.offset - HEADER_BYTES, entry.nbytes) for entry in table.entries]
            ranges = [(start, start + nbytes) for start, nbytes in places]
        else:
            number = placement.number if placement is not None else -1
            chunks = [chunk for s in placement.stripes for chunk in s.data] if placement is not None else []
            ranges = cut([(c.start, c.stop) for c in chunks if c.slot == held.slot], image_end - HEADER_BYTES)
        found, digest = measure(half.memory, ranges, first=HEADER_BYTES, data_bytes=data_bytes)
        tail = bytes(half.memory[image_end : offset + length])
        sealed = pen.sealed_digest(half)
        if not held.current():
            raise SnapshotIncomplete("overwritten while it was digested", slot=held.slot, step=held.step)
        if digest != sealed:
            raise SnapshotCorrupt("the data is not what was sealed", sealed=sealed, found=digest)
        if len(tail) > PAYLOAD_BYTES_MAX // 2:
            raise SnapshotError("a tail too large to be mirrored", slot=held.slot, nbytes=len(tail))
        record = Record(
            slot=held.slot,
            step=held.step,
            fill=held.fill,
            plan=table.plan_digest.hex(),
            incarnation=table.incarnation,
            table_offset=offset,
            table_bytes=length,
            data_bytes=data_bytes,
            image_end=image_end,
            data_digest=digest,
            table_digest=digest_of(tail[len(tail) - length :]).hex(),
            placement=number,
            chunks=found,
        )
        return record, tail, table

"""The layout of one half: one step of one slot's state in shared memory, readable after its writer died.

    0                4096                                  64 B aligned                    end of the memfd
    | header page    | data: each tensor 64 B aligned      | table (JSON): entries, metadata | slack |
      STATE   fill << 8 | EMPTY, FILLING, COPIED           written by the rank alone
      VERDICT fill << 8 | SEALED, CORRUPT                  written by the manager alone

    rank     begin() STATE=FILLING ▸ header, table ▸ bytes ▸ finish() STATE=COPIED
    manager  digest while COPIED ▸ still the same fill? ▸ data digest ▸ VERDICT=SEALED
    reader   STATE, then VERDICT of the same fill ▸ header, table digest ▸ (verify: data digest) ▸ STATE again

A half is SEALED or CORRUPT only if the verdict is about the fill that STATE names. So each word has one
writer and no compare-and-swap is needed: a verdict that comes late, when the next fill has begun, says
nothing. `fill` counts the times this memory was begun. Opens no files, takes no shared memory. What a dead
writer left is in program order; while it lives, "still the same STATE" also needs its stores to be seen in
order: x86 does that, elsewhere the GIL's lock around each copy does. Invariants:

* STATE is FILLING before the first other byte of a fill changes, and COPIED after the last one: one aligned
  8-byte store each. A writer killed at any instruction leaves FILLING, or one whole step.
* No length or offset from a header or table is used before it is checked against the real size of the
  mapping. What does not fit is refused; bytes are never reinterpreted.
* Step, fill, plan and incarnation are in the digested table too, so that a flipped header bit is found.
* A repair (the protector's) writes under PEN, and only while STATE names its fill; begin() stores FILLING,
  then waits for PEN. So no byte of a repair lands in the next fill.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from enum import IntEnum
from mmap import mmap
from typing import Any, Final

from holdfast.proto.errors import HoldfastError, SnapshotCorrupt, SnapshotError, SnapshotIncomplete

from ..pieces import Piece
from .digest import DIGEST_BYTES, digest_of, digest_while
from .table import ALIGN_BYTES, HEADER_BYTES, ArenaEntry, Table, aligned, arena_bytes, layout, place

__all__ = ["HEADER_BYTES", "RESTORABLE", "ArenaEntry", "Half", "State", "Table", "arena_bytes", "layout"]

MAGIC: Final = b"HFARENA1"
VERSION: Final = 1
PLAN_DIGEST_BYTES: Final = 32
_FILL_MAX: Final = (1 << 56) - 1
_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF


class State(IntEnum):
    """What a half holds."""

    EMPTY = 0  # nothing was ever begun
    FILLING = 1  # a rank writes, or died writing
    COPIED = 2  # whole; not digested yet
    SEALED = 3  # whole and digested
    CORRUPT = 4  # its bytes are not those that were sealed, or its table is not what was copied


RESTORABLE: Final = frozenset({State.COPIED, State.SEALED})


PEN_S: Final = 1.0
"""A repair writes one block under the pen: milliseconds. Who holds it longer is stopped, or dead."""


class Word(IntEnum):
    """Index of each 8-byte word of the header."""

    MAGIC = 0
    VERSION = 1
    STATE = 2
    VERDICT = 3
    STEP = 4  # two's complement
    INCARNATION = 5
    TABLE_OFFSET = 6
    TABLE_BYTES = 7
    DATA_OFFSET = 8
    DATA_BYTES = 9
    TABLE_DIGEST = 10  # two words
    DATA_DIGEST = 12  # two words, written by the manager before VERDICT
    JOB = 14  # two words
    PLAN = 16  # four words
    PEN = 20  # the fill that is being repaired, or 0; written by the protector alone


class Half:
    """One half over a mapping. The rank that owns the slot writes it, the manager judges it, anybody reads.

    One thread at a time. Views that were handed out stay valid after release(), as long as they are kept.
    """

    def __init__(self, buffer: mmap | memoryview | bytearray, job: str, *, writable: bool = True) -> None:
        self._bytes: Final = memoryview(buffer).cast("B")
        if self._bytes.nbytes < HEADER_BYTES:
            raise SnapshotCorrupt("smaller than a header", nbytes=self._bytes.nbytes)
        self._words: Final = self._bytes[:HEADER_BYTES].cast("Q")
        self._job = digest_of(job.encode())
        self._writable = writable
        self._filling = 0  # the STATE word of the fill begun through this object
        self._placed: tuple[tuple[Piece, ...], tuple[ArenaEntry, ...], int] | None = None

    # ---- everybody ------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Size of the arena, header and slack included."""
        return self._bytes.nbytes

    @property
    def state(self) -> State:
        """What it holds now; CORRUPT for a state word that nobody writes."""
        return self.peek()[0]

    @property
    def step(self) -> int:
        """Step named by the header. Means something together with `state` only: see peek()."""
        return self._signed(Word.STEP)

    def peek(self) -> tuple[State, int, int]:
        """State, step and fill, all of the same fill, although a rank may write at this moment."""
        while True:
            word = self._words[Word.STATE]
            verdict = self._words[Word.VERDICT]
            step = self._signed(Word.STEP)
            if self._words[Word.STATE] == word:
                return _state(word, verdict), step, word >> 8

    def release(self) -> None:
        """Drop this object's own views, so that the mapping under it can be closed."""
        self._words.release()
        self._bytes.release()

    def check(self) -> None:
        """Raise SnapshotCorrupt unless this is an arena of our version and our job."""
        magic = self._words[Word.MAGIC].to_bytes(8, "little")
        if magic != MAGIC:
            raise SnapshotCorrupt("not an arena", magic=magic.hex())
        if self._words[Word.VERSION] != VERSION:
            raise SnapshotCorrupt("an arena of another version", version=self._words[Word.VERSION], ours=VERSION)
        if self._raw(Word.JOB, DIGEST_BYTES) != self._job:
            raise SnapshotCorrupt("an arena of another job")

    # ---- writer -----------------------------------------------------------------------------------------

    def begin(
        self, step: int, plan_digest: bytes, incarnation: int, entries: Sequence[Piece], metadata: Any
    ) -> tuple[ArenaEntry, ...]:
        """Start a fill and return where each piece goes; write all of them, then finish().

        Whatever can be refused is refused before the first store: until then the old step is whole.
        From the FILLING store on, until finish(), there is nothing to restore here.
        """
        assert self._writable, "a half opened for reading is a private copy: a snapshot in it would be lost"
        assert len(plan_digest) == PLAN_DIGEST_BYTES
        self.check()
        placed, data_end = self._place(entries)
        fill = self._words[Word.STATE] >> 8
        if fill >= _FILL_MAX:
            raise SnapshotCorrupt("a fill number that nobody reaches", fill=fill)
        fill += 1
        table = Table(step, fill, plan_digest, incarnation, placed, metadata).encoded()
        offset = aligned(data_end, ALIGN_BYTES)
        if offset + len(table) > self.nbytes:
            raise SnapshotError("the arena is too small", needed_bytes=offset + len(table), nbytes=self.nbytes)
        words = self._words
        self._filling = fill << 8 | State.FILLING
        words[Word.STATE] = self._filling
        self._await_pen()
        words[Word.STATE] = self._filling  # what was being repaired may have been STATE itself
        words[Word.STEP] = step & _MASK
        words[Word.INCARNATION] = incarnation & _MASK
        words[Word.TABLE_OFFSET] = offset
        words[Word.TABLE_BYTES] = len(table)
        words[Word.DATA_OFFSET] = HEADER_BYTES
        words[Word.DATA_BYTES] = data_end - HEADER_BYTES
        self._store(Word.PLAN, plan_digest)
        self._store(Word.TABLE_DIGEST, digest_of(table))
        self._bytes[offset : offset + len(table)] = table
        return placed

    def finish(self) -> None:
        """Every byte is in place: the half is COPIED from this store on, whatever becomes of the writer."""
        if self._filling == 0 or self._words[Word.STATE] != self._filling:
            raise SnapshotError("finish() of a fill that is not this writer's", **self._named())
        self._words[Word.STATE] = self._filling & ~0xFF | State.COPIED
        self._filling = 0

    def view(self, entry: ArenaEntry) -> memoryview:
        """The bytes of one entry. Valid as long as the view is kept, even if the arena is closed."""
        if entry.offset < HEADER_BYTES or entry.offset + entry.nbytes > self.nbytes:
            raise SnapshotCorrupt("an entry outside of its arena", name=entry.name, state=entry.state)
        return self._bytes[entry.offset : entry.offset + entry.nbytes]

    def _await_pen(self) -> None:
        """Wait, a short time, until no repair can write here any more."""
        turn = threading.Event()
        with threading.Lock():
            deadline = time.monotonic() + PEN_S  # the lock: FILLING must be seen before PEN is looked at
        while self._words[Word.PEN]:
            if time.monotonic() > deadline:
                raise SnapshotError("a repair of this half does not end", **self._named(), waited_s=PEN_S)
            turn.wait(0.0005)

    # ---- reader -----------------------------------------------------------------------------------------

    def read(self, step: int | None = None, plan_digest: bytes | None = None) -> Table:
        """The table of what this half holds, after every check but the digest of the data.

        Raises SnapshotIncomplete if it does not hold that step under that plan, whole; SnapshotCorrupt
        if what it holds contradicts itself.
        """
        self.check()
        with self._steady() as word:
            table = self._parse(self._table_bytes())
            said = (table.step, table.fill, table.plan_digest, table.incarnation)
            plan = self._raw(Word.PLAN, PLAN_DIGEST_BYTES)
            if said != (self.step, word >> 8, plan, self._words[Word.INCARNATION]):
                raise SnapshotCorrupt("header and table disagree", **self._named(), table_step=table.step)
        if step is not None and table.step != step:
            raise SnapshotIncomplete("the half holds another step", **self._named(), wanted=step)
        if plan_digest is not None and table.plan_digest != plan_digest:
            ours, theirs = plan_digest.hex()[:12], table.plan_digest.hex()[:12]
            raise SnapshotIncomplete("the half holds another plan", **self._named(), plan=theirs, wanted=ours)
        return table

    def table(self) -> Table:
        """read() of whatever step and plan it holds."""
        return self.read()

    def verify(self) -> None:
        """Digest the data and compare it with what was sealed. SnapshotCorrupt names both digests."""
        self.check()
        with self._steady() as word:
            if _state(word, self._words[Word.VERDICT]) is not State.SEALED:
                raise SnapshotIncomplete("the half is not digested yet", **self._named())
            sealed = self._raw(Word.DATA_DIGEST, DIGEST_BYTES).hex()
            self._table_bytes()
            found = digest_while(self._data(), lambda: self._words[Word.STATE] == word)
            if found is None or found.hex() != sealed:
                named = {**self._named(), "sealed": sealed, "found": found.hex() if found else ""}
                raise SnapshotCorrupt("the data is not what was sealed", **named)

    def confirm(self, table: Table) -> None:
        """Raise SnapshotIncomplete if a new fill began since `table` was read: call it after copying out."""
        if self._words[Word.STATE] != (table.fill << 8 | State.COPIED):
            raise SnapshotIncomplete("the half was overwritten while it was read", step=table.step)

    # ---- manager ----------------------------------------------------------------------------------------

    def format(self) -> None:
        """Make new memory an EMPTY arena of this job."""
        self._words[Word.VERSION] = VERSION
        self._store(Word.JOB, self._job)
        self._words[Word.STATE] = State.EMPTY
        self._words[Word.MAGIC] = int.from_bytes(MAGIC, "little")

    def judge(self) -> tuple[int, bytes | HoldfastError] | None:
        """(fill, digest of its data, or what is wrong with it); None if there is nothing whole to judge.

        Takes time; stores nothing. That STATE still names the same fill *after* the last byte was read
        proves that no byte changed meanwhile: a writer stores FILLING first.
        """
        word = self._words[Word.STATE]
        if _state(word, self._words[Word.VERDICT]) is not State.COPIED:
            return None
        try:
            self.read()
            digest = digest_while(self._data(), lambda: self._words[Word.STATE] == word)
        except SnapshotError as error:
            return (word >> 8, error) if self._words[Word.STATE] == word else None
        if digest is None or self._words[Word.STATE] != word:
            return None
        return word >> 8, digest

    def judged(self, fill: int, verdict: State) -> bool:
        """Whether that is the verdict about `fill`."""
        return self._words[Word.VERDICT] == fill << 8 | verdict

    def seal(self, fill: int, digest: bytes) -> None:
        """Store the digest of `fill`, once: a second one would hide what changed since the first."""
        if self._words[Word.VERDICT] >> 8 == fill:
            return
        self._store(Word.DATA_DIGEST, digest)
        self._words[Word.VERDICT] = fill << 8 | State.SEALED

    def condemn(self, fill: int) -> None:
        """`fill` is not to be restored from."""
        self._words[Word.VERDICT] = fill << 8 | State.CORRUPT

    def reexamine(self, fill: int) -> bool:
        """Whether table and data of `fill`, although condemned, are what was sealed (again). Stores nothing."""
        try:
            self.check()
            with self._steady(condemned=True) as word:
                self._parse(self._table_bytes())
                sealed = self._raw(Word.DATA_DIGEST, DIGEST_BYTES)
                found = digest_while(self._data(), lambda: self._words[Word.STATE] == word)
        except SnapshotError:
            return False
        return found == sealed and word >> 8 == fill

    def pardon(self, fill: int) -> None:
        """`fill` was repaired, and reexamine() found it right."""
        self._words[Word.VERDICT] = fill << 8 | State.SEALED

    @property
    def memory(self) -> memoryview:
        """All of it, header included: the protector's, for repairs under the pen and reads that it digests."""
        return self._bytes

    # ---- inside -----------------------------------------------------------------------------------------

    def _place(self, entries: Sequence[Piece]) -> tuple[tuple[ArenaEntry, ...], int]:
        """Entries with their offsets. A training job asks the same at each step: remembered."""
        asked = tuple(entries)
        if self._placed is None or self._placed[0] != asked:
            self._placed = asked, *place(asked)
        return self._placed[1], self._placed[2]

    def _restorable_word(self, condemned: bool) -> int:
        """The STATE word, if what it names is whole and not condemned (or that does not matter)."""
        word = self._words[Word.STATE]
        state = _state(word, self._words[Word.VERDICT])
        if condemned and word & 0xFF == State.COPIED:
            return word
        if state is State.CORRUPT:
            raise SnapshotCorrupt("the half is marked corrupt", **self._named())
        if state not in RESTORABLE:
            raise SnapshotIncomplete(f"the half is {state.name}", **self._named())
        return word

    @contextlib.contextmanager
    def _steady(self, *, condemned: bool = False) -> Iterator[int]:
        """The STATE word, of one whole fill during the whole block.

        If a writer overtook the block, that is the error, whatever it found: a table that is half of the
        next fill is no corruption.
        """
        word = self._restorable_word(condemned)
        try:
            yield word
        except SnapshotError as error:
            if self._words[Word.STATE] == word:
                raise
            raise SnapshotIncomplete("the half was overwritten while it was read", **self._named()) from error
        if self._words[Word.STATE] != word:
            raise SnapshotIncomplete("the half was overwritten while it was read", **self._named())

    def _named(self) -> dict[str, int]:
        return {"step": self.step, "fill": self._words[Word.STATE] >> 8}

    def _span(self, offset_word: Word, bytes_word: Word) -> memoryview:
        """A region that the header names, if it lies in the arena."""
        offset, length = self._words[offset_word], self._words[bytes_word]
        if offset < HEADER_BYTES or offset + length > self.nbytes:
            where = offset_word.name.partition("_")[0].lower()
            raise SnapshotCorrupt(
                f"the {where} does not lie in the arena", offset=offset, length=length, nbytes=self.nbytes
            )
        return self._bytes[offset : offset + length]

    def _data(self) -> memoryview:
        return self._span(Word.DATA_OFFSET, Word.DATA_BYTES)

    def _table_bytes(self) -> bytes:
        """A private copy of the table, so that what was digested is what is parsed."""
        raw = bytes(self._span(Word.TABLE_OFFSET, Word.TABLE_BYTES))
        if digest_of(raw) != self._raw(Word.TABLE_DIGEST, DIGEST_BYTES):
            raise SnapshotCorrupt("the table is not what was written", **self._named())
        return raw

    def _parse(self, raw: bytes) -> Table:
        """The table, if every entry lies in the data."""
        first, length = self._words[Word.DATA_OFFSET], self._data().nbytes
        try:
            return Table.decoded(raw, first, first + length)
        except (ValueError, KeyError, TypeError, RecursionError, HoldfastError) as error:
            raise SnapshotCorrupt("the table cannot be read", **self._named(), reason=str(error)) from error

    def _signed(self, word: Word) -> int:
        value = self._words[word]
        return value - (1 << 64) if value >> 63 else value

    def _raw(self, word: Word, length: int) -> bytes:
        return bytes(self._bytes[word * 8 : word * 8 + length])

    def _store(self, word: Word, raw: bytes) -> None:
        self._bytes[word * 8 : word * 8 + len(raw)] = raw


def _state(word: int, verdict: int) -> State:
    """The half's state: the rank's word, or the manager's if it judged this very fill."""
    state = word & 0xFF
    if state == State.COPIED and verdict >> 8 == word >> 8 and verdict & 0xFF in (State.SEALED, State.CORRUPT):
        return State(verdict & 0xFF)
    return State(state) if state <= State.COPIED else State.CORRUPT

"""Repairs of a sealed half in place, and how a damaged header is told from a new fill. The only writer but ranks.

    protector  PEN=fill ▸ STATE still names fill? ▸ bytes ▸ PEN=0
    rank       STATE=FILLING ▸ PEN=0? ▸ bytes                       one of the two sees the other

Does not know what is right: the caller brings bytes that it has digested. Invariants:

* nothing is written unless STATE named the fill (or was found damaged) after PEN was stored;
* VERDICT is never written here: the manager looks at what was repaired, and judges.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from typing import Final

from ..arena import MAGIC, VERSION, Half, State, Word
from ..digest import DIGEST_BYTES, digest_of
from ..table import HEADER_BYTES
from .record import Record

_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF
_NOT_OURS: Final = frozenset({Word.STATE, Word.VERDICT, Word.PEN})


def sealed_digest(half: Half) -> str:
    """The digest of the data that the manager stored."""
    start = Word.DATA_DIGEST * 8
    return bytes(half.memory[start : start + DIGEST_BYTES]).hex()


def header_of(record: Record, job: str) -> tuple[int, ...]:
    """The words that the header of a sealed half has, up to PEN."""
    table, data = bytes.fromhex(record.table_digest), bytes.fromhex(record.data_digest)
    return (
        int.from_bytes(MAGIC, "little"),
        VERSION,
        record.fill << 8 | State.COPIED,
        record.fill << 8 | State.SEALED,
        record.step & _MASK,
        record.incarnation & _MASK,
        record.table_offset,
        record.table_bytes,
        HEADER_BYTES,
        record.data_bytes,
        *struct.unpack("<2Q", table),
        *struct.unpack("<2Q", data),
        *struct.unpack("<2Q", digest_of(job.encode())),
        *struct.unpack("<4Q", bytes.fromhex(record.plan)),
    )


def words_of(half: Half) -> tuple[int, ...]:
    """The header as it is, PEN included."""
    return struct.unpack_from(f"<{Word.PEN + 1}Q", half.memory)


def word_at(half: Half, word: Word) -> int:
    """One word of it."""
    return int.from_bytes(half.memory[word * 8 : word * 8 + 8], "little")


def overtaken(half: Half, record: Record) -> bool:
    """Whether a writer has begun a later fill. A state word that no writer would store there is damage instead."""
    word = word_at(half, Word.STATE)
    fill, state = word >> 8, word & 0xFF
    if fill <= record.fill or state not in (State.FILLING, State.COPIED):
        return False
    # A flipped bit makes no FILLING of COPIED. A COPIED of another fill has a table that says so, for tables
    # name their fill and lie there before COPIED is stored. Without one, the word has changed.
    return state == State.FILLING or _has_table(half, fill)


def _has_table(half: Half, fill: int) -> bool:
    """Whether the header leads to a table of that fill."""
    words = words_of(half)
    offset, length = words[Word.TABLE_OFFSET], words[Word.TABLE_BYTES]
    if offset < HEADER_BYTES or offset + length > half.nbytes:
        return False
    raw = bytes(half.memory[offset : offset + length])
    if struct.unpack("<2Q", digest_of(raw)) != words[Word.TABLE_DIGEST : Word.TABLE_DIGEST + 2]:
        return False
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("fill") == fill


def header_intact(half: Half, record: Record, job: str) -> bool:
    """Whether every word is what was sealed; PEN may be ours."""
    return words_of(half)[: Word.PEN] == header_of(record, job)


def write(half: Half, record: Record, offset: int, data: bytes | memoryview) -> bool:
    """Put right bytes at `offset` of the arena, unless a later fill has begun. False: it has."""

    def store() -> None:
        half.memory[offset : offset + len(data)] = data

    return _under_pen(half, record, store)


def mend_header(half: Half, record: Record, job: str) -> bool:
    """Make every word but VERDICT what was sealed, STATE last. False: a later fill has begun."""
    right = header_of(record, job)

    def store() -> None:
        for word, value in enumerate(right):
            if word not in _NOT_OURS:
                _store(half, word, value)
        _store(half, Word.STATE, right[Word.STATE])

    return _under_pen(half, record, store)


def drop(half: Half) -> None:
    """Nobody repairs here: what a protector that died left, or a flipped bit, must not hold up a rank."""
    if word_at(half, Word.PEN):
        _store(half, Word.PEN, 0)


def _under_pen(half: Half, record: Record, store: Callable[[], None]) -> bool:
    _store(half, Word.PEN, record.fill)
    try:
        with threading.Lock():  # PEN must be seen before STATE is looked at
            gone = overtaken(half, record)
        if not gone:
            store()
        return not gone
    finally:
        _store(half, Word.PEN, 0)


def _store(half: Half, word: int, value: int) -> None:
    """One aligned store of eight bytes."""
    words = half.memory[:HEADER_BYTES].cast("Q")
    if words[word] != value:
        words[word] = value

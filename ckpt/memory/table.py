"""The table of a half: which pieces lie where in it, and the metadata beside them. Pure.

    layout(pieces) ──▶ offsets      place(pieces) ──▶ ArenaEntry      Table.encoded() ◀──▶ Table.decoded()

Does not touch memory: the arena stores and digests what is encoded here. Invariants:

* every entry starts at a multiple of 64 bytes, and no two overlap;
* decoded() returns no entry that reaches beyond the bounds it was given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError

from ..pieces import Piece

HEADER_BYTES: Final = 4096
"""The header page of an arena: the data begins behind it."""
ALIGN_BYTES: Final = 64
_TABLE_STEP_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class ArenaEntry(Piece):
    """A piece with its place in an arena. Writers leave `offset` alone: begin() gives it."""

    offset: int = -1


@dataclass(frozen=True, slots=True)
class Table:
    """What a half holds, checked against its digest."""

    step: int
    fill: int
    plan_digest: bytes
    incarnation: int
    entries: tuple[ArenaEntry, ...]
    metadata: Any

    def encoded(self) -> bytes:
        """As JSON."""
        value = {
            "step": self.step,
            "fill": self.fill,
            "plan": self.plan_digest.hex(),
            "incarnation": self.incarnation,
            "entries": [[e.name, e.state, e.dtype, e.shape, e.start, e.stop, e.offset] for e in self.entries],
            "metadata": self.metadata,
        }
        return _dumps(value)

    @classmethod
    def decoded(cls, raw: bytes, data_start: int, data_stop: int) -> Table:
        """From JSON; raises one of the errors of bad JSON, or SnapshotCorrupt for an entry beyond data."""
        value = json.loads(raw)
        entries = tuple(
            ArenaEntry(name, state, dtype, tuple(shape), start, stop, offset)
            for name, state, dtype, shape, start, stop, offset in value["entries"]
        )
        for entry in entries:
            if entry.offset < data_start or entry.offset + entry.nbytes > data_stop:
                raise SnapshotCorrupt("an entry outside of the data", name=entry.name, state=entry.state)
        plan = bytes.fromhex(value["plan"])
        return cls(value["step"], value["fill"], plan, value["incarnation"], entries, value["metadata"])


def layout(entries: Iterable[Piece]) -> tuple[tuple[int, ...], int]:
    """Offset of each piece in the arena, and the first byte after the last one."""
    end = HEADER_BYTES
    offsets = []
    for entry in entries:
        offset = aligned(end, ALIGN_BYTES)
        offsets.append(offset)
        end = offset + entry.nbytes
    return tuple(offsets), end


def arena_bytes(entries: Sequence[Piece], metadata: Any) -> int:
    """Size of an arena that takes these pieces and metadata, in pages.

    The table's part is a bound in steps of 64 KiB, so that a step number or a scheduler's state that
    grows by a digit does not ask for a new arena.
    """
    bound = 512 + len(_dumps(metadata))
    for entry in entries:
        bound += 64 + 6 * (len(entry.name) + len(entry.state)) + 21 * (len(entry.shape) + 3)
    data = aligned(layout(entries)[1], ALIGN_BYTES)
    return aligned(data + aligned(bound, _TABLE_STEP_BYTES), HEADER_BYTES)


def place(entries: Sequence[Piece]) -> tuple[tuple[ArenaEntry, ...], int]:
    """Entries with their offsets, and the first byte after the last one."""
    if len({(e.name, e.state, e.start) for e in entries}) != len(entries):
        raise SnapshotError("two entries for one piece")
    offsets, end = layout(entries)
    placed = (
        ArenaEntry(e.name, e.state, e.dtype, e.shape, e.start, e.stop, offset)
        for e, offset in zip(entries, offsets, strict=True)
    )
    return tuple(placed), end


def aligned(value: int, step: int) -> int:
    """`value` rounded up to a multiple of `step`."""
    return (value + step - 1) // step * step


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()

"""Bringing a slot back: copied from a host that holds it, or decoded from any k clean shards of its stripes.

    held here? ─▶ else a holder: copy ─▶ else parity, newest placement first: decode
        blocks of the image in order, several in flight ▸ table and tail ▸ finish ▸ the manager seals
        ▸ its digest of all data is that of the record

Copy and parity meet at a block: when the one fails, the other goes on where it stopped. Decides nothing about
which step: the caller did. Invariants:

* the half is FILLING from the first byte to the last, and what is sealed has the digests of the record;
* by the deadline there is an answer, and a refusal names what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError, SnapshotIncomplete

from ..arena import Half, State, arena_bytes
from ..client import MappedHalf, SmpClient
from ..table import HEADER_BYTES, Table
from . import pen
from .blocks import Shard, Sources, StripeReader
from .client import Rebuilt
from .parity import ParityStore
from .peers import LOST, Sealed
from .record import digest_of_block
from .survey import Layout, Survey, check_tail, counts, survey

if TYPE_CHECKING:
    from ..placement import Chunk, Stripe


@dataclass(slots=True)
class RebuildCounters:
    """What happened since the start."""

    rebuilt: int = 0
    rebuilt_bytes: int = 0


@dataclass(slots=True)
class _Target:
    """The half that is being filled, and how far."""

    mapped: MappedHalf
    sealed: Sealed
    done: int = 0

    def room(self, start: int, stop: int) -> memoryview:
        """Bytes of the image."""
        return self.mapped.half.memory[HEADER_BYTES + start : HEADER_BYTES + stop]


class Rebuild:
    """One rebuild. One thread."""

    def __init__(
        self,
        sources: Sources,
        store: ParityStore,
        client: SmpClient,
        counters: RebuildCounters,
        *,
        slot: int,
        step: int,
        halves: Sequence[int],
        deadline: float,
    ) -> None:
        self._sources = sources
        self._store = store
        self._client = client
        self._counters = counters
        self._slot = slot
        self._step = step
        self._halves = halves
        self._deadline = deadline
        self._used: dict[str, None] = {}
        self._failed: list[str] = []
        self._target: _Target | None = None

    def run(self) -> Rebuilt:
        """Do it."""
        began = time.monotonic()
        held = self._held_here()
        if held is not None:
            return Rebuilt(held[0], held[1], "held", (), time.monotonic() - began)
        found = survey(self._sources, self._step)
        source = self._copy(found) or self._decode(found)
        target = self._target
        assert target is not None
        self._seal(target)
        self._counters.rebuilt += 1
        self._counters.rebuilt_bytes += target.sealed.record.data_bytes
        nbytes = target.sealed.record.data_bytes
        return Rebuilt(target.mapped.index, nbytes, source, tuple(self._used), time.monotonic() - began)

    def _held_here(self) -> tuple[int, int] | None:
        """(half, bytes) if the manager has it; a COPIED half is sealed by opening it."""
        for info in self._client.list():
            if (info.slot, info.step) == (self._slot, self._step) and info.state in ("COPIED", "SEALED"):
                try:
                    with self._client.open(info.slot, info.half) as mapped:
                        table = mapped.half.read(self._step)
                        mapped.half.verify()
                        return info.half, sum(entry.nbytes for entry in table.entries)
                except SnapshotCorrupt as error:
                    self._client.corrupt(info.slot, info.half, info.step)
                    self._failed.append(f"held here: {error}")
                except SnapshotError as error:
                    self._failed.append(f"held here: {error}")
        return None

    # ---- sources ----------------------------------------------------------------------------------------

    def _copy(self, found: Survey) -> str:
        """From whoever holds the half itself; "" if nobody does to the end."""
        for holder in found.slots.get(self._slot, []):
            if holder.host == found.me:
                continue
            header = {"op": "record", "slot": self._slot, "step": self._step, "token": holder.token}
            try:
                sealed = self._sources.peers.fetch_sealed(holder.host, header)
                check_tail(sealed)
                target = self._begin(sealed)
                for blocks in sealed.record.chunks:
                    name = f"host {holder.host} slot {self._slot}"
                    shard = Shard(0, holder.host, self._slot, self._step, holder.token, blocks, name)
                    self._copy_chunk(target, shard, found)
            except LOST as error:
                self._failed.append(f"host {holder.host} slot {self._slot}: {error}")
                self._patience()
                continue
            return "copy"
        return ""

    def _copy_chunk(self, target: _Target, shard: Shard, found: Survey) -> None:
        length = shard.blocks.stop - shard.blocks.start
        named = {"slot": self._slot, "step": self._step}
        reader = StripeReader(
            self._sources, [shard], k=1, chunk=length, lengths={0: length}, named=named, avoid=found.avoid
        )
        with reader:
            for block, start, stop in shard.blocks.spans():
                if stop > target.done:
                    self._patience()
                    reader.read(block, target.room(start, stop))
                    target.done = stop
            self._used |= reader.used

    def _decode(self, found: Survey) -> str:
        """From parity, under any placement that has it."""
        for number in found.parity_numbers():
            try:
                layout = Layout.of(self._sources, self._store, found, number)
                sealed = layout.mirrored(self._slot)
                target = self._begin(sealed)
                mine = [(c, s) for s in layout.placement.stripes for c in s.data if c.slot == self._slot]
                for chunk, stripe in sorted(mine, key=lambda one: one[0].start):
                    self._decode_chunk(target, layout, chunk, stripe)
                if target.done < sealed.record.image_bytes:
                    raise SnapshotIncomplete("an image larger than its stripes", slot=self._slot)
            except LOST as error:
                self._failed.append(f"placement {number}: {error}")
                self._patience()
                continue
            return "parity"
        raise SnapshotIncomplete(
            "that snapshot cannot be rebuilt",
            slot=self._slot,
            step=self._step,
            failed=self._failed or ["no host holds it, and there is no parity of that step"],
            **counts(found),
        )

    def _decode_chunk(self, target: _Target, layout: Layout, chunk: Chunk, stripe: Stripe) -> None:
        from .. import erasure

        # Not the target's record: that may have come with a source of another placement, cut otherwise.
        placement, blocks = layout.placement, layout.mirrored(self._slot).record.chunk(chunk.start)
        column = next(i for i, one in enumerate(stripe.data) if one == chunk)
        shards, lengths = layout.shards(stripe)
        named = {"slot": self._slot, "step": self._step, "stripe": stripe.number, "missing": layout.missing(stripe)}
        code = erasure.Code(placement.k, placement.m)
        others = [shard for shard in shards if shard.index != column]
        reader = StripeReader(
            self._sources,
            others,
            k=code.k,
            chunk=placement.chunk,
            lengths=lengths,
            named=named,
            avoid=layout.found.avoid,
        )
        with reader:
            spare = memoryview(bytearray(min(placement.chunk, reader.size(0))))
            for block, start, stop in blocks.spans():
                if stop <= target.done:
                    continue
                self._patience()
                have, room, size = reader.read(block), target.room(start, stop), reader.size(block)
                have.pop(column, None)
                whole = len(room) == size
                erasure.decode(code, have, {column: room if whole else spare[:size]})
                if not whole:
                    room[:] = spare[: len(room)]
                if digest_of_block(room) != blocks.digest(block):
                    raise SnapshotCorrupt("decoded other bytes than were sealed", block=block, **named)
                target.done = stop
            self._used |= reader.used

    # ---- the half ---------------------------------------------------------------------------------------

    def _begin(self, sealed: Sealed) -> _Target:
        """The half to fill; the one begun already if it is of the same state."""
        if self._target is not None and self._target.sealed.record.same_state(sealed.record):
            return self._target
        record = sealed.record
        table = _table(sealed)
        taken = {info.half: info for info in self._client.list() if info.slot == self._slot}

        def worth(half: int) -> tuple[bool, int]:
            info = taken.get(half)
            whole = info is not None and info.state in ("COPIED", "SEALED")
            return whole, info.step if info is not None and whole else -1

        half = min(self._halves, key=lambda half: (worth(half), half))
        mapped = self._client.arena(self._slot, half, arena_bytes(table.entries, table.metadata))
        plan = bytes.fromhex(record.plan)
        placed = mapped.half.begin(table.step, plan, table.incarnation, table.entries, table.metadata)
        if tuple(placed) != table.entries:
            raise SnapshotCorrupt("a table whose entries lie elsewhere", slot=self._slot, step=self._step)
        # What lies in no stripe: entries behind the image, up to the table.
        extra = sealed.tail[: record.table_offset - record.image_end]
        mapped.half.memory[record.image_end : record.table_offset] = extra
        self._target = _Target(mapped, sealed)
        return self._target

    def _seal(self, target: _Target) -> None:
        """Finish it, have it sealed, and compare with the record."""
        mapped = target.mapped
        mapped.half.finish()
        self._client.copied(self._slot, mapped.index, self._step)
        self._client.open(self._slot, mapped.index).close()
        found = pen.sealed_digest(mapped.half)
        if mapped.half.state is not State.SEALED or found != target.sealed.record.data_digest:
            _spoil(mapped.half)
            raise SnapshotCorrupt(
                "rebuilt other bytes than were sealed", slot=self._slot, step=self._step, failed=self._failed
            )
        mapped.close()

    def _patience(self) -> None:
        if time.monotonic() > self._deadline:
            named = {"slot": self._slot, "step": self._step, "failed": self._failed}
            raise SnapshotIncomplete("not rebuilt by the deadline", **named)


def _spoil(half: Half) -> None:
    """Begin again, so that nobody is offered what came out wrong."""
    half.begin(0, bytes(32), 0, (), None)


def _table(sealed: Sealed) -> Table:
    record = sealed.record
    raw = sealed.tail[len(sealed.tail) - record.table_bytes :]
    try:
        table = Table.decoded(raw, HEADER_BYTES, HEADER_BYTES + record.data_bytes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SnapshotCorrupt("the mirrored table cannot be read", slot=record.slot, reason=str(error)) from error
    if table.step != record.step or table.plan_digest.hex() != record.plan:
        raise SnapshotCorrupt("record and table disagree", slot=record.slot, step=record.step)
    return table

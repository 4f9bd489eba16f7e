"""Bringing a slot back: copied from a host that holds it, or decoded from any k clean shards of its stripes.

    held here? ─▶ else a holder: copy ─▶ else parity, newest placement first: decode
        blocks of the image in order, several in flight, each digested where it lies while it is in the cache
        ▸ table and tail ▸ the digest of all data is that of the record ▸ finish ▸ the manager seals with it

Copy and parity meet at a block: when the one fails, the other goes on where it stopped. Decides nothing about
which step: the caller did. Invariants:

* the half is FILLING from the first byte to the last, and what is sealed has the digests of the record, block by
  block and as a whole, computed from the memory that is sealed after its last byte was stored;
* by the deadline there is an answer, and a refusal names what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import xxhash

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError, SnapshotIncomplete

from ...pages import populate
from ..arena import Half, State, arena_bytes
from ..client import SmpClient
from ..table import HEADER_BYTES, Table
from . import pen
from .blocks import Shard, Sources, StripeReader
from .client import Rebuilt
from .parity import ParityStore
from .peers import LOST, Sealed
from .record import Blocks, digest_of_block
from .survey import Holder, Layout, Survey, check_tail, counts, survey

if TYPE_CHECKING:
    from ..erasure import Code
    from ..placement import Chunk, Stripe


_AHEAD_BYTES: Final = 16 << 20
"""Pages are mapped so many at a time: a millisecond, in which the sockets fill."""


@dataclass(slots=True)
class RebuildCounters:
    """What happened since the start."""

    rebuilt: int = 0
    rebuilt_bytes: int = 0


@dataclass(slots=True)
class _Target:
    """The half that is being filled, and how far."""

    half: Half
    index: int
    sealed: Sealed
    done: int = 0
    """Image bytes that are right, from the first on."""
    _mapped: int = 0
    _whole: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def room(self, start: int, stop: int) -> memoryview:
        """Bytes of the image, to be stored to."""
        if stop > self._mapped:
            self._mapped = stop + _AHEAD_BYTES
            populate(self.half.memory, HEADER_BYTES + start, HEADER_BYTES + self._mapped)
        return self.half.memory[HEADER_BYTES + start : HEADER_BYTES + stop]

    def right(self, stop: int) -> None:
        """All bytes up to `stop` have the digests of their blocks."""
        end = min(stop, self.sealed.record.data_bytes)
        if self.done < end:
            self._whole.update(self.half.memory[HEADER_BYTES + self.done : HEADER_BYTES + end])
        self.done = stop

    def digest(self) -> bytes:
        """Of all data, once the image is whole: what lies behind the image included."""
        record = self.sealed.record
        self._whole.update(self.half.memory[record.image_end : HEADER_BYTES + record.data_bytes])
        return self._whole.digest()


@dataclass(slots=True)
class _Part:
    """A range of the image, and what it is read from."""

    reader: StripeReader
    blocks: Blocks
    named: Mapping[str, object]
    code: Code | None = None
    """None: it is read as it is."""
    column: int = 0
    _spare: memoryview | None = None

    def first(self, done: int) -> int | None:
        """The first block that ends behind `done`."""
        return next((block for block, _, stop in self.blocks.spans() if stop > done), None)

    def take(self, block: int, target: _Target) -> None:
        """One block, to where it belongs, and right there."""
        start, stop = self.blocks.span(block)
        room = target.room(start, stop)
        if self.code is None:
            self.reader.read(block, room)
            return
        size = self.reader.size(block)
        whole = len(room) == size
        if whole and self.code.k == 1:
            self.reader.read(block, room)  # a mirror: parity is the data
        else:
            self._decode(self.code, block, room, size)
        if digest_of_block(room) != self.blocks.digest(block):
            raise SnapshotCorrupt("decoded other bytes than were sealed", block=block, **self.named)

    def _decode(self, code: Code, block: int, room: memoryview, size: int) -> None:
        from .. import erasure

        have = self.reader.read(block)
        have.pop(self.column, None)
        if len(room) == size:
            erasure.decode(code, have, {self.column: room})
            return
        self._spare = self._spare or memoryview(bytearray(self.reader.size(0)))
        erasure.decode(code, have, {self.column: self._spare[:size]})
        room[:] = self._spare[: len(room)]


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
        return Rebuilt(target.index, nbytes, source, tuple(self._used), time.monotonic() - began)

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
                parts = (self._copied_part(blocks, holder, found) for blocks in sealed.record.chunks)
                self._fill(self._begin(sealed), parts)
            except LOST as error:
                self._failed.append(f"host {holder.host} slot {self._slot}: {error}")
                self._patience()
                continue
            return "copy"
        return ""

    def _copied_part(self, blocks: Blocks, holder: Holder, found: Survey) -> _Part:
        name = f"host {holder.host} slot {self._slot}"
        shard = Shard(0, holder.host, self._slot, self._step, holder.token, blocks, name)
        length = blocks.stop - blocks.start
        named = {"slot": self._slot, "step": self._step}
        reader = StripeReader(
            self._sources, [shard], k=1, chunk=length, lengths={0: length}, named=named, avoid=found.avoid
        )
        return _Part(reader, blocks, named)

    def _decode(self, found: Survey) -> str:
        """From parity, under any placement that has it."""
        for number in found.parity_numbers():
            try:
                layout = Layout.of(self._sources, self._store, found, number)
                sealed = layout.mirrored(self._slot)
                target = self._begin(sealed)
                mine = [(c, s) for s in layout.placement.stripes for c in s.data if c.slot == self._slot]
                in_order = sorted(mine, key=lambda one: one[0].start)
                self._fill(target, (self._decoded_part(layout, chunk, stripe) for chunk, stripe in in_order))
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

    def _decoded_part(self, layout: Layout, chunk: Chunk, stripe: Stripe) -> _Part:
        from .. import erasure

        # Not the target's record: that may have come with a source of another placement, cut otherwise.
        placement, blocks = layout.placement, layout.mirrored(self._slot).record.chunk(chunk.start)
        column = next(i for i, one in enumerate(stripe.data) if one == chunk)
        shards, lengths = layout.shards(stripe)
        named = {"slot": self._slot, "step": self._step, "stripe": stripe.number, "missing": layout.missing(stripe)}
        reader = StripeReader(
            self._sources,
            [shard for shard in shards if shard.index != column],
            k=placement.k,
            chunk=placement.chunk,
            lengths=lengths,
            named=named,
            avoid=layout.found.avoid,
        )
        return _Part(reader, blocks, named, erasure.Code(placement.k, placement.m), column)

    def _fill(self, target: _Target, parts: Iterator[_Part]) -> None:
        """Part after part; while one is taken, the next one's first blocks are on their way."""
        following = next(parts, None)
        try:
            while (part := following) is not None:
                with part.reader:
                    part.reader.shun()
                    following = next(parts, None)
                    if following is not None and (first := following.first(target.done)) is not None:
                        following.reader.ask(first)
                    for block, _, stop in part.blocks.spans():
                        if stop > target.done:
                            self._patience()
                            part.take(block, target)
                            target.right(stop)
                    self._used |= part.reader.used
        finally:
            if following is not None:
                following.reader.close()

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
        with self._client.arena(self._slot, half, arena_bytes(table.entries, table.metadata)) as mapped:
            number = mapped.memory_number
        local, plan = self._sources.local, bytes.fromhex(record.plan)
        # A Half of our own, for it knows whose fill it may finish: another rebuild may begin the same half after us.
        mine = Half(local.mapping(self._slot, half, number).memory, local.job)
        placed = mine.begin(table.step, plan, table.incarnation, table.entries, table.metadata)
        if tuple(placed) != table.entries:
            raise SnapshotCorrupt("a table whose entries lie elsewhere", slot=self._slot, step=self._step)
        # What lies in no stripe: entries behind the image, up to the table.
        extra = sealed.tail[: record.table_offset - record.image_end]
        mine.memory[record.image_end : record.table_offset] = extra
        self._target = _Target(mine, half, sealed)
        return self._target

    def _seal(self, target: _Target) -> None:
        """Compare it with the record, finish it, and have it sealed."""
        half, digest, wanted = target.half, target.digest(), target.sealed.record.data_digest
        if digest.hex() == wanted:
            half.finish()
            self._client.rebuilt(self._slot, target.index, self._step, digest)
        if half.state is not State.SEALED or pen.sealed_digest(half) != wanted:
            _spoil(half)
            raise SnapshotCorrupt(
                "rebuilt other bytes than were sealed", slot=self._slot, step=self._step, failed=self._failed
            )

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

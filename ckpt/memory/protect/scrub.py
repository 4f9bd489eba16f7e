"""Looking for changed bits in idle memory, and putting back what was sealed.

    Scrubber (slow, for ever)   header ▸ table ▸ each block against its digest ──┐ bad
    the manager's list          CORRUPT, or a header that is not the record's ───┼─▶ Repairer: header ▸ tail ▸
    peers and our own readers   got other bytes than the record says ────────────┘   blocks from the stripe ▸ verdict

Right bytes come from the record (header), its mirrored tail (table), and any k other shards (blocks). A half
that cannot be repaired is reported to the manager, which condemns it; parity is then encoded anew. Invariants:

* nothing is written but bytes whose digest is the sealed one, and that only under the pen;
* SEALED is never said here: the manager digests what was repaired.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from holdfast.proto.errors import HoldfastError, SnapshotCorrupt, SnapshotIncomplete

from ..arena import State, Word
from ..client import SmpClient
from ..table import HEADER_BYTES
from . import pen
from .blocks import Sources, StripeReader
from .client import PARITY_SLOT
from .local import Held
from .parity import ParityStore
from .peers import LOST
from .record import Blocks, Record, digest_of_block
from .survey import Layout, survey

if TYPE_CHECKING:
    from ..placement import Stripe

log = logging.getLogger("holdfast.protect")

_ATTEMPTS: Final = 3
"""A half is condemned after so many."""


@dataclass(slots=True)
class ScrubCounters:
    """What happened since the start."""

    scrubbed_blocks: int = 0
    scrubbed_passes: int = 0
    flips_found: int = 0
    """Blocks, headers and tables that were not what was sealed."""
    repaired: int = 0
    unrepaired: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """What of a half is not what was sealed."""

    header: bool
    tail: bool
    blocks: tuple[tuple[Blocks, int], ...]

    def __bool__(self) -> bool:
        return self.header or self.tail or bool(self.blocks)

    def count(self) -> int:
        """How many things."""
        return self.header + self.tail + len(self.blocks)


def header_damaged(held: Held, record: Record, job: str) -> bool:
    """Whether some word is not what it was; a PEN that nobody holds is one."""
    return not pen.header_intact(held.half, record, job) or bool(pen.word_at(held.half, Word.PEN))


def tail_damaged(held: Held, record: Record) -> bool:
    """Whether the table, or what else lies behind the image, was changed."""
    return bytes(held.half.memory[record.image_end : record.image_end + record.tail_bytes]) != held.tail


def block_damaged(held: Held, blocks: Blocks, block: int) -> bool:
    """Whether the block is not what was sealed."""
    return digest_of_block(held.view(*blocks.span(block))) != blocks.digest(block)


class Repairer:
    """One thread; whoever suspects a half puts it in the queue."""

    def __init__(self, sources: Sources, store: ParityStore, client: SmpClient, job: str) -> None:
        self._sources = sources
        self._store = store
        self._client = client
        self._job = job
        self._lock = threading.Condition()
        self._queue: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._again: dict[tuple[int, int], tuple[float, int]] = {}  # when, and how often it failed
        self._ended = False
        self.counters = ScrubCounters()
        self.error = ""

    def suspect(self, slot: int, half: int) -> None:
        """Have that half looked at, soon."""
        with self._lock:
            if (slot, half) not in self._again:  # else its turn comes
                self._queue[slot, half] = None
                self._lock.notify_all()

    def retry(self) -> None:
        """Other hosts are known now: what could not be repaired is tried again at once."""
        with self._lock:
            self._queue |= dict.fromkeys(list(self._again))
            self._lock.notify_all()

    def stop(self) -> None:
        """End run()."""
        with self._lock:
            self._ended = True
            self._lock.notify_all()

    def run(self) -> None:
        """Repair one half after the other."""
        while (key := self._next()) is not None:
            held = self._sources.local.at(*key)
            if held is None or (held.record is None and held.state is not State.CORRUPT):
                self._again.pop(key, None)
                continue
            try:
                self.repair(held)
                self._again.pop(key, None)
            except (OSError, EOFError, HoldfastError) as error:
                self.error = f"slot {held.slot} half {held.index} step {held.step}: {error}"
                if self._later(key) == _ATTEMPTS:
                    self.counters.unrepaired += 1
                    log.warning("not repaired: %s", self.error)
                    self._condemn(held)

    def _next(self) -> tuple[int, int] | None:
        """The next half to look at: a new suspect, or one that could not be repaired a while ago; None at the end."""
        with self._lock:
            while not self._ended:
                now = time.monotonic()
                due = [key for key, (when, _) in self._again.items() if when <= now]
                if self._queue:
                    return self._queue.popitem(last=False)[0]
                if due:
                    return due[0]
                first = min((when for when, _ in self._again.values()), default=None)
                self._lock.wait(None if first is None else first - now)
            return None

    def _later(self, key: tuple[int, int]) -> int:
        """Not now: bits may have changed meanwhile, and a host that has what lacks may come back. How often so far."""
        options = self._sources.options
        failed = self._again.get(key, (0.0, 0))[1] + 1
        self._again[key] = time.monotonic() + min(options.poll_s, options.retry_s / 8 * 2 ** min(failed, 16)), failed
        return failed

    def repair(self, held: Held) -> None:
        """Make it what was sealed. Raises if that cannot be done; returns if it is overtaken by a new fill."""
        if held.record is None:
            self._find_record(held)
        record = held.record
        assert record is not None
        damage = self._look(held, record)
        if pen.overtaken(held.half, record):
            return
        self.counters.flips_found += damage.count()
        if damage.header and not pen.mend_header(held.half, record, self._job):
            return
        if damage.tail and not pen.write(held.half, record, record.image_end, held.tail):
            return
        for blocks, block in damage.blocks:
            data = self._right_bytes(held, record, blocks, block)
            if not pen.write(held.half, record, HEADER_BYTES + blocks.span(block)[0], data):
                return
        if damage and not damage.blocks and pen.header_intact(held.half, record, self._job):
            self.counters.repaired += damage.count()
            return
        self._vindicate(held, record, damage)

    def _vindicate(self, held: Held, record: Record, damage: Damage) -> None:
        """Have the manager look and say SEALED, if it said otherwise."""
        if not pen.header_intact(held.half, record, self._job):  # only VERDICT can still be wrong
            if not self._client.repaired(held.slot, held.index, held.fill):
                if pen.overtaken(held.half, record):
                    return
                raise SnapshotCorrupt("repaired, and yet not what was sealed", slot=held.slot, half=held.index)
            held.state = State.SEALED
        self.counters.repaired += damage.count()
        if damage:
            log.info("repaired %d of slot %d half %d step %d", damage.count(), held.slot, held.index, held.step)

    def _look(self, held: Held, record: Record) -> Damage:
        bad = tuple((b, n) for b in record.chunks for n, _, _ in b.spans() if block_damaged(held, b, n))
        return Damage(header_damaged(held, record, self._job), tail_damaged(held, record), bad)

    def _condemn(self, held: Held) -> None:
        try:
            self._client.corrupt(held.slot, held.index, held.step)
        except HoldfastError as error:
            log.warning("not condemned: %s", error)

    # ---- right bytes ------------------------------------------------------------------------------------

    def _find_record(self, held: Held) -> None:
        """The record of a half that was found damaged before we had made one: its parity has it."""
        found = survey(self._sources, held.step)
        for number in found.parity_numbers():
            if held.slot == PARITY_SLOT:
                break
            layout = Layout.of(self._sources, self._store, found, number)
            sealed = layout.mirrored(held.slot)
            if sealed.record.fill == held.fill:
                held.tail, held.record = sealed.tail, sealed.record
                return
        raise SnapshotIncomplete("a damaged half whose record nobody has", slot=held.slot, step=held.step)

    def _right_bytes(self, held: Held, record: Record, blocks: Blocks, block: int) -> bytes:
        found = survey(self._sources, held.step)
        if record.placement not in found.parity:
            raise SnapshotIncomplete("no parity to repair from", slot=held.slot, step=held.step)
        layout = Layout.of(self._sources, self._store, found, record.placement)
        if held.slot != PARITY_SLOT:
            for stripe in layout.placement.stripes:
                for column, chunk in enumerate(stripe.data):
                    if (chunk.slot, chunk.start) == (held.slot, blocks.start):
                        return self._decode(layout, stripe, column, blocks, block)
            raise SnapshotIncomplete("a chunk in no stripe", slot=held.slot, start=blocks.start)
        duty = layout.placement.parity_on(self._sources.me())
        at = record.chunks.index(blocks)
        if at < len(duty):
            stripe, index = layout.placement.stripes[duty[at][0]], layout.placement.k + duty[at][1]
            return self._decode(layout, stripe, index, blocks, block)
        return self._right_tail(held, layout, at, blocks, block)

    def _decode(self, layout: Layout, stripe: Stripe, wanted: int, blocks: Blocks, block: int) -> bytes:
        from .. import erasure

        placement, me = layout.placement, self._sources.me()
        shards, lengths = layout.shards(stripe)
        others = [shard for shard in shards if not (shard.index == wanted and shard.host == me)]
        named = {"stripe": stripe.number, "missing": layout.missing(stripe)}
        size = placement.chunk
        reader = StripeReader(
            self._sources, others, k=placement.k, chunk=size, lengths=lengths, named=named, until=block + 1
        )
        with reader:
            have = reader.read(block)
            room = bytearray(reader.size(block))
            erasure.decode(erasure.Code(placement.k, placement.m), have, {wanted: room})
        start, stop = blocks.span(block)
        right = bytes(room[: stop - start])
        if digest_of_block(right) != blocks.digest(block):
            raise SnapshotCorrupt("decoded other bytes than were sealed", **named)
        return right

    def _right_tail(self, held: Held, layout: Layout, at: int, blocks: Blocks, block: int) -> bytes:
        """A mirrored tail: from the slot's holder, or from another mirror."""
        assert held.table is not None
        slot = int(held.table.entries[at].name.partition(".")[2])
        number, step = layout.placement.number, held.step
        record = {"op": "record", "slot": slot, "step": step, "token": -1}
        mirrored = {"op": "mirrored", "placement": number, "step": step, "slot": slot}
        asks = [(holder.host, record) for holder in layout.found.slots.get(slot, [])]
        asks += [(holder.host, mirrored) for holder in layout.found.parity[number]]
        start, stop = blocks.span(block)
        here = self._sources.local.find(slot, step)
        tails = [here.tail] if here is not None else []
        for host, header in asks:
            if host == self._sources.me():
                continue
            try:
                tails.append(self._sources.peers.fetch_sealed(host, header).tail)
            except LOST as error:
                log.info("no tail from host %d: %s", host, error)
        for tail in tails:
            right = tail[start - blocks.start : stop - blocks.start]
            if digest_of_block(right) == blocks.digest(block):
                return right
        raise SnapshotIncomplete("nobody has the tail of that slot", slot=slot, step=step)


class Scrubber:
    """One thread that reads everything that is sealed, slowly."""

    def __init__(self, sources: Sources, repairer: Repairer, job: str) -> None:
        self._sources = sources
        self._repairer = repairer
        self._job = job
        self._ended = threading.Event()
        self._due = 0.0

    def stop(self) -> None:
        """End run()."""
        self._ended.set()

    def run(self) -> None:
        """For ever, unless the rate is 0."""
        options = self._sources.options
        while options.scrub_bytes_per_s and not self._ended.is_set():
            began = time.monotonic()
            for held in self._sources.local.all():
                if held.record is not None and not self._ended.is_set():
                    self._scrub(held, held.record)
            self._repairer.counters.scrubbed_passes += 1
            self._ended.wait(max(0.0, options.scrub_pass_s - (time.monotonic() - began)))

    def _scrub(self, held: Held, record: Record) -> None:
        """One half."""
        if pen.overtaken(held.half, record):
            return
        found = header_damaged(held, record, self._job) or tail_damaged(held, record)
        for blocks in record.chunks:
            for block, start, stop in blocks.spans():
                if self._ended.is_set():
                    return
                self._pace(stop - start)
                found = block_damaged(held, blocks, block) or found
                self._repairer.counters.scrubbed_blocks += 1
                if pen.overtaken(held.half, record):
                    return
        if found:
            self._repairer.suspect(held.slot, held.index)

    def _pace(self, nbytes: int) -> None:
        """Not faster than the rate, and no catching up after a pause."""
        now = time.monotonic()
        self._due = max(self._due, now - 0.05) + nbytes / self._sources.options.scrub_bytes_per_s
        if self._due > now:
            self._ended.wait(self._due - now)

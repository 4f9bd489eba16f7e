"""The protector's side of parity without the network: ranks of this host deliver, and replicas are compared.

    rank  announce(step) ▸ copies its half ▸ deliver(row, block, …) ─▶ early fill of the parity half
    encoder, once every record of the step is here:  take(row) ─▶ digests of the replica == those of the seal records
                                                         equal: the chunk is whole        no network but the records
                                                         other: silent corruption, the step is never protected here
                                                         not delivered: False, the encoder fetches the data as ever

A rank announces before its own half is whole, so whoever sees that half sealed knows whether to wait for a delivery.
Two replicas that differ do not say which of them is right. Invariants:

* a row is adopted only if every block digest of every data shard is that of its owner's record, and its bytes in the
  half are those that were delivered with these digests;
* a step at which replicas differ is not protected, however often it is tried, unless a rank begins it anew.

Only ranks whose steps are exact deliver: a step that is redone, after a failure, has the same bytes then, and a
delivery of one attempt is right to be compared with a record of the other.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from holdfast.proto.errors import SnapshotCorrupt, SnapshotError, SnapshotIncomplete

from .. import memfd
from .news import News
from .options import BLOCK_BYTES, RING_BLOCKS, RING_BYTES, Options
from .page import PageWriter
from .parity import ParityStore
from .peers import Sealed
from .record import DIGEST_BYTES, blocks_of, digest_of_block

if TYPE_CHECKING:
    from ..placement import Placement, Stripe

log = logging.getLogger("holdfast.protect")

Found = tuple[int, int, Sealed]
"""Host, token of the fill, record of a slot."""
PLACEMENT_S: Final = 0.25
"""How long a rank's first announcement waits for the layout, which comes from the agent: a few milliseconds later."""


@dataclass(slots=True)
class ReplicaCounters:
    """What happened since the start."""

    delivered_rows: int = 0
    delivered_bytes: int = 0
    not_delivered: int = 0
    """Rows of local stripes that the network had to bring."""
    replica_mismatches: int = 0


@dataclass(slots=True)
class _Announced:
    order: int
    number: int
    step: int


@dataclass(slots=True)
class _Row:
    """What was delivered of one parity chunk."""

    order: int
    step: int
    serial: int
    digests: tuple[bytearray, ...]
    blocks: int = 0


class Replicas:
    """Deliveries of this host's ranks. Any thread."""

    def __init__(self, store: ParityStore, news: News, page: PageWriter, options: Options) -> None:
        self._store = store
        self._news = news
        self._page = page
        self._options = options
        self._lock = threading.Lock()
        self._orders = itertools.count(1)
        self._placement: Placement | None = None
        self._me = -1
        self._work: dict[int, tuple[tuple[int, int], ...]] = {}
        self._announced: dict[int, _Announced] = {}
        self._rows: dict[tuple[int, int], _Row] = {}
        self._rings: dict[int, memoryview] = {}
        self._condemned: set[tuple[int, int]] = set()
        self.counters = ReplicaCounters()
        self.error = ""
        self.mismatch = ""
        """The last difference, whatever was protected since."""

    def lay(self, placement: Placement | None, me: int) -> None:
        """The layout from now on."""
        with self._lock:
            if (placement, me) == (self._placement, self._me):
                return
            self._placement, self._me = placement, me
            self._work = work_of(placement, me) if placement is not None else {}
            self._announced.clear()
            self._rows.clear()
            self._condemned.clear()
        self._news.bump()

    # ---- what ranks ask ---------------------------------------------------------------------------------

    def announce(self, slot: int, step: int, number: int) -> dict[str, Any]:
        """That slot's rank is about to keep `step`, and to deliver the rows that are answered."""
        deadline = time.monotonic() + PLACEMENT_S
        while True:
            seen = self._news.count
            with self._lock:
                placement = self._placement
                known = placement.number if placement is not None else -1
                if known >= number or time.monotonic() >= deadline:
                    return self._answer(slot, step) if known == number else _nothing()
            self._news.wait(seen, max(0.0, deadline - time.monotonic()))

    def _answer(self, slot: int, step: int) -> dict[str, Any]:
        placement, rows = self._placement, self._work.get(slot, ())
        if placement is None or not rows:
            return _nothing()
        announced = self._announced[slot] = _Announced(next(self._orders), placement.number, step)
        self._condemned.discard((placement.number, step))
        listed = [
            [stripe, index, [[c.slot, c.start, c.stop] for c in placement.stripes[stripe].data]]
            for stripe, index in rows
        ]
        code = {"k": placement.k, "m": placement.m, "chunk": placement.chunk}
        return {"order": announced.order, **code, "rows": listed}

    def ring(self, slot: int) -> int:
        """New shared memory through which that slot's rank hands blocks over; the caller owns the descriptor."""
        fd = memfd.create(RING_BYTES)
        with self._lock:
            if slot not in self._work:
                os.close(fd)
                raise SnapshotIncomplete("nothing to deliver for that slot", slot=slot)
            self._rings[slot] = memoryview(mmap.mmap(fd, RING_BYTES))
        return fd

    def deliver(
        self, slot: int, order: int, row: tuple[int, int], first: int, digests: Sequence[bytes], parity: bytes
    ) -> None:
        """Blocks of a parity chunk are in the ring. SnapshotIncomplete: they are not wanted (any more)."""
        with self._lock:
            announced = self._announced.get(slot)
            if announced is None or announced.order != order or row not in self._work.get(slot, ()):
                raise SnapshotIncomplete("a delivery that is not awaited", slot=slot, stripe=row[0], index=row[1])
            try:
                whole = self._take_blocks(slot, announced, row, first, digests, parity)
            except SnapshotError:
                del self._announced[slot]  # whoever waits for the rest need not
                self._news.bump()
                raise
        if whole:
            self._news.bump()

    # ---- what the encoder asks --------------------------------------------------------------------------

    def condemned(self, number: int, step: int) -> bool:
        """Whether replicas differ there, so that it must not be protected."""
        return (number, step) in self._condemned

    def take(self, placement: Placement, step: int, row: tuple[int, int], records: Mapping[int, Found]) -> bool:
        """Make that chunk of the open fill whole from what was delivered. False: nobody delivers it.

        SnapshotCorrupt: the replica here is not what the owners sealed.
        """
        progress, deadline = -1, 0.0
        while True:
            seen = self._news.count
            if self._store.open_step()[0] != step:
                raise SnapshotIncomplete("another step is being protected by now", step=step)
            with self._lock:
                blocks = self._awaited(placement, step, row)
                if blocks == blocks_of(placement.chunk):
                    return self._judge(placement, step, row, records)
                if blocks > progress:
                    progress, deadline = blocks, time.monotonic() + self._options.secondary_s
                if blocks < 0 or time.monotonic() >= deadline:
                    self._revoke(step, row)
                    return False
            self._news.wait(seen, 0.05)

    # ---- inside, under the lock ---------------------------------------------------------------------------

    def _take_blocks(
        self,
        slot: int,
        announced: _Announced,
        row: tuple[int, int],
        first: int,
        digests: Sequence[bytes],
        parity: bytes,
    ) -> bool:
        placement, ring = self._placement, self._rings.get(slot)
        assert placement is not None, "there is work, so there is a layout"
        count, columns = len(parity) // DIGEST_BYTES, len(placement.stripes[row[0]].data)
        if ring is None or not 0 < count <= RING_BLOCKS or len(digests) != columns:
            raise SnapshotIncomplete("a delivery that does not fit", blocks=count, columns=len(digests))
        if self.condemned(announced.number, announced.step):
            raise SnapshotIncomplete("replicas differ at that step", step=announced.step)
        found = self._rows.get(row) if first else None
        if (found.blocks if found is not None and found.order == announced.order else 0) != first:
            raise SnapshotIncomplete("a delivery with a gap", stripe=row[0], index=row[1], block=first)
        for at in range(count):
            offset = (first + at) * BLOCK_BYTES
            size = min(BLOCK_BYTES, placement.chunk - offset)
            if size <= 0:
                raise SnapshotIncomplete("a delivery beyond its chunk", stripe=row[0], index=row[1])
            data = ring[at * BLOCK_BYTES : at * BLOCK_BYTES + size]
            if digest_of_block(data) != parity[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]:
                raise SnapshotIncomplete("bytes were changed on their way", stripe=row[0], index=row[1])
            serial = self._store.deliver(announced.number, announced.step, *row, offset, data)
            if found is None:
                empty = tuple(bytearray() for _ in digests)
                found = self._rows[row] = _Row(announced.order, announced.step, serial, empty)
            if serial != found.serial:
                raise SnapshotIncomplete("what was delivered before is gone", stripe=row[0], index=row[1])
        assert found is not None, "there was a block"
        for column, more in zip(found.digests, digests, strict=True):
            column += more
        found.blocks += count
        return found.blocks == blocks_of(placement.chunk)

    def _awaited(self, placement: Placement, step: int, row: tuple[int, int]) -> int:
        """Blocks of that chunk that are here; -1: none are, and none will come."""
        if placement != self._placement:
            return -1
        announced, found = self._announced.get(self._slot_of(row)), self._rows.get(row)
        order = announced.order if announced is not None and announced.step == step else 0
        if found is None or found.step != step:
            return 0 if order else -1
        if found.blocks == blocks_of(placement.chunk) and order in (0, found.order):
            return found.blocks  # whole, whatever the rank does since
        return (found.blocks if order == found.order else 0) if order else -1

    def _revoke(self, step: int, row: tuple[int, int]) -> None:
        """The network brings that chunk: a rank that still delivers it must not write over it."""
        self._rows.pop(row, None)
        slot = self._slot_of(row)
        if slot in self._announced and self._announced[slot].step == step:
            del self._announced[slot]
        self.counters.not_delivered += 1

    def _slot_of(self, row: tuple[int, int]) -> int:
        return next((slot for slot, rows in self._work.items() if row in rows), -1)

    def _judge(self, placement: Placement, step: int, row: tuple[int, int], records: Mapping[int, Found]) -> bool:
        found, stripe = self._rows.pop(row), placement.stripes[row[0]]
        differ = differences(stripe, found.digests, records)
        if not differ:
            adopted = self._store.adopt(placement.number, step, *row, found.serial)
            if adopted:
                self.counters.delivered_rows += 1
                self.counters.delivered_bytes += placement.chunk
                self.error = ""
            return adopted
        self._condemned.add((placement.number, step))
        self._store.abandon(placement.number, step)
        self.counters.replica_mismatches += 1
        self.error = self.mismatch = (
            f"replicas differ after step {step}: the state that host {self._me} computed is not that of "
            f"{', '.join(differ)}; silent corruption in one of these hosts, and step {step} is not protected"
        )
        self._page.alarm()
        raise SnapshotCorrupt(self.error)


def work_of(placement: Placement, me: int) -> dict[int, tuple[tuple[int, int], ...]]:
    """Slot of `me` -> (stripe, index) of the parity here that its rank can compute: of replicas of its own state.

    One rank of each replica set on this host does it, that of the lowest slot.
    """
    replicas_of = {slot.slot: slot.replicas for slot in placement.slots}
    work: dict[int, list[tuple[int, int]]] = {}
    first: dict[int, int] = {}
    for slot in placement.slots:
        if slot.host == me and slot.replicas >= 0:
            first.setdefault(slot.replicas, slot.slot)
    for stripe, index in placement.parity_on(me):
        if placement.stripes[stripe].local:
            shared = replicas_of[placement.stripes[stripe].data[0].slot]
            work.setdefault(first[shared], []).append((stripe, index))
    return {slot: tuple(rows) for slot, rows in work.items()}


def differences(stripe: Stripe, digests: Sequence[bytes | bytearray], records: Mapping[int, Found]) -> list[str]:
    """Data shards of which a replica has other blocks than the record of their owner says, in words."""
    found = []
    for chunk, ours in zip(stripe.data, digests, strict=True):
        host, _, sealed = records[chunk.slot]
        theirs = sealed.record.chunk(chunk.start)
        if bytes(ours) == theirs.digests:
            continue
        count = max(len(ours), len(theirs.digests)) // DIGEST_BYTES
        block = next(
            (b for b in range(count) if bytes(ours[b * DIGEST_BYTES : (b + 1) * DIGEST_BYTES]) != theirs.digest(b)), 0
        )
        at = f"first at block {block} of its chunk in stripe {stripe.number} (image byte {theirs.span(block)[0]})"
        found.append(f"slot {chunk.slot} on host {host}, {at}")
    return found


def _nothing() -> dict[str, Any]:
    return {"order": 0, "k": 1, "m": 1, "chunk": 1, "rows": []}

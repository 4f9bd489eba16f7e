"""The encoder: computes the parity of the newest step that all slots have, block by block, and hands it out.

    every slot of my stripes' group SEALED at s ▸ open(s) ▸ for each stripe whose parity[0] is here:
      k data blocks ─▶ m rows ─┬▶ my parity half
                               └▶ pushed to the other parity hosts     (egress: each data byte once, parity m-1 times)
    stripes whose encoder does not deliver: fetched and computed here, the own row only
    local stripes: the own row, from what a rank of this host delivered (replicas.py); else fetched, likewise

One thread. What fails is tried again at the next change; training never waits. Invariants:

* every block that goes into parity was checked against the seal record that is kept beside it;
* data that was overwritten meanwhile ends the attempt: rows of two steps never meet in a fill.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from holdfast.proto.errors import SnapshotError, SnapshotIncomplete

from .blocks import Shard, Sources, StripeReader
from .news import News
from .options import BLOCK_BYTES, Options
from .parity import ParityStore
from .peers import LOST, Peers, Sealed
from .push import Pusher
from .record import Record, blocks_of
from .replicas import Found, Replicas

if TYPE_CHECKING:
    from ..placement import Placement, Stripe

log = logging.getLogger("holdfast.protect")


@dataclass(slots=True)
class EncodeCounters:
    """What happened since the start."""

    encoded_steps: int = 0
    encoded_bytes: int = 0
    abandoned: int = 0
    pushed_bytes: int = 0
    fetched_rows: int = 0


@dataclass(frozen=True, slots=True)
class Duty:
    """What of a placement concerns one host."""

    placement: Placement
    stripes: tuple[tuple[int, int], ...]
    """(stripe, index) of the parity here."""
    slots: frozenset[int]
    """Slots with data in these stripes: their records are needed."""
    group: frozenset[int]
    """Slots of the group of hosts that these stripes tie together: they choose the same step."""
    hosts: frozenset[int]
    """Hosts of that group."""

    @staticmethod
    def of(placement: Placement, me: int) -> Duty:
        """The stripes of `me`, and all that is connected with it by stripes."""
        stripes = placement.parity_on(me)
        host_of = {slot.slot: slot.host for slot in placement.slots}
        sets = [{*stripe.parity, *(host_of[c.slot] for c in stripe.data)} for stripe in placement.stripes]
        hosts, before = {me}, 0
        while len(hosts) != before:
            before = len(hosts)
            for one in sets:
                if one & hosts:
                    hosts |= one
        slots = {chunk.slot for stripe, _ in stripes for chunk in placement.stripes[stripe].data}
        group = {c.slot for s in placement.stripes if set(s.parity) & hosts for c in s.data}
        return Duty(placement, stripes, frozenset(slots), frozenset(group), frozenset(hosts))


class Encoder:
    """The encoding thread, and what it knows of all hosts of its group."""

    def __init__(self, sources: Sources, store: ParityStore, news: News, replicas: Replicas) -> None:
        self._local = sources.local
        self._peers: Final[Peers] = sources.peers
        self._sources = sources
        self._options: Final[Options] = sources.options
        self._store = store
        self._news = news
        self._replicas = replicas
        self._duty: Duty | None = None
        self._ended = threading.Event()
        self._spared: tuple[int, float] = -1, 0.0
        self.counters = EncodeCounters()
        self.error = ""
        store.gather = self.gather
        store.everywhere = self.everywhere

    @property
    def duty(self) -> Duty | None:
        """What this host does under the current layout."""
        return self._duty

    def set_duty(self, duty: Duty | None) -> None:
        """The layout from now on."""
        self._duty = duty
        self._news.bump()

    def stop(self) -> None:
        """End run()."""
        self._ended.set()
        self._news.bump()

    def run(self) -> None:
        """Protect one step after the other."""
        while not self._ended.is_set():
            seen = self._news.count
            try:
                busy = self._turn()
            except LOST as error:
                self.error = str(error) or type(error).__name__
                self.counters.abandoned += 1
                log.info("not protected yet: %s", self.error)
                busy = False
                self._ended.wait(self._options.retry_s / 10)
            if not busy:
                self._news.wait(seen, self._options.retry_s)

    # ---- which step -------------------------------------------------------------------------------------

    def steps(self, slots: frozenset[int]) -> set[int]:
        """Steps at which every one of these slots is sealed somewhere."""
        found: dict[int, set[int]] = {slot: set() for slot in slots}
        for held in self._local.sealed():
            if held.slot in found:
                found[held.slot].add(held.step)
        for inventory in self._peers.inventories().values():
            for slot, step in inventory.slots:
                if slot in found:
                    found[slot].add(step)
        return set.intersection(*found.values()) if found else set()

    def everywhere(self, number: int, step: int) -> bool:
        """Whether every parity host of the group is known to have that step sealed under that placement."""
        duty = self._duty
        if duty is None or duty.placement.number != number:
            return False
        known = {host for host, found in self._peers.inventories().items() if (number, step) in found.parity}
        if self._store.find(number, step) is not None:
            known.add(self._sources.me())
        return {host for host in duty.hosts if duty.placement.parity_bytes(host)} <= known

    def records(self, duty: Duty, step: int) -> dict[int, Found] | None:
        """(host, token, record) of each slot of my stripes at that step; None while one lacks."""
        number = duty.placement.number
        found: dict[int, Found] = {}
        for slot in duty.slots:
            held = self._local.find(slot, step, placement=number)
            if held is not None and held.record is not None:
                found[slot] = self._sources.me(), held.token, Sealed(held.record, held.tail)
                continue
            there = self._peers.record(slot, step, number)
            if there is None:
                return None
            found[slot] = there
        return found

    def gather(self, number: int, step: int) -> None:
        """Another encoder pushes `step`: open it as soon as the records are here."""
        deadline = time.monotonic() + self._options.secondary_s
        while True:
            seen = self._news.count
            duty = self._duty
            if duty is None or duty.placement.number != number:
                raise SnapshotIncomplete("another placement", wanted=number)
            if self._store.open_step()[0] > step or self._replicas.condemned(number, step):
                raise SnapshotIncomplete("a newer step is being protected, or replicas differ at this one", step=step)
            records = self.records(duty, step)
            if records is not None:
                self._store.open(number, step, {slot: sealed for slot, (_, _, sealed) in records.items()})
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise SnapshotIncomplete("the records of that step are not here yet", step=step)
            self._news.wait(seen, left)

    def _spare(self, step: int) -> bool:
        """Whether `step` should wait: ranks may be about to keep the step that it would overwrite."""
        protected = self._store.protected()
        if self._store.keep < 0 or protected <= self._store.keep or step <= protected:
            return False
        now = time.monotonic()
        if self._spared[0] != protected:
            self._spared = protected, now + self._options.keep_s
        return now < self._spared[1]

    # ---- one step ---------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """Protect the newest common step, if it is not. False: there was nothing to do."""
        duty = self._duty
        if duty is None or not duty.stripes:
            return False
        number = duty.placement.number
        step = max(self.steps(duty.group), default=-1)
        if step < 0 or self._replicas.condemned(number, step):
            return False
        records = self.records(duty, step)
        if records is None:
            return False
        sealed = {slot: one for slot, (_, _, one) in records.items()}
        if self._store.matches(number, step, sealed):
            return False
        if self._store.open_step()[0] != step and self._spare(step):
            return False
        if not self._open(duty, step, sealed):
            return False
        self._fill(duty, step, records)
        return True

    def _open(self, duty: Duty, step: int, sealed: Mapping[int, Sealed]) -> bool:
        try:
            self._store.open(duty.placement.number, step, sealed)
        except SnapshotIncomplete:
            return False  # finished, and not sealed yet; or a newer one was pushed here
        return True

    def _fill(self, duty: Duty, step: int, records: Mapping[int, Found]) -> None:
        placement = duty.placement
        later = []
        for number, index in duty.stripes:
            stripe = placement.stripes[number]
            if not self._store.lacks(number, index):
                continue  # done in an attempt before this one
            if stripe.local:
                later.append((number, index))
            elif index == 0:
                _StripeEncoder(self, placement, stripe, step, records).run(None)
            elif stripe.parity[0] != self._sources.me():
                later.append((number, index))
        for number, index in later:
            stripe = placement.stripes[number]
            if stripe.local:
                for chunk in stripe.data:
                    _check_size(placement, chunk.slot, records[chunk.slot][2].record)
                there = self._replicas.take(placement, step, (number, index), records)
            else:
                there = not self._wait_for(step, number, index)
            if not there:
                self.counters.fetched_rows += 1
                _StripeEncoder(self, placement, stripe, step, records).run(index)
        self.counters.encoded_steps += 1
        self.error = ""

    def _wait_for(self, step: int, stripe: int, index: int) -> bool:
        """Wait until its encoder has delivered that chunk. True: it does not; fetch it."""
        progress, deadline = -1, 0.0
        while not self._ended.is_set():
            found, _, now = self._store.open_step()
            if found != step:
                if found > step:
                    raise SnapshotIncomplete("a newer step is being protected", step=step, newer=found)
                return False  # all of it came
            if not self._store.lacks(stripe, index):
                return False
            if now != progress:
                progress, deadline = now, time.monotonic() + self._options.secondary_s
            if time.monotonic() >= deadline:
                return True
            self._news.wait(self._news.count, 0.05)
        return False


class _StripeEncoder:
    """One stripe of one step."""

    def __init__(
        self,
        encoder: Encoder,
        placement: Placement,
        stripe: Stripe,
        step: int,
        records: Mapping[int, Found],
    ) -> None:
        self._encoder = encoder
        self._sources = encoder._sources
        self._store = encoder._store
        self._placement = placement
        self._stripe = stripe
        self._step = step
        self._shards = []
        for column, chunk in enumerate(stripe.data):
            host, token, sealed = records[chunk.slot]
            _check_size(placement, chunk.slot, sealed.record)
            blocks = sealed.record.chunk(chunk.start)
            name = f"host {host} slot {chunk.slot}"
            self._shards.append(Shard(column, host, chunk.slot, step, token, blocks, name))

    def run(self, only: int | None) -> None:
        """Compute all rows and push those of other hosts; or the row `only`, which is ours."""
        from .. import erasure

        code = erasure.Code(self._placement.k, self._placement.m)
        rows = range(code.m) if only is None else (only,)
        room = {row: memoryview(bytearray(BLOCK_BYTES)) for row in rows}
        me, lengths = self._sources.me(), {s.index: s.blocks.stop - s.blocks.start for s in self._shards}
        targets = {row: host for row, host in enumerate(self._stripe.parity) if row in rows}
        pushers = {row: Pusher(self._sources, host, self._where(row)) for row, host in targets.items() if host != me}
        named = {"stripe": self._stripe.number, "step": self._step}
        reader = StripeReader(
            self._sources, self._shards, k=code.k, chunk=self._placement.chunk, lengths=lengths, named=named
        )
        try:
            with reader:
                for block in range(blocks_of(self._placement.chunk)):
                    size = reader.size(block)
                    have = reader.read(block)
                    parity = [room[row][:size] if row in rows else None for row in range(code.m)]
                    erasure.encode(code, [have[column] for column in range(code.k)], parity)
                    self._confirm()
                    for row in rows:
                        self._hand_out(row, block * BLOCK_BYTES, room[row][:size], pushers.get(row))
                    self._encoder.counters.encoded_bytes += size * len(self._shards)
            for row in rows:
                if row in pushers:
                    pushers[row].finish()
                else:
                    self._store.complete(*self._chunk(row))
        finally:
            for pusher in pushers.values():
                pusher.close()

    def _hand_out(self, row: int, offset: int, data: memoryview, pusher: Pusher | None) -> None:
        if pusher is not None:
            pusher.push(offset, data)
            self._encoder.counters.pushed_bytes += len(data)
        else:
            self._store.put(*self._chunk(row), offset, data)

    def _confirm(self) -> None:
        """What was read in place was not overwritten while it was coded."""
        for shard in self._shards:
            here = shard.host == self._sources.me()
            if here and self._sources.local.find(shard.slot, shard.step, token=shard.token) is None:
                raise SnapshotIncomplete("overwritten while it was coded", slot=shard.slot, step=shard.step)

    def _chunk(self, row: int) -> tuple[int, int, int, int]:
        return self._placement.number, self._step, self._stripe.number, row

    def _where(self, row: int) -> dict[str, int]:
        number, step, stripe, index = self._chunk(row)
        return {"placement": number, "step": step, "stripe": stripe, "index": index}


def _check_size(placement: Placement, slot: int, record: Record) -> None:
    planned = next(one.nbytes for one in placement.slots if one.slot == slot)
    if record.image_bytes > planned:
        raise SnapshotError("an image larger than was planned", slot=slot, nbytes=record.image_bytes, planned=planned)

"""Who has what of one step, asked now: for rebuilds and repairs, which must not believe old news.

    ask every host at once ─▶ holders of the slot's own half
                          └─▶ parity of that step: placement, records mirrored beside it ─▶ shards of each stripe

Asks; reads no block. A host that does not answer in time has nothing. Invariants: a placement and a record are
checked when they are parsed, and a tail against the digest of its table, whoever sent them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.proto.errors import SnapshotCorrupt, SnapshotIncomplete

from ..digest import digest_of
from .blocks import Shard, Sources
from .client import PARITY_SLOT
from .parity import ParityStore
from .peers import LOST, Inventory, Sealed
from .record import Record

if TYPE_CHECKING:
    from ..placement import Placement, Stripe


@dataclass(frozen=True, slots=True)
class Holder:
    """A host with a slot's half at the step."""

    host: int
    token: int
    """Of the fill; see local.Held."""


@dataclass(slots=True)
class Survey:
    """What all hosts said about one step."""

    step: int
    me: int
    slots: dict[int, list[Holder]] = field(default_factory=dict)
    parity: dict[int, list[Holder]] = field(default_factory=dict)
    """By placement."""
    silent: dict[int, str] = field(default_factory=dict)
    avoid: set[int] = field(default_factory=set)
    """Hosts that failed somebody since: asked last."""

    def parity_numbers(self) -> list[int]:
        """Placements with parity of the step, the newest first."""
        return sorted(self.parity, reverse=True)


def inventory_here(sources: Sources) -> Inventory:
    """Our own."""
    slots, parity = {}, {}
    for held in sources.local.sealed():
        assert held.record is not None
        if held.slot == PARITY_SLOT:
            parity[held.record.placement, held.step] = held.token
        else:
            slots[held.slot, held.step] = held.token, held.record.placement
    return Inventory(0, slots, parity)


def survey(sources: Sources, step: int) -> Survey:
    """Ask all hosts at once."""
    me = sources.me()
    found: dict[int, Inventory] = {me: inventory_here(sources)}
    result = Survey(step, me)

    def ask(host: int) -> None:
        try:
            found[host] = sources.peers.survey(host)
        except LOST as error:
            result.silent[host] = str(error) or type(error).__name__

    threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in sources.peers.hosts()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * sources.options.survey_s)
    for host, inventory in sorted(dict(found).items(), key=lambda item: (item[0] != me, item[0])):
        for (slot, at), (token, _) in inventory.slots.items():
            if at == step:
                result.slots.setdefault(slot, []).append(Holder(host, token))
        for (number, at), token in inventory.parity.items():
            if at == step:
                result.parity.setdefault(number, []).append(Holder(host, token))
    return result


@dataclass(slots=True)
class Layout:
    """The stripes of one step under one placement, with the records that judge their blocks."""

    sources: Sources
    store: ParityStore
    found: Survey
    placement: Placement
    _mirrored: dict[int, Sealed] = field(default_factory=dict)
    _parity: dict[int, Record] = field(default_factory=dict)

    @staticmethod
    def of(sources: Sources, store: ParityStore, found: Survey, number: int) -> Layout:
        """Learn the placement from whoever has parity of it."""
        from ..placement import Placement

        failed = []
        for holder in found.parity[number]:
            try:
                if holder.host == found.me:
                    text = store.placement_text(number)
                else:
                    with sources.peers.link(holder.host) as link:
                        text = link.ask({"op": "placement", "number": number})[1].decode()
                placement = Placement.from_json(text)
            except (*LOST, UnicodeDecodeError) as error:
                failed.append(f"host {holder.host}: {error}")
                continue
            if placement.number == number:
                return Layout(sources, store, found, placement)
        raise SnapshotIncomplete("nobody tells that placement", placement=number, failed=failed)

    def mirrored(self, slot: int) -> Sealed:
        """The record of a slot, kept beside the parity of any of its stripes."""
        if slot in self._mirrored:
            return self._mirrored[slot]
        keepers = {h for s in self.placement.stripes if any(c.slot == slot for c in s.data) for h in s.parity}
        number, step, failed = self.placement.number, self.found.step, []
        for holder in sorted(self.found.parity[number], key=lambda holder: holder.host in self.found.avoid):
            if holder.host not in keepers:
                continue
            try:
                if holder.host == self.found.me:
                    sealed = self.store.mirrored(number, step, slot)
                else:
                    header = {"op": "mirrored", "placement": number, "step": step, "slot": slot}
                    sealed = self.sources.peers.fetch_sealed(holder.host, header)
                check_tail(sealed)
            except LOST as error:
                failed.append(f"host {holder.host}: {error}")
                self.found.avoid.add(holder.host)
                continue
            self._mirrored[slot] = sealed
            return sealed
        raise SnapshotIncomplete("nobody has the record of that slot", slot=slot, step=step, failed=failed)

    def shards(self, stripe: Stripe) -> tuple[list[Shard], dict[int, int]]:
        """Shards of a stripe that are there, and the real length of each data shard."""
        step, shards, lengths = self.found.step, [], {}
        for column, chunk in enumerate(stripe.data):
            record = self._record(chunk.slot)
            if record is None:  # how long it is, nobody knows: as long as was planned
                lengths[column] = chunk.stop - chunk.start
                continue
            blocks = record.chunk(chunk.start)
            lengths[column] = blocks.stop - blocks.start
            for holder in self.found.slots.get(chunk.slot, []):
                name = f"host {holder.host} slot {chunk.slot}"
                shards.append(Shard(column, holder.host, chunk.slot, step, holder.token, blocks, name))
        for index, host in enumerate(stripe.parity):
            shard = self._parity_shard(stripe, index, host)
            if shard is not None:
                shards.append(shard)
        return shards, lengths

    def _record(self, slot: int) -> Record | None:
        """The record of a data shard: mirrored, or else from whoever holds the slot."""
        try:
            return self.mirrored(slot).record
        except SnapshotIncomplete:
            header = {"op": "record", "slot": slot, "step": self.found.step}
            for holder in self.found.slots.get(slot, []):
                if holder.host == self.found.me:
                    held = self.sources.local.find(slot, self.found.step, placement=self.placement.number)
                    record = held.record if held is not None else None
                else:
                    try:
                        record = self.sources.peers.fetch_sealed(holder.host, {**header, "token": holder.token}).record
                    except LOST:
                        continue
                if record is not None and record.placement == self.placement.number:
                    return record
        return None

    def missing(self, stripe: Stripe) -> list[str]:
        """What is not there, in words."""
        lost = [f"slot {c.slot}" for c in stripe.data if c.slot not in self.found.slots]
        there = {holder.host for holder in self.found.parity.get(self.placement.number, [])}
        return lost + [f"parity on host {host}" for host in stripe.parity if host not in there]

    def _parity_shard(self, stripe: Stripe, index: int, host: int) -> Shard | None:
        holder = next((one for one in self.found.parity[self.placement.number] if one.host == host), None)
        if holder is None:
            return None
        if host in self.found.silent:
            return None
        if host not in self._parity:
            try:
                self._parity[host] = self._parity_record(holder)
            except LOST as error:
                self.found.silent[host] = str(error) or type(error).__name__
                self.found.avoid.add(host)
                return None
        record = self._parity[host]
        at = self.placement.parity_on(host).index((stripe.number, index))
        name = f"host {host} stripe {stripe.number}.{index}"
        return Shard(self.placement.k + index, host, PARITY_SLOT, record.step, holder.token, record.chunks[at], name)

    def _parity_record(self, holder: Holder) -> Record:
        if holder.host == self.found.me:
            held = self.sources.local.find(PARITY_SLOT, self.found.step, token=holder.token)
            if held is None or held.record is None:
                raise SnapshotIncomplete("parity overwritten meanwhile", host=holder.host)
            record = held.record
        else:
            header = {"op": "record", "slot": PARITY_SLOT, "step": self.found.step, "token": holder.token}
            record = self.sources.peers.fetch_sealed(holder.host, header).record
        if record.placement != self.placement.number or len(record.chunks) < len(self.placement.parity_on(holder.host)):
            raise SnapshotIncomplete("parity of another placement", host=holder.host)
        return record


def check_tail(sealed: Sealed) -> None:
    """Whether the table that came with a record is the one that was sealed."""
    table = sealed.tail[len(sealed.tail) - sealed.record.table_bytes :]
    if digest_of(table).hex() != sealed.record.table_digest:
        raise SnapshotCorrupt("the mirrored table is not what was written", slot=sealed.record.slot)


def counts(found: Survey) -> Mapping[str, object]:
    """For a message: who holds what of the step."""
    return {
        "slots": {slot: [holder.host for holder in holders] for slot, holders in sorted(found.slots.items())},
        "parity": {number: [holder.host for holder in holders] for number, holders in sorted(found.parity.items())},
        "silent": sorted(found.silent),
    }

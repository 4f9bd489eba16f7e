"""The parity that this host holds: two halves of a pseudo-slot, filled in turn, and the page that ranks read.

    open(step) ▸ FILLING: rows of my own encoding, rows that other encoders push ▸ all there ▸ finish, copied
      ▸ the manager seals ▸ the digest thread makes its record ▸ publish(): (placement, step) on the page

Entries: "stripe.N.I", the chunk I of parity of stripe N; "tail.S", what of slot S is in no stripe. Metadata: the
placement and the seal record of each slot of these stripes. So a parity half explains itself to whoever finds
it. Encodes nothing. Invariants:

* the half that holds the step that is kept is not overwritten, nor one that is complete everywhere by one
  that is not known to be;
* bytes are stored only while the fill that they are for is open: one lock for both;
* an early fill, open before its records are here, takes bytes of this host's own ranks only, is never finished, and
  gives way to any step whose records are.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.proto.errors import SnapshotError, SnapshotIncomplete

from ..arena import ArenaEntry, State, arena_bytes
from ..client import MappedHalf, SmpClient
from .client import NO_DUTY, PARITY_SLOT
from .local import Held, Local
from .page import PageWriter
from .peers import Sealed
from .record import Record

if TYPE_CHECKING:
    from ..placement import Placement

log = logging.getLogger("holdfast.protect")

_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Kept:
    """What one parity half holds whole."""

    half: int
    placement: int
    step: int
    fill: int = 0


def choose_half(kept: Sequence[Kept], keep: int, everywhere: Callable[[int, int], bool]) -> int:
    """The half to overwrite. `keep`: the step told to be kept, -1 for none; `everywhere`: whether all hosts have it."""
    taken = {one.half for one in kept}
    for half in (0, 1):
        if half not in taken:
            return half
    first, second = sorted(kept, key=lambda one: (one.placement, one.step))
    if (first.step == keep) != (second.step == keep):
        return second.half if first.step == keep else first.half
    # Both or neither is the one to keep: the older, unless only the older is known to be whole everywhere.
    if everywhere(first.placement, first.step) and not everywhere(second.placement, second.step):
        return second.half
    if first.step == second.step == keep and not everywhere(second.placement, second.step):
        return second.half  # of a placement that is not whole yet; the older one was, when `keep` was told
    return first.half


@dataclass(slots=True)
class _Fill:
    """The fill that is open."""

    number: int
    step: int
    half: int
    mapped: MappedHalf
    entries: dict[str, ArenaEntry]
    remaining: set[tuple[int, int]]
    serial: int
    """Names the bytes that lie in it: kept when an early fill becomes the real one."""
    early: bool = False
    fetched: set[tuple[int, int]] = field(default_factory=set)
    """Chunks that come over the network."""
    progress: int = 0


class ParityStore:
    """This host's parity. Any thread."""

    def __init__(self, client: SmpClient, local: Local, page: PageWriter) -> None:
        self._client = client
        self._local = local
        self._page = page
        self._lock = threading.RLock()
        self._placement: Placement | None = None
        self._me = -1
        self._fill: _Fill | None = None
        self._mapped: dict[int, MappedHalf] = {}
        self._last: dict[int, Kept] = {}  # what we finished: listings come later
        self._texts: dict[int, str] = {}
        self._stale: set[tuple[int, int]] = set()
        self._serials = itertools.count(1)
        self.keep = -1
        self.everywhere: Callable[[int, int], bool] = lambda number, step: False
        self.gather: Callable[[int, int], None] = lambda number, step: None
        """Calls open() when the records of that step are there; raises SnapshotIncomplete if they do not come."""

    # ---- what there is ----------------------------------------------------------------------------------

    def set_placement(self, placement: Placement | None, me: int, texts: Mapping[int, str]) -> None:
        """The layout from now on. What was filled under another one is given up."""
        with self._lock:
            self._texts = dict(texts)
            if placement != self._placement or me != self._me:
                self._fill = None
            self._placement, self._me = placement, me
        self.publish()

    def duty(self) -> tuple[tuple[int, int], ...]:
        """(stripe, index) of each parity chunk of this host."""
        with self._lock:
            return self._placement.parity_on(self._me) if self._placement is not None else ()

    def held(self) -> list[Held]:
        """Parity halves that are digested, condemned ones included: most of their blocks are good."""
        return [held for held in self._local.sealed() if held.slot == PARITY_SLOT]

    def find(self, number: int, step: int) -> Held | None:
        """The parity half of that step."""
        return self._local.find(PARITY_SLOT, step, placement=number)

    def protected(self) -> int:
        """Newest step whose parity chunks of the current placement are all sealed here; -1: none."""
        with self._lock:
            number = self._placement.number if self._placement is not None else -1
            stale = set(self._stale)
        whole = [held for held in self.held() if held.state is not State.CORRUPT]
        steps = [held.step for held in whole if held.record is not None and held.record.placement == number]
        return max([step for step in steps if (number, step) not in stale], default=-1)

    def publish(self) -> None:
        """Write what ranks read."""
        with self._lock:
            number = self._placement.number if self._placement is not None else -1
            idle = self._placement is not None and not self.duty()
            word = (number, NO_DUTY if idle else self.protected() if number >= 0 else -1)
            if self._page.load() != word:
                self._page.store(*word)

    def open_step(self) -> tuple[int, int, int]:
        """(step, chunks that lack, progress) of the fill that is open; (-1, 0, 0): none is, or an early one."""
        with self._lock:
            fill = self._fill
            if fill is None or fill.early:
                return -1, 0, 0
            return fill.step, len(fill.remaining), fill.progress

    def lacks(self, stripe: int, index: int) -> bool:
        """Whether the open fill waits for that chunk."""
        with self._lock:
            return self._fill is not None and not self._fill.early and (stripe, index) in self._fill.remaining

    def matches(self, number: int, step: int, sealed: Mapping[int, Sealed]) -> bool:
        """Whether that parity is of these very bytes: a step may have been redone with others."""
        held = self.find(number, step)
        if held is None or held.state is State.CORRUPT:
            return False
        ours = [record for record in records_of(held) if record.slot in sealed]
        same = all(record.same_state(sealed[record.slot].record) for record in ours)
        with self._lock:
            (self._stale.discard if same else self._stale.add)((number, step))
        return same

    # ---- filling ----------------------------------------------------------------------------------------

    def reserve(self, placement: Placement, me: int) -> int:
        """Have memory for both halves under `placement`; bytes of both. SnapshotError: there is no room."""
        duty = placement.parity_on(me)
        if not duty:
            return 0
        room = _room(placement, me)
        for half in (0, 1):
            with self._lock:
                used = self._fill is not None and self._fill.half == half
                held = self._local.at(PARITY_SLOT, half)
                # Replacing memory loses what it holds: that waits until the half is overwritten anyway.
                if used or (held is not None and held.state in (State.SEALED, State.COPIED)):
                    continue
                self._map(half, room)
        return 2 * room

    def open(self, number: int, step: int, sealed: Mapping[int, Sealed]) -> None:
        """Begin the fill for `step`, unless it is open. SnapshotIncomplete: another one is, and newer."""
        with self._lock:
            placement = self._placement
            if placement is None or placement.number != number:
                raise SnapshotIncomplete("another placement", wanted=number)
            fill = self._fill
            if fill is not None and not fill.early and fill.step >= step:
                if fill.step > step:
                    raise SnapshotIncomplete("a newer step is being protected", step=step, newer=fill.step)
                return
            if self._is_whole(number, step):
                raise SnapshotIncomplete("that step is protected here already", step=step)
            self._fill = None
            entries, metadata = self._contents(placement, sealed)
            early = fill if fill is not None and fill.early and (fill.number, fill.step) == (number, step) else None
            half = early.half if early is not None else choose_half(self._kept(), self.keep, self.everywhere)
            mapped = self._map(half, arena_bytes(entries, metadata))
            serial = early.serial if early is not None and mapped is early.mapped else next(self._serials)
            self._last.pop(half, None)
            placed = mapped.half.begin(step, placement.digest(), number, entries, metadata)
            named = {entry.name: entry for entry in placed}
            for slot, one in sealed.items():
                mapped.half.view(named[f"tail.{slot}"])[:] = one.tail
            self._fill = _Fill(number, step, half, mapped, named, set(self.duty()), serial)

    def deliver(self, number: int, step: int, stripe: int, index: int, offset: int, data: memoryview) -> int:
        """Bytes of a parity chunk from a rank of this host, which needs no record of others; their serial.

        SnapshotIncomplete: another step is being protected, or the half that this would take is still needed.
        """
        with self._lock:
            fill = self._early(number, step)
            if (stripe, index) in fill.fetched:
                raise SnapshotIncomplete("that chunk is fetched meanwhile", stripe=stripe, index=index)
            self._store(fill, stripe, index, offset, data)
            return fill.serial

    def adopt(self, number: int, step: int, stripe: int, index: int, serial: int) -> bool:
        """What was delivered is that chunk. False: these bytes are not there (any more)."""
        with self._lock:
            fill = self._fill
            if fill is None or fill.early or (fill.number, fill.step, fill.serial) != (number, step, serial):
                return False
            self.complete(number, step, stripe, index)
            return True

    def abandon(self, number: int, step: int) -> None:
        """That step must not become parity: its half stays FILLING until another step takes it."""
        with self._lock:
            if self._fill is not None and (self._fill.number, self._fill.step) == (number, step):
                self._fill = None

    def accept(self, number: int, step: int, stripe: int, index: int, offset: int, data: memoryview) -> None:
        """Bytes of a parity chunk from its encoder. SnapshotIncomplete: not wanted, or not any more."""
        if not self._is_open(number, step):
            self.gather(number, step)
        self.put(number, step, stripe, index, offset, data)

    def put(self, number: int, step: int, stripe: int, index: int, offset: int, data: memoryview) -> None:
        """Bytes of a parity chunk of the open fill; SnapshotIncomplete if it is another one by now."""
        with self._lock:
            fill = self._need(number, step)
            self._store(fill, stripe, index, offset, data)
            fill.fetched.add((stripe, index))

    def complete(self, number: int, step: int, stripe: int, index: int) -> None:
        """That chunk is whole; after the last one the half is."""
        with self._lock:
            fill = self._need(number, step)
            fill.remaining.discard((stripe, index))
            fill.progress += 1
            if fill.remaining:
                return
            fill.mapped.half.finish()
            self._fill = None
            self._last[fill.half] = Kept(fill.half, number, step, fill.mapped.half.peek()[2])
            self._stale.discard((number, step))
            self._client.copied(PARITY_SLOT, fill.half, step)

    # ---- what peers ask ---------------------------------------------------------------------------------

    def mirrored(self, number: int, step: int, slot: int) -> Sealed:
        """The record of a slot, as it is kept beside its parity."""
        held = self.find(number, step)
        if held is None or held.table is None:
            raise SnapshotIncomplete("no such parity here", placement=number, step=step)
        record = next((record for record in records_of(held) if record.slot == slot), None)
        entry = next((entry for entry in held.table.entries if entry.name == f"tail.{slot}"), None)
        if record is None or entry is None:
            raise SnapshotIncomplete("that slot has no parity here", placement=number, step=step, slot=slot)
        return Sealed(record, bytes(held.half.view(entry)))

    def placement_text(self, number: int) -> str:
        """A placement that was told, or that some parity here was made under."""
        with self._lock:
            text = self._texts.get(number)
        if text is not None:
            return text
        for held in self.held():
            if held.record is not None and held.record.placement == number and held.table is not None:
                return str(held.table.metadata["layout"])
        raise SnapshotIncomplete("a placement that is not known here", placement=number)

    # ---- inside -----------------------------------------------------------------------------------------

    def _early(self, number: int, step: int) -> _Fill:
        """The fill for `step`, opened now if it is not: over a half that open() would take, too."""
        placement, fill = self._placement, self._fill
        if placement is None or placement.number != number:
            raise SnapshotIncomplete("another placement", wanted=number)
        if fill is not None and (fill.number, fill.step) == (number, step):
            return fill
        if fill is not None and not fill.early:
            raise SnapshotIncomplete("another step is being protected", step=step, other=fill.step)
        if self._is_whole(number, step):
            raise SnapshotIncomplete("that step is protected here already", step=step)
        if 0 <= self.keep < self.protected():
            raise SnapshotIncomplete("parity that ranks are about to keep is in the way", step=step)
        self._fill = None
        entries = self._chunks(placement)
        half = choose_half(self._kept(), self.keep, self.everywhere)
        mapped = self._map(half, _room(placement, self._me))
        self._last.pop(half, None)
        placed = mapped.half.begin(step, placement.digest(), number, entries, {"placement": number})
        named = {entry.name: entry for entry in placed}
        self._fill = _Fill(number, step, half, mapped, named, set(self.duty()), next(self._serials), early=True)
        return self._fill

    @staticmethod
    def _store(fill: _Fill, stripe: int, index: int, offset: int, data: memoryview) -> None:
        entry = fill.entries.get(f"stripe.{stripe}.{index}")
        if entry is None or (stripe, index) not in fill.remaining or not 0 <= offset <= entry.nbytes - len(data):
            raise SnapshotIncomplete("not a chunk that is filled here", stripe=stripe, index=index, offset=offset)
        fill.mapped.half.view(entry)[offset : offset + len(data)] = data
        fill.progress += 1

    def _is_open(self, number: int, step: int) -> bool:
        with self._lock:
            fill = self._fill
            return fill is not None and not fill.early and (fill.number, fill.step) == (number, step)

    def _need(self, number: int, step: int) -> _Fill:
        if self._fill is None or not self._is_open(number, step):
            raise SnapshotIncomplete("that step is not being protected here", placement=number, step=step)
        return self._fill

    def _contents(self, placement: Placement, sealed: Mapping[int, Sealed]) -> tuple[list[ArenaEntry], Any]:
        entries = self._chunks(placement)
        for slot, one in sorted(sealed.items()):
            entries.append(ArenaEntry(f"tail.{slot}", "tail", "U8", (len(one.tail),), 0, len(one.tail)))
        records = [one.record.to_json() for _, one in sorted(sealed.items())]
        return entries, {"placement": placement.number, "layout": placement.to_json(), "records": records}

    def _chunks(self, placement: Placement) -> list[ArenaEntry]:
        """The chunks come first in a half: where each lies does not depend on what follows."""
        chunk = placement.chunk
        names = [f"stripe.{stripe}.{index}" for stripe, index in self.duty()]
        return [ArenaEntry(name, "parity", "U8", (chunk,), 0, chunk) for name in names]

    def _is_whole(self, number: int, step: int) -> bool:
        whole = any((kept.placement, kept.step) == (number, step) for kept in self._kept())
        return whole and (number, step) not in self._stale

    def _kept(self) -> list[Kept]:
        """Both halves: what is whole and not condemned."""
        kept = []
        for half in (0, 1):
            last, held = self._last.get(half), self._local.at(PARITY_SLOT, half)
            if last is not None and (held is None or held.fill != last.fill or held.state is not State.CORRUPT):
                kept.append(last)
            elif held is not None and held.state in (State.SEALED, State.COPIED) and held.current():
                number = held.record.placement if held.record is not None else -1
                kept.append(Kept(half, number, held.step, held.fill))
        return kept

    def _map(self, half: int, nbytes: int) -> MappedHalf:
        """The memory of one half, big enough."""
        mapped = self._mapped.get(half)
        if mapped is None or mapped.nbytes < nbytes:
            larger = self._client.arena(PARITY_SLOT, half, nbytes)
            self._mapped[half] = larger
            if mapped is not None:
                mapped.close()
            mapped = larger
        return mapped


def _room(placement: Placement, me: int) -> int:
    """Bytes of a half for all that this host keeps under `placement`."""
    slots = {chunk.slot for stripe, _ in placement.parity_on(me) for chunk in placement.stripes[stripe].data}
    return placement.parity_bytes(me) + 2 * len(placement.to_json()) + _TAIL_BYTES * (2 + len(slots))


def records_of(held: Held) -> list[Record]:
    """The seal records in the metadata of a parity half."""
    if held.table is None:
        raise SnapshotError("a parity half that was not read", half=held.index)
    return [Record.from_json(value) for value in held.table.metadata["records"]]

"""The shelf: the arenas that a manager holds, and what it may do with them. No sockets, no clock.

    (slot, half) ──▶ MappedHalf        slot: whose state (a rank's number); half: 0 or 1, used in turn

    create ──▶ EMPTY ── rank: begin ▸ FILLING ▸ finish ▸ COPIED ── copied ▸ digest (worker) ▸ SEALED
                                                              │                            └▸ CORRUPT
                        protector: likewise, and its digest ──┴── rebuilt ─────────────────▸ SEALED

Whatever takes time runs in the worker; its result comes back on the loop's thread, which alone changes the
shelf and alone writes verdicts. Never changes a tensor's byte, never parses metadata. Invariants:

* a half is handed to a reader only when it is SEALED, and FILLING or CORRUPT ones are refused;
* memory is replaced only by memory whose pages are there, and never by an older step than it holds;
* a digest whose half was begun again meanwhile is thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from holdfast.proto.errors import HoldfastError, ProtocolViolation, SnapshotCorrupt, SnapshotError, SnapshotIncomplete

from .arena import HEADER_BYTES, RESTORABLE, State
from .digest import DIGEST_BYTES, Worker
from .memfd import MappedHalf, create, is_sealed, read_only

Done = Callable[[int | HoldfastError], None]
"""Takes a descriptor, which it then owns, or the reason why there is none."""


@dataclass(slots=True)
class _Held:
    """One half, and how many jobs of the worker still look at it."""

    mapped: MappedHalf
    busy: int = 0
    retired: bool = False


@dataclass(slots=True)
class Counters:
    """What happened since the start."""

    created: int = 0
    refused: int = 0
    adopted: int = 0
    copied: int = 0
    sealed: int = 0
    corrupt: int = 0
    repaired: int = 0
    digested_bytes: int = 0


@dataclass(slots=True)
class Shelf:
    """All halves of one host and job."""

    job: str
    worker: Worker
    counters: Counters = field(default_factory=Counters)
    version: int = 1
    """Rises with each change that the manager sees: what watch() waits for."""
    _held: dict[tuple[int, int], _Held] = field(default_factory=dict)

    def arena(self, slot: int, half: int, nbytes: int, done: Done) -> None:
        """Memory of at least `nbytes` for this half: what is there, or new and empty memory in its place."""
        held = self._held.get((slot, half))
        if held is not None and held.mapped.nbytes >= nbytes:
            done(os.dup(held.mapped.fd))
            return
        size = -(-max(nbytes, 2 * HEADER_BYTES) // HEADER_BYTES) * HEADER_BYTES

        def created(result: object) -> None:
            try:
                if isinstance(result, (HoldfastError, OSError)):
                    raise result
                assert isinstance(result, int)
                mapped = MappedHalf(result, self.job, slot=slot, index=half)
                mapped.half.format()
                self._put(slot, half, mapped)
                self.counters.created += 1
                fd = os.dup(mapped.fd)
            except HoldfastError as error:
                self.counters.refused += 1
                done(error)
            except OSError as error:
                self.counters.refused += 1
                done(SnapshotError("no memory for a snapshot", needed_bytes=size, reason=str(error)))
            else:
                done(fd)

        self.worker.submit(lambda: create(size), created)

    def copied(self, slot: int, half: int, step: int) -> None:
        """The rank says that it finished a copy: believe the header, and digest. Raises if that says no."""
        held = self._need(slot, half)
        state, found, _ = held.mapped.half.peek()
        if state not in RESTORABLE or found != step:
            raise SnapshotIncomplete(
                "not copied into this arena", slot=slot, half=half, step=step, found=found, state=state.name
            )
        self.counters.copied += 1
        self.version += 1
        if state is State.COPIED:
            self._judge(held, lambda: None)

    def rebuilt(self, slot: int, half: int, step: int, digest: object) -> None:
        """The protector rebuilt `step` here, and digested each block where it lies: seal it without another look.

        What is stored is the digest that the state had on the host that was lost, so whoever reads compares with that.
        """
        held = self._need(slot, half)
        mine = held.mapped.half
        table = mine.read(step)
        try:
            sealed = bytes.fromhex(digest) if isinstance(digest, str) else b""
        except ValueError:
            sealed = b""
        if len(sealed) != DIGEST_BYTES:
            raise ProtocolViolation("a digest is hexadecimal", digest=repr(digest)[:40])
        if mine.state is State.COPIED:
            mine.seal(table.fill, sealed)
            self.counters.sealed += 1
        self.version += 1

    def listing(self) -> list[dict[str, Any]]:
        """Every half with its state, in order."""
        rows = []
        for (slot, half), held in sorted(self._held.items()):
            state, step, fill = held.mapped.half.peek()
            row = {"slot": slot, "half": half, "step": step, "state": state.name, "nbytes": held.mapped.nbytes}
            rows.append({**row, "fill": fill, "memory": held.mapped.memory_number})
        return rows

    def open(self, slot: int, half: int, done: Done) -> None:
        """A read-only descriptor of a SEALED half; a COPIED one is digested first."""
        held = self._need(slot, half)

        def reply() -> None:
            try:
                fd = self._readable(held)
            except HoldfastError as error:
                done(error)
            except OSError as error:
                done(SnapshotError("no descriptor for a reader", slot=slot, half=half, reason=str(error)))
            else:
                done(fd)

        if held.mapped.half.state is State.COPIED:
            self._judge(held, reply, urgent=True)
        else:
            reply()

    def corrupt(self, slot: int, half: int, step: int, done: Callable[[bool], None]) -> None:
        """A reader says that `step` is not what was sealed. It may be the reader that is broken, so look.

        done(True): the half is CORRUPT. done(False): it is intact, or holds something else by now.
        """
        held = self._need(slot, half)
        mine = held.mapped.half
        state, found, fill = mine.peek()
        if state is not State.SEALED or found != step:
            done(state is State.CORRUPT and found == step)
            return
        held.busy += 1

        def look() -> None:
            mine.read()
            mine.verify()

        def looked(result: object) -> None:
            held.busy -= 1
            wrong = isinstance(result, SnapshotCorrupt)
            if wrong:
                self.counters.corrupt += not mine.judged(fill, State.CORRUPT)
                mine.condemn(fill)
                self.version += 1
            done(wrong)
            self._close_if_done(held)

        self.worker.submit(look, looked, urgent=True)

    def repaired(self, slot: int, half: int, fill: int, done: Callable[[bool], None]) -> None:
        """The protector says that a CORRUPT half is right again: look, and only then say so to readers."""
        held = self._need(slot, half)
        mine = held.mapped.half
        held.busy += 1

        def looked(result: object) -> None:
            held.busy -= 1
            right = result is True and mine.peek()[2] == fill
            if right:
                self.counters.repaired += 1
                self.version += 1
                mine.pardon(fill)
            done(right)
            self._close_if_done(held)

        self.worker.submit(lambda: mine.reexamine(fill), looked, urgent=True)

    def adopt(self, slot: int, half: int, fd: int) -> bool:
        """Take memory that a rank still maps; owns `fd` from here on.

        True: the shelf holds this very memory now. False: it holds a newer step (or a whole one where the
        offer has none) in other memory; the rank must ask for that. What is not an arena of this job, or
        could shrink under us, is refused with SnapshotCorrupt.
        """
        held = self._held.get((slot, half))
        if held is not None and held.mapped.same_memory(fd):
            os.close(fd)
            return True
        if not is_sealed(fd):
            os.close(fd)
            raise SnapshotCorrupt("an offered arena could shrink under its readers", slot=slot, half=half)
        mapped = MappedHalf(fd, self.job, slot=slot, index=half)
        try:
            mapped.half.check()
            state, step, _ = mapped.half.peek()
            if state in RESTORABLE:
                mapped.half.read()
            if held is not None:
                ours, our_step, _ = held.mapped.half.peek()
                if ours in RESTORABLE and (state not in RESTORABLE or step < our_step):
                    mapped.close()
                    return False
        except BaseException:
            mapped.close()
            raise
        self._put(slot, half, mapped)
        self.counters.adopted += 1
        if state is State.COPIED:
            self._judge(self._held[slot, half], lambda: None)
        return True

    def nbytes(self) -> int:
        """Memory held."""
        return sum(held.mapped.nbytes for held in self._held.values())

    # ---- inside -----------------------------------------------------------------------------------------

    def _need(self, slot: int, half: int) -> _Held:
        held = self._held.get((slot, half))
        if held is None:
            raise SnapshotIncomplete("no such half", slot=slot, half=half)
        return held

    def _put(self, slot: int, half: int, mapped: MappedHalf) -> None:
        old = self._held.get((slot, half))
        self._held[slot, half] = _Held(mapped)
        self.version += 1
        if old is not None:
            old.retired = True
            self._close_if_done(old)

    def _close_if_done(self, held: _Held) -> None:
        """The worker must not find its memory closed: the last job on it closes it."""
        if held.retired and held.busy == 0:
            held.mapped.close()

    def _judge(self, held: _Held, then: Callable[[], None], *, urgent: bool = False) -> None:
        half = held.mapped.half
        held.busy += 1

        def judged(result: object) -> None:
            held.busy -= 1
            if isinstance(result, tuple):
                fill, found = result
                if isinstance(found, bytes):
                    self.counters.sealed += not half.judged(fill, State.SEALED)
                    self.counters.digested_bytes += held.mapped.nbytes
                    half.seal(fill, found)
                else:
                    self.counters.corrupt += 1
                    half.condemn(fill)
                self.version += 1
            then()
            self._close_if_done(held)

        self.worker.submit(half.judge, judged, urgent=urgent)

    def _readable(self, held: _Held) -> int:
        """A descriptor for readers, if the half is SEALED and still on the shelf."""
        state, step, _ = held.mapped.half.peek()
        named: Final = {"slot": held.mapped.slot, "half": held.mapped.index, "step": step}
        if held.retired:
            raise SnapshotIncomplete("the half was replaced", **named)
        if state is State.CORRUPT:
            raise SnapshotCorrupt("the half is marked corrupt", **named)
        if state is not State.SEALED:
            raise SnapshotIncomplete(f"the half is {state.name}", **named)
        return read_only(held.mapped.fd)

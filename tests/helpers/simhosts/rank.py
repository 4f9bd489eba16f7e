"""One incarnation of a rank, as the protocol sees it (member.py, rejoin.py, engine.py, finish.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.launcher.actions import Form
from holdfast.launcher.slots import Joined
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.gather import Kept
from holdfast.runtime.keep import choose
from holdfast.runtime.recovery.decide import Report

from .network import MS, Pipe, S

if TYPE_CHECKING:
    from .agent import Agent

UNTIL = 40
IMAGE = 20_000


class Process:
    """One incarnation of a rank, as the protocol sees it (member.py, rejoin.py, engine.py, finish.py)."""

    def __init__(self, agent: Agent, rank: int, incarnation: int) -> None:
        self.world, self.agent, self.machine = agent.world, agent, agent.machine
        self.rank, self.incarnation = rank, incarnation
        self.host = agent.site  # the number in its environment: that of the agent's start
        self.alive = True
        self.live = 0 if incarnation == 0 else NO_STEP
        self.address = agent.address
        self.pipe: Pipe | None = None
        self.dial = 0
        self.outbox: list[tuple[str, int, object]] = []
        self.published: list[tuple[str, int, object]] = []
        self.suspicion: tuple[str, int, object] | None = None
        self.farewell: tuple[str, int, object] | None = None
        self.target = self.current = 0
        self.asked = 0  # generation joined, not formed yet
        self.join_message: Joined | None = None
        self.form: Form | None = None
        self.broken = self.building = False
        self.copying = False
        self.kept = Kept()
        self.first = True
        self.tries = self.pauses = 0
        self.seen_generation = 0
        self.world.every[rank, incarnation] = self
        self.world.soon(self.connect, 40.0)

    # ---- its session

    def moved(self, address: str) -> None:
        """Its agent names the coordinator in charge."""
        if self.alive and address != self.address:
            self.address = address
            if self.pipe is not None:
                self.pipe.close(0)
                self.pipe = None
            self.connect()

    def connect(self) -> None:
        if not self.alive or self.pipe is not None:
            return
        self.dial += 1
        dial, machine = self.dial, self.world.machine_at(self.address)
        coordinator = self.world.coordinator_at(self.address)

        def again() -> None:
            if dial == self.dial:
                self.connect()

        if not self.world.reach(self.machine, machine):
            self.world.after(1 * S, again)
        elif coordinator is None:
            self.world.after(250 * MS, again)
        else:
            self.coordinator = coordinator
            self.pipe = pipe = Pipe(self.world, (self.machine, machine), (self._disconnected, lambda: None))
            pipe.ended = (self._disconnected, lambda: coordinator.rank_gone(self, pipe))
            generation, live = self.current, self.live
            pipe.send(0, lambda: coordinator.rank_hello(self, pipe, generation, live))
            pending = ("join", self.asked, self.join_message) if self.asked else None
            again_said = [
                pending,
                *(self.published if self.current == self.target else ()),
                self.suspicion,
                self.farewell,
            ]
            waiting, self.outbox = self.outbox, []
            waiting = [m for m in waiting if m[0] in ("restored", "committed", "goodbye", "join")]
            for message in [*again_said, *waiting]:
                if message is not None:
                    self._put(message)

    def _disconnected(self) -> None:
        self.pipe = None
        dial = self.dial
        self.world.after(250 * MS, lambda: self.connect() if self.dial == dial else None)

    def tell(self, what: str, generation: int, body: object = None) -> None:
        self._put((what, generation, body))

    def _put(self, message: tuple[str, int, object]) -> None:
        if self.pipe is None:
            self.outbox.append(message)
            return
        pipe, coordinator = self.pipe, self.coordinator
        pipe.send(0, lambda: coordinator.rank_says(self, pipe, *message))

    # ---- orders

    def on_fence(self, generation: int) -> None:
        if not self.alive or generation < self.target:
            return
        if generation == self.target:
            if self.asked == generation:
                self.tell("join", generation, self.join_message)
            return
        self.target = generation
        if self.farewell is None:
            self.world.soon(lambda: self.join(generation), 5.0)

    def join(self, generation: int) -> None:
        if not self.alive or self.target != generation or self.asked == generation:
            return
        self.form = None
        if self.copying:
            self.world.soon(lambda: self.join(generation))
            return
        assert generation > self.seen_generation, f"{self.world}: rank {self.rank} joins {generation} again"
        self.seen_generation = generation
        self.asked, self.suspicion, self.published = generation, None, []
        report = Report(self.rank, self.live, self.world.peers(self.rank), self.machine.held())
        parity = self.machine.held_parity()
        self.join_message = Joined(self.incarnation, report, "p", "c", UNTIL, IMAGE + 512 * self.rank, parity)
        self.world.happens("join", self.machine)
        self.tell("join", generation, self.join_message)

    def on_form(self, form: Form) -> None:
        if not self.alive or form.generation != self.target or self.asked != form.generation:
            return
        self.asked, self.current, self.form = 0, form.generation, form
        self.broken, self.first, self.tries, self.pauses = False, True, 0, 0
        if form.solo:
            self.restore()
            return
        self.building = True
        message = ("store_set", form.generation, f"r{self.rank}")
        self.published.append(message)
        self._put(message)

    def on_store_all(self, generation: int) -> None:
        if self.in_group() and generation == self.current and self.building:
            self.building = False
            self.world.soon(self.restore, 10.0)

    def in_group(self) -> bool:
        return self.alive and self.form is not None and self.current == self.target and not self.broken

    # ---- into a generation

    def fail(self, what: str) -> None:
        """Communication broke, or what was decided on is not there: a newer generation decides anew."""
        if self.in_group():
            self.broken = True
            self.suspicion = ("suspect", self.current, what)
            self._put(self.suspicion)

    def restore(self) -> None:
        if not self.in_group() or self.form is None:
            return
        form = self.form
        source = next(s for rank, _, _, s in form.members if rank == self.rank)
        self.world.happens("restore", self.machine)
        if source.rung == "live":
            assert self.live == form.resume_step, f"{self.world}: rank {self.rank} is at {self.live}, not {form}"
            self.restored(form)
        elif source.rung == "peer":
            self.world.soon(lambda: self.from_peer(form, source.peer), 20.0)
        elif source.rung == "snapshot":
            self.world.soon(lambda: self.from_here(form), 10.0)
        else:
            self.world.soon(lambda: self.rebuild(form, list(self.world.peers(self.rank))), 30.0)

    def from_peer(self, form: Form, peer: int) -> None:
        if not self.in_group() or self.form is not form:
            return
        other = self.world.in_form(form, peer)
        if other is not None and other.live == form.resume_step and self.world.reach(self.machine, other.machine):
            self.live = form.resume_step
            self.restored(form)
        elif other is not None:
            self.world.after(50 * MS, lambda: self.from_peer(form, peer))

    def rebuild(self, form: Form, slots: list[int]) -> None:
        if not self.in_group() or self.form is not form:
            return
        step = form.resume_step
        slots = [slot for slot in slots if step not in self.machine.slots.get(slot, ())]
        if not slots:
            self.from_here(form)
            return
        slot = slots[0]
        halves = self.machine.slots.get(slot, [NO_STEP, NO_STEP])
        half = min((0, 1), key=lambda half: (halves[half], half))
        if not self.machine.can_rebuild(slot, step):
            self.fail(f"slot {slot} cannot be rebuilt")
            return
        self.machine.put(slot, half, NO_STEP)
        self.world.happens("rebuild", self.machine)

        def whole() -> None:
            if self.alive and self.machine.can_rebuild(slot, step):
                self.machine.put(slot, half, step)
                self.world.rebuilt += 1
                self.world.copied(step)
                self.rebuild(form, slots)
            else:
                self.fail(f"slot {slot} cannot be rebuilt")

        self.world.soon(whole, 60.0)

    def from_here(self, form: Form) -> None:
        if not self.in_group() or self.form is not form:
            return
        if any(form.resume_step not in self.machine.slots.get(s, ()) for s in self.world.peers(self.rank)):
            self.fail("no whole snapshot")
            return
        self.live = form.resume_step
        self.restored(form)

    def restored(self, form: Form) -> None:
        self.tell("restored", form.generation, form)
        if form.solo:
            self.goodbye()
            return
        self.world.barrier(self, "gate", self.resumed)

    def resumed(self, kept: Kept) -> None:
        """The gate of a generation: all know what all keep; forget what is newer, keep this step if nobody does."""
        self.kept = kept
        halves = self.machine.slots.get(self.rank, [NO_STEP, NO_STEP])
        for half, step in enumerate(list(halves)):
            if step > self.live:
                self.machine.put(self.rank, half, NO_STEP)
        if self.live not in halves:
            self.snapshot(kept, must=True)
        self.step()

    # ---- steps

    def keeps(self) -> list[int]:
        halves = self.machine.slots.get(self.rank, [NO_STEP, NO_STEP])
        return [*halves, *self.machine.page()]

    def step(self) -> None:
        self.world.after(self.world.step_ns(), self.arrive)

    def arrive(self) -> None:
        if not self.in_group():
            return
        if self.copying:
            self.world.soon(self.arrive)
        elif self.live < UNTIL:
            self.world.barrier(self, f"step {self.live + 1}", self.commit)
        else:
            self.world.barrier(self, f"finish {self.tries} {self.pauses}", self.finish)

    def commit(self, kept: Kept) -> None:
        assert self.form is not None
        self.live += 1
        self.world.committed(self, self.form)
        first = self.first or kept.protected_under() != self.kept.protected_under()
        if self.first or (self.rank == 0 and (first or self.live % 8 == 0)):
            self.tell("committed", self.current, (self.live, self.first, kept.protected_under(), kept.protected))
        self.kept, self.first = kept, False
        self.snapshot(kept)
        self.step()

    def snapshot(self, kept: Kept, *, must: bool = False) -> None:
        halves = self.machine.slots.setdefault(self.rank, [NO_STEP, NO_STEP])
        half = choose(halves, self.live, kept, must=must)
        if half is None:
            self.world.skipped += 1
            return
        self.machine.put(self.rank, half, NO_STEP)
        self.copying, step = True, self.live
        if kept.protected != NO_STEP:
            self.machine.keep = kept.protected

        def whole() -> None:
            if self.alive:
                self.machine.put(self.rank, half, step)
                self.copying = False
                self.world.copied(step)

        self.world.soon(whole, self.world.copy_ms)

    def finish(self, kept: Kept) -> None:
        """Nobody leaves before the last state is kept everywhere, with parity."""
        if kept.sealed != UNTIL and self.tries < 3:
            self.tries += 1
            if UNTIL not in self.machine.slots[self.rank]:
                self.snapshot(kept, must=True)
            self.arrive()
        elif kept.placement and kept.protected < UNTIL and self.pauses < 60:
            self.pauses += 1
            self.world.after(50 * MS, self.arrive)
        else:
            self.goodbye()

    def goodbye(self) -> None:
        self.farewell = ("goodbye", self.current, self.live)
        self._put(self.farewell)
        self.world.goodbye(self)
        self.world.happens("goodbye", self.machine)
        self.world.after(self.world.chance.randrange(20 * MS), lambda: self.end(finished=True))

    # ---- its end

    def end(self, *, finished: bool = False, power: bool = True) -> None:
        """Its process is gone; with `power`, its kernel tells whoever it was connected to."""
        if not self.alive:
            return
        self.alive = False
        if self.pipe is not None:
            self.pipe.close(0) if power else self.pipe.vanish(0)
        if self.form is not None and power and not finished:
            self.world.reset_peers(self, self.form)
        if finished:
            self.agent.finished_rank(self)

"""Several hosts under simulated failures: virtual clock, late messages, hosts that die, fall silent, are cut off.

    real     Job, HostBook, Roster, has_quorum, assign, candidates; place, decodable; decide_resume; Kept;
             choose_half, choose_protected_half, and the protector's choose_half
    modelled machines, network, agents (session.py, supervisor.py), coordinators' streams and election (control.py),
             ranks (member.py, engine.py, finish.py), snapshot managers, protectors

    Machine ── Agent ──┐ Pipe (in order, late; silent across a cut)     Coordinator ── Job
       └── Process ────┘

Checked at every event: what a Form promises exists; a step is never applied by two memberships that both go on; a
generation has one Form that anybody acts on; a minority forms nothing. At the end: every rank is at the last step,
or there is one StopJob and the state really was lost. A failing seed is replayed with SIM_SEED=N.

Not modelled: bytes, corruption, one-way cuts, a loss of a snapshot manager or protector alone, clocks that differ.
Long: one world; its parts mean little alone.
"""

from __future__ import annotations

import heapq
import inspect
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from holdfast.ckpt.memory.placement import Placement, survivable
from holdfast.ckpt.memory.protect.parity import choose_half as choose_parity_half
from holdfast.launcher.actions import (
    Action,
    Adopt,
    Fence,
    Form,
    JobDone,
    Probe,
    StepDown,
    StopJob,
    StoreAll,
    Tell,
    Welcome,
)
from holdfast.launcher.hosts import BEAT_NS, PROBE_NS, SILENT_NS, Host, Roster, has_quorum, newest
from holdfast.launcher.job import Job
from holdfast.launcher.session import CONNECT_S, LEADER_RETRY_S, RETRY_S, candidates
from holdfast.launcher.slots import Joined
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.gather import Kept
from holdfast.runtime.keep import choose
from holdfast.runtime.recovery.decide import Report

MS = 1_000_000
S = 1_000 * MS
LEASE_NS = 6 * S
FENCE_NS = 4_800 * MS
ELECT_NS = 3 * S
DOOR_NS = 1 * S
KEEP_NS = 2 * S
UNTIL = 40
STEP_MAX = 1 << 52
IMAGE = 20_000

PATIENT = RENUMBERS = True
REMEMBERS = "before" in inspect.signature(Kept.of).parameters
RESENDS = SETTLES = True
TESTIFIES = hasattr(Host(0), "former")
"""Whether an agent waits while a standby elects, and whether a host without ranks gives up its number too."""

Call = Callable[[], None]


def kept_of(rows: Sequence[Sequence[int]], placement: int, before: Kept) -> Kept:
    return Kept.of(rows, placement, before) if REMEMBERS else Kept.of(rows, placement)  # type: ignore[call-arg]


# ---- machines and the network -----------------------------------------------------------------------------


class Pipe:
    """A connection: in order, late; held back across a cut; reset by the kernel of a machine whose process is gone.

    Side 0 is whoever connected.
    """

    def __init__(self, world: World, machines: tuple[Machine, Machine], ended: tuple[Call, Call]) -> None:
        self.world, self.machines, self.ended = world, machines, ended
        self.open = [True, True]
        self.free_ns = [0, 0]
        self.held: list[list[Call | None]] = [[], []]
        world.pipes.append(self)

    def send(self, side: int, call: Call) -> None:
        if self.open[side]:
            self._carry(side, call)

    def close(self, side: int) -> None:
        """Its process ends it, or the kernel after its death."""
        if self.open[side]:
            self.open[side] = False
            self._carry(side, None)

    def vanish(self, side: int) -> None:
        """Its machine is without power: nobody hears of it."""
        self.open[side], self.held[side] = False, []

    def _carry(self, side: int, call: Call | None) -> None:
        world = self.world
        at = max(self.free_ns[side], world.now_ns + world.chance.randrange(2 * MS)) + 1
        self.free_ns[side] = at
        world.at(at, lambda: self._arrive(side, call))

    def _arrive(self, side: int, call: Call | None) -> None:
        here, there = self.machines[side], self.machines[1 - side]
        if self.held[side] or not self.world.reach(here, there):
            if here.up:
                self.held[side].append(call)
        elif not self.open[1 - side]:
            self._end(side)
        elif call is None:
            self._end(1 - side)
        else:
            call()

    def _end(self, side: int) -> None:
        if self.open[side]:
            self.open[side] = False
            self.ended[side]()

    def flush(self) -> None:
        """The network is another: what was held back goes on its way."""
        for side in (0, 1):
            held, self.held[side] = self.held[side], []
            for call in held:
                self._carry(side, call)


@dataclass(frozen=True, slots=True)
class Parity:
    """A parity half that is whole: the protector's Kept, and what is in it."""

    half: int
    layout: Placement
    step: int
    chunks: tuple[tuple[int, int], ...]

    @property
    def placement(self) -> int:
        return self.layout.number


class Machine:
    """What survives its agent: power, a number for the tester, its snapshot manager's and its protector's memory."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.boot = 0
        self.up = True
        self.agent: Agent | None = None
        self.coordinator: Coordinator | None = None
        self.clear()

    @property
    def address(self) -> str:
        """Of its coordinator, and of its agent's door: new with every boot."""
        return f"{self.number}:{self.boot}"

    def clear(self) -> None:
        for slot, steps in getattr(self, "slots", {}).items():
            for half in range(len(steps)):
                self.put(slot, half, NO_STEP)
        self.slots: dict[int, list[int]] = {}
        self.parity: list[Parity | None] = [None, None]
        self.placement: Placement | None = None
        self.me = -1  # its number in the job, as its protector was told
        self.told = -1
        self.hosts: dict[int, str] = {}  # number -> address, of all protectors
        self.keep = -1
        self.filling = self.pending = False
        self.spared = (-1, 0)

    # ---- snapshot manager

    def put(self, slot: int, half: int, step: int) -> None:
        halves = self.slots.setdefault(slot, [NO_STEP, NO_STEP])
        before, halves[half] = halves[half], step
        holders = self.world.holders
        if before != NO_STEP and before not in halves:
            holders[slot, before].discard(self)
        if step != NO_STEP:
            holders.setdefault((slot, step), set()).add(self)

    def held(self) -> dict[int, frozenset[int]]:
        return {slot: frozenset(s for s in halves if s != NO_STEP) for slot, halves in self.slots.items()}

    def held_parity(self) -> dict[tuple[int, int, int], frozenset[int]]:
        found: dict[tuple[int, int, int], frozenset[int]] = {}
        for kept in self.whole():
            for stripe, index in kept.chunks:
                key = (kept.placement, stripe, index)
                found[key] = found.get(key, frozenset()) | {kept.step}
        return found

    def whole(self) -> list[Parity]:
        return [kept for kept in self.parity if kept is not None]

    def has_parity(self, number: int, step: int) -> bool:
        return any((kept.placement, kept.step) == (number, step) for kept in self.whole())

    # ---- protector (ckpt/memory/protect)

    def topology(self, number: int, me: int, hosts: dict[int, str], placement: Placement | None) -> None:
        if number < self.told:
            return
        self.told, self.me, self.hosts, self.placement = number, me, hosts, placement
        self.world.poke()

    def page(self) -> tuple[int, int]:
        if self.placement is None:
            return 0, NO_STEP
        if not self.placement.parity_on(self.me):
            return self.placement.number, STEP_MAX
        return self.placement.number, self.protected()

    def protected(self) -> int:
        number = self.placement.number if self.placement is not None else -1
        return max((kept.step for kept in self.whole() if kept.placement == number), default=-1)

    def asked(self) -> dict[int, Machine]:
        """Machines that its protector can ask now, by the numbers that it knows them under."""
        found = {number: self.world.machine_at(address) for number, address in self.hosts.items()}
        return {
            number: machine
            for number, machine in (found | {self.me: self}).items()
            if machine is self
            or (machine.agent is not None and machine.address == self.hosts[number] and self.world.reach(self, machine))
        }

    def everywhere(self, number: int, step: int) -> bool:
        layout = self.placement
        if layout is None or layout.number != number:
            return False
        known = {host for host, machine in self.asked().items() if machine.has_parity(number, step)}
        return {host.host for host in layout.hosts if layout.parity_bytes(host.host)} <= known

    def turn(self) -> None:
        """Protect the newest step that every slot holds, if it is not protected yet."""
        self.pending = False
        placement = self.placement
        if self.agent is None or placement is None or self.filling or not placement.parity_on(self.me):
            return
        asked = set(self.asked().values())
        slots = [slot.slot for slot in placement.slots]
        step = self.world.common_step(slots, asked)
        if step < 0 or self.has_parity(placement.number, step):
            return
        if self._spare(step):
            self.world.after(50 * MS, self.wake)
            return
        half = choose_parity_half(self.whole(), self.keep, self.everywhere)
        self.parity[half], self.filling = None, True
        self.world.happens("encode", self)
        boot, me = self.boot, self.me

        def whole() -> None:
            if self.boot != boot or self.agent is None:
                return
            self.filling = False
            there = set(self.asked().values())
            if self.placement is placement and all(self.world.holds(slot, step, there) for slot in slots):
                self.parity[half] = Parity(half, placement, step, placement.parity_on(me))
            self.world.poke()

        self.world.soon(whole, self.world.encode_ms)

    def _spare(self, step: int) -> bool:
        protected = self.protected()
        if self.keep < 0 or protected <= self.keep or step <= protected:
            return False
        if self.spared[0] != protected:
            self.spared = protected, self.world.now_ns + KEEP_NS
        return self.world.now_ns < self.spared[1]

    def wake(self) -> None:
        if not self.pending:
            self.pending = True
            self.world.soon(self.turn, 8.0)

    def can_rebuild(self, slot: int, step: int) -> bool:
        """Whether its protector finds that slot, or enough shards of it, on hosts under the numbers they have now."""
        asked = self.asked()
        if self.world.holds(slot, step, set(asked.values())):
            return True
        layouts = {kept.placement: kept.layout for m in asked.values() for kept in m.whole() if kept.step == step}
        return any(self._decodes(slot, step, layout, asked) for layout in layouts.values())

    def _decodes(self, slot: int, step: int, layout: Placement, asked: dict[int, Machine]) -> bool:
        parity = {host for host, machine in asked.items() if machine.has_parity(layout.number, step)}
        machines = set(asked.values())
        stripes = [stripe for stripe in layout.stripes if any(chunk.slot == slot for chunk in stripe.data)]
        for stripe in stripes:
            shards = sum(self.world.holds(chunk.slot, step, machines) for chunk in stripe.data)
            if shards + sum(host in parity for host in stripe.parity) < len(stripe.data):
                return False
        return bool(stripes)


# ---- a rank -----------------------------------------------------------------------------------------------


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
            pending = ("join", self.asked, self.join_message) if self.asked and RESENDS else None
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


# ---- an agent ---------------------------------------------------------------------------------------------


class Agent:
    """One host's agent: its ranks, and its way to the coordinator in charge (supervisor.py, session.py)."""

    def __init__(self, machine: Machine, index: int, leader: str, capacity: int) -> None:
        self.world, self.machine = machine.world, machine
        self.site = index
        self.alive = True
        self.me = Host(
            index,
            name=f"m{machine.number}",
            door=machine.address,
            coordinator=machine.address,
            protector=machine.address,
            capacity=capacity,
            domain=f"d{machine.number}",
        )
        self.address = leader
        self.roster = Roster()
        self.running: dict[int, Process] = {}
        self.slots: dict[int, int] = {}  # rank -> incarnation: the watcher's
        self.live: dict[int, int] = {}
        self.finished: dict[int, int] = {}
        self.outbox: list[tuple[str, int, int]] = []
        self.pipe: Pipe | None = None
        self.welcomed = False
        self.heard_ns = self.called_ns = self.world.now_ns
        self.voted = index  # its number in the newest membership that did anything
        self.turn, self.failing_ns, self.asked = 0, -1, ""
        self.waiting = False
        self.world.soon(self.walk, 5.0)
        self.world.after(self.world.chance.randrange(BEAT_NS), self.beat)
        self.world.after(FENCE_NS, self.check_lease)

    # ---- its session

    def several(self) -> bool:
        return len(self.roster.hosts) > 1

    def walk(self) -> None:
        """Ask the next candidate (CoordinatorSession._run)."""
        self.waiting = False
        if not self.alive or self.pipe is not None:
            return
        choices = candidates(self.address, self.roster)
        address = self.asked = choices[self.turn % len(choices)]
        if self.failing_ns < 0:
            self.failing_ns = self.world.now_ns
        machine, coordinator = self.world.machine_at(address), self.world.coordinator_at(address)
        if not self.world.reach(self.machine, machine):
            self.world.after(int(CONNECT_S * S), lambda: self.failed(address))
        elif coordinator is None:
            self.world.soon(lambda: self.failed(address))
        else:
            self.stream(address, coordinator)

    def stream(self, address: str, coordinator: Coordinator) -> None:
        news = {rank for _, rank, _ in self.outbox}
        ranks = [(rank, incarnation, 1) for rank, incarnation in sorted(self.live.items()) if rank not in news]
        machines = (self.machine, coordinator.machine)
        pipe = self.pipe = Pipe(self.world, machines, (lambda: self.closed(address), lambda: None))
        caller = Caller(self, replace(self.me), ranks, self.roster.encoded() if self.roster.hosts else "", pipe)
        pipe.ended = (pipe.ended[0], lambda: coordinator.agent_gone(caller))
        self.welcomed, self.called_ns = False, self.world.now_ns
        self.caller, self.coordinator = caller, coordinator
        pipe.send(0, lambda: coordinator.agent_hello(caller))
        told = [("finished", rank, incarnation) for rank, incarnation in self.finished.items() if rank not in news]
        waiting, self.outbox = [*self.outbox, *told], []
        for message in waiting:
            self.tell(*message)

    def closed(self, address: str) -> None:
        """The stream ended, whoever ended it."""
        self.pipe = None
        if not self.alive:
            return
        if self.welcomed:
            self.turn, self.failing_ns, self.asked = 0, -1, ""
            self.later(0)
        else:
            self.failed(address, refused=True)

    def failed(self, address: str, *, refused: bool = False) -> None:
        failing = self.world.now_ns - self.failing_ns
        stays = address == self.address and failing <= int(LEADER_RETRY_S * S)
        if stays:
            door = next((host.door for host in self.roster.hosts if host.coordinator == address), "")
            if door:
                machine = self.world.machine_at(door)
                if not self.world.reach(self.machine, machine):
                    self.world.after(int(CONNECT_S * S), self.next)
                    return
                stays = machine.agent is not None and machine.address == door
        if stays:
            self.later(int(RETRY_S * S))
        elif refused and SETTLES and self.world.chance.random() < 0.75:
            self.turn = 0  # stay with the first that answers: the others come there too
            self.later(int(RETRY_S * S))
        else:
            self.next()

    def next(self) -> None:
        self.turn += 1
        wrapped = self.turn % len(candidates(self.address, self.roster)) == 0
        self.later(int(RETRY_S * S) if wrapped else 0)

    def later(self, delay_ns: int) -> None:
        if self.alive and not self.waiting:
            self.waiting = True
            self.world.after(delay_ns + MS, self.walk)

    def tell(self, what: str, rank: int, incarnation: int) -> None:
        if self.pipe is None:
            self.outbox.append((what, rank, incarnation))
        else:
            caller, coordinator = self.caller, self.coordinator
            self.pipe.send(0, lambda: coordinator.agent_says(caller, what, rank, incarnation))

    def beat(self) -> None:
        if not self.alive:
            return
        if self.pipe is not None:
            self.tell("beat", -1, -1)
            if self.several() and self.quiet():
                pipe, address, self.pipe = self.pipe, self.coordinator.address, None
                pipe.close(0)
                self.closed(address)
        self.world.after(BEAT_NS, self.beat)

    def quiet(self) -> bool:
        """Whether to leave the coordinator that is asked."""
        since = self.heard_ns if self.welcomed or not PATIENT else max(self.heard_ns, self.called_ns)
        return self.world.now_ns - since > (SILENT_NS if self.welcomed or not PATIENT else ELECT_NS + S)

    # ---- orders

    def on_welcome(self, index: int, fenced: bool) -> None:
        self.heard_ns = self.world.now_ns
        self.welcomed = True
        moved, self.address = self.coordinator.address != self.address, self.coordinator.address
        if fenced:
            self.fence()
            return
        self.me.index = index
        if moved:
            for process in self.running.values():
                process_address = self.address
                self.world.soon(lambda p=process, a=process_address: p.moved(a))

    def on_roster(self, text: str) -> None:
        self.heard_ns = self.world.now_ns
        roster = self.world.decoded(text)
        if newest((roster, self.roster)) is roster:
            self.roster = roster

    def on_beat(self) -> None:
        self.heard_ns = self.world.now_ns

    def on_adopt(self, rank: int, incarnation: int) -> None:
        self.heard_ns = self.world.now_ns
        if self.slots.get(rank, -1) < incarnation:
            self.slots[rank] = incarnation - 1
            self.world.happens("adopt", self.machine)
            self.world.soon(lambda: self.start(rank, incarnation), 60.0)

    # ---- ranks

    def start(self, rank: int, incarnation: int) -> None:
        if not self.alive or (self.slots.get(rank, 99999) >= incarnation and incarnation):
            return
        self.slots[rank] = self.live[rank] = incarnation
        self.finished.pop(rank, None)
        self.running[rank] = Process(self, rank, incarnation)
        self.tell("started", rank, incarnation)

    def rank_died(self, process: Process) -> None:
        """The kernel says so."""
        if not self.alive or self.running.get(process.rank) is not process:
            return
        self.live.pop(process.rank, None)
        self.tell("exited", process.rank, process.incarnation)
        self.world.soon(lambda: self.start(process.rank, process.incarnation + 1), 60.0)

    def finished_rank(self, process: Process) -> None:
        if self.alive and self.running.get(process.rank) is process:
            self.live.pop(process.rank, None)
            self.finished[process.rank] = process.incarnation
            self.tell("finished", process.rank, process.incarnation)

    def fence(self) -> None:
        """This host was given up, or cannot know: its ranks end."""
        if not self.slots and not RENUMBERS:
            return
        for process in self.running.values():
            process.end()
        self.running, self.slots, self.live, self.finished = {}, {}, {}, {}
        if TESTIFIES and self.me.index >= 0:
            self.me.former = (*self.me.former, self.me.index)
        self.me.index = -1
        if self.pipe is not None:
            pipe, self.pipe = self.pipe, None
            pipe.close(0)
            self.welcomed = self.welcomed and True
            self.closed(self.coordinator.address)

    def check_lease(self) -> None:
        if not self.alive:
            return
        silence = self.world.now_ns - self.heard_ns
        if self.several() and silence > FENCE_NS and self.slots:
            self.world.self_fenced += 1
            self.fence()
        self.world.after(max(0, FENCE_NS - silence) + 20 * MS, self.check_lease)

    def die(self, *, power: bool) -> None:
        self.alive = False
        for process in self.running.values():
            process.end(power=power)
        if self.pipe is not None:
            self.pipe.close(0) if power else self.pipe.vanish(0)


@dataclass(slots=True, eq=False)
class Caller:
    """A coordinator's view of an agent's stream (messages.Caller)."""

    agent: Agent
    told: Host
    ranks: list[tuple[int, int, int]]
    text: str
    pipe: Pipe
    welcomed: bool = False
    backlog: list[tuple[str, int, int]] = field(default_factory=list)


# ---- a coordinator ----------------------------------------------------------------------------------------


class Coordinator:
    """control.py without gRPC: streams, election, doors, one real Job while it is in charge."""

    def __init__(self, machine: Machine, job: Job | None = None) -> None:
        self.world, self.machine, self.address = machine.world, machine, machine.address
        self.alive = True
        self.job = job
        self.candidates: list[Caller] = []
        self.agents: dict[int, Caller] = {}
        self.all: list[Caller] = []
        self.ranks: dict[int, tuple[Process, Pipe]] = {}
        self.early: list[tuple[Process, Pipe, int, int, list[tuple[str, int, object]]]] = []
        self.dead: set[int] = set()
        self.asking: set[int] = set()
        self.due_ns = 1 << 62

    # ---- agents

    def agent_hello(self, caller: Caller) -> None:
        if not self.alive:
            return
        self.all.append(caller)
        if self.job is not None:
            self.welcome(caller)
            return
        self.candidates.append(caller)
        self.elect()
        if not caller.welcomed:
            self.world.after(ELECT_NS, lambda: self.send_away(caller))

    def send_away(self, caller: Caller) -> None:
        if caller in self.candidates:
            self.candidates.remove(caller)
            caller.pipe.close(1)

    def welcome(self, caller: Caller) -> None:
        assert self.job is not None
        actions = self.job.on_agent_hello(self.world.now_ns, caller.told, caller.ranks)
        self.agents[caller.told.index] = caller
        caller.welcomed = True
        self.do(actions)
        self.beat(caller)
        for message in caller.backlog:
            self.agent_says(caller, *message)

    def beat(self, caller: Caller) -> None:
        if self.alive and caller.pipe.open[1]:
            caller.pipe.send(1, caller.agent.on_beat)
            self.world.after(BEAT_NS, lambda: self.beat(caller))

    def agent_says(self, caller: Caller, what: str, rank: int, incarnation: int) -> None:
        if not caller.welcomed:
            caller.backlog.append((what, rank, incarnation))
            return
        job, now, host = self.job, self.world.now_ns, caller.told.index
        if job is None or not self.alive:
            return
        actions = job.on_agent_beat(now, host)
        if what == "started":
            actions = job.on_rank_started(now, rank, incarnation, 1, host, "fresh")
        elif what in ("exited", "finished"):
            actions = job.on_rank_exited(
                now,
                rank,
                incarnation,
                what,
                detected_ns=now,
                last_progress_ns=0,
                finished=what == "finished",
            )
        self.do(actions)

    def agent_gone(self, caller: Caller) -> None:
        if caller in self.candidates:
            self.candidates.remove(caller)
        if self.agents.get(caller.told.index) is caller:
            del self.agents[caller.told.index]
            if self.job is not None and self.alive:
                self.do(self.job.on_agent_gone(self.world.now_ns, caller.told.index))

    # ---- ranks

    def rank_hello(self, process: Process, pipe: Pipe, generation: int, live: int) -> None:
        if not self.alive:
            return
        if self.job is None:
            entry = (process, pipe, generation, live, [])
            self.early.append(entry)
            self.world.after(ELECT_NS, lambda: self.send_rank_away(entry))
            return
        if process.incarnation < self.job.slots[process.rank].incarnation:
            pipe.close(1)
            process.pipe = None
            self.world.after(250 * MS, process.connect)
            return
        self.ranks[process.rank] = (process, pipe)
        who = (process.rank, process.incarnation, 1, process.host)
        self.do(self.job.on_rank_hello(self.world.now_ns, *who, generation, live))

    def send_rank_away(self, entry: tuple[Process, Pipe, int, int, list[tuple[str, int, object]]]) -> None:
        if entry in self.early:
            self.early.remove(entry)
            entry[1].close(1)

    def rank_says(self, process: Process, pipe: Pipe, what: str, generation: int, body: object) -> None:
        for entry in self.early:
            if entry[1] is pipe:
                entry[4].append((what, generation, body))
                return
        job, now, rank = self.job, self.world.now_ns, process.rank
        if job is None or not self.alive:
            return
        actions: list[Action] = []
        if what == "join":
            assert isinstance(body, Joined)
            actions = job.on_join(now, rank, generation, body)
        elif what == "store_set":
            actions = job.on_store_set(rank, generation, str(body), b"", True)
        elif what == "restored":
            actions = job.on_restored(rank, generation, now, [])
        elif what == "committed":
            step, first, placement, protected = body  # type: ignore[misc]
            actions = job.on_committed(rank, generation, step, now, 1.0, first)
            actions += job.on_protected(placement, protected)
        elif what == "suspect":
            actions = job.on_suspect(now, rank, generation, str(body))
        elif what == "goodbye":
            assert isinstance(body, int)
            actions = job.on_goodbye(now, rank, process.incarnation, body)
        self.do(actions)

    def rank_gone(self, process: Process, pipe: Pipe) -> None:
        if self.ranks.get(process.rank, (None, None))[1] is pipe:
            del self.ranks[process.rank]
            if self.job is not None and self.alive:
                self.do(self.job.on_session_lost(process.rank, process.incarnation))

    # ---- taking over

    def elect(self) -> None:
        if self.job is not None or not self.candidates or not self.alive:
            return
        rosters = [self.world.decoded(caller.text) for caller in self.candidates]
        roster = newest(rosters)
        if not roster.members:
            return
        voters = {rank: host for rank, (_, host) in roster.members.items()}
        former = {n for caller in self.candidates for n in caller.told.former} if TESTIFIES else set()
        heard = {caller.told.index for caller in self.candidates} | former
        proven = {host.index for host in roster.hosts if host.proven}
        dead = (self.dead | proven) - heard
        if has_quorum(voters, heard, dead):
            self.take_over(roster)
            return
        for host in roster.hosts:
            if host.index not in heard | dead | self.asking:
                self.try_door(host.index, host.door)

    def take_over(self, roster: Roster) -> None:
        self.world.takeovers += 1
        roster = Roster.decoded(roster.encoded())  # its hosts become the job's own
        self.job = Job.from_roster(self.world.size, roster, self.world.now_ns, **self.world.options)
        callers, self.candidates = sorted(self.candidates, key=lambda caller: caller.told.index), []
        for caller in callers:
            self.welcome(caller)
        for index in sorted(self.dead):
            if self.job is not None:
                self.do(self.job.on_probe(self.world.now_ns, index, refused=True))
        self.dead = set()
        early, self.early = self.early, []
        for process, pipe, generation, live, waiting in early:
            if pipe.open[1]:
                self.rank_hello(process, pipe, generation, live)
                for message in waiting:
                    self.rank_says(process, pipe, *message)
        self.world.happens("takeover", self.machine)

    def step_down(self) -> None:
        self.world.stepped_down += 1
        for caller in list(self.agents.values()):
            caller.pipe.send(1, lambda c=caller: c.agent.on_welcome(-1, True) if c.agent.caller is c else None)
        self.job = None
        for _, pipe in self.ranks.values():
            pipe.close(1)
        for caller in self.agents.values():
            caller.pipe.close(1)
        self.ranks, self.agents = {}, {}

    def try_door(self, index: int, door: str) -> None:
        machine = self.world.machine_at(door)
        self.asking.add(index)
        reached = self.world.reach(self.machine, machine)
        refused = reached and (machine.agent is None or machine.address != door)

        def again() -> None:
            self.asking.discard(index)
            self.elect()

        def answered() -> None:
            if self.job is not None and self.alive:
                self.do(self.job.on_probe(self.world.now_ns, index, refused=refused))
            elif refused:
                self.dead.add(index)
            self.world.after(0 if refused or self.job is not None else PROBE_NS, again)

        if reached:
            self.world.soon(answered)
        else:
            self.world.after(DOOR_NS, answered)

    # ---- orders

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Fence(generation, _, ranks):
                    self.world.happens("fence", self.machine)
                    self.order(ranks, lambda process, g=generation: process.on_fence(g))
                case Form():
                    self.world.formed(self, action)
                    self.order(action.ranks, lambda process, form=action: process.on_form(form))
                    self.world.happens("form", self.machine)
                case StoreAll(generation, _, ranks):
                    self.order(ranks, lambda process, g=generation: process.on_store_all(g))
                case StopJob():
                    self.world.stop(self, action)
                case Probe(host, door):
                    if host not in self.asking:
                        self.try_door(host, door)
                case Welcome(host, fenced):
                    self.to_agent(host, lambda agent, h=host, f=fenced: agent.on_welcome(h, f))
                case Adopt(host, rank, incarnation):
                    self.to_agent(host, lambda agent, r=rank, i=incarnation: agent.on_adopt(r, i))
                case Tell(roster, topology):
                    for host in self.agents:
                        self.to_agent(host, lambda agent, text=roster: agent.on_roster(text))
                    for host, text in topology.items():
                        told = self.world.topology(text)
                        self.to_agent(host, lambda agent, t=told: agent.machine.topology(*t))
                case JobDone():
                    self.world.finish(self)
                case StepDown():
                    self.step_down()
                    break
        self.set_timer()

    def order(self, ranks: Iterable[int], call: Callable[[Process], None]) -> None:
        for rank in ranks:
            if rank in self.ranks:
                process, pipe = self.ranks[rank]
                pipe.send(1, lambda p=process: call(p))

    def to_agent(self, host: int, call: Callable[[Agent], None]) -> None:
        caller = self.agents.get(host)
        if caller is not None:
            caller.pipe.send(1, lambda: call(caller.agent) if caller.agent.pipe is caller.pipe else None)

    def set_timer(self) -> None:
        due = self.job.next_tick_ns() if self.job is not None else None
        if due is not None and due < self.due_ns:
            self.due_ns = due = max(due, self.world.now_ns + MS)
            self.world.at(due, lambda: self.tick(due))

    def tick(self, due: int) -> None:
        if due != self.due_ns or not self.alive:
            return
        self.due_ns = 1 << 62
        if self.job is not None:
            self.world.ticks += 1
            self.do(self.job.on_tick(self.world.now_ns))
            self.set_timer()

    def die(self, *, power: bool) -> None:
        self.alive = False
        for caller in self.all:
            caller.pipe.close(1) if power else caller.pipe.vanish(1)
        pipes = [pipe for _, pipe in self.ranks.values()] + [entry[1] for entry in self.early]
        for pipe in pipes:
            pipe.close(1) if power else pipe.vanish(1)


# ---- the world --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens: at `ns` of the simulation, or `ns` after the nth time that `on` happens, if `safe` only once
    redundancy is whole again."""

    kind: str  # kill, power, cut, coordinator, rank
    ns: int
    on: str = ""
    nth: int = 1
    count: int = 1  # hosts
    lasts_ns: int = 0  # of a cut; until a killed host is back (0: never)
    leader: bool = False  # the one in charge is among them
    safe: bool = False
    hosts: tuple[int, ...] = ()  # these machines, not just any


@dataclass(frozen=True, slots=True)
class Scenario:
    """A job, and what befalls it."""

    hosts: int = 3
    per_host: int = 1
    spares: int = 0
    replicas: int = 1
    redundancy: str = "auto"
    spread: bool = True
    faults: tuple[Fault, ...] = ()

    @property
    def size(self) -> int:
        return self.hosts * self.per_host


@dataclass(eq=False)
class Barrier:
    """Who has arrived, with what, and how each goes on."""

    waiting: dict[int, tuple[Process, list[int], Callable[[Kept], None]]] = field(default_factory=dict)


class World:
    """Clock, network, machines, and what must never happen."""

    def __init__(self, seed: int, scenario: Scenario) -> None:
        self.seed, self.scenario, self.size = seed, scenario, scenario.size
        self.chance = random.Random(seed)
        self.now_ns = self.count = self.ticks = 0
        self.queue: list[tuple[int, int, Call]] = []
        self.pipes: list[Pipe] = []
        self.cuts: list[frozenset[int]] = []
        self.holders: dict[tuple[int, int], set[Machine]] = {}
        self.barriers: dict[tuple[int, str], Barrier] = {}
        self.forms: list[tuple[Form, Coordinator]] = []
        self.orders: dict[int, int] = {}  # id of a form -> its place
        self.acted: dict[int, Form] = {}  # generation -> the form that somebody committed in
        self.newest_commit = -1
        self.every: dict[tuple[int, int], Process] = {}
        self.voters: dict[int, Agent] = {}
        self.left: set[int] = set()
        self.stopped: StopJob | None = None
        self.done = self.unasked = False
        self.applied: dict[tuple[int, int], Process] = {}
        self.fired: list[str] = []
        self.seen: dict[str, int] = {}
        self.faults = list(scenario.faults)
        self.takeovers = self.stepped_down = self.self_fenced = self.rebuilt = self.skipped = 0
        self.rosters: dict[str, Roster] = {}
        self.topologies: dict[str, tuple[int, int, dict[int, str], Placement | None]] = {}
        self.layouts: dict[str, Placement] = {}
        self.step_ms, self.copy_ms = self.chance.choice((20, 60, 120)), self.chance.choice((3.0, 12.0, 40.0))
        self.encode_ms = self.chance.choice((8.0, 40.0, 150.0))
        self.options = {
            "lease_ns": LEASE_NS,
            "redundancy": scenario.redundancy,
            "spread": scenario.spread,
            "wait_ns": 30 * S,
        }
        self.machines = [Machine(self, number) for number in range(scenario.hosts + scenario.spares)]
        self._start()

    def __str__(self) -> str:
        return f"SIM_SEED={self.seed} t={self.now_ns / 1e9:.3f} {self.fired}"

    def _start(self) -> None:
        first = self.machines[0]
        first.coordinator = Coordinator(first, Job(self.size, **self.options))  # type: ignore[arg-type]
        for machine in self.machines:
            if machine is not first:
                machine.coordinator = Coordinator(machine)
            if machine.number >= self.scenario.hosts:
                self.after(200 * MS, lambda m=machine: self.back(m))
                continue
            machine.agent = agent = Agent(machine, machine.number, first.address, self.scenario.per_host)
            for local in range(self.scenario.per_host):
                rank = machine.number * self.scenario.per_host + local
                agent.start(rank, 0)
                self.voters[rank] = agent
        for fault in self.faults:
            if not fault.on:
                self.after(fault.ns, lambda f=fault: self.strike(f))

    # ---- machinery

    def at(self, at_ns: int, call: Call) -> None:
        self.count += 1
        heapq.heappush(self.queue, (at_ns, self.count, call))

    def after(self, delay_ns: int, call: Call) -> None:
        self.at(self.now_ns + delay_ns, call)

    def soon(self, call: Call, most_ms: float = 3.0) -> None:
        self.at(self.now_ns + self.chance.randrange(int(most_ms * MS)) + 1, call)

    def step_ns(self) -> int:
        return self.chance.randrange(self.step_ms * MS)

    def run(self, until_ns: int = 200 * S) -> World:
        while self.queue and not self.done and self.stopped is None:
            self.now_ns, _, call = heapq.heappop(self.queue)
            if self.now_ns > until_ns:
                break
            call()
            assert self.ticks < 50_000, f"{self}: the coordinator's timer never rests"
        return self

    def reach(self, a: Machine, b: Machine) -> bool:
        if not (a.up and b.up):
            return False
        return a is b or all((a.number in cut) == (b.number in cut) for cut in self.cuts)

    def machine_at(self, address: str) -> Machine:
        return self.machines[int(address.partition(":")[0])]

    def coordinator_at(self, address: str) -> Coordinator | None:
        machine = self.machine_at(address)
        return machine.coordinator if machine.address == address else None

    def decoded(self, text: str) -> Roster:
        if text not in self.rosters:
            self.rosters[text] = Roster.decoded(text)
        return self.rosters[text]

    def topology(self, text: str) -> tuple[int, int, dict[int, str], Placement | None]:
        if text not in self.topologies:
            value = json.loads(text)
            layout = value["placement"]
            if layout is not None and layout not in self.layouts:
                self.layouts[layout] = Placement.from_json(layout)
            placement = self.layouts[layout] if layout is not None else None
            hosts = {int(host): str(address) for host, address in value["hosts"].items()}
            self.topologies[text] = value["number"], value["me"], hosts, placement
        return self.topologies[text]

    # ---- what is held

    def peers(self, rank: int) -> tuple[int, ...]:
        stages = self.size // self.scenario.replicas
        return tuple(range(rank % stages, self.size, stages))

    def holds(self, slot: int, step: int, among: set[Machine]) -> bool:
        return not among.isdisjoint(self.holders.get((slot, step), ()))

    def common_step(self, slots: Sequence[int], among: set[Machine]) -> int:
        steps = {step for slot, step in self.holders if slot == slots[0]}
        for step in sorted(steps, reverse=True):
            if all(self.holds(slot, step, among) for slot in slots):
                return step
        return -1

    def copied(self, step: int) -> None:
        if all(self.holders.get((slot, step)) for slot in range(self.size)):
            self.poke()

    def poke(self) -> None:
        for machine in self.machines:
            if machine.placement is not None:
                machine.wake()

    # ---- groups

    def in_form(self, form: Form, rank: int) -> Process | None:
        for machine in self.machines:
            if machine.agent is not None:
                process = machine.agent.running.get(rank)
                if process is not None and process.alive and process.form is form:
                    return process
        return None

    def reset_peers(self, gone: Process, form: Form) -> None:
        for rank in form.ranks:
            other = self.in_form(form, rank)
            if other is not None and self.reach(gone.machine, other.machine):
                self.soon(lambda p=other: p.fail("connection reset") if p.form is form else None, 5.0)

    def barrier(self, process: Process, tag: str, then: Callable[[Kept], None]) -> None:
        form = process.form
        assert form is not None
        key = (self.orders[id(form)], tag)
        barrier = self.barriers.setdefault(key, Barrier())
        barrier.waiting[process.rank] = (process, process.keeps(), then)
        if len(barrier.waiting) < len(form.ranks):
            return
        del self.barriers[key]
        rows = [barrier.waiting[rank][1] for rank in sorted(barrier.waiting)]
        kept = kept_of(rows, form.placement, process.kept if tag != "gate" else Kept())
        members = [entry[0].machine for entry in barrier.waiting.values()]
        for member, _, go_on in barrier.waiting.values():
            self.soon(lambda p=member, then=go_on: self.pass_barrier(p, form, members, lambda: then(kept)))

    def pass_barrier(self, process: Process, form: Form, members: list[Machine], go_on: Call) -> None:
        """What the others sent has come; what kernels hold back comes when a cut is healed."""
        if not process.in_group() or process.form is not form:
            return
        if all(self.reach(process.machine, m) for m in members if m.agent is not None):
            go_on()
        else:
            self.after(50 * MS, lambda: self.pass_barrier(process, form, members, go_on))

    # ---- what must never happen

    def formed(self, coordinator: Coordinator, form: Form) -> None:
        """A Form is sent: check that it can be."""
        job = coordinator.job
        assert job is not None
        assert all(form.generation != other.generation or self.dead_letter(other) for other, _ in self.forms), (
            f"{self}: generation {form.generation} formed twice"
        )
        self.forms.append((form, coordinator))
        self.orders[id(form)] = len(self.forms) - 1
        members = {rank: self.member(rank, incarnation) for rank, incarnation, _, _ in form.members}
        self.check_side(form, coordinator, members)
        if all(
            process is not None and self.reach(process.machine, coordinator.machine) for process in members.values()
        ):
            self.check_sources(form, {rank: process for rank, process in members.items() if process is not None})

    def dead_letter(self, form: Form) -> bool:
        """Whether nobody ever acted on that Form."""
        return all(process.form is not form for process in self.processes())

    def processes(self) -> list[Process]:
        return [p for m in self.machines if m.agent is not None for p in m.agent.running.values() if p.alive]

    def member(self, rank: int, incarnation: int) -> Process | None:
        return next((p for p in self.processes() if (p.rank, p.incarnation) == (rank, incarnation)), None)

    def check_side(self, form: Form, coordinator: Coordinator, members: dict[int, Process | None]) -> None:
        """Those who form are a majority of the newest generation that did anything, but for the truly dead."""
        numbers = {agent: number for number, agent in enumerate(dict.fromkeys(self.voters.values()))}
        voters = {rank: numbers[agent] for rank, agent in self.voters.items()}
        dead = {number for agent, number in numbers.items() if not agent.alive or agent.me.index != agent.voted}
        here = {p.agent for p in members.values() if p is not None}
        here |= {caller.agent for caller in coordinator.agents.values()}
        heard = {numbers[agent] for agent in here if agent in numbers}
        assert has_quorum(voters, heard - dead, dead), f"{self}: a minority {heard} of {voters} formed {form}"

    def check_sources(self, form: Form, members: dict[int, Process]) -> None:
        step = form.resume_step
        for rank, _, _, source in form.members:
            process = members[rank]
            if source.rung == "live":
                ok = process.live == step
            elif source.rung == "snapshot":
                ok = all(step in process.machine.slots.get(peer, ()) for peer in self.peers(rank))
            elif source.rung == "peer":
                ok = source.peer in members and members[source.peer].live == step
            else:
                machines = {m for m in self.machines if m.agent is not None and self.reach(m, process.machine)}
                ok = all(self.reachable(peer, step, machines) for peer in self.peers(rank))
            # Whoever has left reports no more: that the last state is kept is the contract of leaving.
            assert ok or form.fresh or (form.solo and step == UNTIL), (
                f"{self}: rank {rank} cannot get step {step} from {source}"
            )

    def reachable(self, slot: int, step: int, machines: set[Machine]) -> bool:
        """Whether the bytes exist there: whole, or k shards of each stripe, whatever number a host has now."""
        if self.holds(slot, step, machines):
            return True
        layouts = {kept.placement: kept.layout for m in machines for kept in m.whole() if kept.step == step}
        for layout in layouts.values():
            parity = [k.chunks for m in machines for k in m.whole() if (k.placement, k.step) == (layout.number, step)]
            chunks = {chunk for held in parity for chunk in held}
            stripes = [stripe for stripe in layout.stripes if any(chunk.slot == slot for chunk in stripe.data)]
            if stripes and all(
                sum(self.holds(chunk.slot, step, machines) for chunk in stripe.data)
                + sum((stripe.number, index) in chunks for index in range(len(stripe.parity)))
                >= len(stripe.data)
                for stripe in stripes
            ):
                return True
        return False

    def recoverable(self, machines: set[Machine], processes: list[Process]) -> int:
        """Newest step that every rank could resume from with what is there; -1: none."""
        live = {(p.rank, p.live) for p in processes}
        steps = {step for _, step in self.holders} | {step for _, step in live}
        for step in sorted(steps - {NO_STEP}, reverse=True):
            if all(
                any((peer, step) in live for peer in self.peers(rank))
                or all(self.reachable(peer, step, machines) for peer in self.peers(rank))
                for rank in range(self.size)
            ):
                return step
        return -1

    def committed(self, process: Process, form: Form) -> None:
        place = self.orders[id(form)]
        assert place >= self.newest_commit, f"{self}: {form} goes on although {self.forms[self.newest_commit][0]} did"
        assert self.acted.setdefault(form.generation, form) is form, f"{self}: two memberships are {form.generation}"
        assert self.applied.setdefault((place, process.rank), process) is process, f"{self}: rank {process.rank} is two"
        if place > self.newest_commit:
            self.newest_commit = place
            self.voters = {}
            for rank, incarnation, host, _ in form.members:
                agent = self.voters[rank] = self.every[rank, incarnation].agent
                agent.voted = host
        if process.live == UNTIL:
            self.happens("last", process.machine)
        self.happens("commit", process.machine)

    def goodbye(self, process: Process) -> None:
        assert process.live == UNTIL, f"{self}: rank {process.rank} leaves at step {process.live}"
        self.left.add(process.rank)

    def finish(self, coordinator: Coordinator) -> None:
        assert len(self.left) == self.size, f"{self}: done, but only {self.left} left in good order"
        self.done = True

    def stop(self, coordinator: Coordinator, stop: StopJob) -> None:
        """The job gives up: it must have to."""
        machines = {m for m in self.machines if m.agent is not None and self.reach(m, coordinator.machine)}
        assert coordinator.job is not None
        slots = coordinator.job.slots
        number = {m: m.agent.me.index for m in machines if m.agent is not None}
        members = [
            p
            for p in self.processes()
            if p.machine in machines
            and (p.incarnation, number[p.machine]) == (slots[p.rank].incarnation, slots[p.rank].host)
        ]
        homes = {p.machine for p in members}
        self.unasked = self.recoverable(machines, members) > self.recoverable(homes, members)
        step = self.recoverable(homes, members)
        if (
            stop.exit_code == 1
            and "no host came" not in stop.reason
            and (step >= 0 and (not self.left or step == UNTIL))
        ):
            raise AssertionError(f"{self}: stopped although step {step} could be had: {stop.reason}")
        self.stopped = stop

    def quorum_is_left(self) -> bool:
        """Whether those of the newest membership who live, and can hear each other, could decide."""
        if self.newest_commit < 0:
            return False  # before the first generation only the first coordinator may decide
        if not TESTIFIES and any(m.agent is not None and m.agent.me.index < 0 for m in self.machines):
            return False
        numbers = {agent: number for number, agent in enumerate(dict.fromkeys(self.voters.values()))}
        voters = {rank: numbers[agent] for rank, agent in self.voters.items()}
        for machine in self.machines:
            if machine.agent is None or not machine.agent.roster.members:
                continue
            heard = {n for agent, n in numbers.items() if agent.alive and self.reach(agent.machine, machine)}
            dead = {n for agent, n in numbers.items() if not agent.alive and self.reach(agent.machine, machine)}
            if has_quorum(voters, heard, dead):
                return True
        return False

    # ---- faults

    def happens(self, what: str, machine: Machine) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1
        for fault in self.faults:
            if fault.on == what and fault.nth == self.seen[what]:
                self.after(fault.ns, lambda f=fault: self.strike(f))

    def leader(self) -> Coordinator | None:
        led = [m.coordinator for m in self.machines if m.coordinator is not None and m.coordinator.job is not None]
        return max(led, key=lambda c: (len(c.agents), -c.machine.number), default=None)

    def tolerates(self) -> int:
        """Hosts that may be lost now, by what the job says it has protected and by those who really live."""
        leader = self.leader()
        placement = leader.job._current if leader is not None and leader.job is not None else None
        if leader is None or leader.job is None or placement is None or leader.job._protected[0] != placement.number:
            return 0
        living = {m.agent.me.index for m in self.machines if m.agent is not None and self.reach(m, leader.machine)}
        lost = {host.host for host in placement.hosts} - living
        return min(survivable(placement, lost).values(), default=0)

    def strike(self, fault: Fault) -> None:
        if fault.safe and self.tolerates() < fault.count:
            if not self.left:
                self.after(100 * MS, lambda: self.strike(fault))
            return
        living = [m for m in self.machines if m.agent is not None]
        leader = self.leader()
        if fault.leader and leader is not None and leader.machine in living:
            living.remove(leader.machine)
            living = [leader.machine, *self.chance.sample(living, len(living))]
        else:
            living = self.chance.sample(living, len(living))
        victims = [self.machines[number] for number in fault.hosts] or living[: fault.count]
        self.fired.append(f"{fault.kind} {[m.number for m in victims]} at {self.now_ns / 1e9:.3f}")
        if fault.kind == "cut":
            self.cut(victims, fault.lasts_ns)
        for machine in victims:
            if fault.kind in ("kill", "power"):
                self.lose(machine, power=fault.kind == "kill")
                if fault.lasts_ns:
                    self.after(fault.lasts_ns, lambda m=machine: self.back(m))
            elif fault.kind == "coordinator":
                self.restart_coordinator(machine)
            elif fault.kind == "rank":
                self.kill_rank(machine)

    def cut(self, victims: list[Machine], lasts_ns: int) -> None:
        cut = frozenset(m.number for m in victims)
        self.cuts.append(cut)
        if lasts_ns:
            self.after(lasts_ns, lambda: self.heal(cut))

    def heal(self, cut: frozenset[int]) -> None:
        self.cuts.remove(cut)
        self.fired.append(f"healed {sorted(cut)} at {self.now_ns / 1e9:.3f}")
        self.flush()

    def flush(self) -> None:
        self.pipes = [pipe for pipe in self.pipes if any(pipe.open) or any(pipe.held)]
        for pipe in self.pipes:
            pipe.flush()
        self.poke()

    def lose(self, machine: Machine, *, power: bool) -> None:
        """Its processes and its memory are gone; without power its kernel too, which would have told."""
        agent, coordinator = machine.agent, machine.coordinator
        machine.up = power
        machine.agent = machine.coordinator = None
        if coordinator is not None:
            coordinator.die(power=power)
        if agent is not None:
            agent.die(power=power)
        machine.boot += 1
        machine.clear()
        self.poke()

    def back(self, machine: Machine) -> None:
        """Somebody starts the host again, as a spare, and tells it where the job is."""
        leader = self.leader()
        if machine.agent is not None:
            return
        machine.up = True
        if leader is None or not self.reach(machine, leader.machine):
            self.after(1 * S, lambda: self.back(machine))
            return
        self.fired.append(f"back {machine.number} at {self.now_ns / 1e9:.3f}")
        machine.coordinator = machine.coordinator or Coordinator(machine)
        machine.agent = Agent(machine, -1, leader.address, self.scenario.per_host)
        self.flush()

    def restart_coordinator(self, machine: Machine) -> None:
        old = machine.coordinator
        if old is None:
            return
        machine.coordinator = None
        old.die(power=True)
        boot = machine.boot

        def again() -> None:
            if machine.boot == boot and machine.agent is not None:
                machine.coordinator = Coordinator(machine)

        self.after(300 * MS + self.chance.randrange(700 * MS), again)

    def kill_rank(self, machine: Machine) -> None:
        assert machine.agent is not None
        running = [p for p in machine.agent.running.values() if p.alive]
        if running:
            process = self.chance.choice(running)
            process.end()
            self.soon(lambda: process.agent.rank_died(process), 15.0)


# ---- what befalls a job, by seed --------------------------------------------------------------------------

PHASES = ("fence", "join", "form", "restore", "rebuild", "encode", "adopt", "takeover", "commit", "goodbye", "last")
CODES = {
    2: ("mirror", "xor", "auto"),
    3: ("mirror", "xor", "rs:1+2", "rs:2+1"),
    4: ("rs:2+2", "xor", "mirror"),
    5: ("rs:3+2", "rs:2+2", "auto"),
    6: ("rs:4+2", "auto", "rs:3+3"),
}
TOLERATED = {"mirror": 1, "xor": 1, "rs:1+2": 2, "rs:2+1": 1, "rs:2+2": 2, "rs:3+2": 2, "rs:4+2": 2, "rs:3+3": 3}


def when(chance: random.Random) -> tuple[int, str, int]:
    """A time, or a moment in some phase and a little after it."""
    if chance.random() < 0.4:
        return chance.randrange(50 * MS, 2 * S), "", 1
    return chance.choice((0, chance.randrange(30 * MS))), chance.choice(PHASES), chance.choice((1, 2, 3, 5, 9, 30))


def scenario(seed: int) -> Scenario:
    """Losses at once up to what is tolerated and beyond, again and again, while anything is going on; cuts; leaders."""
    chance = random.Random(~seed)
    hosts = chance.choice((2, 3, 3, 4, 4, 5, 5, 6))
    code = chance.choice(CODES[hosts])
    m = TOLERATED.get(code, 2 if hosts == 6 else 1)
    faults: list[Fault] = []
    for round_ in range(chance.choice((1, 1, 2, 3, 4))):
        ns, on, nth = when(chance)
        count = min(chance.choice((1, 1, m, m, m + 1)), hosts)
        kind = chance.choice(("kill", "kill", "kill", "power", "power", "cut", "cut", "coordinator", "rank", "rank"))
        lasts = chance.choice((0, chance.randrange(20 * S))) if kind != "cut" else chance.randrange(50 * MS, 15 * S)
        safe = round_ > 0 and chance.random() < 0.5
        faults.append(Fault(kind, ns, on, nth, count, lasts, chance.random() < 0.4, safe))
    return Scenario(
        hosts=hosts,
        per_host=chance.choice((1, 1, 2)),
        spares=chance.choice((0, 0, 1, 2)),
        replicas=2 if hosts % 2 == 0 and chance.random() < 0.3 else 1,
        redundancy=code,
        spread=chance.random() < 0.85,
        faults=tuple(faults),
    )


def simulate(seed: int, befalls: Scenario | None = None) -> World:
    world = World(seed, befalls if befalls is not None else scenario(seed)).run()
    if not world.done and world.stopped is None:
        leader = world.leader()
        status = leader.job.status() if leader is not None and leader.job is not None else "nobody is in charge"
        assert not world.quorum_is_left(), f"{world}: hangs; {status}"
    return world

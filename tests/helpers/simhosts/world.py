"""The world of the simulation: clock, network, machines, groups of ranks, and the faults that befall them."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from holdfast.ckpt.memory.placement import Placement, survivable
from holdfast.launcher.actions import Form
from holdfast.launcher.hosts import Roster
from holdfast.launcher.job import Job
from holdfast.runtime.gather import Kept

from .agent import Agent
from .coordinator import Coordinator
from .machine import Machine
from .network import MS, Call, Pipe, S
from .oracle import Oracle
from .rank import Process
from .scenario import Fault, Scenario

LEASE_NS = 6 * S


@dataclass(eq=False)
class Barrier:
    """Who has arrived, with what, and how each goes on."""

    waiting: dict[int, tuple[Process, list[int], Callable[[Kept], None]]] = field(default_factory=dict)


class World(Oracle):
    """Clock, network, machines, and what must never happen."""

    def __init__(self, seed: int, scenario: Scenario) -> None:
        super().__init__()
        self.seed, self.scenario, self.size = seed, scenario, scenario.size
        self.chance = random.Random(seed)
        self.now_ns = self.count = self.ticks = 0
        self.queue: list[tuple[int, int, Call]] = []
        self.pipes: list[Pipe] = []
        self.cuts: list[frozenset[int]] = []
        self.holders: dict[tuple[int, int], set[Machine]] = {}
        self.barriers: dict[tuple[int, str], Barrier] = {}
        self.fired: list[str] = []
        self.seen: dict[str, int] = {}
        self.faults = list(scenario.faults)
        self.takeovers = self.stepped_down = self.resigned = self.self_fenced = self.rebuilt = self.skipped = 0
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

    def run(self) -> World:
        while self.queue and not self.done and self.stopped is None:
            self.now_ns, _, call = heapq.heappop(self.queue)
            if self.now_ns > self.scenario.until_ns:
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
        kept = Kept.of(rows, form.placement, process.kept if tag != "gate" else None)
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
        kind = "kill" if fault.safe and fault.kind == "power" and not self.may_fall_silent(victims) else fault.kind
        self.fired.append(f"{kind} {[m.number for m in victims]} at {self.now_ns / 1e9:.3f}")
        if kind == "cut":
            self.cut(victims, fault.lasts_ns)
        for machine in victims:
            if kind in ("kill", "power"):
                self.lose(machine, power=kind == "kill")
                if fault.lasts_ns:
                    self.after(fault.lasts_ns, lambda m=machine: self.back(m))
            elif kind == "coordinator":
                self.restart_coordinator(machine)
            elif kind == "rank":
                self.kill_rank(machine)

    def may_fall_silent(self, victims: list[Machine]) -> bool:
        """Whether the others are a majority without these, of whose death nobody would have proof."""
        leader = self.leader()
        if leader is None or leader.job is None:
            return False
        left = {m.agent.me.index for m in self.machines if m.agent is not None and m not in victims}
        return leader.job.council.decides(left, leader.job.book.dead())

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

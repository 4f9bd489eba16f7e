"""What must never happen, checked at every event; and whether an end that is none had to be.

* a Form's sources exist: live, whole on that host, or at least k shards of every stripe;
* a step is never applied by two memberships that both go on; a generation has one Form that anybody acts on;
* those who form are a majority of the newest membership that was formed, but for the truly dead;
* the job stops only if the state is really gone, and hangs only if no majority is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.launcher.actions import Form, StopJob
from holdfast.launcher.council import Election, Try, may_elect
from holdfast.launcher.hosts import has_quorum, newest
from holdfast.proto.ids import NO_STEP

from .agent import Caller
from .rank import UNTIL

if TYPE_CHECKING:
    from .agent import Agent
    from .coordinator import Coordinator
    from .machine import Machine
    from .rank import Process


class Oracle:
    """The part of the world that judges it."""

    machines: list[Machine]
    holders: dict[tuple[int, int], set[Machine]]
    size: int

    def reach(self, a: Machine, b: Machine) -> bool:
        raise NotImplementedError

    def holds(self, slot: int, step: int, among: set[Machine]) -> bool:
        raise NotImplementedError

    def machine_at(self, address: str) -> Machine:
        raise NotImplementedError

    def peers(self, rank: int) -> tuple[int, ...]:
        raise NotImplementedError

    def happens(self, what: str, machine: Machine) -> None:
        raise NotImplementedError

    def __init__(self) -> None:
        self.forms: list[tuple[Form, Coordinator]] = []
        self.orders: dict[int, int] = {}  # id of a form -> its place
        self.acted: dict[int, Form] = {}  # generation -> the form that somebody committed in
        self.newest_commit = -1
        self.every: dict[tuple[int, int], Process] = {}  # by rank and incarnation
        self.voters: dict[int, Agent] = {}  # of the newest membership that did anything
        self.sent: dict[int, Agent] = {}  # of the newest that was formed
        self.left: set[int] = set()
        self.applied: dict[tuple[int, int], Process] = {}
        self.stopped: StopJob | None = None
        self.done = self.unasked = False

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
        self.sent = {rank: self.every[rank, incarnation].agent for rank, incarnation, _, _ in form.members}
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
        """Those who form are a majority of the newest generation that was formed, but for the truly dead."""
        before = self.sent or self.voters
        numbers = {agent: number for number, agent in enumerate(dict.fromkeys(before.values()))}
        voters = {rank: numbers[agent] for rank, agent in before.items()}
        dead = {number for agent, number in numbers.items() if not agent.alive}
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

    def would_elect(self, machine: Machine) -> bool:
        """Whether all agents that can reach that machine, together, would put its coordinator in charge."""
        election = Election(machine.address)
        asking = [
            Caller(m.agent, m.agent.me, [], m.agent.roster, None, m.agent.promised)
            for m in self.machines
            if m.agent is not None and self.reach(m, machine)
        ]
        doors = {h.index: h.door for caller in asking for h in caller.roster.hosts}
        election.dead = {index for index, door in doors.items() if self.refuses(machine, door)}
        return not isinstance(election.next(asking), Try)

    def refuses(self, machine: Machine, door: str) -> bool:
        """Whether an agent's death is certain there."""
        other = self.machine_at(door)
        return self.reach(machine, other) and (other.agent is None or other.address != door)

    def quorum_is_left(self) -> bool:
        """Whether those of the newest membership who live, and can hear each other, could decide."""
        if self.newest_commit < 0:
            return False  # before the first generation only the first coordinator may decide
        numbers = {agent: number for number, agent in enumerate(dict.fromkeys(self.voters.values()))}
        voters = {rank: numbers[agent] for rank, agent in self.voters.items()}
        for machine in self.machines:
            if machine.agent is None or not machine.agent.roster.members:
                continue
            if self.would_elect(machine):
                return True
            there = [m.agent.roster for m in self.machines if m.agent is not None and self.reach(m, machine)]
            if newest(there).generation > self.forms[self.newest_commit][0].generation:
                continue  # for all that they can know, ranks act on newer members than those
            heard = {agent: n for agent, n in numbers.items() if agent.alive and self.reach(agent.machine, machine)}
            here = {number for agent, number in heard.items() if agent.me.index == agent.voted}
            dead = {n for agent, n in numbers.items() if not agent.alive and self.reach(agent.machine, machine)}
            if may_elect(voters, here, set(heard.values()) - here, dead):
                return True
        return False

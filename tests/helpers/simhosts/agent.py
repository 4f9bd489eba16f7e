"""One host's agent: its ranks, and its way to the coordinator in charge (supervisor.py, session.py)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from holdfast.launcher.hosts import BEAT_NS, FIRST, SILENT_NS, Host, Roster, Term
from holdfast.launcher.session import CONNECT_S, LEADER_RETRY_S, RETRY_S, SETTLES, STANDBY_S, candidates

from .network import MS, Pipe, S
from .rank import Process

if TYPE_CHECKING:
    from .coordinator import Coordinator
    from .machine import Machine

FENCE_NS = 4_800 * MS


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
        self.promised = FIRST
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
        caller = Caller(self, replace(self.me), ranks, self.roster, pipe, self.promised)
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
        elif refused and self.world.chance.random() < SETTLES:
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
        if self.welcomed:
            return self.world.now_ns - self.heard_ns > SILENT_NS
        return self.world.now_ns - max(self.heard_ns, self.called_ns) > STANDBY_S * S

    # ---- orders

    def on_promise(self, term: Term) -> None:
        self.promised = max(self.promised, term)
        self.answer(("promised", self.promised))

    def answer(self, what: object) -> None:
        """To the coordinator that is asked, on this stream or never."""
        caller, coordinator = self.caller, self.coordinator
        caller.pipe.send(0, lambda: coordinator.agent_answers(caller, what))

    def on_welcome(self, index: int, fenced: bool, term: Term) -> None:
        if term < self.promised:
            pipe, self.pipe = self.caller.pipe, None
            pipe.close(0)
            self.closed(self.coordinator.address)
            return
        self.heard_ns, self.promised = self.world.now_ns, term
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
        if roster.term >= self.roster.term:
            self.roster = roster
            self.answer(("learnt", roster.term, roster.number))

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
        for process in self.running.values():
            process.end()
        self.running, self.slots, self.live, self.finished = {}, {}, {}, {}
        self.me.index = -1
        if self.pipe is not None:
            pipe, self.pipe = self.pipe, None
            pipe.close(0)
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
    roster: Roster
    pipe: Pipe
    promised: Term
    asked: Term = FIRST
    welcomed: bool = False
    backlog: list[tuple[str, int, int]] = field(default_factory=list)

    def current(self) -> bool:
        """Whether its agent still listens to this stream."""
        return self.agent.pipe is self.pipe

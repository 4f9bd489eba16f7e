"""control.py without gRPC: streams, election, doors, one real Job while it is in charge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

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
from holdfast.launcher.council import Ask, Elected, Election, Try
from holdfast.launcher.hosts import BEAT_NS, PROBE_NS, Roster, Term
from holdfast.launcher.job import Job
from holdfast.launcher.slots import Joined

from .agent import Agent, Caller
from .network import MS, Pipe, S

if TYPE_CHECKING:
    from .machine import Machine
    from .rank import Process

ELECT_NS = 3 * S
DOOR_NS = 1 * S


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
        self.election = Election(self.address)
        self.asking: set[int] = set()
        self.due_ns = 1 << 62

    # ---- agents

    def agent_hello(self, caller: Caller) -> None:
        if not self.alive:
            caller.pipe.close(1)  # its kernel resets what was on its way to it
            return
        self.all.append(caller)
        if self.job is not None and caller.promised > self.job.term:
            self.world.resigned += 1
            self.leave_charge()
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
        index, term = caller.told.index, self.job.term
        if Welcome(index, fenced=True) in actions:
            caller.pipe.send(1, lambda: caller.agent.on_welcome(index, True, term) if caller.current() else None)
            return
        self.agents[index] = caller
        caller.welcomed = True
        self.do(actions)
        self.beat(caller)
        for message in caller.backlog:
            self.agent_says(caller, *message)

    def beat(self, caller: Caller) -> None:
        if self.alive and caller.pipe.open[1]:
            caller.pipe.send(1, caller.agent.on_beat)
            self.world.after(BEAT_NS, lambda: self.beat(caller))

    def agent_answers(self, caller: Caller, what: tuple[Any, ...]) -> None:
        """Promised, learnt: what is said to one coordinator, on one stream."""
        if not self.alive:
            return
        if what[0] == "promised" and caller in self.candidates:
            caller.promised = what[1]
            self.elect()
        elif what[0] == "learnt" and self.job is not None and self.agents.get(caller.told.index) is caller:
            self.do(self.job.on_agent_learnt(self.world.now_ns, caller.told.index, what[1], what[2]))

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
            pipe.close(1)
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
        match self.election.next(self.candidates):
            case Elected(term, roster):
                self.take_over(term, roster)
            case Ask(term, indices):
                for caller in [self.candidates[index] for index in indices]:
                    caller.asked = term
                    caller.pipe.send(1, lambda c=caller, t=term: c.agent.on_promise(t) if c.current() else None)
            case Try(hosts):
                for host in hosts:
                    if host.index not in self.asking:
                        self.try_door(host.index, host.door)

    def take_over(self, term: Term, roster: Roster) -> None:
        self.world.takeovers += 1
        roster = Roster.decoded(roster.encoded())  # its hosts become the job's own
        self.job = Job.from_roster(self.world.size, roster, self.world.now_ns, term=term, **self.world.options)
        callers, self.candidates = sorted(self.candidates, key=lambda caller: caller.told.index), []
        for caller in callers:
            if self.job is not None:
                self.welcome(caller)
        for index in sorted(self.election.dead):
            if self.job is not None:
                self.do(self.job.on_probe(self.world.now_ns, index, refused=True))
        self.election = Election(self.address)
        early, self.early = self.early, []
        for process, pipe, generation, live, waiting in early:
            if pipe.open[1]:
                self.rank_hello(process, pipe, generation, live)
                for message in waiting:
                    self.rank_says(process, pipe, *message)
        self.world.happens("takeover", self.machine)

    def step_down(self) -> None:
        self.world.stepped_down += 1
        assert self.job is not None
        for caller in list(self.agents.values()):
            caller.pipe.send(
                1, lambda c=caller, t=self.job.term: c.agent.on_welcome(-1, True, t) if c.current() else None
            )
        self.leave_charge()

    def leave_charge(self) -> None:
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
        refused = self.world.refuses(self.machine, door)

        def again() -> None:
            self.asking.discard(index)
            self.elect()

        def answered() -> None:
            if self.job is not None and self.alive:
                self.do(self.job.on_probe(self.world.now_ns, index, refused=refused))
            elif refused:
                self.election.dead.add(index)
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
                    assert self.job is not None
                    term = self.job.term
                    self.to_agent(host, lambda agent, h=host, f=fenced, t=term: agent.on_welcome(h, f, t))
                case Adopt(host, rank, incarnation):
                    self.to_agent(host, lambda agent, r=rank, i=incarnation: agent.on_adopt(r, i))
                case Tell(roster, topology):
                    for host in self.agents:
                        self.to_agent(host, lambda agent, text=roster: agent.on_roster(text))
                    for host, text in topology.items():
                        told = self.world.topology(text)
                        self.to_agent(host, lambda agent, t=told: agent.machine.topology(*t))
                    if self.job is not None and self.job.council.proposed is not None:
                        self.world.happens("propose", self.machine)
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
            caller.pipe.send(1, lambda: call(caller.agent) if caller.current() else None)

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

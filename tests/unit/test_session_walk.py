"""How agents find the coordinator in charge, and how one comes to be: order, election, doors, stepping down.

The coordinator's service runs without gRPC: its streams are fed by hand and read as what they yield. Doors are
real listening sockets of this process. The agent's side runs against real services on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from holdfast.launcher import control as control_module
from holdfast.launcher import session as session_module
from holdfast.launcher.control import ELECT_S, Control
from holdfast.launcher.detector import Limits
from holdfast.launcher.eventlog import EventLog
from holdfast.launcher.hosts import BEAT_NS, SILENT_NS, Host, Roster, Term
from holdfast.launcher.job import Job
from holdfast.launcher.session import STANDBY_S, CoordinatorSession, Hooks, candidates
from holdfast.launcher.starter import Program
from holdfast.launcher.supervisor import Supervisor
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc

DEADLINE_S = 15.0


# ---- whom to ask ------------------------------------------------------------------------------------------------


def known(*addresses: str, lost: int = -1) -> Roster:
    hosts = [Host(index, coordinator=address) for index, address in enumerate(addresses)]
    if lost >= 0:
        hosts[lost].lost = "gone"
    return Roster(hosts=tuple(hosts))


def test_the_last_leader_is_asked_first_and_then_everybody_in_the_order_of_their_numbers() -> None:
    assert candidates("b", known("a", "b", "c")) == ["b", "a", "c"]


def test_all_agents_that_lost_the_same_leader_ask_in_the_same_order_whatever_order_they_learnt() -> None:
    roster = known("a", "b", "c")
    shuffled = Roster(hosts=tuple(reversed(roster.hosts)))
    assert candidates("a", shuffled) == candidates("a", roster) == ["a", "b", "c"]


def test_hosts_that_were_given_up_and_hosts_without_a_coordinator_are_not_asked() -> None:
    assert candidates("a", known("a", "b", "", "d", lost=1)) == ["a", "d"]


def test_the_last_leader_is_asked_although_no_roster_was_told() -> None:
    assert candidates("a", Roster()) == ["a"]


# ---- a coordinator without gRPC -----------------------------------------------------------------------------------


class SentAway(Exception):
    """What context.abort() raises here."""


class Context:
    """As much of a gRPC context as the service uses."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    async def abort(self, code: grpc.StatusCode, detail: str) -> None:
        self.code = code
        raise SentAway(detail)


@dataclass
class Door:
    """A listening socket; shut() ends it as a dying agent's kernel does."""

    server: asyncio.Server
    visits: int = 0

    @property
    def address(self) -> str:
        host, port = self.server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def shut(self) -> None:
        self.server.close()
        await self.server.wait_closed()


async def open_door() -> Door:
    def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        door.visits += 1
        writer.close()

    door = Door(await asyncio.start_server(visited, "127.0.0.1", 0))
    return door


@dataclass
class Agent:
    """One agent's stream to a Control: what it is told comes into `orders`."""

    hello: Any
    promises: bool = True
    context: Context = field(default_factory=Context)
    orders: list[Any] = field(default_factory=list)
    outbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def talk(self, control: Control) -> None:
        async def messages() -> AsyncIterator[Any]:
            yield pb.AgentMessage(hello=self.hello)
            while (message := await self.outbox.get()) is not None:
                yield message

        with contextlib.suppress(SentAway):
            async for order in control.AgentSession(messages(), self.context):
                self.orders.append(order)
                if self.promises and order.WhichOneof("body") == "promise":
                    self.outbox.put_nowait(pb.AgentMessage(promised=pb.Promised(term=order.promise.term)))
        self.ended.set()

    def said(self, body: str) -> list[Any]:
        return [getattr(order, body) for order in self.orders if order.WhichOneof("body") == body]


class Stage:
    """Agents with doors, and Controls; `roster` is what all agents were told by a leader that is gone."""

    def __init__(self, doors: list[Door], *, spares: int = 0) -> None:
        self.doors = doors
        ranks = len(doors) - spares
        hosts = tuple(Host(i, f"host{i}", door=door.address, coordinator=f"c{i}") for i, door in enumerate(doors))
        members = {rank: (0, rank) for rank in range(ranks)}
        self.roster = Roster(3, 2, 5, members, dict.fromkeys(range(ranks), 0), {r: r for r in range(ranks)}, hosts)
        self.world_size = ranks
        self.tasks: list[asyncio.Task[None]] = []

    def control(self) -> Control:
        def successor(roster: Roster, term: Term) -> Job:
            return Job.from_roster(self.world_size, roster, time.monotonic_ns(), term=term, lease_ns=3 * 10**9)

        return Control("job", self.world_size, None, successor, EventLog(None))

    def call(self, control: Control, index: int, *, roster: Roster | None = None) -> Agent:
        ranks = [pb.RankStarted(rank=index, pid=1)] if 0 <= index < self.world_size else []
        text = (self.roster if roster is None else roster).encoded()
        door = self.doors[index].address if index >= 0 else "127.0.0.1:1"
        agent = Agent(pb.AgentHello(host=f"host{index}", index=index, ranks=ranks, door=door, roster=text))
        self.tasks.append(asyncio.create_task(agent.talk(control)))
        return agent


@contextlib.asynccontextmanager
async def stage(hosts: int, *, spares: int = 0) -> AsyncIterator[Stage]:
    doors = [await open_door() for _ in range(hosts)]
    found = Stage(doors, spares=spares)
    try:
        yield found
    finally:
        for task in found.tasks:
            task.cancel()
        await asyncio.gather(*found.tasks, return_exceptions=True)
        for door in doors:
            await door.shut()


async def until(ready: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not ready():
        assert time.monotonic() < end, f"no {what} within {deadline_s} s"
        await asyncio.sleep(0.01)


def test_a_standby_takes_over_when_a_majority_asks_it() -> None:
    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            first, second = found.call(control, 1), None
            await asyncio.sleep(0.2)
            assert first.orders == []
            second = found.call(control, 2)
            for agent in (first, second):
                await until(lambda agent=agent: bool(agent.said("welcome")), "welcome")  # type: ignore[misc]
                assert not agent.said("welcome")[0].fenced
                roster = Roster.decoded(agent.said("roster")[-1].json)
                assert roster.number > found.roster.number
            status = json.loads((await control.Status(None, None)).json)
            assert (status["generation"], status["state"]) == (2, "running")

    asyncio.run(play())


def test_a_majority_that_does_not_promise_puts_nobody_in_charge_and_hears_no_beat() -> None:
    """Each of them may have promised somebody else meanwhile; and a beat would keep ranks alive that nobody leads."""

    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            agents = [found.call(control, index) for index in (1, 2)]
            agents[1].promises = False
            await until(lambda: all(agent.said("promise") for agent in agents), "promise asked for")
            await asyncio.sleep(3 * BEAT_NS / 1e9)
            assert all([order.WhichOneof("body") for order in agent.orders] == ["promise"] for agent in agents)
            (asked,) = agents[1].said("promise")
            agents[1].outbox.put_nowait(pb.AgentMessage(promised=pb.Promised(term=asked.term)))
            await until(lambda: all(agent.said("welcome") for agent in agents), "welcome")
            assert agents[0].said("welcome")[0].term == asked.term
            assert asked.term.number == 1

    asyncio.run(play())


def test_what_an_agent_says_before_it_is_led_is_heard_afterwards() -> None:
    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            agents = [found.call(control, index) for index in (1, 2)]
            exited = pb.RankExited(rank=1, incarnation=0, reason="SIGKILL", detected_ns=1)
            agents[0].outbox.put_nowait(pb.AgentMessage(exited=exited))
            await until(lambda: all(agent.said("welcome") for agent in agents), "welcome")
            await until(lambda: ranks_alive(control) == {0, 2}, "news of the death")

    def ranks_alive(control: Control) -> set[int]:
        assert control._job is not None
        return {rank for rank, slot in control._job.slots.items() if slot.alive}

    asyncio.run(play())


def test_a_leader_that_hears_of_a_later_promise_gives_way_and_ends_no_rank() -> None:
    """Whoever it was given to may be in charge: a quorum finds out, and ranks train on meanwhile."""

    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            agents = [found.call(control, index) for index in (0, 1)]
            await until(lambda: all(agent.said("welcome") for agent in agents), "takeover")
            later = found.call(control, 2)
            later.hello.promised.CopyFrom(pb.Term(number=9, leader="another"))
            await until(lambda: all(agent.ended.is_set() for agent in agents), "end of the streams")
            assert not any(welcome.fenced for agent in agents for welcome in agent.said("welcome"))
            again = found.call(control, 1)
            await until(lambda: bool(later.said("welcome") and again.said("welcome")), "another takeover")
            assert again.said("welcome")[0].term.number == 10

    asyncio.run(play())


def test_a_host_under_a_number_that_is_anothers_is_fenced_and_the_other_goes_on() -> None:
    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            agents = [found.call(control, index) for index in (1, 2)]
            await until(lambda: all(agent.said("welcome") for agent in agents), "takeover")
            stranger = Agent(pb.AgentHello(host="stranger", index=2, door="127.0.0.1:2"))
            found.tasks.append(asyncio.create_task(stranger.talk(control)))
            await until(lambda: bool(stranger.said("welcome")), "an answer")
            assert stranger.said("welcome")[0].fenced
            assert not any(welcome.fenced for welcome in agents[1].said("welcome"))
            stranger.outbox.put_nowait(None)
            await until(stranger.ended.is_set, "its end")
            assert control._job is not None
            assert control._job.book.all[2].connected

    asyncio.run(play())


def test_a_minority_is_sent_away_within_its_deadline() -> None:
    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            agent, began = found.call(control, 2), time.monotonic()
            await asyncio.wait_for(agent.ended.wait(), ELECT_S + 2)
            assert agent.context.code is grpc.StatusCode.UNAVAILABLE
            assert agent.orders == []
            assert time.monotonic() - began >= ELECT_S - 0.5
            status = json.loads((await control.Status(None, None)).json)
            assert status["standby"] is True

    asyncio.run(play())


def test_a_half_without_the_lowest_rank_waits_until_the_other_halfs_doors_refuse() -> None:
    async def play() -> None:
        async with stage(2) as found:
            control = found.control()
            agent = found.call(control, 1)
            await until(lambda: found.doors[0].visits > 1, "visits at the door")
            assert agent.orders == [], "who answers at its door lives"
            await found.doors[0].shut()
            await until(lambda: bool(agent.said("adopt")), "takeover")
            (adopt,) = agent.said("adopt")
            assert (adopt.rank, adopt.incarnation) == (0, 1)

    asyncio.run(play())


def test_several_hosts_that_are_dead_do_not_make_the_new_leader_step_down() -> None:
    async def play() -> None:
        async with stage(5) as found:
            control = found.control()
            for index in (0, 1, 2):
                await found.doors[index].shut()
            agents = [found.call(control, index) for index in (3, 4)]
            await until(lambda: len({a.rank for agent in agents for a in agent.said("adopt")}) == 3, "three ranks")
            assert not any(welcome.fenced for agent in agents for welcome in agent.said("welcome"))

    asyncio.run(play())


def test_hosts_that_an_earlier_leader_found_dead_do_not_count_in_the_next_election() -> None:
    async def play() -> None:
        async with stage(5) as found:
            for index in (0, 1):
                found.roster.hosts[index].lost, found.roster.hosts[index].proven = "its agent is gone", True
            await found.doors[2].shut()
            control = found.control()
            agents = [found.call(control, index) for index in (3, 4)]
            await until(lambda: all(agent.said("welcome") for agent in agents), "takeover", ELECT_S)

    asyncio.run(play())


def test_before_the_first_generation_no_standby_takes_over() -> None:
    """Nobody knows who counts: each side of a cut would think itself the job."""

    async def play() -> None:
        async with stage(2) as found:
            control = found.control()
            young = Roster(number=1, hosts=found.roster.hosts)
            agents = [found.call(control, index, roster=young) for index in (0, 1)]
            for agent in agents:
                await asyncio.wait_for(agent.ended.wait(), ELECT_S + 2)
                assert agent.context.code is grpc.StatusCode.UNAVAILABLE

    asyncio.run(play())


def test_the_newest_of_the_rosters_that_are_brought_counts() -> None:
    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            moved = Roster(9, 4, 8, {0: (1, 2), 1: (0, 1), 2: (0, 2)}, {0: 1, 1: 0, 2: 0}, {0: 2, 1: 1, 2: 2},
                           found.roster.hosts)  # fmt: skip
            found.call(control, 1)
            agent = found.call(control, 2, roster=moved)
            await until(lambda: bool(agent.said("welcome")), "welcome")
            assert json.loads((await control.Status(None, None)).json)["generation"] == 4

    asyncio.run(play())


def test_doors_of_missing_hosts_are_tried_one_at_a_time_however_long_it_takes() -> None:
    """Each answer would otherwise ask all others again, twice as many each time."""

    async def play() -> None:
        async with stage(5) as found:
            control = found.control()
            agent = found.call(control, 4)
            await asyncio.wait_for(agent.ended.wait(), ELECT_S + 2)
            visits = [door.visits for door in found.doors[:4]]
            assert all(3 <= count <= 20 for count in visits), visits

    asyncio.run(play())


def test_a_leader_that_hears_too_few_ends_its_agents_ranks_and_its_streams() -> None:
    async def play() -> None:
        async with stage(3) as found:
            control = found.control()
            agents = [found.call(control, index) for index in (0, 1)]
            await until(lambda: all(agent.said("welcome") for agent in agents), "takeover")

            async def beat() -> None:
                while True:
                    agents[0].outbox.put_nowait(pb.AgentMessage(beat=pb.Beat()))
                    await asyncio.sleep(0.2)

            found.tasks.append(asyncio.create_task(beat()))  # host 1 says nothing any more
            await asyncio.wait_for(agents[0].ended.wait(), 3 + DEADLINE_S)
            assert agents[0].said("welcome")[-1].fenced
            assert json.loads((await control.Status(None, None)).json)["standby"] is True
            again = found.call(control, 0)
            await asyncio.sleep(0.3)
            assert again.orders == [], "it decides nothing any more"

    asyncio.run(play())


def test_a_stream_that_does_not_begin_with_hello_is_refused() -> None:
    async def play() -> None:
        async def beats() -> AsyncIterator[Any]:
            yield pb.AgentMessage(beat=pb.Beat())

        async with stage(1) as found:
            context = Context()
            orders = found.control().AgentSession(beats(), context)
            with pytest.raises(SentAway):
                await anext(orders)
            assert context.code is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(play())


def test_a_rank_of_another_job_is_refused_and_one_without_a_leader_is_sent_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_module, "ELECT_S", 0.2)

    async def play(hello: Any) -> grpc.StatusCode | None:
        async def messages() -> AsyncIterator[Any]:
            yield pb.RankMessage(hello=hello)

        async with stage(2) as found:
            context = Context()
            orders = found.control().RankSession(messages(), context)
            with pytest.raises(SentAway):
                await anext(orders)
            return context.code

    assert asyncio.run(play(pb.Hello(rank=5, world_size=2))) is grpc.StatusCode.INVALID_ARGUMENT
    assert asyncio.run(play(pb.Hello(rank=0, world_size=3))) is grpc.StatusCode.INVALID_ARGUMENT
    assert asyncio.run(play(pb.Hello(rank=0, world_size=2))) is grpc.StatusCode.UNAVAILABLE


# ---- the agent's side, against services of this machine -------------------------------------------------------------


class Service(control_pb2_grpc.ControlServicer):
    """Notes who comes; `orders` are sent to each agent (`once`: to the first), then it is silent for `hold_s`."""

    def __init__(self, *orders: Any, hold_s: float = 60.0, once: bool = False, answers: int = 0) -> None:
        self.orders, self.hold_s, self.once, self.answers = orders, hold_s, once, answers
        self.hellos: list[Any] = []
        self.said: list[Any] = []  # so many answers of the first agent, beats left out
        self.came, self.over = threading.Condition(), threading.Event()
        self.stays: list[float] = []
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        control_pb2_grpc.add_ControlServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def AgentSession(self, messages: Any, context: Any) -> Iterator[Any]:
        began, left = time.monotonic(), threading.Event()
        context.add_callback(left.set)
        with self.came:
            self.hellos.append(next(messages).hello)
            self.came.notify_all()
        orders = self.orders if len(self.hellos) == 1 or not self.once else ()
        yield from orders
        while len(self.said) < self.answers:
            message = next(messages)
            if message.WhichOneof("body") != "beat":
                with self.came:
                    self.said.append(message)
                    self.came.notify_all()
        left.wait(self.hold_s)
        self.stays.append(time.monotonic() - began)
        if not left.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, "not in charge")

    def await_hellos(self, count: int, deadline_s: float = DEADLINE_S) -> list[Any]:
        with self.came:
            assert self.came.wait_for(lambda: len(self.hellos) >= count, deadline_s), f"{len(self.hellos)} hellos"
            return self.hellos

    def close(self) -> None:
        self.server.stop(0).wait(5.0)


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    things: list[Any] = []
    yield things
    for thing in reversed(things):
        thing.close()


def told(*services: Service) -> Any:
    hosts = tuple(Host(index, coordinator=service.address) for index, service in enumerate(services))
    return pb.AgentOrder(roster=pb.Roster(json=Roster(1, 1, 0, {0: (0, 0)}, {0: 0}, {0: 0}, hosts).encoded()))


def session(opened: list[Any], **hooks: Any) -> CoordinatorSession:
    given = Hooks(on_order=hooks.pop("on_order", lambda order: None), **hooks)
    made = CoordinatorSession(me=Host(0, "me"), token="t", world_size=1, hooks=given)
    opened.append(made)
    return made


def led_by(opened: list[Any], leader: Service, *others: Service) -> CoordinatorSession:
    """An agent that knows a leader, and from it the others; the leader is gone by now."""
    learnt = threading.Event()
    leader.orders = (WELCOME, told(leader, *others), pb.AgentOrder(recovered=pb.Recovered(line="-")))
    opened += [leader, *others]
    made = session(opened, on_order=lambda order: learnt.set())
    made.start(leader.address)
    assert learnt.wait(DEADLINE_S)
    leader.close()
    return made


WELCOME = pb.AgentOrder(welcome=pb.AgentWelcome(index=0))
FENCED = pb.AgentOrder(welcome=pb.AgentWelcome(index=-1, fenced=True))


def test_an_agent_whose_leader_falls_silent_asks_the_next_coordinator_with_the_newest_roster(
    opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "SETTLES", 0.0)  # the silent one answers still: how long it is asked is chance
    next_ = Service(WELCOME)
    leader = Service(once=True, hold_s=3.0)
    leader.orders = (WELCOME, told(leader, next_))
    opened += [leader, next_]
    led = threading.Event()
    made = session(opened, on_leader=lambda address: led.set())
    made.start(leader.address)
    (hello,) = next_.await_hellos(1)
    assert Roster.decoded(hello.roster).number == 1
    assert led.wait(DEADLINE_S)
    assert made.address == next_.address
    assert leader.stays[0] >= SILENT_NS / 1e9 - BEAT_NS / 1e9


def test_an_agent_gives_a_standby_the_time_to_take_over(opened: list[Any]) -> None:
    """It has not heard a leader for long already: that alone is no reason to leave."""
    standby = Service(hold_s=2.5)
    led_by(opened, Service(), standby)
    standby.await_hellos(2)
    assert standby.stays[0] >= 2.4
    assert STANDBY_S > ELECT_S


def test_an_agent_that_nobody_takes_does_not_spin(opened: list[Any]) -> None:
    refusing = Service(hold_s=0.0)
    led_by(opened, Service(), refusing)
    refusing.await_hellos(1)
    before = len(refusing.hellos)
    threading.Event().wait(1.5)
    assert len(refusing.hellos) - before <= 12


def test_a_leader_that_steps_down_ends_the_ranks_of_its_hosts_at_once(opened: list[Any]) -> None:
    leader = Service()
    leader.orders = (WELCOME, told(leader, leader), FENCED)
    opened.append(leader)
    fenced = threading.Event()
    session(opened, on_fenced=fenced.set).start(leader.address)
    assert fenced.wait(3.0), "the others count on it that these ranks have ended"


def test_an_agent_says_what_it_promised_and_what_it_has_learnt(opened: list[Any]) -> None:
    term = pb.Term(number=3, leader="x")
    roster = Roster(9, 1, 0, {0: (0, 0)}, {0: 0}, {0: 0}, (Host(0), Host(1)), term=Term(3, "x"))
    leader = Service(
        pb.AgentOrder(promise=pb.Promise(term=term)),
        pb.AgentOrder(welcome=pb.AgentWelcome(index=0, term=term)),
        pb.AgentOrder(roster=pb.Roster(json=roster.encoded())),
        answers=2,
    )
    opened.append(leader)
    session(opened).start(leader.address)
    with leader.came:
        assert leader.came.wait_for(lambda: len(leader.said) == 2, DEADLINE_S)
    assert leader.said[0].promised.term == term
    assert (leader.said[1].learnt.term, leader.said[1].learnt.number) == (term, 9)


def test_an_agent_that_promised_takes_nothing_from_an_older_coordinator(opened: list[Any]) -> None:
    """It neither follows it nor counts it as a word of one in charge, and says so when it asks again."""
    promise = pb.AgentOrder(promise=pb.Promise(term=pb.Term(number=3, leader="x")))
    roster = Roster(9, 1, 0, {0: (0, 0)}, {0: 0}, {0: 0}, (Host(0), Host(1)))
    old = Service(promise, WELCOME, pb.AgentOrder(roster=pb.Roster(json=roster.encoded())), once=True)
    opened.append(old)
    heard: list[str] = []
    session(opened, on_leader=heard.append).start(old.address)
    hellos = old.await_hellos(2)
    assert hellos[1].promised == pb.Term(number=3, leader="x")
    assert hellos[1].roster == ""
    assert heard == []


def test_a_host_that_was_fenced_asks_for_a_new_number_and_names_no_ranks(opened: list[Any]) -> None:
    leader = Service(FENCED)
    opened.append(leader)
    made = session(opened, on_fenced=lambda: made.fenced())
    made.started(pb.RankStarted(rank=0, incarnation=2, pid=3))
    made.start(leader.address)
    hellos = leader.await_hellos(2)
    assert [hello.index for hello in hellos[:2]] == [0, -1]
    assert list(hellos[1].ranks) == []


class Loop:
    """Runs what is posted at once."""

    def post(self, call: Callable[[], None]) -> None:
        call()

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        pass

    def every(self, period_s: float, call: Callable[[], None]) -> None:
        pass


class Ending:
    """A session that notes that it was told of ranks that ended."""

    def __init__(self) -> None:
        self.count = 0

    def fenced(self) -> None:
        self.count += 1


def test_a_host_without_ranks_gives_up_its_number_too_when_it_is_told_so() -> None:
    """It would say hello under the old one for ever, be refused each time, and never be given a rank."""
    ending = Ending()
    supervisor = Supervisor(Loop(), ending, job="j", limits=Limits(), budget=1, host="h")  # type: ignore[arg-type]
    supervisor._link = socket.socket()  # type: ignore[assignment]
    try:
        supervisor.stand_by(Program(command=(), environment={}, stdout="", stderr="", error_file="", python=None))
        supervisor.fence("this host was given up by the others")
        assert ending.count == 1
    finally:
        supervisor._link.close()

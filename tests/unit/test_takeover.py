"""Real coordinators and real agents' sessions over gRPC, in one process: the first generation, a takeover, a fence.

What only the wire can get wrong: messages that are sent and not read, read and not sent, in the wrong order, or on
a stream that is not theirs. Decisions are in test_council.py and test_job.py, whole histories in sim/test_hosts.py.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc.aio
import pytest

from holdfast.launcher.actions import Action, Form
from holdfast.launcher.control import Control
from holdfast.launcher.eventlog import EventLog
from holdfast.launcher.hosts import Host, Roster, Term
from holdfast.launcher.job import Job
from holdfast.launcher.session import CoordinatorSession, Hooks
from holdfast.launcher.slots import Joined
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc
from holdfast.runtime.recovery.decide import Report

HOSTS = 3
LEASE_NS = 30 * 10**9
DEADLINE_S = 30.0


class Formed(Control):
    """A real one that also notes the Forms that it sends."""

    def __init__(self, job: Job | None) -> None:
        def successor(roster: Roster, term: Term) -> Job:
            return Job.from_roster(HOSTS, roster, time.monotonic_ns(), term=term, lease_ns=LEASE_NS)

        super().__init__("job", HOSTS, job, successor, EventLog(None))
        self.forms: list[Form] = []

    def _do(self, actions: list[Action]) -> None:
        self.forms += [action for action in actions if isinstance(action, Form)]
        super()._do(actions)


class Cluster:
    """Three hosts: a coordinator each, served by one loop, and a session each; host 0 leads."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(HOSTS)]
        self.controls: list[Formed] = []
        self.servers: list[Any] = []
        self.sessions: list[CoordinatorSession] = []
        for index in range(HOSTS):
            self.on_loop(self._serve(index))
        for index in range(HOSTS):
            me = Host(index, f"host{index}", door=self.door(index), coordinator=self.controls[index].address)
            session = CoordinatorSession(me=me, token="t", world_size=HOSTS, hooks=Hooks(on_order=lambda order: None))
            session.started(pb.RankStarted(rank=index, pid=1))
            session.start(self.controls[0].address)
            self.sessions.append(session)

    def door(self, index: int) -> str:
        return f"127.0.0.1:{self.doors[index].getsockname()[1]}"

    async def _serve(self, index: int) -> None:
        control = Formed(Job(HOSTS, lease_ns=LEASE_NS) if index == 0 else None)
        server = grpc.aio.server()
        control_pb2_grpc.add_ControlServicer_to_server(control, server)
        control.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.controls.append(control)
        self.servers.append(server)

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)

    def tell(self, control: Formed, call: Callable[[Job], list[Action]]) -> None:
        """As if a rank had said it."""

        async def on_loop() -> None:
            assert control._job is not None
            control._do(call(control._job))

        self.on_loop(on_loop())

    def lose(self, index: int) -> None:
        self.sessions[index].close()
        self.doors[index].close()
        self.on_loop(self._stop(index))

    async def _stop(self, index: int) -> None:
        self.controls[index].end_sessions()
        await self.servers[index].stop(0)

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        for server in self.servers:
            self.on_loop(server.stop(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_S)
        for door in self.doors:
            door.close()

    def form(self, control: Formed, generation: int) -> None:
        for rank in range(HOSTS):
            joined = Joined(0, Report(rank, 5, (rank,), {rank: frozenset({5})}), "p", "c", 9, 1000)
            self.tell(control, lambda job, rank=rank, joined=joined: job.on_join(  # type: ignore[misc]
                time.monotonic_ns(), rank, generation, joined))  # fmt: skip


def until(ready: Callable[[], Any], what: str) -> None:
    """Await it; what is awaited changes in other threads of this process, which have nothing else to tell."""
    end, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not ready():
        assert time.monotonic() < end, f"no {what} within {DEADLINE_S} s"
        pause.wait(0.01)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


def test_agents_learn_the_members_before_ranks_act_put_the_next_in_charge_and_come_back_after_a_fence(
    cluster: Cluster,
) -> None:
    first, second = cluster.controls[:2]
    until(lambda: len(first._agents) == HOSTS, "agents")
    for rank in range(HOSTS):
        cluster.tell(first, lambda job, rank=rank: job.on_rank_hello(1, rank, 0, 1, rank, 0, 0))  # type: ignore[misc]
    cluster.form(first, 1)
    until(lambda: first.forms, "Form")
    assert first._job is not None
    assert all(session._roster.members for session in cluster.sessions), "each has it, or else no Form"
    until(lambda: all(not session._roster.before for session in cluster.sessions), "word that it stands")

    cluster.lose(0)
    until(lambda: {s.address for s in cluster.sessions[1:]} == {second.address}, "takeover")
    assert second._job is not None
    assert second._job.term == Term(1, second.address)
    assert [session._promised for session in cluster.sessions[1:]] == [second._job.term] * 2
    until(lambda: second._job is not None and second._job.book.all[0].lost, "news of the lost host")

    cluster.sessions[2].fenced()
    until(lambda: cluster.sessions[2]._me.index == 3, "a new number")
    until(lambda: second._job is not None and second._job.book.all[2].lost == "it ended its ranks itself", "its ranks")
    assert second._job.book.heard(time.monotonic_ns()) == {1, 2, 3}

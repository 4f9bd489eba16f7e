"""The coordinator's gRPC service around job.Job: streams are queues of orders, one event loop owns it all.

    standby ── enough agents say hello ──▶ in charge ── no quorum any more ──▶ standby
       └─ not in time: UNAVAILABLE, ask another host's coordinator

Every host has a coordinator; the first host's leads from the start, the others stand by. Agents that lose the
leader ask the next host in the roster's order, so that they meet; who is told the roster by enough of the last
generation's members, and promised that they follow nobody from before, goes on from there. Not here: decisions
(council.py, job.py), the process (coordinator.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Any, Final

import grpc
import grpc.aio

from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc

from .actions import (
    Action,
    Adopt,
    Announce,
    Fence,
    Form,
    JobDone,
    Probe,
    Record,
    StepDown,
    StopJob,
    StoreAll,
    Tell,
    Welcome,
)
from .council import Ask, Elected, Election, Try
from .eventlog import EventLog
from .hosts import BEAT_NS, PROBE_NS, Roster, Term
from .job import Job
from .messages import Caller, caller_of, form_order, heed_agent, heed_rank, term_message, term_of

ELECT_S: Final = 3.0
DOOR_S: Final = 1.0


class Control(control_pb2_grpc.ControlServicer):
    """The service. All methods run on one event loop."""

    def __init__(
        self, name: str, world_size: int, job: Job | None, successor: Callable[[Roster, Term], Job], log: EventLog
    ) -> None:
        """`job` None: stand by. `successor` makes the job that goes on from a roster."""
        self._name = name
        self._world_size = world_size
        self._job = job
        self._successor = successor
        self._log = log
        self.address = ""
        self._ranks: dict[int, asyncio.Queue[Any]] = {}
        self._agents: dict[int, Caller] = {}
        self._asking: list[Caller] = []  # agents, while nobody is in charge here
        self._election = Election()
        self._trying: set[int] = set()  # hosts, at their doors
        self._in_charge = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._probes: set[asyncio.Task[None]] = set()
        if job is not None:
            self._in_charge.set()

    # ---- ranks --------------------------------------------------------------------------------------

    async def RankSession(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        """One rank's stream: its first message is Hello."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session is Hello")
            return
        hello = first.hello
        if not 0 <= hello.rank < self._world_size or hello.world_size != self._world_size:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"rank {hello.rank} of {hello.world_size} does not belong to a job of {self._world_size}",
            )
            return
        job = await self._leading(context)
        if hello.incarnation < job.slots[hello.rank].incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"rank {hello.rank} was replaced")
            return
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._ranks[hello.rank] = queue
        queue.put_nowait(pb.RankOrder(generation=job.generation, welcome=pb.Welcome()))
        who = (hello.rank, hello.incarnation, hello.pid, hello.host, first.generation)
        self._do(job.on_rank_hello(time.monotonic_ns(), *who, hello.live_step, hello.inexact_since))
        handle = partial(self._on_rank_message, hello.rank, hello.incarnation)
        reader = asyncio.create_task(self._read(request_iterator, handle, queue))
        try:
            while (order := await queue.get()) is not None:
                yield order
        finally:
            reader.cancel()
            if self._ranks.get(hello.rank) is queue:
                del self._ranks[hello.rank]
                if self._job is job:
                    self._do(job.on_session_lost(hello.rank, hello.incarnation))

    @staticmethod
    async def _read(messages: Any, handle: Callable[[Any], None], queue: asyncio.Queue[Any]) -> None:
        """Handle a stream's messages until it ends; whatever went wrong, the other side opens a new one."""
        try:
            async for message in messages:
                handle(message)
        except grpc.RpcError:
            pass  # the stream broke: same as its end
        except Exception:
            traceback.print_exc()  # a bug of ours: for the coordinator's log
            raise
        finally:
            queue.put_nowait(None)

    def _on_rank_message(self, rank: int, incarnation: int, message: Any) -> None:
        if (job := self._job) is not None:
            foreign = self._foreign(job.slots[rank].host)
            self._do(heed_rank(job, rank, incarnation, message, now_ns=time.monotonic_ns(), foreign=foreign))

    def _foreign(self, host: int) -> bool:
        """Whether that host's clock is another than ours."""
        caller = self._agents.get(host)
        return caller is not None and caller.told.coordinator not in ("", self.address)

    # ---- agents -------------------------------------------------------------------------------------

    async def AgentSession(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        """One host's agent: its first message is AgentHello."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session is AgentHello")
            return
        caller = caller_of(first.hello)
        if self._job is not None and caller.promised > self._job.term:
            self._resign(caller)
        if self._job is not None:
            self._welcome(caller)
        else:
            self._asking.append(caller)
            self._elect()
        handle = partial(self._on_agent_message, caller)
        reader = asyncio.create_task(self._read(request_iterator, handle, caller.queue))
        patience = asyncio.get_running_loop().call_later(ELECT_S, self._send_away, caller)
        beats = asyncio.create_task(self._beat(caller))
        try:
            while (order := await caller.queue.get()) is not None:
                yield order
            if caller in self._asking:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "this coordinator is not in charge")
        finally:
            reader.cancel()
            patience.cancel()
            beats.cancel()
            if caller in self._asking:
                self._asking.remove(caller)
            if self._agents.get(caller.told.index) is caller:
                del self._agents[caller.told.index]
                if self._job is not None:
                    self._do(self._job.on_agent_gone(time.monotonic_ns(), caller.told.index))

    def _send_away(self, caller: Caller) -> None:
        if caller in self._asking:
            caller.queue.put_nowait(None)

    def _welcome(self, caller: Caller) -> None:
        assert self._job is not None
        # A number first, so that what follows finds its way.
        actions = self._job.on_agent_hello(time.monotonic_ns(), caller.told, caller.ranks)
        if Welcome(caller.told.index, fenced=True) in actions:  # under a number that may be another's
            caller.queue.put_nowait(self._welcome_order(caller.told.index, fenced=True))
            return
        self._agents[caller.told.index] = caller
        self._do(actions)
        for message in caller.backlog:
            self._on_agent_message(caller, message)

    async def _beat(self, caller: Caller) -> None:
        while True:
            await asyncio.sleep(BEAT_NS / 1e9)
            if self._agents.get(caller.told.index) is caller:  # who is not in charge must not seem to be
                caller.queue.put_nowait(pb.AgentOrder(beat=pb.Beat()))

    def _on_agent_message(self, caller: Caller, message: Any) -> None:
        if caller in self._asking:
            if message.WhichOneof("body") == "promised":
                caller.promised = term_of(message.promised.term)
                self._elect()
            else:
                caller.backlog.append(message)
        elif (job := self._job) is not None and self._agents.get(caller.told.index) is caller:
            host = caller.told.index
            foreign = self._foreign(host)
            self._do(heed_agent(job, host, message, now_ns=time.monotonic_ns(), foreign=foreign))

    # ---- taking over --------------------------------------------------------------------------------

    async def _leading(self, context: Any) -> Job:
        """The job, once this coordinator is in charge; the caller is sent away if that takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ELECT_S):
                await self._in_charge.wait()
        if self._job is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this coordinator is not in charge")
        assert self._job is not None
        return self._job

    def _elect(self) -> None:
        """Go on where the last coordinator stopped, if enough agents ask for it and promise to follow."""
        if self._job is not None or not self._asking:
            return
        self._election.leader = self.address
        match self._election.next(self._asking):
            case Elected(term, roster):
                self._take_over(term, roster)
            case Ask(term, indices):
                for caller in [self._asking[index] for index in indices]:
                    caller.asked = term
                    caller.queue.put_nowait(pb.AgentOrder(promise=pb.Promise(term=term_message(term))))
            case Try(hosts):
                for host in hosts:
                    if host.index not in self._trying:
                        self._trying.add(host.index)
                        self._spawn(self._try_door(host.index, host.door))

    def _take_over(self, term: Term, roster: Roster) -> None:
        self._job = self._successor(roster, term)
        callers, self._asking = sorted(self._asking, key=lambda caller: caller.told.index), []
        heard = [caller.told.index for caller in callers]
        event = {"event": "coordinator_took_over", "generation": roster.generation, "term": term.number}
        self._log.write({**event, "hosts": heard})
        for caller in callers:
            if self._job is not None:
                self._welcome(caller)
        for index in sorted(self._election.dead):
            if self._job is not None:
                self._do(self._job.on_probe(time.monotonic_ns(), index, refused=True))
        self._election = Election()
        self._in_charge.set()

    def _resign(self, caller: Caller) -> None:
        """Others may be led by somebody else already: whoever has a quorum now is to find out what stands."""
        reason = f"host {caller.told.name} promised to follow {caller.promised.leader}"
        self._log.write({"event": "coordinator_resigned", "reason": reason})
        self._leave_charge()

    def _leave_charge(self) -> None:
        self._job = None
        self._in_charge.clear()
        self.end_sessions()

    def _step_down(self, reason: str) -> None:
        """Without a quorum nothing may be decided here, and the ranks of these hosts must not wait for the others."""
        self._log.write({"event": "coordinator_stepped_down", "reason": reason})
        self._tell_agents(pb.AgentOrder(welcome=pb.AgentWelcome(index=-1, fenced=True)))
        self._leave_charge()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _try_door(self, index: int, door: str) -> None:
        """Connect to a host's door; only a refusal says something."""
        host, _, port = door.rpartition(":")
        refused = False
        try:
            async with asyncio.timeout(DOOR_S):
                _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
        except ConnectionRefusedError:
            refused = True
        except (OSError, ValueError, TimeoutError):
            pass
        if self._job is not None:
            self._do(self._job.on_probe(time.monotonic_ns(), index, refused=refused))
        elif refused:
            self._election.dead.add(index)
        else:
            await asyncio.sleep(PROBE_NS / 1e9)
        self._trying.discard(index)  # not before: each answer would ask all the others again
        self._elect()

    # ---- admin --------------------------------------------------------------------------------------

    async def Status(self, request: Any, context: Any) -> Any:
        """State as JSON."""
        state = self._job.status() if self._job is not None else {"standby": True}
        return pb.StatusReply(json=json.dumps({"job": self._name, **state}))

    async def Inject(self, request: Any, context: Any) -> Any:
        """Pass a fault order on to the agent of the rank's host."""
        slot = self._job.slots.get(request.rank) if self._job is not None else None
        caller = self._agents.get(slot.host) if slot is not None else None
        if caller is None:
            return pb.InjectReply(accepted=False, reason=f"no agent with a live rank {request.rank}")
        self._log.write({"event": "fault_ordered", "rank": request.rank, "kind": request.kind, "id": request.id})
        order = pb.InjectOrder(rank=request.rank, kind=request.kind, id=request.id)
        caller.queue.put_nowait(pb.AgentOrder(inject=order))
        return pb.InjectReply(accepted=True)

    # ---- orders -------------------------------------------------------------------------------------

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Fence(generation, reason, ranks):
                    self._order(ranks, pb.RankOrder(generation=generation, fence=pb.Fence(reason=reason)))
                case Form():
                    self._order(action.ranks, form_order(action))
                case StoreAll(generation, values, ranks):
                    stored = pb.StoreAll(values=dict(values))
                    self._order(ranks, pb.RankOrder(generation=generation, store_all=stored))
                case StopJob(exit_code, reason, but):
                    self._log.write({"event": "stop", "exit_code": exit_code, "reason": reason})
                    order = pb.AgentOrder(stop=pb.StopJob(exit_code=exit_code, reason=reason))
                    for host in self._agents.keys() - {but}:
                        self._tell_agent(host, order)
                case Announce(line):
                    self._tell_agents(pb.AgentOrder(recovered=pb.Recovered(line=line)))
                case Record(event):
                    self._log.write(event)
                case Probe(host, door):
                    self._spawn(self._try_door(host, door))
                case StepDown(reason):
                    self._step_down(reason)
                    break
                case _:
                    self._do_for_agents(action)
        self._set_timer()

    def _do_for_agents(self, action: Action) -> None:
        match action:
            case Welcome(host, fenced):
                self._tell_agent(host, self._welcome_order(host, fenced=fenced))
            case Adopt(host, rank, incarnation):
                self._tell_agent(host, pb.AgentOrder(adopt=pb.Adopt(rank=rank, incarnation=incarnation)))
            case Tell(roster, topology):
                self._tell_agents(pb.AgentOrder(roster=pb.Roster(json=roster)))
                for host, text in topology.items():
                    self._tell_agent(host, pb.AgentOrder(topology=pb.Topology(json=text)))
            case JobDone():
                self._tell_agents(pb.AgentOrder(done=pb.JobDone()))

    def _welcome_order(self, host: int, *, fenced: bool) -> Any:
        assert self._job is not None
        term = term_message(self._job.term)
        return pb.AgentOrder(welcome=pb.AgentWelcome(index=host, fenced=fenced, term=term))

    def _order(self, ranks: Iterable[int], order: Any) -> None:
        for rank in ranks:
            if (queue := self._ranks.get(rank)) is not None:
                queue.put_nowait(order)

    def _tell_agent(self, host: int, order: Any) -> None:
        if (caller := self._agents.get(host)) is not None:
            caller.queue.put_nowait(order)

    def _tell_agents(self, order: Any) -> None:
        for caller in self._agents.values():
            caller.queue.put_nowait(order)

    def end_sessions(self) -> None:
        """End every stream in an orderly way."""
        for queue in (*self._ranks.values(), *(caller.queue for caller in self._agents.values())):
            queue.put_nowait(None)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ns = self._job.next_tick_ns() if self._job is not None else None
        if due_ns is not None:
            delay_s = max(0.001, (due_ns - time.monotonic_ns()) / 1e9)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._job is not None:
            self._do(self._job.on_tick(time.monotonic_ns()))

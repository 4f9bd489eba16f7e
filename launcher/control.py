"""The coordinator's gRPC service around job.Job: streams are queues of orders, one event loop owns it all.

    standby ── enough agents say hello ──▶ in charge ── no quorum any more ──▶ standby
       └─ not in time: UNAVAILABLE, ask another host's coordinator

Every host has a coordinator; the first host's leads from the start, the others stand by. Agents that lose the
leader ask the next host in the roster's order, so that they meet; who is told the roster by enough of the last
generation's members (hosts.has_quorum) goes on from there. Not here: decisions (job.py), the process
(coordinator.py).
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
from .eventlog import EventLog
from .hosts import BEAT_NS, PROBE_NS, Roster, has_quorum, newest
from .job import Job
from .messages import Caller, caller_of, form_order, joined_of

ELECT_S: Final = 3.0
DOOR_S: Final = 1.0


class Control(control_pb2_grpc.ControlServicer):
    """The service. All methods run on one event loop."""

    def __init__(
        self, name: str, world_size: int, job: Job | None, successor: Callable[[Roster], Job], log: EventLog
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
        self._candidates: set[Caller] = set()
        self._dead: set[int] = set()
        self._asking: set[int] = set()
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

    async def _read(self, messages: Any, handle: Callable[[Job, Any], list[Action]], queue: asyncio.Queue[Any]) -> None:
        """Handle a stream's messages until it ends; whatever went wrong, the other side opens a new one."""
        try:
            async for message in messages:
                if self._job is not None:
                    self._do(handle(self._job, message))
        except grpc.RpcError:
            pass  # the stream broke: same as its end
        except Exception:
            traceback.print_exc()  # a bug of ours: for the coordinator's log
            raise
        finally:
            queue.put_nowait(None)

    def _on_rank_message(self, rank: int, incarnation: int, job: Job, message: Any) -> list[Action]:
        now_ns, generation = time.monotonic_ns(), int(message.generation)
        foreign = self._foreign(job.slots[rank].host)
        match message.WhichOneof("body"):
            case "join":
                return job.on_join(now_ns, rank, generation, joined_of(rank, incarnation, message.join))
            case "store_set":
                body = message.store_set
                return job.on_store_set(rank, generation, body.key, body.value, body.gather)
            case "restored":
                body = message.restored
                sources = [(s.rung, int(s.bytes), int(s.pieces)) for s in body.sources]
                restored_ns = now_ns if foreign else int(body.restored_ns)
                return job.on_restored(rank, generation, restored_ns, sources, body.note, int(body.inexact_since))
            case "committed":
                body = message.committed
                committed_ns = now_ns if foreign else int(body.committed_ns)
                first = body.first_after_resume
                actions = job.on_committed(rank, generation, int(body.step), committed_ns, body.loss, first)
                actions += job.on_protected(int(body.protected_placement), int(body.protected_step))
                if body.replica_mismatch:
                    actions += job.on_mismatch(rank, int(body.step), body.replica_mismatch)
                return actions
            case "suspect":
                return job.on_suspect(now_ns, rank, generation, message.suspect.what)
            case "goodbye":
                return job.on_goodbye(now_ns, rank, incarnation, int(message.goodbye.step))
        return []

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
        if self._job is None:
            self._candidates.add(caller)
            try:
                self._elect()
                await self._leading(context)
            finally:
                self._candidates.discard(caller)
        else:
            self._welcome(caller)
        handle = partial(self._on_agent_message, caller)
        reader = asyncio.create_task(self._read(request_iterator, handle, caller.queue))
        beats = asyncio.create_task(self._beat(caller.queue))
        try:
            while (order := await caller.queue.get()) is not None:
                yield order
        finally:
            reader.cancel()
            beats.cancel()
            if self._agents.get(caller.told.index) is caller:
                del self._agents[caller.told.index]
                if self._job is not None:
                    self._do(self._job.on_agent_gone(time.monotonic_ns(), caller.told.index))

    def _welcome(self, caller: Caller) -> None:
        assert self._job is not None
        # A number first, so that what follows finds its way.
        actions = self._job.on_agent_hello(time.monotonic_ns(), caller.told, caller.ranks)
        self._agents[caller.told.index] = caller
        self._do(actions)

    @staticmethod
    async def _beat(queue: asyncio.Queue[Any]) -> None:
        while True:
            await asyncio.sleep(BEAT_NS / 1e9)
            queue.put_nowait(pb.AgentOrder(beat=pb.Beat()))

    def _on_agent_message(self, caller: Caller, job: Job, message: Any) -> list[Action]:
        host, now_ns = caller.told.index, time.monotonic_ns()
        actions = job.on_agent_beat(now_ns, host)
        match message.WhichOneof("body"):
            case "started":
                body = message.started
                return job.on_rank_started(now_ns, body.rank, body.incarnation, body.pid, host, body.source)
            case "exited":
                body = message.exited
                detected_ns, progress_ns = int(body.detected_ns), int(body.last_progress_ns)
                if self._foreign(host):
                    detected_ns, progress_ns = now_ns, now_ns - (detected_ns - progress_ns) if progress_ns else 0
                return job.on_rank_exited(
                    now_ns,
                    body.rank,
                    body.incarnation,
                    body.reason,
                    detected_ns=detected_ns,
                    last_progress_ns=progress_ns,
                    finished=body.finished,
                    phase=body.phase,
                )
            case "failed":
                return job.on_agent_failed(host, message.failed.reason)
        return actions

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
        """Go on where the last coordinator stopped, if enough agents ask for it."""
        if self._job is not None or not self._candidates:
            return
        roster = newest(caller.roster for caller in self._candidates)
        if not roster.members:
            return  # before the first generation only the first coordinator may decide
        voters = {rank: host for rank, (_, host) in roster.members.items()}
        heard = {caller.told.index for caller in self._candidates}
        dead = (self._dead | {host.index for host in roster.hosts if host.proven}) - heard
        if has_quorum(voters, heard, dead):
            self._take_over(roster)
            return
        for host in roster.hosts:
            if host.index not in heard | dead | self._asking:
                self._asking.add(host.index)
                self._spawn(self._try_door(host.index, host.door))

    def _take_over(self, roster: Roster) -> None:
        self._job = self._successor(roster)
        members = sorted(self._candidates, key=lambda caller: caller.told.index)
        heard = [caller.told.index for caller in members]
        self._log.write({"event": "coordinator_took_over", "generation": roster.generation, "hosts": heard})
        for caller in members:
            self._welcome(caller)
        for index in sorted(self._dead):
            self._do(self._job.on_probe(time.monotonic_ns(), index, refused=True))
        self._dead = set()
        self._in_charge.set()

    def _step_down(self, reason: str) -> None:
        """Without a quorum nothing may be decided here, and the ranks of these hosts must not wait for the others."""
        self._log.write({"event": "coordinator_stepped_down", "reason": reason})
        self._tell_agents(pb.AgentOrder(welcome=pb.AgentWelcome(index=-1, fenced=True)))
        self._job = None
        self._in_charge.clear()
        self.end_sessions()

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
            self._dead.add(index)
        else:
            await asyncio.sleep(PROBE_NS / 1e9)
        self._asking.discard(index)  # not before: each answer would ask all the others again
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
                order = pb.AgentOrder(welcome=pb.AgentWelcome(index=host, fenced=fenced))
                self._tell_agent(host, order)
            case Adopt(host, rank, incarnation):
                self._tell_agent(host, pb.AgentOrder(adopt=pb.Adopt(rank=rank, incarnation=incarnation)))
            case Tell(roster, topology):
                self._tell_agents(pb.AgentOrder(roster=pb.Roster(json=roster)))
                for host, text in topology.items():
                    self._tell_agent(host, pb.AgentOrder(topology=pb.Topology(json=text)))
            case JobDone():
                self._tell_agents(pb.AgentOrder(done=pb.JobDone()))

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

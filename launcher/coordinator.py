"""The coordinator process: a gRPC shell around membership.Membership, and the event record.

    python -m holdfast.launcher.coordinator --bind 127.0.0.1:0 --job ID --world-size N --events FILE

One event loop owns the Membership; streams are queues of orders. The event record doubles as its log: a
restarted coordinator reads the last generation and its members from it, ranks and agents connect again and
say where they are, and training never waits for any of it. Not here: detection (agents do it), decisions
(membership.py, recovery/decide.py), bulk data. Ends when its standard input closes: the agent holds it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from holdfast.proto import env
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc
from holdfast.runtime.recovery.decide import Report

from .actions import Action, Announce, Fence, Form, Record, StopJob, StoreAll
from .membership import Joined, Membership

TOKEN_HEADER = "holdfast-token"


class EventLog:
    """Append-only JSON lines; each line is written whole and flushed, so a killed coordinator loses none."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("ab", buffering=0) if path is not None else None
        self._torn = False

    def write(self, event: dict[str, object]) -> None:
        """Append one event, stamped with wall clock and monotonic time."""
        if self._file is None:
            return
        stamped = {"time": round(time.time(), 6), "monotonic_ns": time.monotonic_ns(), **event}
        line = json.dumps(stamped, separators=(",", ":")).encode() + b"\n"
        try:
            # A line that could not be written whole is ended first, so that only itself is lost.
            written = self._file.write(b"\n" + line if self._torn else line)
            self._torn = written is None or written < len(line)
        except OSError as error:
            if not self._torn:
                print(f"holdfast: the event record cannot be written: {error}", file=sys.stderr, flush=True)
            self._torn = True


def last_generation(lines: Iterable[str]) -> tuple[int, dict[int, int]]:
    """Generation number and members of the last generation in a log; (0, {}) for an empty one.

    A torn last line (the coordinator was killed while writing) is skipped. A fence after the last formed
    generation means that nothing stands: members are empty then.
    """
    generation, members = 0, dict[int, int]()
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "fence":
            generation, members = int(event["generation"]), {}
        elif event.get("event") == "formed":
            generation = int(event["generation"])
            members = {int(rank): int(incarnation) for rank, incarnation in event["members"].items()}
    return generation, members


class Control(control_pb2_grpc.ControlServicer):
    """The service. All methods run on one event loop."""

    def __init__(self, membership: Membership, log: EventLog) -> None:
        self._membership = membership
        self._log = log
        self._ranks: dict[int, asyncio.Queue[Any]] = {}
        self._agents: dict[str, asyncio.Queue[Any]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def RankSession(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        """One rank's stream: its first message is Hello."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session is Hello")
            return
        hello = first.hello
        if not 0 <= hello.rank < self._membership.world_size or hello.world_size != self._membership.world_size:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"rank {hello.rank} of {hello.world_size} does not belong to a job of {self._membership.world_size}",
            )
            return
        if hello.incarnation < self._membership.slots[hello.rank].incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"rank {hello.rank} was replaced")
            return
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._ranks[hello.rank] = queue
        queue.put_nowait(pb.RankOrder(generation=self._membership.generation, welcome=pb.Welcome()))
        self._do(
            self._membership.on_rank_hello(
                time.monotonic_ns(),
                hello.rank,
                hello.incarnation,
                hello.pid,
                hello.host,
                first.generation,
                hello.live_step,
            )
        )
        reader = asyncio.create_task(self._read_rank(hello, request_iterator, queue))
        try:
            while (order := await queue.get()) is not None:
                yield order
        finally:
            reader.cancel()
            if self._ranks.get(hello.rank) is queue:
                del self._ranks[hello.rank]
                self._do(self._membership.on_session_lost(hello.rank, hello.incarnation))

    async def _read_rank(self, hello: Any, messages: Any, queue: asyncio.Queue[Any]) -> None:
        try:
            async for message in messages:
                self._do(self._on_rank_message(hello.rank, hello.incarnation, message))
        except grpc.RpcError:
            pass  # the stream broke: same as its end
        finally:
            queue.put_nowait(None)  # whatever went wrong, the rank opens a new stream and says again where it is

    def _on_rank_message(self, rank: int, incarnation: int, message: Any) -> list[Action]:
        members, now_ns, generation = self._membership, time.monotonic_ns(), int(message.generation)
        match message.WhichOneof("body"):
            case "join":
                return members.on_join(now_ns, rank, generation, _joined(rank, incarnation, message.join))
            case "store_set":
                body = message.store_set
                return members.on_store_set(rank, generation, body.key, body.value, body.gather)
            case "restored":
                sources = [(s.rung, int(s.bytes), int(s.pieces)) for s in message.restored.sources]
                return members.on_restored(rank, generation, int(message.restored.restored_ns), sources)
            case "committed":
                body = message.committed
                return members.on_committed(
                    rank,
                    generation,
                    int(body.step),
                    int(body.committed_ns),
                    body.loss,
                    body.first_after_resume,
                )
            case "suspect":
                return members.on_suspect(now_ns, rank, generation, message.suspect.what)
            case "goodbye":
                return members.on_goodbye(now_ns, rank, incarnation, int(message.goodbye.step))
        return []

    async def AgentSession(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        """One host's agent: its first message is AgentHello."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session is AgentHello")
            return
        host = first.hello.host
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._agents[host] = queue
        ranks = [(r.rank, r.incarnation, r.pid) for r in first.hello.ranks]
        self._do(self._membership.on_agent_hello(time.monotonic_ns(), host, ranks))
        reader = asyncio.create_task(self._read_agent(host, request_iterator, queue))
        try:
            while (order := await queue.get()) is not None:
                yield order
        finally:
            reader.cancel()
            if self._agents.get(host) is queue:
                del self._agents[host]

    async def _read_agent(self, host: str, messages: Any, queue: asyncio.Queue[Any]) -> None:
        try:
            async for message in messages:
                self._do(self._on_agent_message(host, message))
        except grpc.RpcError:
            pass  # the stream broke: same as its end
        finally:
            queue.put_nowait(None)

    def _on_agent_message(self, host: str, message: Any) -> list[Action]:
        now_ns = time.monotonic_ns()
        match message.WhichOneof("body"):
            case "started":
                body = message.started
                return self._membership.on_rank_started(
                    now_ns, body.rank, body.incarnation, body.pid, host, body.source
                )
            case "exited":
                body = message.exited
                return self._membership.on_rank_exited(
                    now_ns,
                    body.rank,
                    body.incarnation,
                    body.reason,
                    detected_ns=int(body.detected_ns),
                    last_progress_ns=int(body.last_progress_ns),
                    finished=body.finished,
                    phase=body.phase,
                )
        return []

    async def Status(self, request: Any, context: Any) -> Any:
        """State as JSON."""
        return pb.StatusReply(json=json.dumps(self._membership.status()))

    async def Inject(self, request: Any, context: Any) -> Any:
        """Pass a fault order on to the agent of the rank's host."""
        slot = self._membership.slots.get(request.rank)
        queue = self._agents.get(slot.host) if slot is not None else None
        if queue is None:
            return pb.InjectReply(accepted=False, reason=f"no agent with a live rank {request.rank}")
        self._log.write({"event": "fault_ordered", "rank": request.rank, "kind": request.kind, "id": request.id})
        queue.put_nowait(pb.AgentOrder(inject=pb.InjectOrder(rank=request.rank, kind=request.kind, id=request.id)))
        return pb.InjectReply(accepted=True)

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Fence(generation, reason, ranks):
                    self._order(ranks, pb.RankOrder(generation=generation, fence=pb.Fence(reason=reason)))
                case Form():
                    self._order(action.ranks, _form_order(action))
                case StoreAll(generation, values, ranks):
                    stored = pb.StoreAll(values=dict(values))
                    self._order(ranks, pb.RankOrder(generation=generation, store_all=stored))
                case StopJob(exit_code, reason):
                    self._log.write({"event": "stop", "exit_code": exit_code, "reason": reason})
                    self._tell_agents(pb.AgentOrder(stop=pb.StopJob(exit_code=exit_code, reason=reason)))
                case Announce(line):
                    self._tell_agents(pb.AgentOrder(recovered=pb.Recovered(line=line)))
                case Record(event):
                    self._log.write(event)
        self._set_timer()

    def _order(self, ranks: Iterable[int], order: Any) -> None:
        for rank in ranks:
            if (queue := self._ranks.get(rank)) is not None:
                queue.put_nowait(order)

    def _tell_agents(self, order: Any) -> None:
        for queue in self._agents.values():
            queue.put_nowait(order)

    def end_sessions(self) -> None:
        """End every stream in an orderly way."""
        for queue in (*self._ranks.values(), *self._agents.values()):
            queue.put_nowait(None)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ns = self._membership.next_tick_ns()
        if due_ns is not None:
            delay_s = max(0.0, (due_ns - time.monotonic_ns()) / 1e9)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._do(self._membership.on_tick(time.monotonic_ns()))


def _joined(rank: int, incarnation: int, join: Any) -> Joined:
    held = {int(h.rank): frozenset(int(s) for s in h.steps) for h in join.held}
    report = Report(rank, int(join.live_step), tuple(int(p) for p in join.peers), held)
    return Joined(incarnation, report, join.plan, join.compute, int(join.until))


def _form_order(form: Form) -> Any:
    members = [
        pb.Member(rank=rank, incarnation=incarnation, host=host, rung=source.rung, peer=source.peer)
        for rank, incarnation, host, source in form.members
    ]
    body = pb.Form(members=members, resume_step=form.resume_step, fresh=form.fresh, solo=form.solo)
    return pb.RankOrder(generation=form.generation, form=body)


class TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses every call that does not carry the job's token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

        async def refuse_stream(request_iterator: Any, context: Any) -> AsyncIterator[Any]:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong job token")
            yield None

        async def refuse_unary(request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong job token")

        self._refuse_stream = grpc.stream_stream_rpc_method_handler(refuse_stream)
        self._refuse_unary = grpc.unary_unary_rpc_method_handler(refuse_unary)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Compare in constant time; a wrong token reaches no handler."""
        given = dict(handler_call_details.invocation_metadata or ()).get(TOKEN_HEADER, "")
        if hmac.compare_digest(str(given).encode(), self._token):
            return await continuation(handler_call_details)
        streams = handler_call_details.method.endswith("Session")
        return self._refuse_stream if streams else self._refuse_unary


async def _until_stdin_closes() -> None:
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()

    def readable() -> None:
        with contextlib.suppress(BlockingIOError):
            if not os.read(0, 4096):
                closed.set()

    os.set_blocking(0, False)
    loop.add_reader(0, readable)
    await closed.wait()


async def serve(arguments: argparse.Namespace, token: str) -> int:
    """Listen, say where, and serve until the agent closes our standard input. Returns the exit code."""
    path = None if arguments.events == "none" else Path(arguments.events)
    generation, members = 0, dict[int, int]()
    if path is not None and path.exists():
        generation, members = last_generation(path.read_text().splitlines())
    log = EventLog(path)
    membership = Membership(arguments.world_size, generation=generation, members=members)
    server = grpc.aio.server(interceptors=[TokenCheck(token)], options=[("grpc.so_reuseport", 0)])
    control = Control(membership, log)
    control_pb2_grpc.add_ControlServicer_to_server(control, server)
    try:
        port = server.add_insecure_port(arguments.bind)
    except RuntimeError:
        port = 0
    if not port:
        print(f"holdfast: error: cannot listen on {arguments.bind}: the port is in use", file=sys.stderr)
        return 2
    await server.start()
    host = arguments.bind.rpartition(":")[0]
    event = "coordinator_restarted" if generation else "coordinator_started"
    log.write({"event": event, "job": arguments.job, "address": f"{host}:{port}", "pid": os.getpid()})
    if arguments.ready_fd is not None:
        with os.fdopen(arguments.ready_fd, "w") as ready:
            ready.write(json.dumps({"address": f"{host}:{port}"}) + "\n")
    await _until_stdin_closes()
    control.end_sessions()
    await server.stop(grace=0.2)
    return 0


def main() -> int:
    """Entry point; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="holdfast-coordinator", description=__doc__)
    parser.add_argument("--bind", default="127.0.0.1:0", help="host:port to listen on; port 0 takes a free one")
    parser.add_argument("--job", required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--events", default="none", help="event record, JSON lines; also the log to restart from")
    parser.add_argument("--ready-fd", type=int, help="write the address as one JSON line to this descriptor")
    arguments = parser.parse_args()
    token = os.environ.get(env.TOKEN, "")
    if not token:
        print(f"holdfast: error: {env.TOKEN} is not set; the agent sets it", file=sys.stderr)
        return 2
    return asyncio.run(serve(arguments, token))


if __name__ == "__main__":
    sys.exit(main())

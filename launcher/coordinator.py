"""The coordinator process: one on every host, of which one is in charge.

    python -m holdfast.launcher.coordinator --bind 127.0.0.1:0 --job ID --world-size N --events FILE [--standby]

The first host's leads from the start. If it is restarted in a job of one host, its event record is its log: it
reads the last generation and its members from it, ranks and agents connect again and say where they are, and
training never waits for any of it. In a job of several hosts a restarted coordinator stands by like the others,
until enough agents ask it to go on from the roster that they were told (control.py). Not here: detection
(agents do it), decisions (job.py), bulk data. Ends when its standard input closes: the agent holds it.
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
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from holdfast.proto import env
from holdfast.proto.gen import control_pb2_grpc

from .control import Control
from .eventlog import EventLog, last_generation
from .hosts import Roster, Term
from .job import Job

TOKEN_HEADER = "holdfast-token"


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
    if path is not None and path.exists() and not arguments.standby:
        generation, members = last_generation(path.read_text().splitlines())
    log = EventLog(path)
    options = {
        "lease_ns": int(arguments.host_lease * 1e9),
        "redundancy": arguments.redundancy,
        "spread": arguments.lost_host == "spread",
        "wait_ns": int(arguments.host_wait * 1e9),
    }
    leads = not arguments.standby and not (generation and arguments.hosts > 1)
    job = Job(arguments.world_size, generation=generation, members=members, **options) if leads else None
    server = grpc.aio.server(interceptors=[TokenCheck(token)], options=[("grpc.so_reuseport", 0)])
    control = Control(arguments.job, arguments.world_size, job, partial(_successor, arguments.world_size, options), log)
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
    control.address = f"{host}:{port}"
    if not arguments.standby:
        event = "coordinator_restarted" if generation else "coordinator_started"
        log.write({"event": event, "job": arguments.job, "address": control.address, "pid": os.getpid()})
    if arguments.ready_fd is not None:
        with os.fdopen(arguments.ready_fd, "w") as ready:
            ready.write(json.dumps({"address": control.address}) + "\n")
    await _until_stdin_closes()
    control.end_sessions()
    await server.stop(grace=0.2)
    return 0


def _successor(world_size: int, options: dict[str, Any], roster: Roster, term: Term) -> Job:
    return Job.from_roster(world_size, roster, time.monotonic_ns(), term=term, **options)


def main() -> int:
    """Entry point; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="holdfast-coordinator", description=__doc__)
    parser.add_argument("--bind", default="127.0.0.1:0", help="host:port to listen on; port 0 takes a free one")
    parser.add_argument("--job", required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--events", default="none", help="event record, JSON lines; also the log to restart from")
    parser.add_argument("--ready-fd", type=int, help="write the address as one JSON line to this descriptor")
    parser.add_argument("--standby", action="store_true", help="do not lead until agents ask for it")
    parser.add_argument("--hosts", type=int, default=1, help="hosts that the job starts with")
    parser.add_argument("--host-lease", type=float, default=6.0, help="seconds of silence after which a host is lost")
    parser.add_argument("--redundancy", default="auto")
    parser.add_argument("--lost-host", choices=("spread", "wait"), default="spread")
    parser.add_argument("--host-wait", type=float, default=600.0)
    arguments = parser.parse_args()
    token = os.environ.get(env.TOKEN, "")
    if not token:
        print(f"holdfast: error: {env.TOKEN} is not set; the agent sets it", file=sys.stderr)
        return 2
    return asyncio.run(serve(arguments, token))


if __name__ == "__main__":
    sys.exit(main())

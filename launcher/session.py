"""The agent's stream to the coordinator, kept open while the job runs, whichever process that is now.

    started(rank), exited(rank) ──▶ outbox ──▶ AgentSession stream ──▶ coordinator
    on_order(order)             ◀──────────────                    ◀──

A coordinator that was restarted knows nothing of this host: the new stream begins with a hello that names
every live rank, then what could not be sent, then which ranks are finished. Not here: what orders mean.
Invariant: hello and outbox are swapped under one lock, so a death is in one or the other, never in neither.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final

import grpc

from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc

TOKEN_HEADER: Final = "holdfast-token"
RETRY_S: Final = 0.25
_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
)


class CoordinatorSession:
    """See the module's docstring. Every method may be called from any thread."""

    def __init__(self, *, host: str, token: str, world_size: int, on_order: Callable[[Any], None]) -> None:
        self._host = host
        self._token = token
        self._world_size = world_size
        self._on_order = on_order
        self._changed = threading.Condition()
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._live: dict[int, Any] = {}
        self._finished: dict[int, Any] = {}
        self._address = ""
        self._closed = False
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="holdfast-session", daemon=True)

    def start(self, address: str) -> None:
        """Begin, with the coordinator at `address`."""
        self._address = address
        self._thread.start()

    def moved(self, address: str) -> None:
        """The coordinator listens at `address` now."""
        with self._changed:
            self._address = address
            self._changed.notify_all()

    def started(self, started: Any) -> None:
        """A process holds a rank now (pb.RankStarted)."""
        with self._changed:
            self._live[started.rank] = started
            self._finished.pop(started.rank, None)
            self._outbox.put(pb.AgentMessage(started=started))

    def exited(self, exited: Any) -> None:
        """A rank's process ended, or was fenced (pb.RankExited)."""
        with self._changed:
            self._live.pop(exited.rank, None)
            if exited.finished:
                self._finished[exited.rank] = exited
            self._outbox.put(pb.AgentMessage(exited=exited))

    def close(self, timeout_s: float = 2.0) -> None:
        """End the stream and the thread."""
        with self._changed:
            self._closed = True
            call = self._call
            self._outbox.put(None)
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    # ---- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        failed = ""
        while True:
            with self._changed:
                # After a failure the address usually changes; it may also be the same again, in a moment.
                self._changed.wait_for(lambda: self._closed or self._address != failed, RETRY_S)  # noqa: B023
                if self._closed:
                    return
                address = self._address
            # A broken stream is no news: the coordinator's process is watched elsewhere.
            with contextlib.suppress(grpc.RpcError):
                self._stream(address)
            failed = address

    def _stream(self, address: str) -> None:
        with grpc.insecure_channel(address, options=_OPTIONS) as channel:
            with self._changed:
                if self._closed:
                    return
                outbox = self._reopen()
                call = control_pb2_grpc.ControlStub(channel).AgentSession(
                    iter(outbox.get, None), metadata=[(TOKEN_HEADER, self._token)]
                )
                self._call = call
            try:
                for order in call:
                    self._on_order(order)
            finally:
                outbox.put(None)  # ends the thread that feeds this stream

    def _reopen(self) -> SimpleQueue[Any]:
        """A new outbox that begins with who we are; what was never taken from the old one follows."""
        unsent: list[Any] = []
        with contextlib.suppress(Empty):
            while True:
                unsent.append(self._outbox.get_nowait())
        unsent = [message for message in unsent if message is not None and message.WhichOneof("body") != "hello"]
        # A rank with news tells its story in order (its death, then its replacement); the others are listed.
        news = {getattr(message, message.WhichOneof("body")).rank for message in unsent}
        ranks = [started for rank, started in sorted(self._live.items()) if rank not in news]
        outbox: SimpleQueue[Any] = SimpleQueue()
        outbox.put(pb.AgentMessage(hello=pb.AgentHello(host=self._host, ranks=ranks, world_size=self._world_size)))
        told = [pb.AgentMessage(exited=exited) for rank, exited in self._finished.items() if rank not in news]
        for message in unsent + told:
            outbox.put(message)
        self._outbox = outbox
        return outbox

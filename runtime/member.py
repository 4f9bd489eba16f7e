"""A rank's membership of the job: its agent, its coordinator session, and the group to wake.

    agent socket (lifeline) ◀──▶ lifeline thread: beats, EOF = the agent is gone = this process ends
    coordinator stream      ◀──▶ session thread:  Fence ─▶ abort the group;  Form, StoreAll ─▶ main thread
    main thread                  await_fence() ▶ join() ▶ build ▶ restored() ▶ ... ▶ goodbye()

The session thread never touches training state: it aborts the group and leaves notes. A lost coordinator
costs nothing: training goes on, the stream is opened again at the address that the agent tells, and
whatever the new coordinator must know is said again.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

import grpc

from holdfast.proto.channel import CHANNEL
from holdfast.proto.errors import ConfigError, Fenced, PeerLost
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc
from holdfast.proto.lease import PAGE_BYTES, LeasePage

from .comm.group import Group
from .joining import Formed, Identity, JoinReport
from .lease import Lease
from .recovery.decide import Source

BEAT_S = 0.1
COORDINATOR_DEADLINE_S = 600.0
"""Longest wait for the coordinator's answer; other ranks may be in long user code meanwhile."""


class AgentLink:
    """The socket to the host's agent: lease page, coordinator address, and the sign that the agent lives."""

    def __init__(self, identity: Identity) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect("\0" + identity.agent)
            self._socket.settimeout(30.0)
            self._send({"hello": {"rank": identity.rank, "incarnation": identity.incarnation, "pid": os.getpid()}})
            data, fds, _, _ = socket.recv_fds(self._socket, 65536, 1)
        except OSError as error:
            raise ConfigError(f"no Holdfast agent answers: {error}; start the script with `holdfast run`") from None
        if not fds or not data:
            raise ConfigError("the agent refused this rank: it is not the one that it started", rank=identity.rank)
        self._buffer = data
        self._mapped = mmap.mmap(fds[0], PAGE_BYTES)
        os.close(fds[0])
        self.page = LeasePage(memoryview(self._mapped))
        line, _, self._buffer = self._buffer.partition(b"\n")
        self.coordinator: str = json.loads(line)["welcome"]["coordinator"]

    def _send(self, message: dict[str, object]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def config_error(self, message: str) -> None:
        """Tell the operator, once, through the agent; the job ends with exit code 2."""
        self._send({"config_error": message})

    def done(self) -> None:
        """This rank's training is complete."""
        self._send({"done": True})

    def listen(self, lease: Lease, on_coordinator: Any) -> None:
        """Beat, follow the coordinator's address, and end this process when the agent is gone."""
        self._socket.settimeout(BEAT_S)
        while True:
            lease.beat()
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                os._exit(1)  # orphans do not train: the agent was killed, so is its job
            self._buffer += data
            while b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                message = json.loads(line)
                if "coordinator" in message:
                    on_coordinator(message["coordinator"])


class Member:
    """See the module's docstring."""

    def __init__(self, identity: Identity, link: AgentLink, lease: Lease) -> None:
        self._identity = identity
        self._link = link
        self._lease = lease
        self._lock = threading.Condition()
        self._address = link.coordinator
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._target = 0  # newest generation we were fenced into
        self._reason = ""
        self._current = 0  # generation that this rank formed
        self._joined: tuple[int, Any] | None = None  # join not answered yet
        self._formed: Formed | None = None
        self._group: Group | None = None
        self._published: list[Any] = []
        self._suspect: Any = None
        self._goodbye: Any = None
        self._live_step, self._inexact_since = -1, 0
        self._refused = ""
        self._call: Any = None
        self.interrupt: Callable[[], None] = lambda: None
        for target in (lambda: link.listen(lease, self._moved), self._session):
            threading.Thread(target=target, name="holdfast-member", daemon=True).start()

    # ---- main thread --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Fenced if the current generation is over."""
        if self._target > self._current:
            raise Fenced(self._target, self._reason)

    @property
    def reason(self) -> str:
        """Why the newest generation began."""
        return self._reason

    def control_ports(self) -> frozenset[int]:
        """Ports of the control channel, so that its connections are not taken for peers'."""
        return frozenset({int(self._address.rpartition(":")[2])})

    def await_fence(self, newer_than: int) -> int:
        """Wait for the order to join a generation newer than `newer_than`; returns it."""
        with self._lock:
            self._wait(lambda: self._target > newer_than, "the coordinator's next generation")
            return self._target

    def join(self, generation: int, report: JoinReport) -> Formed:
        """Join `generation` and wait until it stands. Raises Fenced when a newer one supersedes it."""
        message = pb.RankMessage(generation=generation, join=report.message())
        with self._lock:
            self._live_step, self._inexact_since = report.live_step, report.inexact_since
            self._joined, self._formed, self._suspect, self._published = (generation, message), None, None, []
            self._outbox.put(message)
            self._wait(lambda: self._formed is not None or self._target > generation, "the other ranks")
            self._joined = None
            if self._target > generation:
                raise Fenced(self._target, self._reason)
            self._current = generation
            return self._answer()

    def _answer(self) -> Formed:
        assert self._formed is not None
        return self._formed

    def attach(self, group: Group) -> None:
        """`group` is what a fence must wake from now on. Raises Fenced if one came already."""
        with self._lock:
            self._group = group
            self.check()

    def publish(self, generation: int, key: str, value: bytes, *, gather: bool) -> None:
        """Publish an address of this rank's group (any thread)."""
        message = pb.RankMessage(generation=generation, store_set=pb.StoreSet(key=key, value=value, gather=gather))
        with self._lock:
            self._published.append(message)
        self._outbox.put(message)

    def restored(
        self, generation: int, step: int, sources: Iterable[tuple[str, int, int]], note: str = "", since: int = 0
    ) -> None:
        """The state after `step` is in place; `sources` are (rung, bytes, pieces). `note`: how, if it is not exact;
        `since`: the first step that was not."""
        self._inexact_since = since
        listed = [pb.Source(rung=rung, bytes=size, pieces=pieces) for rung, size, pieces in sources]
        body = pb.Restored(step=step, restored_ns=time.monotonic_ns(), sources=listed, note=note, inexact_since=since)
        self._outbox.put(pb.RankMessage(generation=generation, restored=body))

    def committed(
        self,
        generation: int,
        step: int,
        loss: float,
        *,
        first: bool,
        protected: tuple[int, int] = (0, -1),
        alarm: str = "",
    ) -> None:
        """A step was committed; `protected`: placement and newest step that every host has protected. Never waits."""
        body = pb.Committed(
            step=step,
            committed_ns=time.monotonic_ns(),
            loss=loss,
            first_after_resume=first,
            protected_placement=protected[0],
            protected_step=protected[1],
            replica_mismatch=alarm,
        )
        self._outbox.put(pb.RankMessage(generation=generation, committed=body))

    def suspect(self, generation: int, what: str) -> None:
        """Communication broke; the coordinator finds out who is to blame."""
        message = pb.RankMessage(generation=generation, suspect=pb.Suspect(what=what))
        with self._lock:
            self._suspect = message
        self._outbox.put(message)

    def goodbye(self, step: int) -> None:
        """All state after `step` is kept; this rank takes part no more."""
        with self._lock:
            self._goodbye = pb.RankMessage(generation=self._current, goodbye=pb.Goodbye(step=step))
            self._outbox.put(self._goodbye)
        self._link.done()

    def config_error(self, message: str) -> None:
        """Report a fatal configuration error to the operator."""
        self._link.config_error(message)

    def _wait(self, ready: Any, what: str) -> None:
        if not self._lock.wait_for(lambda: bool(self._refused) or ready(), COORDINATOR_DEADLINE_S):
            raise PeerLost(f"no answer while waiting for {what}", deadline_s=COORDINATOR_DEADLINE_S)
        if self._refused:
            raise ConfigError(self._refused, rank=self._identity.rank)

    # ---- session thread -----------------------------------------------------------------------------

    def _moved(self, address: str) -> None:
        with self._lock:
            call = self._call if address != self._address else None
            self._address = address
            self._lock.notify_all()
        if call is not None:
            call.cancel()  # whoever was in charge may be cut off: its stream would stay silent for ever

    def _session(self) -> None:
        """Keep a stream to the coordinator, whichever process that is now."""
        failed = ""
        while not self._refused:
            with self._lock:
                # After a failure wait for the agent to tell a new address; it may also be the same again.
                self._lock.wait_for(lambda: self._address != failed, timeout=0.25)  # noqa: B023
                address = self._address
            try:
                self._stream(address)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT):
                    with self._lock:
                        self._refused = f"the coordinator refused this rank: {error.details()}"
                        self._lock.notify_all()
            failed = address

    def _stream(self, address: str) -> None:
        identity = self._identity
        with grpc.insecure_channel(address, options=CHANNEL) as channel:
            outbox: SimpleQueue[Any] = SimpleQueue()
            with self._lock:
                hello = pb.Hello(
                    rank=identity.rank,
                    incarnation=identity.incarnation,
                    pid=os.getpid(),
                    host=identity.host,
                    world_size=identity.world_size,
                    live_step=self._live_step,
                    inexact_since=self._inexact_since,
                )
                outbox.put(pb.RankMessage(generation=self._current, hello=hello))
                for message in self._published if self._current == self._target else ():
                    outbox.put(message)
                if self._joined is not None:
                    outbox.put(self._joined[1])  # nobody else may know that this generation was begun
                for message in (self._suspect, self._goodbye):
                    if message is not None:
                        outbox.put(message)
                stale, self._outbox = self._outbox, outbox
            stub = control_pb2_grpc.ControlStub(channel)
            orders = self._call = stub.RankSession(
                iter(outbox.get, None), metadata=[("holdfast-token", identity.token)]
            )
            self._keep_unsent(stale, outbox)
            try:
                for order in orders:
                    self._on_order(order)
            finally:
                outbox.put(None)  # ends the request iterator's thread

    @staticmethod
    def _keep_unsent(stale: SimpleQueue[Any], outbox: SimpleQueue[Any]) -> None:
        """What was put while no stream stood: joins and suspicions are said again anyway, the rest follows."""
        while not stale.empty():
            message = stale.get()
            if message is not None and message.WhichOneof("body") in (
                "restored",
                "committed",
                "goodbye",
                "join",
            ):
                outbox.put(message)

    def _on_order(self, order: Any) -> None:
        generation = int(order.generation)
        match order.WhichOneof("body"):
            case "fence":
                self._on_fence(generation, order.fence.reason)
            case "form":
                form = order.form
                sources = {int(m.rank): Source(m.rung, int(m.peer), int(m.step)) for m in form.members}
                step, placement = int(form.resume_step), int(form.placement)
                told = (form.inexact, int(form.inexact_since))
                formed = Formed(generation, step, form.fresh, form.solo, sources, placement, *told)
                with self._lock:
                    if generation == self._target:
                        self._formed = formed
                        self._lock.notify_all()
            case "store_all":
                with self._lock:
                    group = self._group
                if group is not None and group.generation == generation:
                    group.deliver(dict(order.store_all.values))

    def _on_fence(self, generation: int, reason: str) -> None:
        with self._lock:
            if generation < self._target:
                return
            if generation == self._target:
                if self._joined is not None and self._joined[0] == generation:
                    self._outbox.put(self._joined[1])  # the coordinator forgot: it was restarted
                return
            self._target, self._reason = generation, reason
            group = self._group
            self._lock.notify_all()
        self.interrupt()
        if group is not None and group.generation < generation:
            group.abort(Fenced(generation, reason))

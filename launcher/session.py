"""The agent's stream to the coordinator in charge, wherever that is now.

    started(rank), exited(rank) ──▶ outbox ──▶ AgentSession stream ──▶ coordinator
    on_order(order)             ◀──────────────                    ◀──

A coordinator that was restarted, or that takes over from one whose host is lost, knows nothing of this host: the
new stream begins with a hello that names every live rank and brings the newest roster, then what could not be
sent, then which ranks are finished. Without a word from the coordinator its hosts are asked in the roster's order,
which is the same for all agents, so that they meet. Not here: what orders mean. Invariants:

* hello and outbox are swapped under one lock, so a death is in one or the other, never in neither;
* `silence_s` counts from the last word of a coordinator that is in charge;
* an agent that promised a term takes nothing from a coordinator of an older one.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Final

import grpc

from holdfast.proto.channel import CHANNEL
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc

from .hosts import BEAT_NS, FIRST, SILENT_NS, Host, Roster, Term
from .messages import term_message, term_of

TOKEN_HEADER: Final = "holdfast-token"
RETRY_S: Final = 0.25
LEADER_RETRY_S: Final = 2.0
"""A coordinator whose agent lives is restarted in less; after this the others are asked."""
CONNECT_S: Final = 0.4
STANDBY_S: Final = 4.0
"""A coordinator that is not in charge answers in less, one way or the other."""
SETTLES: Final = 0.75
"""How often the first coordinator that answers is asked again, not the next: all agents come to it."""
SAID_ANEW: Final = frozenset({"hello", "beat", "promised", "learnt"})
"""What is of one stream; the next begins with a hello that says it all."""
_OPTIONS: Final = (
    *CHANNEL,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)


def answers(address: str, timeout_s: float = CONNECT_S) -> bool:
    """Whether something takes connections there."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return True
    except (OSError, ValueError):
        return False


def candidates(leader: str, roster: Roster) -> list[str]:
    """Whom to ask, in this order: the last leader, then every host's coordinator, in the order of their numbers."""
    others = [host.coordinator for host in sorted(roster.hosts, key=lambda host: host.index) if not host.lost]
    return list(dict.fromkeys([leader, *(address for address in others if address)]))


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the session calls, from its thread."""

    on_order: Callable[[Any], None]
    on_leader: Callable[[str], None] = lambda address: None  # another coordinator is in charge
    on_fenced: Callable[[], None] = lambda: None  # this host was given up: its ranks must end


class CoordinatorSession:
    """See the module's docstring. Every method may be called from any thread."""

    def __init__(self, *, me: Host, token: str, world_size: int, hooks: Hooks) -> None:
        self._me = me
        self._token = token
        self._world_size = world_size
        self._hooks = hooks
        self._changed = threading.Condition()
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._live: dict[int, Any] = {}
        self._finished: dict[int, Any] = {}
        self._address = ""
        self._roster = Roster()
        self._promised = FIRST
        self._closed = False
        self._call: Any = None
        self._heard_s = self._called_s = time.monotonic()
        self._welcomed = False
        self._thread = threading.Thread(target=self._run, name="holdfast-session", daemon=True)
        self._beats = threading.Thread(target=self._beat, name="holdfast-beat", daemon=True)

    def start(self, address: str) -> None:
        """Begin, with the coordinator at `address`."""
        self._address = address
        self._heard_s = time.monotonic()
        self._thread.start()
        self._beats.start()

    @property
    def address(self) -> str:
        """Where the coordinator in charge was last heard."""
        return self._address

    @property
    def silence_s(self) -> float:
        """Seconds since a coordinator in charge said anything; 0 in a job of one host."""
        return time.monotonic() - self._heard_s if self._several() else 0.0

    def moved(self, address: str) -> None:
        """Our own coordinator listens at `address` now; in a job of one host it is the one in charge."""
        with self._changed:
            self._me = replace(self._me, coordinator=address)
            if not self._several():
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

    def failed(self, reason: str, *, waits: bool = False) -> None:
        """This host cannot go on. `waits`: it does until it is told to stop, as the others are."""
        self._outbox.put(pb.AgentMessage(failed=pb.AgentFailed(reason=reason, waits=waits)))

    def fenced(self) -> None:
        """Our ranks have ended because nobody in charge was heard: from now on this is a host without any."""
        with self._changed:
            self._live.clear()
            self._finished.clear()
            self._me = replace(self._me, index=-1)
            call = self._call
        if call is not None:
            call.cancel()

    def close(self, timeout_s: float = 2.0) -> None:
        """End the stream and the threads."""
        with self._changed:
            self._closed = True
            call = self._call
            self._outbox.put(None)
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        for thread in (self._thread, self._beats):
            if thread.ident is not None:
                thread.join(timeout_s)

    def _several(self) -> bool:
        return len(self._roster.hosts) > 1

    # ---- the threads --------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Say that we are there, and leave a coordinator that says nothing any more."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, BEAT_NS / 1e9):
                    return
                call = self._call
                self._outbox.put(pb.AgentMessage(beat=pb.Beat()))
            if call is not None and self._several() and self._is_silent():
                call.cancel()

    def _is_silent(self) -> bool:
        """Whether the coordinator that we talk to is cut off; one that is not in charge may take a while to be."""
        if self._welcomed:
            return self.silence_s > SILENT_NS / 1e9
        return time.monotonic() - max(self._heard_s, self._called_s) > STANDBY_S

    def _run(self) -> None:
        asked, turn, failing_s = "", 0, 0.0
        while True:
            with self._changed:
                choices = candidates(self._address, self._roster)
                # After a failure the address may change at any time (it was restarted elsewhere on this host).
                if asked == choices[turn % len(choices)]:
                    self._changed.wait_for(lambda: self._closed or self._address != asked, RETRY_S)  # noqa: B023
                if self._closed:
                    return
                choices = candidates(self._address, self._roster)
            address = asked = choices[turn % len(choices)]
            failing_s = failing_s or time.monotonic()
            welcomed = False
            reached = len(choices) == 1 or answers(address)
            if reached:
                # A broken stream is no news: the coordinator's process is watched elsewhere.
                with contextlib.suppress(grpc.RpcError):
                    welcomed = self._stream(address)
            if welcomed:
                asked, turn, failing_s = "", 0, 0.0
            elif not self._stay(address, time.monotonic() - failing_s):
                turn = 0 if reached and random.random() < SETTLES else turn + 1
                asked = "" if turn % len(choices) else choices[0]  # a pause before each walk

    def _stay(self, address: str, failing_s: float) -> bool:
        """Whether to ask the same coordinator again: the last leader's agent, if it lives, restarts it."""
        if address != self._address or failing_s > LEADER_RETRY_S:
            return False
        doors = [host.door for host in self._roster.hosts if host.coordinator == address]
        return not doors or answers(doors[0])

    def _stream(self, address: str) -> bool:
        """One stream to its end; whether it was one of a coordinator in charge."""
        welcomed = False
        with grpc.insecure_channel(address, options=_OPTIONS) as channel:
            with self._changed:
                if self._closed:
                    return False
                outbox = self._reopen()
                call = control_pb2_grpc.ControlStub(channel).AgentSession(
                    iter(outbox.get, None), metadata=[(TOKEN_HEADER, self._token)]
                )
                self._call, self._called_s, self._welcomed = call, time.monotonic(), False
            try:
                for order in call:
                    if order.WhichOneof("body") == "promise":  # not from one in charge: no news of the job
                        self._promise(term_of(order.promise.term))
                        continue
                    if order.WhichOneof("body") == "welcome" and term_of(order.welcome.term) < self._promised:
                        return False
                    self._heard_s = time.monotonic()
                    if order.WhichOneof("body") == "welcome":  # once; again if its sender steps down
                        welcomed = self._welcomed = True
                        self._welcome(address, order.welcome)
                    elif order.WhichOneof("body") == "roster":
                        self._learn(order.roster.json)
                    elif order.WhichOneof("body") != "beat":
                        # When the job is done coordinators go, one by one: nobody is to take over.
                        self._closed = self._closed or order.WhichOneof("body") == "done"
                        self._hooks.on_order(order)
            except grpc.RpcError:
                return welcomed
            finally:
                self._call = None
                outbox.put(None)  # ends the thread that feeds this stream
        return welcomed

    def _welcome(self, address: str, welcome: Any) -> None:
        with self._changed:
            moved = address != self._address
            self._address = address
            self._promised = term_of(welcome.term)
            if not welcome.fenced:
                self._me = replace(self._me, index=welcome.index)
        if welcome.fenced:
            self._hooks.on_fenced()
        elif moved:
            self._hooks.on_leader(address)

    def _learn(self, text: str) -> None:
        roster = Roster.decoded(text)
        with self._changed:
            if roster.term >= self._roster.term:  # of one coordinator the last word comes last
                self._roster = roster
                learnt = pb.Learnt(term=term_message(roster.term), number=roster.number)
                self._outbox.put(pb.AgentMessage(learnt=learnt))

    def _promise(self, term: Term) -> None:
        """A coordinator may be put in charge: from now on only it, or a later one, is followed."""
        with self._changed:
            self._promised = max(self._promised, term)
            self._outbox.put(pb.AgentMessage(promised=pb.Promised(term=term_message(self._promised))))

    def _reopen(self) -> SimpleQueue[Any]:
        """A new outbox that begins with who we are; what was never taken from the old one follows."""
        unsent: list[Any] = []
        with contextlib.suppress(Empty):
            while True:
                unsent.append(self._outbox.get_nowait())
        unsent = [m for m in unsent if m is not None and m.WhichOneof("body") not in SAID_ANEW]
        # A rank with news tells its story in order (its death, then its replacement); the others are listed.
        stories = [getattr(message, message.WhichOneof("body")) for message in unsent]
        news = {story.rank for story in stories if hasattr(story, "rank")}
        ranks = [started for rank, started in sorted(self._live.items()) if rank not in news]
        outbox: SimpleQueue[Any] = SimpleQueue()
        outbox.put(pb.AgentMessage(hello=self._hello(ranks)))
        told = [pb.AgentMessage(exited=exited) for rank, exited in self._finished.items() if rank not in news]
        for message in unsent + told:
            outbox.put(message)
        self._outbox = outbox
        return outbox

    def _hello(self, ranks: Sequence[Any]) -> Any:
        me = self._me
        return pb.AgentHello(
            host=me.name,
            ranks=ranks,
            world_size=self._world_size,
            index=me.index,
            address=me.address,
            door=me.door,
            coordinator=me.coordinator,
            protector=me.protector,
            capacity=me.capacity,
            domain=me.domain,
            roster=self._roster.encoded() if self._roster.hosts else "",
            promised=term_message(self._promised),
        )

"""The protector: its threads, and what is wired to what. The operations of the control socket are here.

    watch    the manager's list ─▶ Local          digest   records of what was sealed     publish  the page
    serve    other hosts (a thread a connection)  encode   parity of the newest step      scrub    idle memory
    control  agent and ranks (likewise)           repair   what was found damaged         watch-N  host N's news

Each thread has one owner class; they meet in Local, Peers and ParityStore, which have locks, and wake each other
through News. Invariants: the process ends when its manager does, when the agent says bye, or when a thread dies
of something nobody foresaw, because a protector that protects nothing must not look alive.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from holdfast.proto.errors import HoldfastError, PeerLost, ProtocolViolation, SnapshotError

from ..client import SmpClient
from ..placement import Placement
from .blocks import Sources
from .client import NO_DUTY
from .control import AGENTS, RANKS, ROLES, Control, Operation
from .encode import Duty, Encoder
from .local import Local
from .net import Key
from .news import News
from .options import Options
from .page import PageWriter
from .parity import ParityStore
from .peers import Peers
from .rebuild import Rebuild, RebuildCounters
from .replicas import Replicas
from .scrub import Repairer, Scrubber
from .serve import Server

log = logging.getLogger("holdfast.protect")

_SMP_S: Final = 10.0
_ANSWER_S: Final = 0.05


class Protector:
    """One host's protector. Raises PeerLost when there is no snapshot manager."""

    def __init__(
        self,
        smp: str,
        control: socket.socket,
        peers: socket.socket,
        *,
        job: str,
        token: str,
        options: Options,
    ) -> None:
        self._smp, self._job, self._token, self._options = smp, job, token, options
        self._listeners = (control, peers)
        self._end = threading.Event()
        self.ended = ""
        self.orderly = True
        self._lock = threading.Lock()
        self._number, self._me = -1, -1
        self._placement: Placement | None = None
        self._texts: dict[int, str] = {}
        self._news = News()
        self._local_news = News(self._news)
        self._page = PageWriter()
        self._watcher = self._client()
        self._local = Local(self._client(), job, self._local_news)
        key = Key(job, token)
        self._peers = Peers(key, self._news, options)
        self._store = ParityStore(self._client(), self._local, self._page)
        self._sources = Sources(self._local, self._peers, options, lambda: self._me, self._suspect)
        self._replicas = Replicas(self._store, self._news, self._page, options)
        self._encoder = Encoder(self._sources, self._store, self._news, self._replicas)
        self._repairer = Repairer(self._sources, self._store, self._client(), job)
        self._scrubber = Scrubber(self._sources, self._repairer, job)
        self._rebuilds = RebuildCounters()
        self._local.trouble = self._suspect
        self._server = Server(
            peers, key, self._local, self._store, options=options, suspect=self._suspect, news=self._local_news
        )
        self._control = Control(control, job=job, token=token, hello_s=options.hello_s, operations=self._operations())

    def stop(self, reason: str) -> None:
        """End run(); safe in a signal handler."""
        self.ended = self.ended or reason
        self._end.set()

    def run(self) -> None:
        """Until the job, or the manager, is over."""
        jobs = {
            "watch": self._watch,
            "digest": self._digest,
            "publish": self._publish,
            "serve": self._server.run,
            "control": self._control.run,
            "encode": self._encoder.run,
            "repair": self._repairer.run,
            "scrub": self._scrubber.run,
            "warm": _warm,
        }
        for name, job in jobs.items():
            threading.Thread(target=self._guard, args=(name, job), name=name, daemon=True).start()
        self._end.wait()
        self._encoder.stop()
        self._repairer.stop()
        self._scrubber.stop()
        for listener in self._listeners:
            listener.close()
        # Whoever maps the page must not take the word of a protector that is gone.
        self._page.store(-1, -1)

    # ---- threads ----------------------------------------------------------------------------------------

    def _guard(self, name: str, job: Callable[[], None]) -> None:
        try:
            job()
        except PeerLost as error:
            self.stop(f"{name}: {error}")
        except BaseException:
            log.exception("the %s thread died", name)
            self.orderly = False
            self.stop(f"the {name} thread died")

    def _watch(self) -> None:
        version = 0
        while not self._end.is_set():
            version, listed = self._watcher.watch(version, self._options.poll_s)
            self._local.refresh(listed)

    def _digest(self) -> None:
        while not self._end.is_set():
            seen = self._local_news.count
            waiting = self._local.undigested()
            if waiting:
                self._local.make_record(waiting[0])
            else:
                self._local_news.wait(seen, self._options.poll_s)

    def _publish(self) -> None:
        while not self._end.is_set():
            seen = self._news.count
            self._store.publish()
            self._news.wait(seen, self._options.poll_s)

    def _suspect(self, slot: int, half: int) -> None:
        self._repairer.suspect(slot, half)

    def _client(self) -> SmpClient:
        return SmpClient(self._smp, job=self._job, token=self._token, role="protector", timeout_s=_SMP_S)

    # ---- operations -------------------------------------------------------------------------------------

    def _operations(self) -> dict[str, tuple[frozenset[str], Operation]]:
        return {
            "topology": (AGENTS, self._topology),
            "reserve": (AGENTS, self._reserve),
            "rebuild": (ROLES, self._rebuild),
            "status": (ROLES, self._status),
            "keep": (ROLES, self._keep),
            "page": (ROLES, lambda message: ({}, self._page.descriptor())),
            "announce": (RANKS, self._announce),
            "ring": (RANKS, lambda message: ({}, self._replicas.ring(_whole(message, "slot")))),
            "deliver": (RANKS, self._deliver),
            "bye": (AGENTS, self._bye),
        }

    def _topology(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        number, me, hosts, placement = _parse_topology(message)
        with self._lock:
            if number < self._number:
                return {"accepted": False}, -1
            changed = (number, me) != (self._number, self._me) or placement != self._placement
            self._number, self._me = number, me
            self._peers.set_hosts({host: address for host, address in hosts.items() if host != me})
            if changed:
                self._lay(placement, me)
        return {"accepted": True}, -1

    def _lay(self, placement: Placement | None, me: int) -> None:
        """Make that the layout."""
        self._placement = placement
        if placement is not None:
            self._texts[placement.number] = placement.to_json()
            for old in sorted(self._texts)[: -self._options.placements_kept]:
                del self._texts[old]
        duty = Duty.of(placement, me) if placement is not None else None
        self._local.placement = placement
        self._store.set_placement(placement, me, self._texts)
        self._replicas.lay(placement, me)
        if duty is not None and duty.stripes:
            self._peers.watch(duty.hosts - {me}, duty.slots, duty.placement.number)
        else:
            self._peers.watch((), frozenset(), -1)
        self._encoder.set_duty(duty)
        self._repairer.retry()
        self._local_news.bump()
        if duty is not None and duty.stripes:
            threading.Thread(target=self._reserve_later, args=(duty.placement, me), daemon=True).start()

    def _reserve_later(self, placement: Placement, me: int) -> None:
        try:
            self._store.reserve(placement, me)
        except HoldfastError as error:
            self._encoder.error = str(error)
            log.warning("no memory for parity: %s", error)

    def _reserve(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        me = message.get("me")
        return {"nbytes": self._store.reserve(_placement(message), me if type(me) is int and me >= 0 else self._me)}, -1

    def _rebuild(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        slot, step, halves = _whole(message, "slot", 1 << 20), _whole(message, "step"), message.get("halves")
        wait_s = message.get("deadline_s")
        if not isinstance(halves, list) or not halves or any(type(h) is not int or h not in (0, 1) for h in halves):
            raise ProtocolViolation("halves are a list of 0 and 1", halves=repr(halves)[:40])
        if not isinstance(wait_s, (int, float)) or not 0 < wait_s < 86400:
            raise ProtocolViolation("a deadline is a number of seconds", deadline_s=repr(wait_s)[:40])
        deadline = time.monotonic() + wait_s
        with self._client() as client:
            rebuild = Rebuild(
                self._sources,
                self._store,
                client,
                self._rebuilds,
                slot=slot,
                step=step,
                halves=halves,
                deadline=deadline,
            )
            try:
                rebuilt = rebuild.run()
            except PeerLost as error:
                raise SnapshotError(error.message, **error.fields) from error
        return {**asdict(rebuilt), "shards": list(rebuilt.shards)}, -1

    def _keep(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        self._store.keep = _whole(message, "step")
        self._news.bump()
        return {}, -1

    def _announce(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        slot, step, number = _whole(message, "slot"), _whole(message, "step"), _whole(message, "placement")
        return self._replicas.announce(slot, step, number), -1

    def _deliver(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        digests, chunk = message.get("digests"), message.get("chunk")
        if not isinstance(digests, list) or not isinstance(chunk, dict):
            raise ProtocolViolation("a delivery without its chunk, or digests")
        self._replicas.deliver(
            _whole(message, "slot"),
            _whole(message, "order"),
            (_whole(chunk, "stripe"), _whole(chunk, "index")),
            _whole(chunk, "first"),
            [_hex(column) for column in digests],
            _hex(message.get("parity")),
        )
        return {}, -1

    def _bye(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        threading.Timer(_ANSWER_S, self.stop, ("bye",)).start()  # the answer goes first
        return {}, -1

    def _status(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        with self._lock:
            placement, number, me = self._placement, self._number, self._me
        duty = self._encoder.duty
        protected = self._store.protected() if duty is not None and duty.stripes else NO_DUTY
        newest = max(self._encoder.steps(duty.group), default=-1) if duty is not None else -1
        stripes = self._stripes(duty, protected) if duty is not None and duty.stripes else []
        errors = (self._replicas.error, self._encoder.error, self._repairer.error, self._local.error)
        status = {
            "host": me,
            "topology": number,
            "placement": placement.number if placement is not None else -1,
            "protected": protected,
            "newest": newest,
            "lag": max(0, newest - protected) if newest >= 0 else 0,
            "everywhere": self._encoder.everywhere(placement.number, protected) if placement is not None else False,
            "keep": self._store.keep,
            "tolerance": min((row["tolerance"] for row in stripes), default=-1),
            "stripes": stripes,
            "counters": {
                **asdict(self._encoder.counters),
                **asdict(self._rebuilds),
                **asdict(self._repairer.counters),
                **asdict(self._replicas.counters),
                "refused": self._server.refused,
                "read_bytes": self._server.read_bytes,
                "written_bytes": self._server.written_bytes,
            },
            "error": next((error for error in errors if error), ""),
            "errors": dict(zip(("replicas", "encode", "repair", "digest"), errors, strict=True)),
            "mismatch": self._replicas.mismatch,
            "hosts": sorted(self._peers.inventories()),
            "pid": os.getpid(),
        }
        return {"status": status}, -1

    def _stripes(self, duty: Duty, step: int) -> list[dict[str, int]]:
        """Stripes of which this host holds parity: shards known to be there at the protected step."""
        placement, rows = duty.placement, []
        known = self._peers.inventories()
        data = {slot for inventory in known.values() for slot, at in inventory.slots if at == step}
        data |= {held.slot for held in self._local.sealed() if held.step == step}
        parity = {host for host, inventory in known.items() if (placement.number, step) in inventory.parity}
        parity |= {self._me} if self._store.find(placement.number, step) is not None else set()
        for stripe in {number: placement.stripes[number] for number, _ in duty.stripes}.values():
            there = sum(c.slot in data for c in stripe.data) + sum(host in parity for host in stripe.parity)
            row = {"stripe": stripe.number, "step": step, "shards": there, "tolerance": there - len(stripe.data)}
            rows.append(row)
        return rows


def _warm() -> None:
    """Load the codec before anybody waits for it; it costs more than all our own start."""
    from .. import erasure

    erasure.engine()


def _parse_topology(message: dict[str, Any]) -> tuple[int, int, dict[int, str], Placement | None]:
    number, me, hosts = _whole(message, "number"), _whole(message, "me", 1 << 20), message.get("hosts")
    if not isinstance(hosts, dict):
        raise ProtocolViolation("a topology without hosts")
    addresses = {}
    for name, address in hosts.items():
        port = address.rpartition(":")[2] if isinstance(address, str) else ""
        if not name.isdigit() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ProtocolViolation("a host without a number, or an address", host=name[:20], address=str(address)[:60])
        addresses[int(name)] = str(address)
    return number, me, addresses, _placement(message) if message.get("placement") is not None else None


def _placement(message: dict[str, Any]) -> Placement:
    text = message.get("placement")
    if not isinstance(text, str):
        raise ProtocolViolation("a placement is JSON text")
    return Placement.from_json(text)


def _hex(value: object) -> bytes:
    try:
        return bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        return b""


def _whole(message: dict[str, Any], key: str, high: int = 1 << 62) -> int:
    value = message.get(key)
    if type(value) is not int or not 0 <= value < high:
        raise ProtocolViolation(f"{key} is not a number in 0..{high}", value=repr(value)[:40])
    return value

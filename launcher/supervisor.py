"""The supervisor: what happens on this host when a rank says hello, dies, hangs, or the coordinator orders something.

    torch's main thread ── attach, view, freeze, close ──▶ ┌────────────┐ ◀── agent socket, watcher tick
    coordinator session ── orders ──────────────────────▶ │ Supervisor │ ──▶ zygote, coordinator, session
                                                           └────────────┘
Everything but the four calls of the main thread runs in the loop's thread. One lock is held by both for the
slots, torch's handler table and its worker ids. Invariants:

* after `freeze` returns no process is put into a slot any more: shutdown never races a replacement;
* a lost process is fenced (killed, its connection closed, its lease page dropped) before its slot is given away;
* a job none of whose ranks ever said hello is torchrun's alone: nothing here touches its ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from holdfast.proto import env
from holdfast.proto.errors import ConfigError, HoldfastError, JobFailed
from holdfast.proto.faults import FaultKind
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.lease import Word

from .detector import Death, Health, Limits, Refuse, Verdict, decide_replacement
from .link import AgentSocket, Welcome
from .loop import Loop
from .processes import RankHandler, kill_sessions, reap_orphans, spawn_rank
from .session import CoordinatorSession
from .standby import StandbyPool
from .watcher import TICK_S, Page, Slot, State, Watcher, exit_fields
from .zygote import Assignment

REFILL_S: Final = 2.0  # standbys are refilled when the rank has committed again, at the latest after this
FORK_WAIT_S: Final = 1.0  # longest wait for a fork of a warm zygote before a fresh process is started
HOUSEKEEPING_S: Final = 1.0
QUIET_WAIT_NS: Final = 30_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How one rank is started: by command, and if it is a plain Python program, what a standby must run."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    stdout: str
    stderr: str
    error_file: str
    python: tuple[tuple[str, ...], bool] | None  # argv and whether it is a module


@dataclass(frozen=True, slots=True)
class View:
    """What the main thread must know of a managed job."""

    managed: bool
    ended: bool  # nothing left to watch: all finished, or one lost for good
    stop: HoldfastError | None


@dataclass(slots=True)
class Refill:
    """Standbys are low since this rank was replaced."""

    slot: Slot
    incarnation: int
    since: float


@dataclass(slots=True)
class Torch:
    """The two tables of torch's agent in which a replaced process must appear together."""

    handlers: dict[int, Any] = field(default_factory=dict)
    workers: list[Any] = field(default_factory=list)


class Supervisor:
    """See the module's docstring."""

    def __init__(
        self, loop: Loop, session: CoordinatorSession, *, job: str, limits: Limits, budget: int, host: str
    ) -> None:
        self._loop = loop
        self._session = session
        self._job = job
        self._budget = budget
        self._host = host
        self._lock = threading.RLock()
        self._frozen = True
        self._managed = False
        self._stop: HoldfastError | None = None
        self._watcher = Watcher(limits)
        self._programs: dict[int, Program] = {}
        self._torch = Torch()
        self._waiting: list[tuple[Slot, float]] = []
        self._corpses: list[Any] = []
        self._sessions: set[int] = set()
        self._refill: Refill | None = None
        self._used = 0
        self._best_step = -1
        self._quiet_told = False
        self._link: AgentSocket | None = None
        self._pool: StandbyPool | None = None
        self.coordinator = ""
        self.service_pids: list[int] = []

    # ---- main thread --------------------------------------------------------------------------------

    def listen(self, name: str, pool: StandbyPool | None) -> None:
        """Open the agent socket; before the loop starts."""
        self._link = AgentSocket(self._loop, name, on_hello=self._on_hello, on_message=self._on_message)
        self._pool = pool
        if pool is not None:
            pool.start()
        self._loop.later(HOUSEKEEPING_S, self._housekeep)

    def attach(
        self, handlers: dict[int, Any], workers: list[Any], programs: dict[int, Program], epoch: int
    ) -> None:
        """torch has started (or restarted) all ranks; `epoch` is their common incarnation."""
        with self._lock:
            self._torch = Torch(handlers, workers)
            self._programs = programs
            self._watcher.close()
            self._waiting.clear()
            self._managed = False
            now_ns = time.monotonic_ns()
            for local_rank, handler in handlers.items():
                rank = int(workers[local_rank].global_rank)
                slot = Slot(local_rank, rank, Page.create(epoch, now_ns, 0), handler.proc, epoch)
                slot.open(self._watcher.clock_ns)
                self._watcher.slots[local_rank] = slot
                self._sessions.add(slot.proc.pid)
                self._tell_started(slot, "fresh")
            self._frozen = False

    def view(self) -> View:
        """State of the job, consistent while the caller holds `locked()`."""
        states = {slot.state for slot in self._watcher.slots.values()}
        ended = State.REFUSED in states or states == {State.FINISHED}
        return View(self._managed, ended, self._stop)

    def locked(self) -> threading.RLock:
        """The lock under which torch's tables do not change."""
        return self._lock  # type: ignore[return-value]

    def freeze(self) -> None:
        """No replacement from now on. When this returns, none is under way either."""
        with self._lock:
            self._frozen = True

    def close(self) -> None:
        """Once torch has ended the ranks and the loop has stopped: end what is left, free everything."""
        with self._lock:
            self._frozen = True
        if self._pool is not None:
            self._pool.close()
        if self._link is not None:
            self._link.close()
        self._watcher.close()
        deadline = time.monotonic() + 2.0
        while kill_sessions(self._sessions) and time.monotonic() < deadline:
            self._reap()
        for corpse in self._corpses:
            corpse.poll()
        self._reap()

    # ---- ranks --------------------------------------------------------------------------------------

    def _on_hello(self, rank: int, incarnation: int, pid: int) -> Welcome | None:
        with self._lock:  # held while torch starts the ranks: a quick one is not refused, it waits
            for slot in self._watcher.slots.values():
                if (slot.rank, slot.incarnation, slot.state) == (rank, incarnation, State.RUNNING):
                    if not self._managed:
                        self._managed = True
                        self._loop.every(TICK_S, self._tick)
                    slot.hello = True
                    return Welcome(slot.local_rank, {"coordinator": self.coordinator}, slot.page.fd)
        return None

    def _on_message(self, local_rank: int, message: dict[str, Any]) -> None:
        if "config_error" in message:
            self._end_job(ConfigError(str(message["config_error"])))
        if message.get("done"):
            self._watcher.slots[local_rank].done = True

    def on_coordinator_moved(self, address: str) -> None:
        """The coordinator listens somewhere else now."""
        self.coordinator = address
        self._session.moved(address)
        if self._link is not None:
            self._link.push({"coordinator": address})

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        self._watcher.advance(now_ns)
        with self._lock:
            if self._frozen or not self._managed:
                return
            for slot, verdict in list(self._watcher.verdicts()):
                self._lost(slot, verdict, now_ns)
            if self._waiting:
                self._serve_waiting()
            if self._refill is not None:
                self._refill_if_due()

    def _lost(self, slot: Slot, verdict: Verdict, now_ns: int) -> None:
        """A slot's process is dead, dying, or about to be killed. The coordinator hears of it first of all."""
        assert self._link is not None
        self._link.drain(slot.local_rank)  # what it said last may be why it ended
        if self._stop is not None:
            return
        self._session.exited(pb.RankExited(**exit_fields(slot, verdict, now_ns)))
        self._best_step = max([self._best_step, *(s.live_step for s in self._watcher.slots.values())])
        if verdict.health is Health.FINISHED:
            slot.state = State.FINISHED
            slot.close()
            return
        slot.kill()
        self._link.drop(slot.local_rank)
        slot.deaths.append(Death(self._best_step, verdict.reason, slot.injected))
        decision = decide_replacement(slot.rank, slot.deaths, self._used, self._budget)
        if isinstance(decision, Refuse):
            slot.state = State.REFUSED
            print(f"[holdfast] {decision.reason}", file=sys.stderr)
            return
        slot.state = State.REPLACING
        self._used += 1
        self._replace(slot)

    def _replace(self, slot: Slot) -> None:
        source = "standby"
        handler = self._from_standby(slot)
        if (
            handler is None
            and self._pool is not None
            and self._pool.warm
            and self._programs[slot.local_rank].python
        ):
            self._pool.refill(extra=len(self._waiting) + 1)
            self._waiting.append((slot, time.monotonic() + FORK_WAIT_S))
            return
        if handler is None:
            source, handler = "fresh", self._fresh(slot)
        self._install(slot, handler, source)

    def _serve_waiting(self) -> None:
        """Slots that wait for a fork get the standbys that have come, or a fresh process after the deadline."""
        waiting, self._waiting = self._waiting, []
        for slot, deadline in waiting:
            handler = self._from_standby(slot)
            if handler is not None:
                self._install(slot, handler, "standby")
            elif time.monotonic() < deadline and self._pool is not None and self._pool.warm:
                self._waiting.append((slot, deadline))
            else:
                self._install(slot, self._fresh(slot), "fresh")

    def _from_standby(self, slot: Slot) -> RankHandler | None:
        program = self._programs[slot.local_rank]
        if program.python is None or self._pool is None or not self._pool.ready:
            return None
        argv, is_module = program.python
        assignment = Assignment(self._environment(slot), list(argv), is_module, os.getcwd())
        return self._pool.assign(slot.local_rank, assignment, stdout=program.stdout, stderr=program.stderr)

    def _fresh(self, slot: Slot) -> RankHandler:
        program = self._programs[slot.local_rank]
        environment = self._environment(slot)
        return spawn_rank(
            slot.local_rank, program.command, environment, stdout=program.stdout, stderr=program.stderr
        )

    def _environment(self, slot: Slot) -> dict[str, str]:
        changed = {env.COORDINATOR: self.coordinator, env.INCARNATION: str(slot.incarnation + 1)}
        return {**self._programs[slot.local_rank].environment, **changed}

    def _install(self, slot: Slot, handler: RankHandler, source: str) -> None:
        """Give the slot to the new process: in torch's tables, in ours, and in what others are told."""
        program = self._programs[slot.local_rank]
        old = self._torch.handlers[slot.local_rank]
        self._torch.handlers[slot.local_rank] = handler
        self._torch.workers[slot.local_rank].id = handler.proc.pid
        for log in (old._stdout, old._stderr):
            if log is not None:
                log.close()
        _keep_error_file(program.error_file, slot.incarnation)
        self._corpses.append(old.proc)
        slot.close()
        fired = slot.page.lease.get(Word.FIRED_MASK)
        slot.page.close()
        slot.incarnation += 1
        slot.page = Page.create(slot.incarnation, time.monotonic_ns(), fired)
        slot.proc = handler.proc
        slot.open(self._watcher.clock_ns)
        slot.state = State.RUNNING
        self._sessions.add(handler.proc.pid)
        self._tell_started(slot, source)
        self._refill = Refill(slot, slot.incarnation, time.monotonic())

    def _tell_started(self, slot: Slot, source: str) -> None:
        self._session.started(
            pb.RankStarted(
                rank=slot.rank,
                incarnation=slot.incarnation,
                pid=slot.proc.pid,
                source=source,
                started_ns=time.monotonic_ns(),
            )
        )

    # ---- orders of the coordinator (posted by the session's thread) --------------------------------

    def on_order(self, order: Any) -> None:
        """An order came (any thread)."""
        self._loop.post(lambda: self._obey(order))

    def _obey(self, order: Any) -> None:
        with self._lock:
            if not self._frozen:
                self._obey_locked(order)

    def _obey_locked(self, order: Any) -> None:
        match order.WhichOneof("body"):
            case "kill":
                slot = self._slot_of(order.kill.rank)
                if slot is not None and slot.incarnation == order.kill.incarnation:
                    self._lost(slot, Verdict(Health.HUNG, order.kill.reason), time.monotonic_ns())
            case "inject":
                self._inject(order.inject.rank, order.inject.kind)
            case "stop":
                refused = order.stop.exit_code == 2
                self._end_job(ConfigError(order.stop.reason) if refused else JobFailed(order.stop.reason))
            case "recovered":
                print(f"[holdfast] {order.recovered.line}", file=sys.stderr, flush=True)

    def _inject(self, rank: int, kind: str) -> None:
        slot = self._slot_of(rank)
        if slot is None or kind.upper() not in FaultKind.__members__:
            print(
                f"[holdfast] fault {kind!r} for rank {rank} not injected: no such rank or kind",
                file=sys.stderr,
            )
            return
        slot.ordered = True
        fault = FaultKind[kind.upper()]
        if fault in (FaultKind.KILL, FaultKind.STOP):
            # From outside, as the kernel or an operator would: the detection is then the real one.
            number = signal.SIGKILL if fault is FaultKind.KILL else signal.SIGSTOP
            signal.pidfd_send_signal(slot.pidfd, number)
        else:
            slot.page.lease.set(Word.FAULT_ORDER, fault + 1)

    def _slot_of(self, rank: int) -> Slot | None:
        slots = self._watcher.slots.values()
        return next((s for s in slots if s.rank == rank and s.state is State.RUNNING), None)

    def _end_job(self, error: HoldfastError) -> None:
        if self._stop is None:  # every rank reports the same mistake: it is told once
            self._stop = error

    # ---- housekeeping -------------------------------------------------------------------------------

    def on_pool_change(self) -> None:
        """A standby came or went."""
        with self._lock:
            if self._waiting and not self._frozen:
                self._serve_waiting()

    def on_crash(self, error: BaseException) -> None:
        """A callback raised: a bug of ours. The job ends in order instead of hanging."""
        traceback.print_exception(error)
        self._end_job(JobFailed(f"the agent failed: {type(error).__name__}: {error}", host=self._host))

    def _refill_if_due(self) -> None:
        """Refill once the replaced rank has committed: until then the cores are for the recovery."""
        refill = self._refill
        assert refill is not None
        committed = (
            refill.slot.page.lease.get(Word.COMMIT_NS) != 0 or refill.slot.incarnation != refill.incarnation
        )
        if committed or time.monotonic() - refill.since > REFILL_S:
            self._refill = None
            if self._pool is not None:
                self._pool.refill()

    def _housekeep(self) -> None:
        self._loop.later(HOUSEKEEPING_S, self._housekeep)
        self._corpses = [corpse for corpse in self._corpses if corpse.poll() is None]
        self._reap()
        if self._pool is not None and self._refill is None and self._pool.warm:
            self._pool.refill()
        waiting_ns = self._watcher.all_waiting_ns() if self._managed else 0
        if waiting_ns > QUIET_WAIT_NS and not self._quiet_told:
            print(
                f"[holdfast] all ranks of {self._host} wait for peers since {waiting_ns // 10**9} s",
                file=sys.stderr,
            )
        self._quiet_told = waiting_ns > QUIET_WAIT_NS

    def _reap(self) -> None:
        known = [slot.proc.pid for slot in self._watcher.slots.values()] + self.service_pids
        known += [corpse.pid for corpse in self._corpses]
        known += [handler.proc.pid for handler in list(self._torch.handlers.values())]
        reap_orphans(known)


def _keep_error_file(path: str, incarnation: int) -> None:
    """Keep a dead process' error file as error.<incarnation>.json; its name is for the next one's error."""
    if path and path != os.devnull and os.path.exists(path):
        stem, extension = os.path.splitext(path)
        os.replace(path, f"{stem}.{incarnation}{extension}")

"""The supervisor: what happens when a rank of this host says hello, dies or hangs, or an order comes.

    torch's main thread ── attach, view, freeze, close ──▶ ┌────────────┐ ◀── agent socket, watcher tick
    coordinator session ── orders ──────────────────────▶ │ Supervisor │ ──▶ zygote, coordinator, session
                                                           └────────────┘
Everything but the four calls of the main thread runs in the loop's thread. One lock is held by both for the
slots, torch's handler table and its worker ids. Invariants:

* after `freeze` returns no process is put into a slot any more: shutdown never races a replacement;
* a lost process is fenced (killed, connection closed, lease page dropped) before its slot is given away;
* a job none of whose ranks ever said hello is torchrun's alone: nothing here touches its ranks.

Long: every path that puts a process into a slot, or ends one, holds one lock and sees the same tables.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from holdfast.proto.errors import ConfigError, HoldfastError, JobFailed
from holdfast.proto.faults import FaultKind
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.lease import Word

from .detector import Death, Health, Limits, Refuse, Verdict, decide_replacement
from .guests import guest_program
from .link import AgentSocket, Welcome
from .loop import Loop
from .processes import RankHandler, kill_sessions, reap_orphans, tell
from .session import CoordinatorSession
from .standby import Standby, StandbyPool
from .starter import Program, Started, Starter
from .watcher import TICK_S, Page, Slot, State, Watcher, exit_fields

REFILL_S: Final = 2.0  # standbys are refilled when the rank has committed again, at the latest after this
HOUSEKEEPING_S: Final = 1.0
FIRST_FORKS_S: Final = 60.0  # longest wait for the zygote's imports; each fresh rank would need as long for its own
UNKILLABLE_S: Final = 30.0
GONE_S: Final = 120.0  # a host without ranks waits so long for a coordinator that does not answer
HEARD_S: Final = 30.0  # longest wait of a host that refuses the job until the coordinator has stopped all of them
QUIET_WAIT_NS: Final = 30_000_000_000


@dataclass(frozen=True, slots=True)
class View:
    """What the main thread must know of a managed job."""

    managed: bool
    ended: bool  # nothing left to watch: all finished, or one lost for good
    stop: HoldfastError | None
    good: bool = False  # every rank of the job has finished, wherever it ran


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
        self._refusal: ConfigError | None = None  # why this host cannot run the job
        self._watcher = Watcher(limits)
        self._torch = Torch()
        self._guests: dict[int, Any] = {}  # local rank -> handler, of ranks that torch knows nothing of
        self._corpses: list[Any] = []
        self._sessions: set[int] = set()
        self._refill: Refill | None = None
        self._used = 0
        self._best_step = -1
        self._refused_at = 0.0
        self._quiet_told = False
        self._link: AgentSocket | None = None
        self._pool: StandbyPool | None = None
        self._starter = Starter(None)
        self._service_pids: Callable[[], list[int]] = list
        self._several = False
        self._done = False
        self._early: list[Any] = []  # orders that came before the ranks were there
        self._fence_s = 0.0
        self._fenced_at = 0.0
        self.template: Program | None = None  # how a rank of another host is started here
        self.on_topology: Callable[[str], None] = lambda text: None
        self.attached = False  # whether every rank that torch has started is known here

    # ---- main thread --------------------------------------------------------------------------------

    def listen(self, name: str, pool: StandbyPool | None, service_pids: Callable[[], list[int]]) -> None:
        """Open the agent socket, before the loop starts. `service_pids`: children that others wait for."""
        self._service_pids = service_pids
        self._link = AgentSocket(self._loop, name, on_hello=self._on_hello, on_message=self._on_message)
        self._pool, self._starter = pool, Starter(pool)
        if pool is not None:
            pool.start()
        self._loop.later(HOUSEKEEPING_S, self._housekeep)

    def attach(self, handlers: dict[int, Any], workers: list[Any], programs: dict[int, Program], epoch: int) -> None:
        """torch has started (or restarted) all ranks; `epoch` is their common incarnation."""
        with self._lock:
            self._torch = Torch(handlers, workers)
            self._starter.programs = programs
            self._starter.forget()
            self._watcher.close()
            self._refill, self._managed = None, False
            now_ns = time.monotonic_ns()
            for local_rank, handler in handlers.items():
                rank = int(workers[local_rank].global_rank)
                slot = Slot(local_rank, rank, Page.create(epoch, now_ns, 0), handler.proc, epoch)
                slot.open(self._watcher.clock_ns)
                self._watcher.slots[local_rank] = slot
                self._sessions.add(slot.proc.pid)
                self._tell_started(slot, "standby" if isinstance(handler, RankHandler) else "fresh")
            self._begin()

    def several_hosts(self, fence_s: float) -> None:
        """This is one host of several: it ends with the job, and its ranks end after so long without a coordinator."""
        self._several, self._fence_s = True, fence_s

    def first_standbys(self, count: int) -> list[Standby]:
        """Standbys for all ranks of a start (before it: not under the lock); none if they are not to be had."""
        return self._pool.claim(count, FIRST_FORKS_S) if self._pool is not None else []

    def stand_by(self, template: Program) -> None:
        """A host without ranks of its own, until it is given some."""
        with self._lock:
            self.template = template
            self._begin()
            self._begin_watching()

    def view(self) -> View:
        """State of the job, consistent while the caller holds `locked()`."""
        states = {slot.state for slot in self._watcher.slots.values()}
        ended = State.REFUSED in states or (not self._several and states == {State.FINISHED})
        return View(self._managed, ended, self._stop, good=self._several and self._done)

    def locked(self) -> threading.RLock:
        """The lock under which torch's tables do not change."""
        return self._lock

    def freeze(self) -> None:
        """No replacement from now on. When this returns, none is under way either."""
        with self._lock:
            self._frozen = True
            if self._managed:
                for slot in self._watcher.slots.values():
                    slot.resume()  # a stopped process would make the shutdown wait for its timeout

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
                    self._begin_watching()
                    slot.hello = True
                    return Welcome(slot.local_rank, {"coordinator": self._starter.coordinator}, slot.page.fd)
        return None

    def _begin_watching(self) -> None:
        if not self._managed:
            self._managed = True
            self._loop.every(TICK_S, self._tick)

    def _on_message(self, local_rank: int, message: dict[str, Any]) -> None:
        if "config_error" in message:
            self._end_job(ConfigError(str(message["config_error"])))
        if message.get("done"):
            self._watcher.slots[local_rank].done = True

    @property
    def coordinator(self) -> str:
        """Where the coordinator listens, for processes that are started now."""
        return self._starter.coordinator

    def set_coordinator(self, address: str) -> None:
        """The coordinator listens there; before the loop starts."""
        self._starter.coordinator = address

    def on_coordinator_moved(self, address: str) -> None:
        """The coordinator listens somewhere else now."""
        self._starter.coordinator = address
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
            self._serve_waiting()
            if self._refill is not None:
                self._refill_if_due()
        silence_s = self._session.silence_s if self._several else 0.0
        if silence_s > self._fence_s and self._watcher.slots:
            self._fence(f"no coordinator was heard for {silence_s:.1f} s")
        if silence_s > GONE_S and not self._done:
            self._end_job(
                JobFailed(f"no coordinator was heard for {silence_s:.0f} s: the job has ended, or is out of reach")
            )

    def _lost(self, slot: Slot, verdict: Verdict, now_ns: int) -> None:
        """A slot's process is dead, dying, or about to be killed. The coordinator hears of it first."""
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
            slot.state, self._refused_at = State.REFUSED, time.monotonic()
            tell(decision.reason)
            self._session.failed(decision.reason)
            if slot.guest:
                self._end_job(JobFailed(decision.reason))
            return
        slot.state = State.REPLACING
        self._used += 1
        self._replace(slot)

    def _replace(self, slot: Slot) -> None:
        started = self._starter.launch(slot)
        if started is not None:
            self._install(slot, started)

    def _serve_waiting(self) -> None:
        """Slots that wait for a fork get it if it has come, or a fresh process if that took too long."""
        for slot in self._watcher.slots.values():
            if slot.state is State.REPLACING:
                self._replace(slot)

    def _install(self, slot: Slot, started: Started) -> None:
        """Give the slot to the new process: in torch's tables, in ours, and in what others are told."""
        handler = started.handler
        old = self._guests.get(slot.local_rank) if slot.guest else self._torch.handlers[slot.local_rank]
        if slot.guest:
            self._guests[slot.local_rank] = handler
        else:
            self._torch.handlers[slot.local_rank] = handler
            self._torch.workers[slot.local_rank].id = handler.proc.pid
        for log in (old._stdout, old._stderr) if old is not None else ():
            if log is not None:
                log.close()
        _keep_error_file(self._starter.programs[slot.local_rank].error_file, slot.incarnation)
        if old is not None:
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
        self._tell_started(slot, started.source)
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
            # One that comes while the ranks are being started counts as well, a stop at once: nobody says it twice.
            if not self._frozen or order.WhichOneof("body") == "stop":
                self._obey_locked(order)
            elif not self.attached:
                self._early.append(order)

    def _begin(self) -> None:
        """The ranks that this host begins with are known."""
        self._frozen, self.attached = False, True
        early, self._early = self._early, []
        for order in early:
            self.on_order(order)

    def _obey_locked(self, order: Any) -> None:
        match order.WhichOneof("body"):
            case "kill":
                slot = self._slot_of(order.kill.rank)
                if slot is not None and slot.incarnation == order.kill.incarnation:
                    self._lost(slot, Verdict(Health.HUNG, order.kill.reason), time.monotonic_ns())
            case "inject":
                self._inject(order.inject.rank, order.inject.kind)
            case "stop":
                kind = ConfigError if order.stop.exit_code == 2 else JobFailed
                self._end_job(self._refusal or kind(order.stop.reason))
            case "recovered":
                tell(order.recovered.line)
            case "adopt":
                self._adopt(order.adopt.rank, order.adopt.incarnation)
            case "topology":
                self.on_topology(order.topology.json)
            case "done":
                self._done = True

    def _adopt(self, rank: int, incarnation: int) -> None:
        """Start a process for a rank of a lost host."""
        template = self.template or next(iter(self._starter.programs.values()), None)
        known = next((slot for slot in self._watcher.slots.values() if slot.rank == rank), None)
        if template is None or (known is not None and known.incarnation >= incarnation):
            return
        local_rank = known.local_rank if known is not None else 1 + max(self._watcher.slots, default=-1)
        slot = Slot.vacant(local_rank, rank, incarnation - 1, time.monotonic_ns())
        self._starter.programs[local_rank] = guest_program(template, rank, local_rank)
        self._watcher.slots[local_rank] = slot
        tell(f"rank {rank} of a lost host goes on here")
        self._replace(slot)

    def fence(self, reason: str) -> None:
        """This host was given up, or cannot know: its ranks end (any thread)."""
        self._loop.post(lambda: self._fence(reason))

    def refuse(self, reason: str) -> None:
        """The job cannot be run like this on this host (any thread)."""
        # It ends with the others: if it went before they knew, they would take it for lost, and go on without it.
        self._refusal = ConfigError(reason)
        self._session.failed(reason, waits=True)
        self._loop.post(lambda: self._loop.later(HEARD_S, lambda: self._end_job(ConfigError(reason))))

    def _fence(self, reason: str) -> None:
        with self._lock:
            if self._frozen:
                return
            if self._watcher.slots:
                tell(f"{reason}: the ranks of this host end, it waits to be given others")
            assert self._link is not None
            for slot in self._watcher.slots.values():
                if slot.state is State.RUNNING:
                    slot.kill()
                    self._link.drop(slot.local_rank)
                    self._corpses.append(slot.proc)
            self.template = self.template or next(iter(self._starter.programs.values()), None)
            self._watcher.close()
            self._fenced_at = time.monotonic()
        self._session.fenced()

    def _inject(self, rank: int, kind: str) -> None:
        slot = self._slot_of(rank)
        if slot is None or kind.upper() not in FaultKind.__members__:
            tell(f"fault {kind!r} for rank {rank} not injected: no such rank or kind")
            return
        slot.inject(FaultKind[kind.upper()])

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
            if not self._frozen:
                self._serve_waiting()

    def on_crash(self, error: BaseException) -> None:
        """A callback raised: a bug of ours. The job ends in order instead of hanging."""
        if self._stop is None:
            traceback.print_exception(error)
        self._end_job(JobFailed(f"the agent failed: {type(error).__name__}: {error}", host=self._host))

    def _refill_if_due(self) -> None:
        """Refill once the replaced rank has committed: until then the cores are for the recovery."""
        refill = self._refill
        assert refill is not None
        committed = refill.slot.page.lease.get(Word.COMMIT_NS) != 0 or refill.slot.incarnation != refill.incarnation
        if committed or time.monotonic() - refill.since > REFILL_S:
            self._refill = None
            self._starter.refill()

    def _housekeep(self) -> None:
        self._loop.later(HOUSEKEEPING_S, self._housekeep)
        self._corpses = [corpse for corpse in self._corpses if corpse.poll() is None]
        self._reap()
        if self._refill is None:
            self._starter.refill()
        self._give_up_if_unkillable()
        waiting_ns = self._watcher.all_waiting_ns() if self._managed else 0
        if waiting_ns > QUIET_WAIT_NS and not self._quiet_told:
            tell(f"all ranks of {self._host} wait for peers since {waiting_ns // 10**9} s")
        self._quiet_told = waiting_ns > QUIET_WAIT_NS

    def _give_up_if_unkillable(self) -> None:
        """torch waits for the exit of the rank that failed the job; one stuck in the kernel never exits."""
        for slot in self._watcher.slots.values():
            if slot.state is State.REFUSED and time.monotonic() > self._refused_at + UNKILLABLE_S:
                self._end_job(JobFailed("a killed rank does not end: it is stuck in the kernel", rank=slot.rank))

    def _reap(self) -> None:
        known = [slot.proc.pid for slot in self._watcher.slots.values()] + self._service_pids()
        known += self._pool.pids if self._pool is not None else []
        known += [corpse.pid for corpse in self._corpses]
        handlers = [*self._torch.handlers.values(), *self._guests.values()]
        known += [handler.proc.pid for handler in handlers]
        reap_orphans(known)


def _keep_error_file(path: str, incarnation: int) -> None:
    """Keep a dead process' error file as error.<incarnation>.json; its name is for the next one's error."""
    if path and path != os.devnull and os.path.exists(path):
        stem, extension = os.path.splitext(path)
        os.replace(path, f"{stem}.{incarnation}{extension}")

"""The watcher: what is known of each local rank, and the samples that the detector judges.

    pidfd, /proc/PID/stat, lease page ──▶ Slot.sample() ──▶ detector.judge() ──▶ (slot, verdict), every 10 ms

A Slot is a rank's place on this host; processes come and go in it, each with a lease page of its own, so a
killed one that still runs for an instant writes into a page that nobody reads any more. Ages are counted on
the watcher's own clock, which stands still while the watcher is not running. Not here: what follows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from holdfast.proto.faults import FaultKind
from holdfast.proto.lease import PAGE_BYTES, LeasePage, Phase, Word

from .detector import Death, Health, Limits, Sample, Verdict, judge
from .processes import AdoptedProcess, kill_group, parse_stat

TICK_S: Final = 0.01
LONGEST_GAP_NS: Final = 100_000_000
"""Time that one tick counts at most: longer gaps mean that we were not running ourselves."""

_PHASES: Final = {int(phase): phase for phase in Phase}


class State(Enum):
    """What a slot holds."""

    RUNNING = "running"
    REPLACING = "replacing"  # its process is lost, the next one is not there yet
    FINISHED = "finished"  # exit code 0
    REFUSED = "refused"  # lost, and not to be replaced: the job fails


@dataclass(slots=True)
class Page:
    """One incarnation's lease page: shared memory without a name."""

    fd: int
    memory: mmap.mmap
    lease: LeasePage

    @staticmethod
    def create(incarnation: int, now_ns: int, fired_mask: int) -> Page:
        """A page for a new process; scripted faults that fired stay fired."""
        fd = os.memfd_create("holdfast-lease", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE_BYTES)
        memory = mmap.mmap(fd, PAGE_BYTES)
        lease = LeasePage(memoryview(memory))
        lease.reset(incarnation, now_ns)
        lease.set(Word.FIRED_MASK, fired_mask)
        return Page(fd, memory, lease)

    def close(self) -> None:
        """Drop our half; the process keeps its own."""
        self.lease.release()
        with contextlib.suppress(BufferError):
            self.memory.close()
        os.close(self.fd)


@dataclass(slots=True)
class Marks:
    """When, on the watcher's clock, each sign of life was last seen to change."""

    progress: tuple[int, int] = (0, 0)
    beat: int = 0
    progress_at_ns: int = 0
    beat_at_ns: int = 0
    stopped_at_ns: int = -1


@dataclass(slots=True, eq=False)
class Slot:
    """A rank's place on this host, and the process that holds it now."""

    local_rank: int
    rank: int
    page: Page
    proc: subprocess.Popen[bytes] | AdoptedProcess
    incarnation: int
    state: State = State.RUNNING
    guest: bool = False  # a rank of a host that was lost: torch's agent here knows nothing of it
    hello: bool = False
    done: bool = False
    fired_at_start: int = 0
    ordered: bool = False  # a fault was injected into this process on somebody's order
    deaths: list[Death] = field(default_factory=list)
    pidfd: int = -1
    stat_fd: int = -1
    marks: Marks = field(default_factory=Marks)

    @staticmethod
    def vacant(local_rank: int, rank: int, incarnation: int, now_ns: int) -> Slot:
        """A place for a rank that moves here: its last process, number `incarnation`, died elsewhere."""
        gone = AdoptedProcess(0)
        gone.returncode = -signal.SIGKILL
        page = Page.create(incarnation, now_ns, 0)
        return Slot(local_rank, rank, page, gone, incarnation, State.REPLACING, guest=True)

    def inject(self, fault: FaultKind) -> None:
        """Hurt the process on purpose. Kill and stop come from outside, so the detection is the real one."""
        self.ordered = True
        if fault in (FaultKind.KILL, FaultKind.STOP):
            number = signal.SIGKILL if fault is FaultKind.KILL else signal.SIGSTOP
            signal.pidfd_send_signal(self.pidfd, number)
        else:
            self.page.lease.set(Word.FAULT_ORDER, fault + 1)

    def open(self, clock_ns: int) -> None:
        """Begin to watch `proc`. Raises ProcessLookupError if it is gone and waited for."""
        self.pidfd = os.pidfd_open(self.proc.pid)
        self.stat_fd = os.open(f"/proc/{self.proc.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        self.marks = Marks(progress_at_ns=clock_ns, beat_at_ns=clock_ns)
        self.fired_at_start = self.page.lease.get(Word.FIRED_MASK)
        self.hello = self.done = self.ordered = False

    def close(self) -> None:
        """Watch it no more."""
        for descriptor in (self.pidfd, self.stat_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.pidfd = self.stat_fd = -1

    def kill(self) -> None:
        """SIGKILL the process and its group. The pidfd makes sure that it is this process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        if self.proc.returncode is None:
            kill_group(self.proc.pid)

    def resume(self) -> None:
        """SIGCONT, if it runs."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    @property
    def phase(self) -> Phase:
        """What the rank last said it does; a value that no phase has counts as user code."""
        return _PHASES.get(self.page.lease.get(Word.PHASE), Phase.USER)

    @property
    def live_step(self) -> int:
        """Step of its live state, -1 for none."""
        return self.page.lease.get(Word.STEP) - 1

    @property
    def injected(self) -> bool:
        """Whether somebody hurt this process on purpose."""
        return self.ordered or self.page.lease.get(Word.FIRED_MASK) != self.fired_at_start

    def sample(self, clock_ns: int) -> Sample:
        """Look once; `clock_ns` is the watcher's clock."""
        marks, lease = self.marks, self.page.lease
        # After its goodbye a rank may take as long as it likes for what its user has left to do.
        phase = Phase.DONE if self.done else self.phase  # before the progress: see LeasePage.renew()
        progress = (lease.get(Word.PROGRESS_NS), lease.get(Word.ACTION))
        if progress != marks.progress:
            marks.progress, marks.progress_at_ns = progress, clock_ns
        beat = lease.get(Word.BEAT_NS)
        if beat != marks.beat:
            marks.beat, marks.beat_at_ns = beat, clock_ns
        status, stopped = self._kernel_view()
        if not stopped:
            marks.stopped_at_ns = -1
        elif marks.stopped_at_ns < 0:
            marks.stopped_at_ns = clock_ns
        return Sample(
            status=status,
            stopped_ns=clock_ns - marks.stopped_at_ns if stopped else 0,
            hello=self.hello,
            phase=phase,
            idle_ns=clock_ns - marks.progress_at_ns,
            beat_idle_ns=clock_ns - marks.beat_at_ns,
            lease_ns=lease.get(Word.LEASE_NS),
        )

    def _kernel_view(self) -> tuple[int | None, bool]:
        """(wait status if the process has ended or is sure to end with it, whether it is stopped)."""
        try:
            stat = parse_stat(os.pread(self.stat_fd, 1024, 0))
        except (OSError, ValueError):
            return self._collect(), False
        if stat.state == "Z":
            return self._collect(), False
        if stat.exiting and stat.status != 0:
            return stat.status, False  # the memory is still being torn down: no need to wait for that
        return None, stat.state == "T"

    def _collect(self) -> int | None:
        # A leader that ended before its threads is a zombie too, without having ended.
        if not select.select([self.pidfd], [], [], 0)[0]:
            return None
        # What it left behind in its group (data loaders) would keep ports, memory and devices. Before the
        # wait: until then nobody else can have the group's number.
        kill_group(self.proc.pid)
        code = self.proc.poll()
        if code is None:
            return None
        return -code if code < 0 else code << 8


class Watcher:
    """All slots of the host, and the clock on which their ages are counted."""

    def __init__(self, limits: Limits) -> None:
        self.slots: dict[int, Slot] = {}
        self.limits = limits
        self.clock_ns = 0
        self._last_ns = 0

    def advance(self, now_ns: int) -> None:
        """Let the watcher's clock go on, but by no more than it can have watched."""
        if self._last_ns:
            self.clock_ns += min(now_ns - self._last_ns, LONGEST_GAP_NS)
        self._last_ns = now_ns

    def verdicts(self) -> Iterator[tuple[Slot, Verdict]]:
        """Judge every running slot; yields what is not alive."""
        for slot in self.slots.values():
            if slot.state is State.RUNNING:
                verdict = judge(slot.sample(self.clock_ns), self.limits)
                if verdict.health is not Health.ALIVE:
                    yield slot, verdict

    def all_waiting_ns(self) -> int:
        """For how long all running ranks of this host have been blocked on peers; 0 if one is not."""
        running = [slot for slot in self.slots.values() if slot.state is State.RUNNING]
        if not running or not all(slot.hello and slot.phase is Phase.WAITING and not slot.done for slot in running):
            return 0
        return self.clock_ns - max(slot.marks.progress_at_ns for slot in running)

    def close(self) -> None:
        """Close every slot."""
        for slot in self.slots.values():
            slot.close()
            slot.page.close()
        self.slots.clear()


def exit_fields(slot: Slot, verdict: Verdict, detected_ns: int) -> dict[str, Any]:
    """Fields of the message that tells of a slot's loss."""
    return {
        "rank": slot.rank,
        "incarnation": slot.incarnation,
        "reason": verdict.reason,
        "detected_ns": detected_ns,
        "last_progress_ns": slot.page.lease.get(Word.PROGRESS_NS),
        "step": slot.live_step,
        "finished": verdict.health is Health.FINISHED,
        "phase": slot.phase.name.lower(),
    }

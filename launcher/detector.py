"""Is a rank alive, and is it replaced? Two pure functions; others take the samples and act.

    /proc/PID/stat ──┐
    pidfd            ├──▶ Sample ──▶ judge(sample, limits) ──▶ Verdict(health, reason)
    lease page     ──┘
    deaths so far  ─────▶ decide_replacement(...)          ──▶ Replace | Refuse(reason)

Ages in a Sample are *observed* ages: the watcher adds up only time in which it looked itself. A suspended
machine or a starved agent makes nobody look hung. Not here: clocks, signals, processes. Invariants:

* a rank that never said hello is judged by the kernel's word only, until its start lease runs out;
* a rank that is blocked on a peer (WAITING) is never hung by its progress: its peer is;
* exit status 0 is an end, not a death.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from holdfast.proto.lease import COMPUTE_PHASES, Phase

SAME_STEP_DEATHS: Final = 3
"""So many deaths of one rank by its own doing without one newly committed step: a replacement repeats the bug."""

SAME_STEP_KILLS: Final = 10
"""The same for deaths of any cause: somebody kills it (the kernel for its memory, say) and will again."""

FROM_OUTSIDE: Final = frozenset({"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"})
"""Deaths that a process seldom causes itself."""


class Health(Enum):
    """What a sample shows."""

    ALIVE = "alive"
    FINISHED = "finished"  # exit status 0
    EXITED = "exited"  # dead, or dying with the status already fixed
    STOPPED = "stopped"  # SIGSTOP for longer than the grace: to be killed
    HUNG = "hung"  # a lease ran out: to be killed


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is what the operator reads: "SIGKILL", "exit 1", "hung in backward for 2.1 s"."""

    health: Health
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at one rank. `status` is the kernel's wait status once it is certain, else None."""

    status: int | None = None
    stopped_ns: int = 0  # observed time in state T without a break
    hello: bool = False
    phase: Phase = Phase.STARTING
    idle_ns: int = 0  # observed time since the training thread last made progress
    beat_idle_ns: int = 0  # observed time since the monitor thread last showed itself
    lease_ns: int = 0  # what the rank asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long each kind of silence may last, in nanoseconds."""

    lease_min_ns: int = 2_000_000_000
    start_ns: int = 600_000_000_000
    user_ns: int = 300_000_000_000
    recovering_ns: int = 30_000_000_000
    stop_grace_ns: int = 500_000_000
    beat_ns: int = 10_000_000_000

    @property
    def beat_limit_ns(self) -> int:
        """Silence of the monitor thread that only a held GIL explains."""
        return max(3 * self.lease_min_ns, self.beat_ns)


ALIVE: Final = Verdict(Health.ALIVE)


def describe_status(status: int) -> str:
    """A wait status in an operator's words: "SIGKILL", "exit 1"."""
    number = status & 0x7F
    if number == 0:
        return f"exit {status >> 8 & 0xFF}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def judge(sample: Sample, limits: Limits) -> Verdict:
    """What to make of `sample`. Pure."""
    if sample.status is not None:
        if sample.status == 0:
            return Verdict(Health.FINISHED)
        return Verdict(Health.EXITED, describe_status(sample.status))
    if sample.stopped_ns >= limits.stop_grace_ns > 0:
        return Verdict(Health.STOPPED, f"stopped for {_seconds(sample.stopped_ns)}")
    allowed_ns = _allowance(sample, limits)
    if allowed_ns is not None and sample.idle_ns > allowed_ns:
        where = sample.phase.name.lower() if sample.hello else "starting"
        return Verdict(Health.HUNG, f"hung in {where} for {_seconds(sample.idle_ns)}")
    # User code may hold the GIL for long in one C call (reading a large file); its own lease covers it. In
    # WAITING and RECOVERING the main thread waits without the GIL, so silence means that nothing runs at all.
    blocked = sample.hello and sample.phase in (Phase.WAITING, Phase.RECOVERING)
    if blocked and sample.beat_idle_ns > limits.beat_limit_ns:
        where = sample.phase.name.lower()
        return Verdict(Health.HUNG, f"hung while {where}: no thread ran for {_seconds(sample.beat_idle_ns)}")
    return ALIVE


def _allowance(sample: Sample, limits: Limits) -> int | None:
    """How long the training thread may make no progress; None for as long as it likes."""
    if not sample.hello or sample.phase is Phase.STARTING:
        return limits.start_ns
    if sample.phase in COMPUTE_PHASES:
        return max(limits.lease_min_ns, sample.lease_ns)
    if sample.phase is Phase.RECOVERING:
        return limits.recovering_ns
    if sample.phase is Phase.USER:
        return limits.user_ns
    return None


@dataclass(frozen=True, slots=True)
class Replace:
    """Give the slot to a new process."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The job fails; `reason` says why replacing would not help."""

    reason: str


@dataclass(frozen=True, slots=True)
class Death:
    """One death: the newest step committed anywhere by then; `injected` if it was done on purpose."""

    best_step: int
    reason: str
    injected: bool = False


def decide_replacement(rank: int, deaths: Sequence[Death], used: int, budget: int) -> Replace | Refuse:
    """Whether `rank`, whose deaths are listed oldest first, gets another process. Pure.

    `used` counts replacements so far of all ranks. Injected deaths count against the budget only: they say
    nothing about the program.
    """
    if used >= budget:
        return Refuse(f"rank {rank} lost ({deaths[-1].reason}): all {budget} replacements are used up")
    if deaths[-1].injected:
        return Replace()
    here = [d for d in deaths if d.best_step == deaths[-1].best_step and not d.injected]
    own = [d for d in here if d.reason not in FROM_OUTSIDE]
    if len(own) >= SAME_STEP_DEATHS or len(here) >= SAME_STEP_KILLS:
        reasons = ", ".join(death.reason for death in here[-SAME_STEP_DEATHS:])
        after = f"after step {here[0].best_step}" if here[0].best_step >= 0 else "before the first step"
        return Refuse(f"rank {rank} died {len(here)} times {after} with no step committed in between ({reasons})")
    return Replace()


def _seconds(duration_ns: int) -> str:
    return f"{duration_ns / 1e9:.1f} s"

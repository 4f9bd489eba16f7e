"""judge() and decide_replacement(): every rule of detector.py, with values a reader can check by eye."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from holdfast.launcher.detector import (
    ALIVE,
    Death,
    Health,
    Limits,
    Refuse,
    Replace,
    Sample,
    Verdict,
    decide_replacement,
    describe_status,
    judge,
)
from holdfast.launcher.processes import parse_stat
from holdfast.proto.lease import COMPUTE_PHASES, Phase

S = 1_000_000_000
LIMITS = Limits(
    lease_min_ns=2 * S, start_ns=600 * S, user_ns=300 * S, recovering_ns=30 * S, stop_grace_ns=S // 2, beat_ns=10 * S
)


def sample(**fields: Any) -> Sample:
    return Sample(**{"hello": True, "phase": Phase.FORWARD, **fields})


def test_exit_code_0_is_an_end_and_everything_else_a_death() -> None:
    assert judge(sample(status=0), LIMITS) == Verdict(Health.FINISHED)
    assert judge(sample(status=3 << 8), LIMITS) == Verdict(Health.EXITED, "exit 3")
    assert judge(sample(status=signal.SIGKILL), LIMITS) == Verdict(Health.EXITED, "SIGKILL")
    assert judge(sample(status=signal.SIGSEGV | 0x80), LIMITS) == Verdict(Health.EXITED, "SIGSEGV"), "with core dump"


def test_the_kernels_word_comes_before_the_lease() -> None:
    assert judge(sample(status=9, idle_ns=999 * S, stopped_ns=9 * S), LIMITS).health is Health.EXITED


@pytest.mark.parametrize("phase", sorted(COMPUTE_PHASES))
def test_a_compute_phase_may_last_the_longer_of_its_own_lease_and_the_minimum(phase: Phase) -> None:
    assert judge(sample(phase=phase, idle_ns=2 * S), LIMITS) == ALIVE
    verdict = judge(sample(phase=phase, idle_ns=2_100_000_000), LIMITS)
    assert verdict == Verdict(Health.HUNG, f"hung in {phase.name.lower()} for 2.1 s")
    assert judge(sample(phase=phase, idle_ns=7 * S, lease_ns=7 * S), LIMITS) == ALIVE
    assert judge(sample(phase=phase, idle_ns=7 * S + 1, lease_ns=7 * S), LIMITS).health is Health.HUNG


@pytest.mark.parametrize(("phase", "limit_s"), [(Phase.USER, 300), (Phase.RECOVERING, 30), (Phase.STARTING, 600)])
def test_other_phases_have_limits_of_their_own(phase: Phase, limit_s: int) -> None:
    assert judge(sample(phase=phase, idle_ns=limit_s * S, lease_ns=S), LIMITS) == ALIVE
    assert judge(sample(phase=phase, idle_ns=limit_s * S + 1, lease_ns=S), LIMITS).health is Health.HUNG


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.DONE])
def test_who_waits_for_a_peer_or_is_done_is_never_hung_by_its_progress(phase: Phase) -> None:
    assert judge(sample(phase=phase, idle_ns=99_999 * S), LIMITS) == ALIVE


def test_before_hello_only_the_start_lease_counts() -> None:
    assert judge(sample(hello=False, phase=Phase.FORWARD, idle_ns=599 * S), LIMITS) == ALIVE
    assert judge(sample(hello=False, idle_ns=601 * S), LIMITS) == Verdict(Health.HUNG, "hung in starting for 601.0 s")


def test_a_silent_monitor_thread_is_a_hang_only_where_the_main_thread_waits() -> None:
    silent = {"beat_idle_ns": 10 * S + 1}
    hung = Verdict(Health.HUNG, "hung while waiting: no thread ran for 10.0 s")
    assert judge(sample(phase=Phase.WAITING, **silent), LIMITS) == hung
    assert judge(sample(phase=Phase.RECOVERING, **silent), LIMITS).health is Health.HUNG
    assert judge(sample(phase=Phase.USER, **silent), LIMITS) == ALIVE, "user code may hold the GIL"
    assert judge(sample(phase=Phase.WAITING, hello=False, **silent), LIMITS) == ALIVE, "nobody beats before hello"
    assert judge(sample(phase=Phase.WAITING, beat_idle_ns=10 * S), LIMITS) == ALIVE


def test_the_silence_allowed_grows_with_the_lease() -> None:
    patient = Limits(lease_min_ns=20 * S)
    assert judge(sample(phase=Phase.WAITING, beat_idle_ns=60 * S), patient) == ALIVE
    assert judge(sample(phase=Phase.WAITING, beat_idle_ns=60 * S + 1), patient).health is Health.HUNG


def test_a_stopped_process_is_suspect_after_the_grace() -> None:
    assert judge(sample(stopped_ns=S // 2 - 1), LIMITS) == ALIVE
    assert judge(sample(stopped_ns=S // 2), LIMITS) == Verdict(Health.STOPPED, "stopped for 0.5 s")


def deaths(*steps: int, reason: str = "exit 1", injected: bool = False) -> list[Death]:
    return [Death(step, reason, injected) for step in steps]


def test_a_rank_is_replaced_while_there_is_a_budget() -> None:
    assert decide_replacement(2, deaths(7), used=9, budget=10) == Replace()
    assert decide_replacement(2, deaths(7, reason="SIGKILL"), used=10, budget=10) == Refuse(
        "rank 2 lost (SIGKILL): all 10 replacements are used up"
    )


def test_three_deaths_without_a_new_step_are_a_bug_of_the_program() -> None:
    assert decide_replacement(2, deaths(7, 7), used=2, budget=10) == Replace()
    assert decide_replacement(2, deaths(7, 7, 7), used=3, budget=10) == Refuse(
        "rank 2 died 3 times after step 7 with no step committed in between (exit 1, exit 1, exit 1)"
    )
    refused = decide_replacement(2, deaths(-1, -1, -1), used=3, budget=10)
    assert isinstance(refused, Refuse)
    assert "before the first step" in refused.reason


def test_deaths_from_outside_are_borne_longer() -> None:
    kills = deaths(7, 7, 7, 7, reason="SIGKILL")
    assert decide_replacement(2, kills, used=4, budget=99) == Replace()
    assert decide_replacement(2, [*kills, *deaths(7, 7)], used=6, budget=99) == Replace()
    assert isinstance(decide_replacement(2, [*kills, *deaths(7, 7, 7)], used=7, budget=99), Refuse)
    assert decide_replacement(2, deaths(*[7] * 9, reason="SIGKILL"), used=9, budget=99) == Replace()
    assert isinstance(decide_replacement(2, deaths(*[7] * 10, reason="SIGKILL"), used=10, budget=99), Refuse)


def test_a_step_committed_in_between_starts_the_count_again() -> None:
    assert decide_replacement(2, deaths(7, 7, 8), used=3, budget=10) == Replace()
    assert decide_replacement(2, deaths(7, 7, 8, 8), used=4, budget=10) == Replace()
    assert isinstance(decide_replacement(2, deaths(7, 7, 8, 8, 8), used=5, budget=10), Refuse)


def test_injected_deaths_say_nothing_about_the_program() -> None:
    assert decide_replacement(2, deaths(7, 7, 7, 7, injected=True), used=4, budget=10) == Replace()
    mixed = [*deaths(7, 7), *deaths(7, injected=True)]
    assert decide_replacement(2, mixed, used=3, budget=10) == Replace()
    assert isinstance(decide_replacement(2, [*mixed, *deaths(7)], used=4, budget=10), Refuse)


def test_statuses_are_told_in_words() -> None:
    assert [describe_status(status) for status in (9, 1 << 8, 11 | 0x80, 64)] == [
        "SIGKILL",
        "exit 1",
        "SIGSEGV",
        "SIGRTMAX",
    ]


def test_a_command_name_with_parentheses_does_not_confuse_the_parser() -> None:
    fields = ["T", "1", "20", "30", "0", "-1", str(0x4 | 0x400000), *["0"] * 42, "9", "0", "0"]
    stat = parse_stat(f"12 (a) R (b)) {' '.join(fields)}\n".encode())
    assert (stat.state, stat.parent, stat.group, stat.session, stat.exiting, stat.status) == ("T", 1, 20, 30, True, 9)


def test_our_own_stat_is_understood() -> None:
    with open("/proc/self/stat", "rb") as file:
        stat = parse_stat(file.read())
    assert (stat.parent, stat.session, stat.exiting) == (os.getppid(), os.getsid(0), False)

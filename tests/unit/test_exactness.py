"""A run that is not exact any more says so, until all of it is again; and the options that may lead there."""

from __future__ import annotations

import argparse

import pytest

from holdfast.launcher.actions import Announce, Form, Record
from holdfast.launcher.cli import describe
from holdfast.launcher.exactness import Exactness
from holdfast.launcher.membership import Membership
from holdfast.launcher.recovering import Recovering, plan_recovering
from holdfast.launcher.slots import Joined
from holdfast.proto import env
from holdfast.proto.errors import ConfigError
from holdfast.runtime.recovery.decide import Report, Resume, Source

STAGES = {0: 0, 1: 1, 2: 2}
EXACT = {0: 0, 1: 0, 2: 0}


def lossy(step: int) -> Resume:
    return Resume(step, sources={0: Source("live"), 1: Source("stale", step=step - 3), 2: Source("neighbours")})


def test_what_was_not_exact_is_said_with_stages_and_ages_and_remembered() -> None:
    exactness = Exactness()
    formation = exactness.formed(lossy(8), EXACT, STAGES)
    assert formation.told == "stage 1 went back alone to step 5 (3 steps old); stage 2 rebuilt from its neighbours"
    assert {rank: lossy.facts for rank, lossy in formation.ranks.items()} == {
        1: {"rung": "stale", "stage": 1, "step": 5, "age": 3},
        2: {"rung": "neighbours", "stage": 2},
    }
    exactness.formed(lossy(8), EXACT, STAGES)
    exactness.recovered(formation)
    exactness.formed(Resume(9, sources={0: Source("live")}), {0: 9}, STAGES)
    assert exactness.last_line() == f"done, NOT exact since step 9; 1 recoveries were not, the last: {formation.told}"


def test_a_rank_that_was_rebuilt_before_the_recovery_broke_off_is_live_and_still_not_exact() -> None:
    exactness = Exactness()
    first = exactness.formed(lossy(8), EXACT, STAGES)
    again = Resume(8, sources={0: Source("neighbours"), 1: Source("live"), 2: Source("live")})
    second = exactness.formed(again, {0: 0, 1: 9, 2: 0}, STAGES, first)
    assert sorted(second.ranks) == [0, 1], "rank 2 joined with a state that is not the rebuilt one"
    assert second.told == "stage 0 rebuilt from its neighbours; stage 1 went back alone to step 5 (3 steps old)"
    third = exactness.formed(
        Resume(8, sources={rank: Source("live") for rank in STAGES}), {0: 9, 1: 9, 2: 9}, STAGES, second
    )
    assert sorted(third.ranks) == [0, 1]
    assert third.since == 9


def test_an_exact_run_has_nothing_to_say() -> None:
    exactness = Exactness()
    assert exactness.formed(Resume(3, sources={0: Source("ready")}), EXACT, STAGES).told == ""
    assert exactness.last_line() == ""


def test_a_new_coordinator_and_a_resumed_run_hear_of_it_from_the_ranks() -> None:
    exactness = Exactness()
    exactness.heard(0)
    exactness.heard(7)
    exactness.heard(5)
    assert exactness.last_line() == "done, NOT exact since step 5"


def test_back_at_a_checkpoint_from_before_the_run_is_exact_again() -> None:
    exactness = Exactness()
    exactness.formed(lossy(8), EXACT, STAGES)
    carried = dict.fromkeys(STAGES, 9)
    exactness.formed(Resume(10, sources={rank: Source("disk") for rank in STAGES}), carried, STAGES)
    assert exactness.since == 9, "that checkpoint is of the run that is not exact"
    exactness.formed(Resume(8, sources={rank: Source("live") for rank in STAGES}), carried, STAGES)
    assert exactness.since == 9, "these states are from before the loss, but they carry it"
    exactness.formed(Resume(8, sources={rank: Source("disk") for rank in STAGES}), carried, STAGES)
    assert exactness.since == 0


def test_the_job_records_announces_and_shows_a_recovery_that_was_not_exact() -> None:
    membership = Membership(3)
    for rank in range(3):
        membership.on_rank_started(1, rank, 0, 100 + rank, 0, "fresh")
        membership.on_rank_hello(2, rank, 0, 100 + rank, 0, 0, -1)

    def join(generation: int, live: dict[int, int]) -> list[object]:
        actions: list[object] = []
        for rank, step in live.items():
            incarnation = int(step < 0)
            report = Report(rank, step, (rank,), {}, units={rank: "block"})
            actions += membership.on_join(
                3, rank, generation, Joined(incarnation, report, "p", "c", 9, recovery="auto")
            )
        return actions

    join(1, {0: 4, 1: 4, 2: 4})
    membership.on_rank_exited(10, 1, 0, "SIGKILL", detected_ns=10, last_progress_ns=4)
    membership.on_rank_started(11, 1, 1, 201, 0, "standby")
    membership.on_rank_hello(12, 1, 1, 201, 0, 0, -1)
    actions = join(2, {0: 6, 1: -1, 2: 6})
    (form,) = [action for action in actions if isinstance(action, Form)]
    assert (form.resume_step, form.members[1][3]) == (6, Source("neighbours"))
    membership.on_restored(1, 2, 20, [("neighbours", 8, 2)], "averaged")
    done = membership.on_committed(0, 2, 7, 30, 1.0, True)
    (record,) = [action.event for action in done if isinstance(action, Record)]
    assert record["exact"] is False
    assert record["inexact"] == {"1": {"rung": "neighbours", "stage": 1, "how": "averaged"}}
    (line,) = [action.line for action in done if isinstance(action, Announce)]
    assert line.endswith("resumed from step 6, step 7 committed; NOT exact: stage 1 rebuilt from its neighbours")
    shown = describe("j", "", membership.status())
    assert "NOT exact since step 7 (1 such recoveries; last: stage 1 rebuilt from its neighbours)" in shown
    last: list[object] = []
    for rank in range(3):
        incarnation = int(rank == 1)
        last += membership.on_rank_exited(40, rank, incarnation, "", detected_ns=1, last_progress_ns=1, finished=True)
    lines = [action.line for action in last if isinstance(action, Announce)]
    assert lines == [membership.exactness.last_line()], "once, and with the job's end"


def asked(**given: object) -> Recovering:
    known = {"recovery": "exact", "stale_every": None, "snapshots": "on", "checkpoint_dir": "", "checkpoint_every": 70}
    return plan_recovering(argparse.Namespace(**{**known, **given}))


def test_each_mode_takes_the_snapshots_that_it_needs() -> None:
    assert asked() == Recovering(mode="exact")
    assert asked(recovery="neighbours").environment() == {env.RECOVERY: "neighbours", env.SNAPSHOTS: "off"}
    assert asked(recovery="neighbours+", checkpoint_dir="d") == Recovering(mode="neighbours+", every=70)
    assert asked(recovery="stale") == Recovering(mode="stale", every=50)
    assert asked(recovery="stale", stale_every=7).environment()[env.SNAPSHOT_EVERY] == "7"
    assert asked(recovery="auto", snapshots="off") == Recovering(mode="auto", snapshots=False)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"stale_every": 5}, "--stale-every is for --recovery stale, not for exact"),
        ({"recovery": "stale", "stale_every": 0}, "--stale-every must be at least 1, got 0"),
        ({"recovery": "stale", "snapshots": "off"}, "goes back to snapshots: leave out --snapshots off"),
    ],
)
def test_what_makes_no_sense_together_is_refused_with_a_line(given: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        asked(**given)

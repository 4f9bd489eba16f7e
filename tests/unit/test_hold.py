"""What ranks leave untouched for the saver, and for how long; and where a state comes from in another layout."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from holdfast.ckpt.saver.page import Page
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.gather import Kept
from holdfast.runtime.hold import Hold
from holdfast.runtime.keep import HOLD_NS, SILENT_NS, choose, patient, reserved
from holdfast.runtime.recovery.decide import Impossible, Report, Resume, Source, decide_resume
from holdfast.runtime.recovery.remap import merge_scheduler


def kept(sealed: int, due: int = NO_STEP, protected: int = NO_STEP, placement: int = 0) -> Kept:
    return Kept(sealed, protected, placement, due)


# ---- the due half -------------------------------------------------------------------------------------------


def test_without_a_due_step_nothing_changes() -> None:
    assert choose([10, 11], 12, kept(11)) == 0
    assert choose([10, NO_STEP], 11, kept(10)) == 1


def test_the_half_of_a_due_step_is_left_until_it_is_copied() -> None:
    assert choose([10, 9], 11, kept(10, due=10)) == 1
    assert choose([10, 11], 12, kept(11, due=10)) is None
    assert choose([10, 11], 12, kept(11, due=20)) == 0, "copied: the next one is due"
    assert choose([10, 11], 12, kept(11)) == 0, "copied: nothing is due while it is written"


def test_the_first_step_since_the_due_one_is_the_savers_and_the_others_are_not() -> None:
    assert reserved([12, 15], kept(15, due=10)) == 12
    assert reserved([9, 12], kept(12, due=10)) == 12
    assert choose([12, 15], 18, kept(15, due=10)) is None
    assert choose([9, 12], 15, kept(12, due=10)) == 0


def test_a_due_step_that_not_every_rank_holds_is_no_reason_to_leave_a_snapshot_out() -> None:
    assert choose([10, 9], 11, kept(9, due=10)) == 0


def test_recovery_and_the_end_of_the_job_come_before_the_saver() -> None:
    assert choose([10, 11], 12, kept(11, due=10), must=True) == 0


def test_with_parity_too_the_due_half_is_left() -> None:
    assert choose([10, 11], 12, kept(11, protected=11, placement=1)) == 0
    assert choose([10, 11], 12, kept(11, due=10, protected=11, placement=1)) is None


def test_a_saver_that_is_silent_or_does_not_get_done_is_not_waited_for() -> None:
    assert patient(beat_age_ns=SILENT_NS, held_ns=HOLD_NS)
    assert not patient(beat_age_ns=SILENT_NS + 1, held_ns=0)
    assert not patient(beat_age_ns=0, held_ns=HOLD_NS + 1)


def test_what_is_due_is_what_rank_0_read_whatever_stands_on_the_pages_of_other_hosts() -> None:
    rows = [[10, 11, 0, -1, 10], [10, 11, 0, -1, 20], [10, 11, 0, -1, -1]]
    assert Kept.of(rows, 0).due == 10
    assert Kept.of([rows[2], *rows[:2]], 0).due == NO_STEP
    assert Kept.of([row[:4] for row in rows], 0).due == NO_STEP


def test_a_rank_brings_what_the_page_says_while_the_saver_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic_ns()]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    Page.create(tmp_path / "page")
    page, hold = Page(tmp_path / "page"), Hold(str(tmp_path / "page"))
    assert hold.due([9, 10]) == NO_STEP
    page.due, page.beat_ns = 10, now[0]
    assert hold.due([9, 10]) == 10
    now[0] += SILENT_NS + 1
    assert hold.due([10, 11]) == NO_STEP, "it does not beat"
    page.beat_ns = now[0]
    assert hold.due([10, 11]) == 10
    now[0] += HOLD_NS
    page.beat_ns = now[0]
    assert hold.due([10, 11]) == NO_STEP, "it beats, but the half was held for too long"
    page.due = 20
    assert hold.due([11, 12]) == 20, "the next one gets its time"


def test_rank_0_alone_tells_savers_which_step_all_ranks_leave_untouched(tmp_path: Path) -> None:
    Page.create(tmp_path / "page")
    hold, page = Hold(str(tmp_path / "page")), Page(tmp_path / "page")
    assert page.reserved == NO_STEP
    hold.kept(1, [10, 11], kept(11, due=10))
    assert page.reserved == NO_STEP
    hold.kept(0, [10, 11], kept(11, due=10))
    assert page.reserved == 10
    hold.kept(0, [11, 12], kept(12))
    assert page.reserved == NO_STEP
    Hold("").kept(0, [10, 11], kept(11, due=10))


def test_without_a_saver_nothing_is_due(tmp_path: Path) -> None:
    assert Hold("").due([1, 2]) == NO_STEP
    assert Hold(str(tmp_path / "none")).due([1, 2]) == NO_STEP


@pytest.mark.parametrize("copy_steps", [0, 1, 3, 7])
def test_every_due_step_outlives_a_copy_of_any_length_and_snapshots_go_on_after_it(copy_steps: int) -> None:
    """A model of one rank and a saver whose copy takes so many steps."""
    halves, due, copying, saved, left_out = [NO_STEP, NO_STEP], 10, -1, [], 0
    for step in range(1, 60):
        sealed = max(halves)
        half = choose(halves, step, kept(sealed, due=due))
        if half is None:
            left_out += 1
        else:
            halves[half] = step
        target = next((held for held in sorted(halves) if held >= due), None)
        if target is not None and copying < 0:
            copying = step
        if copying >= 0 and step - copying >= copy_steps:
            assert target in halves
            saved.append(target)
            due, copying = due + 10, -1
    assert saved == [10, 20, 30, 40, 50]
    assert left_out == len(saved) * max(0, copy_steps - 1)


# ---- the disk rung ------------------------------------------------------------------------------------------


def report(rank: int, live: int, disk: set[int], held: dict[int, set[int]] | None = None) -> Report:
    return Report(rank, live, (rank,), {s: frozenset(steps) for s, steps in (held or {}).items()}, frozenset(disk))


def test_a_job_whose_ranks_have_nothing_starts_from_the_newest_checkpoint_that_all_can_read() -> None:
    decision = decide_resume([report(0, -1, {10, 20, 30}), report(1, -1, {10, 20})])
    assert decision == Resume(20, sources={0: Source("disk"), 1: Source("disk")})


def test_memory_that_is_newer_comes_before_a_checkpoint_and_a_checkpoint_before_older_memory() -> None:
    held = {0: {24, 25}, 1: {24, 25}}
    newer = decide_resume([report(0, 26, {20}, held), report(1, -1, {20}, held)])
    assert isinstance(newer, Resume)
    assert newer.step == 25
    older = decide_resume([report(0, 0, {20}), report(1, 0, {20})])
    assert isinstance(older, Resume)
    assert older.step == 20


def test_only_the_rank_without_another_source_reads_the_disk() -> None:
    decision = decide_resume([report(0, 20, {20}), report(1, -1, {20})])
    assert decision == Resume(20, sources={0: Source("live"), 1: Source("disk")})


def test_a_lost_state_goes_back_to_disk_and_without_a_checkpoint_it_is_lost() -> None:
    lost = [report(0, 26, {20}, {0: {25, 26}}), report(1, -1, {20})]
    decision = decide_resume(lost)
    assert isinstance(decision, Resume)
    assert (decision.step, decision.sources) == (20, {0: Source("disk"), 1: Source("disk")})
    without = [Report(one.rank, one.live_step, one.peers, one.held) for one in lost]
    assert decide_resume(without) == Impossible(26, (1,))


# ---- another layout -----------------------------------------------------------------------------------------


def test_a_schedulers_lists_follow_the_groups_and_the_rest_is_the_first_ones() -> None:
    def state(*lrs: float) -> dict[str, object]:
        inner = {"base_lrs": list(lrs), "_last_lr": [lr / 2 for lr in lrs], "milestones": Counter({3: 1}), "at": 7}
        return {"_schedulers": [dict(inner), dict(inner)], "last_epoch": 7, "other": [1, 2]}

    merged = merge_scheduler({0: state(0.1, 0.2), 3: state(0.3)}, [(0, 1), (3, 0), (0, 0)])
    assert merged["_schedulers"][1]["base_lrs"] == [0.2, 0.3, 0.1]
    assert merged["_schedulers"][0]["_last_lr"] == [0.1, 0.15, 0.05]
    assert type(merged["_schedulers"][0]["milestones"]) is Counter
    assert (merged["last_epoch"], merged["other"]) == (7, [1, 2])

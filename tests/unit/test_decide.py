"""The resume decision, as values."""

from __future__ import annotations

import itertools

from holdfast.proto.ids import NO_STEP
from holdfast.runtime.recovery.decide import Impossible, Report, Resume, Source, decide_resume


def report(
    rank: int, live: int, held: dict[int, set[int]] | None = None, peers: tuple[int, ...] | None = None
) -> Report:
    kept = {slot: frozenset(steps) for slot, steps in (held or {}).items()}
    return Report(rank, live, peers or (rank,), kept)


def resume_step(reports: list[Report]) -> int:
    decision = decide_resume(reports)
    assert isinstance(decision, Resume)
    return decision.step


def test_each_rank_gets_the_cheapest_source_and_replicas_serve_in_turn() -> None:
    held = {3: {5}}
    reports = [report(0, 5, peers=(0, 1, 2)), report(1, -1, peers=(0, 1, 2)), report(2, 5, peers=(0, 1, 2))]
    decision = decide_resume([*reports, report(3, -1, held)])
    assert isinstance(decision, Resume)
    assert decision.sources == {
        0: Source("live"),
        1: Source("peer", 2),
        2: Source("live"),
        3: Source("snapshot"),
    }


def test_nobody_with_state_starts_fresh() -> None:
    assert decide_resume([report(0, -1), report(1, -1)]) == Resume(0, fresh=True)


def test_survivors_stay_where_they_are_when_the_dead_rank_has_a_snapshot_of_that_step() -> None:
    held = {0: {6, 7}, 1: {6, 7}}
    assert resume_step([report(0, 7, held), report(1, -1, held)]) == 7


def test_a_step_that_one_rank_applied_is_redone_when_the_dead_ranks_copy_of_it_was_not_whole() -> None:
    held = {0: {6, 7}, 1: {6}}
    assert resume_step([report(0, 7, held), report(1, -1, held)]) == 6


def test_survivors_a_step_apart_meet_at_the_step_that_all_can_reach() -> None:
    held = {0: {6, 7}, 1: {6, 7}, 2: {6, 7}}
    assert resume_step([report(0, 8, held), report(1, 7, held), report(2, -1, held)]) == 7


def test_a_step_applied_by_all_is_kept_although_no_snapshot_has_it() -> None:
    held = {0: {7}, 1: {7}}
    assert resume_step([report(0, 8, held), report(1, 8, held)]) == 8


def test_a_live_replica_is_a_source_without_any_snapshot() -> None:
    assert resume_step([report(0, 5, peers=(0, 1)), report(1, -1, peers=(0, 1))]) == 5


def test_half_of_a_replicated_snapshot_is_no_snapshot() -> None:
    held = {0: {4, 5}, 1: {4}}
    assert resume_step([report(0, -1, held, (0, 1)), report(1, -1, held, (0, 1))]) == 4


def test_without_any_source_the_lost_ranks_are_named() -> None:
    assert decide_resume([report(0, 5), report(1, -1), report(2, -1)]) == Impossible(5, (1, 2))


def test_the_order_of_the_reports_does_not_matter() -> None:
    held = {0: {6, 7}, 1: {6, 7}, 2: {6}}
    reports = [report(0, 8, held), report(1, 7, held), report(2, -1, held)]
    assert {resume_step(list(order)) for order in itertools.permutations(reports)} == {6}


def test_who_forms_no_group_gets_nothing_from_a_replicas_memory() -> None:
    held = {0: frozenset({5}), 1: frozenset({5})}
    pair = [Report(0, 5, (0, 1), {}), Report(1, NO_STEP, (0, 1), {})]
    assert decide_resume(pair) == Resume(5, sources={0: Source("live"), 1: Source("peer", 0)})
    assert decide_resume(pair, solo=True) == Impossible(5, (1,))
    assert decide_resume(pair, held, solo=True) == Resume(5, sources={0: Source("live"), 1: Source("parity")})

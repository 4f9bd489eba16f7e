"""Who goes on from what when there is no snapshot of the last step."""

from __future__ import annotations

import itertools

import pytest

from holdfast.runtime.recovery.decide import Impossible, Report, Resume, Source, decide_resume
from holdfast.runtime.recovery.ladder import MODES, decide, stages

KINDS = ("embedding", "block", "block", "block", "block", "head")
EVEN = {0: (0, 1), 1: (2,), 2: (3,), 3: (4, 5)}
SHADOWED = {0: (0, 1), 1: (0, 2), 2: (3, 5), 3: (4, 5)}


def report(
    rank: int,
    live: int,
    *,
    ready: int = -1,
    held: dict[int, set[int]] | None = None,
    disk: set[int] | None = None,
    units: dict[int, tuple[int, ...]] = EVEN,
    peers: tuple[int, ...] = (),
) -> Report:
    """`told`: whoever has applied a step knows what its barrier told."""
    kept = {slot: frozenset(steps) for slot, steps in (held or {}).items()}
    kinds = {unit: KINDS[unit] for unit in units[rank % 4]}
    return Report(rank, live, peers or (rank,), kept, frozenset(disk or ()), ready, live, kinds)


def resumed(mode: str, reports: list[Report], reachable: dict[int, frozenset[int]] | None = None) -> Resume:
    decision = decide(mode, reports, reachable)
    assert isinstance(decision, Resume), decision
    return decision


def rungs(decision: Resume) -> str:
    return " ".join(source.rung for _, source in sorted(decision.sources.items()))


def lost(rank: int, **more: object) -> Report:
    return report(rank, -1, **more)  # type: ignore[arg-type]


def test_where_somebody_has_applied_a_step_everybody_who_has_it_ready_applies_it_too() -> None:
    decision = resumed("neighbours", [report(0, 8), report(1, 7, ready=8), lost(2), report(3, 8)])
    assert decision.step == 8
    assert rungs(decision) == "live ready neighbours live"


def test_where_nobody_has_applied_a_step_it_is_redone_although_all_have_it_ready() -> None:
    decision = resumed("neighbours", [report(rank, 7, ready=8) if rank != 2 else lost(2) for rank in range(4)])
    assert decision.step == 7
    assert rungs(decision) == "live live neighbours live"


def test_a_step_that_only_the_dead_rank_had_applied_is_redone() -> None:
    decision = resumed("neighbours", [report(0, 7, ready=8), report(1, 7, ready=8), lost(2), report(3, 7, ready=8)])
    assert decision.step == 7


def test_a_step_whose_barrier_nobody_can_tell_of_is_not_rolled_forward_to() -> None:
    restored = Report(1, 8, (1,), {}, told_step=-1, units={2: "block"})
    decision = resumed("neighbours", [report(0, 7, ready=8), restored, report(2, 7, ready=8), report(3, 7, ready=8)])
    assert decision.step == 7
    assert rungs(decision) == "live neighbours live live"


@pytest.mark.parametrize("mode", ["neighbours", "neighbours+", "auto"])
@pytest.mark.parametrize("gone", [(1,), (2,), (1, 2)])
def test_inner_stages_are_rebuilt_from_their_neighbours_also_two_beside_each_other(
    mode: str, gone: tuple[int, ...]
) -> None:
    decision = resumed(mode, [lost(r) if r in gone else report(r, 9) for r in range(4)])
    assert decision.step == 9
    assert {rank for rank, source in decision.sources.items() if source.rung == "neighbours"} == set(gone)


def test_the_holder_of_the_embedding_is_rebuilt_only_if_another_live_rank_has_that_too() -> None:
    plain = decide("neighbours", [lost(0), *(report(r, 9) for r in (1, 2, 3))])
    assert isinstance(plain, Impossible)
    assert plain.missing == (0,)
    assert plain.why == "stage 0 (rank 0): no live rank has layer 0, nor a layer of the same kind"
    shadowed = [lost(0, units=SHADOWED), *(report(r, 9, units=SHADOWED) for r in (1, 2, 3))]
    assert rungs(resumed("neighbours+", shadowed)) == "neighbours live live live"
    both = [lost(0, units=SHADOWED), lost(1, units=SHADOWED), *(report(r, 9, units=SHADOWED) for r in (2, 3))]
    failed = decide("neighbours+", both)
    assert isinstance(failed, Impossible)
    assert failed.missing == (0, 1)


def test_first_and_last_stage_together_and_all_but_one_end_in_a_rung_or_an_error_that_names_them() -> None:
    ends = [lost(r, units=SHADOWED) if r in (0, 3) else report(r, 9, units=SHADOWED) for r in range(4)]
    assert rungs(resumed("neighbours+", ends)) == "neighbours live live neighbours"
    one = [lost(r, units=SHADOWED) if r != 1 else report(r, 9, units=SHADOWED) for r in range(4)]
    failed = decide("auto", one)
    assert isinstance(failed, Impossible)
    assert failed.missing == (2, 3), "the embedding is on rank 1 too, the head is nowhere"
    assert failed.why.startswith("stage 2 (rank 2): ")


def test_without_a_rung_everybody_goes_back_to_a_checkpoint_that_all_can_read() -> None:
    disk = {4, 6}
    reports = [lost(0, disk=disk), *(report(r, 9, disk=disk) for r in (1, 2, 3))]
    for mode in ("neighbours", "stale", "auto"):
        decision = resumed(mode, reports)
        assert decision.step == 6
        assert rungs(decision) == "disk disk disk disk"


def test_a_lost_stage_alone_returns_to_its_newest_older_snapshot() -> None:
    held = {rank: {0, 5} for rank in range(4)}
    decision = resumed("stale", [report(r, 9, held=held) if r != 2 else lost(2, held=held) for r in range(4)])
    assert decision.step == 9
    assert decision.sources[2] == Source("stale", step=5)
    assert {decision.sources[r] for r in (0, 1, 3)} == {Source("live")}


def test_a_snapshot_of_the_present_step_is_exact_and_comes_first() -> None:
    held = {2: {5, 9}}
    decision = resumed("stale", [report(r, 9) if r != 2 else lost(2, held=held) for r in range(4)])
    assert decision.sources[2] == Source("snapshot")


def test_a_stale_copy_is_also_had_from_other_hosts() -> None:
    reports = [report(r, 9) if r != 2 else lost(2) for r in range(4)]
    assert resumed("stale", reports, {2: frozenset({3, 6})}).sources[2] == Source("stale", step=6)
    alone = decide("stale", reports)
    assert isinstance(alone, Impossible)
    assert alone.why == "stage 2 (rank 2): no older snapshot of it is left"


def test_all_replicas_of_a_stage_go_back_to_the_same_older_step() -> None:
    """State of two replicas is snapshotted half by each: a step counts only if both halves are there."""
    held = {2: {3, 5}, 6: {3}}
    reports = [report(r, 9) for r in (0, 1, 3, 4, 5, 7)]
    reports += [lost(2, peers=(2, 6), held=held), lost(6, peers=(2, 6))]
    decision = resumed("stale", reports)
    assert decision.sources[2] == decision.sources[6] == Source("stale", step=3)


def test_a_live_replica_is_exact_in_every_mode() -> None:
    reports = [report(r, 9, peers=(2, 6) if r == 6 else ()) for r in (0, 1, 3, 4, 5, 6, 7)]
    for mode in MODES:
        assert resumed(mode, [*reports, lost(2, peers=(2, 6))]).sources[2] == Source("peer", 6)


def test_auto_takes_exact_memory_then_stale_then_neighbours_for_each_lost_rank() -> None:
    held = {rank: {8, 9} for rank in range(4)}
    exact = [report(r, 9, held=held) if r != 2 else lost(2, held=held) for r in range(4)]
    assert rungs(resumed("auto", exact)) == "live live snapshot live"
    back = [report(r, 9, held={r: {8}}) if r != 2 else lost(2, held={2: {8}}) for r in range(4)]
    assert (resumed("auto", back).step, rungs(resumed("auto", back))) == (8, "snapshot snapshot snapshot snapshot")
    mixed = [report(0, 9), lost(1, held={1: {5}}), lost(2), report(3, 9)]
    decision = resumed("auto", mixed)
    assert decision.step == 9
    assert rungs(decision) == "live stale neighbours live"


def test_auto_prefers_the_inexact_rungs_to_a_checkpoint_but_not_to_one_of_the_present_step() -> None:
    for disk, rung, step in (({4}, "neighbours", 9), ({4, 9}, "disk", 9)):
        reports = [report(r, 9, disk=disk) if r != 2 else lost(2, disk=disk) for r in range(4)]
        decision = resumed("auto", reports)
        assert (decision.step, decision.sources[2].rung) == (step, rung)


def test_exact_mode_is_decide_resume_whatever_the_reports_say_beside() -> None:
    held = {rank: {6, 7} for rank in range(4)}
    for lives in itertools.product((-1, 7, 8), repeat=3):
        reports = [report(rank, live, ready=8, held=held) for rank, live in enumerate((8, *lives))]
        assert decide("exact", reports) == decide_resume(reports)


def test_the_order_of_reports_changes_nothing() -> None:
    reports = [report(0, 8), report(1, 7, ready=8), lost(2, held={2: {5}}), report(3, 8)]
    for mode in MODES:
        assert len({repr(decide(mode, list(order))) for order in itertools.permutations(reports)}) == 1


def test_a_start_is_no_loss_in_any_mode() -> None:
    for mode in MODES:
        assert decide(mode, [report(r, -1) for r in range(4)]) == Resume(0, fresh=True)
        assert resumed(mode, [report(r, -1, disk={7}) for r in range(4)]).step == 7


def test_ranks_with_the_same_units_are_one_stage() -> None:
    assert stages([report(rank, 9) for rank in range(8)]) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 0, 5: 1, 6: 2, 7: 3}

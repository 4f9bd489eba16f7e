"""Whatever ranks report, the ladder's answer is one that every rank can carry out, and exact where that can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.runtime.recovery.decide import Impossible, Report, Resume, decide_resume
from holdfast.runtime.recovery.ladder import INEXACT, MODES, decide, layout_of
from holdfast.runtime.recovery.neighbours import Average, Copy, plan_rebuild


@st.composite
def jobs(draw: st.DrawFn) -> list[Report]:
    """Ranks after a barrier that some passed: a step apart, some dead, with whatever snapshots and checkpoints."""
    stages, replicas = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    edges, shadows = draw(st.booleans()), draw(st.booleans())
    step = draw(st.integers(1, 12))
    steps = st.frozensets(st.integers(0, step + 1), max_size=2)
    held = {rank: draw(steps) for rank in range(stages * replicas)}
    reports = []
    for rank in range(stages * replicas):
        stage = rank % stages
        units = {stage + 1: "block"}
        if edges:
            units |= {0: "embedding"} if stage == 0 or (shadows and stage == 1) else {}
            units |= {stages + 1: "head"} if stage == stages - 1 or (shadows and stage == stages - 2) else {}
        state = draw(st.sampled_from(["applied", "ready", "before", "dead"]))
        live = {"applied": step, "dead": -1}.get(state, step - 1)
        ready = step if state == "ready" else -1
        told = live if draw(st.booleans()) else -1
        peers = tuple(range(stage, stages * replicas, stages))
        kept = held if draw(st.booleans()) else {rank: held[rank]}
        disk = draw(st.sampled_from([frozenset(), frozenset({max(0, step - 3)}), frozenset({step})]))
        reports.append(Report(rank, live, peers, kept, disk, ready, told, units))
    return reports


def everywhere(reports: list[Report], slot: int) -> frozenset[int]:
    return frozenset().union(*(report.held.get(slot, frozenset()) for report in reports))


@given(jobs(), st.sampled_from(MODES))
def test_every_source_is_there(reports: list[Report], mode: str) -> None:
    decision = decide(mode, reports)
    if isinstance(decision, Impossible):
        assert decision.missing
        return
    if decision.fresh:
        assert all(report.live_step < 0 for report in reports)
        return
    by_rank = {report.rank: report for report in reports}
    usable = {r for r, s in decision.sources.items() if s.rung in ("live", "ready")}
    for rank, source in decision.sources.items():
        mine = by_rank[rank]
        match source.rung:
            case "live":
                assert mine.live_step == decision.step
            case "ready":
                assert mine.ready_step == decision.step
                assert any(r.live_step == r.told_step == decision.step for r in reports), "somebody can tell it"
            case "peer":
                assert source.peer in usable & set(mine.peers)
            case "snapshot":
                assert all(decision.step in mine.held.get(peer, ()) for peer in mine.peers)
            case "parity":
                assert all(decision.step in everywhere(reports, peer) for peer in mine.peers)
            case "disk":
                assert decision.step in mine.disk
            case "stale":
                assert source.step < decision.step
                assert all(source.step in everywhere(reports, peer) for peer in mine.peers)
                assert {decision.sources[peer].step for peer in mine.peers} == {source.step}
            case "neighbours":
                plan = plan_rebuild(layout_of(reports), rank, usable, {})
                assert plan.missing == ()
                for recipe in plan.recipes:
                    ranks = [t.rank for t in recipe.terms] if isinstance(recipe, Average) else [recipe.from_rank]
                    assert set(ranks) <= usable
                    assert not isinstance(recipe, Copy) or recipe.exact == (recipe.unit == recipe.from_unit)


@given(jobs(), st.sampled_from(MODES))
def test_nothing_is_inexact_that_an_exact_source_of_the_same_step_exists_for(reports: list[Report], mode: str) -> None:
    decision = decide(mode, reports)
    if not isinstance(decision, Resume) or decision.fresh:
        return
    usable = {r for r, s in decision.sources.items() if s.rung in ("live", "ready")}
    for report in reports:
        if decision.sources[report.rank].rung in INEXACT:
            assert mode != "exact"
            assert not usable & set(report.peers)
            assert not all(decision.step in everywhere(reports, peer) for peer in report.peers)
            assert decision.step not in report.disk


@given(jobs(), st.sampled_from(MODES))
def test_no_mode_gives_up_where_exact_recovery_would_go_on(reports: list[Report], mode: str) -> None:
    if isinstance(decide_resume(reports), Resume):
        assert isinstance(decide(mode, reports), Resume)

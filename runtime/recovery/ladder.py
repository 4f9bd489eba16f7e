"""Recovery without a snapshot of the last step: who goes on from what, decided as a pure function.

    live     present state in its own memory            ready    cut off at the barrier: applies its own gradients
    exact    replica, snapshot, parity of the present step       (decide.py)
    stale    this rank alone goes back to an older snapshot of its own, moments too
    neighbours   rebuilt from the stages beside it               (neighbours.py)
    disk     everybody goes back to a checkpoint: exact again, and older

    mode exact                    decide_resume alone
    mode stale | neighbours(+)    live/ready/exact, then that rung, then disk
    mode auto                     decide_resume from memory, then stale, neighbours, each for every lost rank, then disk

Nobody rolls back on the rungs stale and neighbours: the job stays at the newest step that a survivor applied. The
barrier makes that possible: if one rank has applied a step, every survivor has applied it or has its gradients final.
Invariants:

* a rank's source is exact whenever an exact one of the present step exists;
* all ranks that host the same units go back to the same older step;
* in mode exact the answer is decide_resume's; same reports, same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

from holdfast.proto.ids import NO_STEP

from ..pipeline.blocks import NO_STATE
from .decide import (
    Impossible,
    Reachable,
    Report,
    Resume,
    Source,
    choose_sources,
    decide_resume,
    held_everywhere,
    ranks_without_source,
)
from .neighbours import Layout, plan_rebuild

Mode = Literal["exact", "neighbours", "neighbours+", "stale", "auto"]
MODES: Final[tuple[Mode, ...]] = ("exact", "neighbours", "neighbours+", "stale", "auto")
INEXACT: Final = ("stale", "neighbours")
"""Rungs after which a run is no longer what an unbroken one would be."""


def decide(
    mode: str, reports: Sequence[Report], reachable: Reachable | None = None, *, solo: bool = False
) -> Resume | Impossible:
    """The step that a generation goes on from, and each rank's source. `solo`: each restores by itself, exactly."""
    reachable = reachable or {}
    newest = max((report.live_step for report in reports), default=int(NO_STEP))
    if mode == "exact" or newest == NO_STEP or solo:
        return decide_resume(reports, reachable, solo=solo)
    step = _present(reports, newest)
    present = [_at(report, step) for report in reports]
    if mode == "auto":
        # A checkpoint is exact too, but old: it comes last, unless it is of the present step.
        memory = decide_resume([replace(r, disk=r.disk & {step}) for r in present], reachable)
        if isinstance(memory, Resume):
            return _with_ready(memory, reports)
    found = _climb(mode, present, step, reachable)
    if isinstance(found, Resume):
        return _with_ready(found, reports)
    back = decide_resume(present, reachable)
    return _with_ready(back, reports) if isinstance(back, Resume) else found


def stages(reports: Sequence[Report]) -> dict[int, int]:
    """Rank -> number of its stage."""
    return stage_numbers({report.rank: tuple(report.units) for report in reports})


def stage_numbers(hosted: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Rank -> number of its stage: ranks that host the same units are one."""
    different = sorted({tuple(sorted(units)) for units in hosted.values()})
    return {rank: different.index(tuple(sorted(units))) for rank, units in hosted.items()}


def announce(sources: Mapping[int, Source], numbers: Mapping[int, int], step: int) -> str:
    """What is not exact about a generation, for people; empty if it is."""
    said: dict[str, None] = {}
    for rank, source in sorted(sources.items(), key=lambda item: (numbers[item[0]], item[0])):
        if source.rung == "stale":
            age = step - source.step
            text = f"stage {numbers[rank]} went back alone to step {source.step} ({age} step{'s' * (age != 1)} old)"
        elif source.rung == "neighbours":
            text = f"stage {numbers[rank]} rebuilt from its neighbours"
        else:
            continue
        said[text] = None
    return "; ".join(said)


def layout_of(reports: Sequence[Report]) -> Layout:
    """All units of the model, from what the ranks say of theirs."""
    kinds: dict[int, str] = {}
    for report in reports:
        kinds |= report.units
    units = range(max(kinds, default=-1) + 1)
    holders = tuple(tuple(sorted(r.rank for r in reports if unit in r.units)) for unit in units)
    return Layout(tuple(kinds.get(unit, NO_STATE) for unit in units), holders)


def _present(reports: Sequence[Report], newest: int) -> int:
    """The newest step that was applied; the one before if some have it only ready and nobody can tell them the rest."""
    ready = any(report.ready_step == newest for report in reports)
    told = any(report.live_step == newest == report.told_step for report in reports)
    return newest - 1 if ready and not told else newest


def _at(report: Report, step: int) -> Report:
    """The report, with a step that is ready counted as applied."""
    return replace(report, live_step=step) if report.ready_step == step != report.live_step else report


def _with_ready(decision: Resume, reports: Sequence[Report]) -> Resume:
    """Name the ranks whose source is a step that they have ready, not live."""
    live = {report.rank: report.live_step for report in reports}
    sources = {
        rank: Source("ready") if source.rung == "live" and live[rank] != decision.step else source
        for rank, source in decision.sources.items()
    }
    return replace(decision, sources=sources)


def _climb(mode: str, reports: Sequence[Report], step: int, reachable: Reachable) -> Resume | Impossible:
    """Everybody at `step`; a rank without an exact source of it gets the mode's."""
    lost = ranks_without_source(reports, step, reachable)
    sources = choose_sources(reports, step, reachable)
    by_rank = {report.rank: report for report in reports}
    live = [report.rank for report in reports if report.live_step == step]
    layout = layout_of(reports)
    held = held_everywhere(reports, reachable)
    failed: dict[int, str] = {}
    for rank in lost:
        older = _older(by_rank[rank], step, held) if mode in ("stale", "auto") else int(NO_STEP)
        if older != NO_STEP:
            sources[rank] = Source("stale", step=older)
            continue
        missing = plan_rebuild(layout, rank, live, {}).missing
        if mode == "stale":
            failed[rank] = "no older snapshot of it is left"
        elif missing:
            failed[rank] = f"no live rank has {_layers(missing)}, nor a layer of the same kind"
        else:
            sources[rank] = Source("neighbours")
    if not failed:
        return Resume(step, sources=sources)
    where = stages(reports)
    reasons = "; ".join(f"stage {where[rank]} (rank {rank}): {reason}" for rank, reason in sorted(failed.items()))
    return Impossible(step, tuple(sorted(failed)), reasons)


def _older(report: Report, step: int, held: Mapping[int, frozenset[int]]) -> int:
    """Newest step before `step` of which every share of this rank's state is kept somewhere."""
    common = frozenset.intersection(*(held.get(peer, frozenset()) for peer in report.peers))
    return max((older for older in common if older < step), default=int(NO_STEP))


def _layers(units: Sequence[int]) -> str:
    return f"layer{'s' if len(units) > 1 else ''} {', '.join(map(str, units))}"

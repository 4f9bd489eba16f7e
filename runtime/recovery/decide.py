"""Which step a generation resumes from, decided as a pure function over what its members report.

    reports: live step, steps held by each host's snapshot manager;
    reachable: what parity gives                                ──▶ decide_resume ──▶ Resume | Impossible

Presumed commit: step s counts when every piece of the state after s exists somewhere, so s can be resumed
from when for each *replica set* (ranks that host the same units)

    some member is live at s     (the others copy it, unless they form no group; or their own snapshot), or
    every owner's snapshot of s is whole on some host (state replicated over n ranks is snapshotted 1/n by each),
    or can be rebuilt there from the parity that other hosts hold,
    or is in a checkpoint on disk that all its members can read.

The newest such step wins: nobody redoes more than needed, and a step that some rank already applied is
either kept by all or redone by all. Nothing here reads a clock or a socket. Invariants:

* the chosen step is one that every rank can reach exactly;
* it is never newer than the newest step that anybody reported;
* same reports, same answer, whatever their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.proto.ids import NO_STEP


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says when it joins: `peers` are the ranks that host the same units, itself included."""

    rank: int
    live_step: int
    peers: tuple[int, ...]
    held: Mapping[int, frozenset[int]]
    """Slot -> steps wholly copied there, of the snapshot manager of this rank's host."""
    disk: frozenset[int] = frozenset()
    """Steps of the job's checkpoints that this rank can read."""
    ready_step: int = int(NO_STEP)
    """The step whose gradients it has final but could not commit: it was cut off at the step's barrier."""
    told_step: int = int(NO_STEP)
    """The step of which it knows what the barrier told, and can tell others."""
    units: Mapping[int, str] = field(default_factory=dict)
    """Units hosted -> their kind (neighbours.Layout); empty in jobs that recover exactly or not at all."""


Rung = Literal["live", "peer", "snapshot", "parity", "disk", "ready", "stale", "neighbours"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a rank gets its state: its own memory, its host's snapshot manager, the memory of rank `peer`, what its
    host rebuilds from snapshots and parity on other hosts ("parity"), or a checkpoint ("disk"). Without checkpoints
    (ladder.py) also: the step that it has ready ("ready"), a snapshot of older `step` ("stale"), or other stages."""

    rung: Rung
    peer: int = -1
    step: int = int(NO_STEP)


@dataclass(frozen=True, slots=True)
class Resume:
    """Resume from the state after `step`. `fresh`: nobody has any state, start from the initial one."""

    step: int
    fresh: bool = False
    sources: Mapping[int, Source] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Impossible:
    """No step is complete; `missing` names, for the newest step seen, the ranks without a source; `why`, if something
    is to be said beside that."""

    newest: int
    missing: tuple[int, ...]
    why: str = ""


Reachable = Mapping[int, frozenset[int]]
"""Slot -> steps that can be had from other hosts: held there, or decodable from what is held there."""


def held_everywhere(reports: Sequence[Report], reachable: Reachable) -> dict[int, frozenset[int]]:
    """Slot -> steps that any host holds or can rebuild."""
    held = dict(reachable)
    for report in reports:
        for slot, steps in report.held.items():
            held[slot] = held.get(slot, frozenset()) | steps
    return held


def ranks_without_source(
    reports: Sequence[Report], step: int, reachable: Reachable, *, solo: bool = False
) -> tuple[int, ...]:
    """Ranks that could not get the state after `step` from anywhere. `solo`: no group, so no replica's memory."""
    held = held_everywhere(reports, reachable)
    live = {report.rank for report in reports if report.live_step == step}
    return tuple(
        sorted(
            report.rank
            for report in reports
            if not live & ({report.rank} if solo else set(report.peers))
            and not all(step in held.get(peer, frozenset()) for peer in report.peers)
            and step not in report.disk
        )
    )


def choose_sources(
    reports: Sequence[Report], step: int, reachable: Reachable, *, solo: bool = False
) -> dict[int, Source]:
    """Cheapest source of the state after `step` for each rank that has one: own memory, a snapshot on its own
    host, a live replica, a rebuild from other hosts, a checkpoint.

    A snapshot costs one copy within a host, a replica's memory a transfer, a rebuild k transfers; replicas are
    taken in turn, so that several losers of one stage do not all load the same survivor.
    """
    live = {report.rank for report in reports if report.live_step == step}
    held = held_everywhere(reports, reachable)
    sources: dict[int, Source] = {}
    for turn, report in enumerate(sorted(reports, key=lambda report: report.rank)):
        peers = sorted(live & set(report.peers))
        if report.rank in live:
            sources[report.rank] = Source("live")
        elif all(step in report.held.get(peer, frozenset()) for peer in report.peers):
            sources[report.rank] = Source("snapshot")
        elif peers and not solo:
            sources[report.rank] = Source("peer", peers[turn % len(peers)])
        elif all(step in held.get(peer, frozenset()) for peer in report.peers):
            sources[report.rank] = Source("parity")
        else:
            sources[report.rank] = Source("disk")
    return sources


def decide_resume(
    reports: Sequence[Report], reachable: Reachable | None = None, *, solo: bool = False
) -> Resume | Impossible:
    """Newest step that every rank can reach exactly, or why there is none. `solo`: each restores by itself."""
    reachable = reachable or {}
    steps = {report.live_step for report in reports} - {NO_STEP}
    steps |= {step for kept in held_everywhere(reports, reachable).values() for step in kept}
    steps |= {step for report in reports for step in report.disk}
    if not steps:
        return Resume(0, fresh=True)
    for step in sorted(steps, reverse=True):
        if not ranks_without_source(reports, step, reachable, solo=solo):
            return Resume(step, sources=choose_sources(reports, step, reachable, solo=solo))
    newest = max(steps)
    return Impossible(newest, ranks_without_source(reports, newest, reachable, solo=solo))

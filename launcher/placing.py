"""What of the ranks that joined is protected, and by which code. Pure.

    "auto" on 4 hosts ──▶ 3+1, or, where lost stages go back alone, 1+1       joins ──▶ slots, their stages ──▶ place()

Not here: where parity then lies (ckpt/memory/placement.py), and who is told (job.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.ckpt.memory.redundancy import NONE, SHARDS_MAX, Redundancy, SlotInfo
from holdfast.runtime.recovery.ladder import stages

from .slots import Joined


def fitting(text: str, hosts: int, mode: str = "exact") -> Redundancy:
    """What was asked for, as far as so many hosts can give it: after losses less is better than nothing.

    `auto` with recovery mode "stale", where any two hosts could not be lost anyway, is a mirror on a host that has no
    adjacent stage: then any hosts may be lost but the two of a pair.
    """
    if text.startswith("rs:"):
        return Redundancy.parse(text, SHARDS_MAX).fitted(hosts)
    found = Redundancy.parse(text, hosts) if hosts > 1 else NONE
    return Redundancy(1, 1) if text == "auto" and mode == "stale" and found.m == 1 else found


def snapshots(joins: Mapping[int, Joined], host_of: Mapping[int, int]) -> tuple[SlotInfo, ...]:
    """Each rank's snapshot: on which host, how long, and of whose state it is a replica."""
    peers = {rank: joined.report.peers for rank, joined in joins.items()}
    return tuple(
        SlotInfo(rank, host_of[rank], joined.image_bytes, min(peers[rank]) if len(peers[rank]) > 1 else -1)
        for rank, joined in sorted(joins.items())
    )


def stages_of(joins: Mapping[int, Joined]) -> dict[int, int] | None:
    """Rank -> stage. None where all is exact or nothing: it then does not matter who is whose neighbour."""
    reports = [joined.report for _, joined in sorted(joins.items())]
    return stages(reports) if all(report.units for report in reports) else None

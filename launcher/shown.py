"""What `holdfast status` shows of hosts and of redundancy, as plain values. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from holdfast.ckpt.memory.placement import survivable
from holdfast.ckpt.memory.redundancy import Placement

from .hosts import Host


def host_rows(hosts: Iterable[Host], holders: Mapping[int, int]) -> list[dict[str, object]]:
    """One row a host; `holders`: rank -> host."""
    return [
        {
            "host": host.index,
            "name": host.name,
            "address": host.address,
            "domain": host.domain,
            "connected": host.connected,
            "lost": host.lost,
            "ranks": [rank for rank, holder in holders.items() if holder == host.index],
        }
        for host in hosts
    ]


def redundancy_row(
    placement: Placement | None, protected: tuple[int, int], lost: Collection[int]
) -> dict[str, object] | None:
    """How many more hosts may be lost now; `protected`: placement and newest step whose parity is whole."""
    if placement is None:
        return None
    whole = protected[0] == placement.number
    left = survivable(placement, lost)
    return {
        "code": f"rs:{placement.k}+{placement.m}",
        "placement": placement.number,
        "protected_step": protected[1] if whole else -1,
        "stripes": {str(stripe): count if whole else 0 for stripe, count in left.items()},
        "losses_tolerated": min(left.values(), default=0) if whole else 0,
        "warnings": list(placement.warnings),
    }

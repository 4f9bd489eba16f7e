"""The plan: which rank hosts which units, and which path each microbatch takes. Pure values.

    units        0 1 2 3 4 5 6 7          a unit is one layer of the user's ordered list
    rank 0..3   [0 1|2 3|4 5|6 7]         replica 0: path of microbatches 0..M/2-1
    rank 4..7   [0 1|2 3|4 5|6 7]         replica 1: path of microbatches M/2..M-1

A plan is the same on every rank and is compared by hash. Nothing else in the system knows the layout:
1F1B, GPipe, interleaving, swapped orders, rerouting and uneven replicas are all just paths. Invariants,
checked at construction (an invalid plan cannot exist):

* every path visits units 0..units-1, each once, in the order the model is trained in that path;
* every microbatch 0..M-1 has exactly one path;
* a rank named in a path lies in 0..world_size-1.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["1f1b", "gpipe"]


@dataclass(frozen=True, slots=True)
class Hop:
    """One visit of a microbatch at a rank: it runs units[0], units[1], ... there, in this order."""

    rank: int
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Path:
    """The hops of a microbatch from input to loss. The last hop's rank computes the loss."""

    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Layout of one step. `paths[m]` is the path of microbatch m; len(paths) == M."""

    world_size: int
    units: int
    paths: tuple[Path, ...]
    schedule: ScheduleKind = "1f1b"

    def __post_init__(self) -> None:
        for microbatch, path in enumerate(self.paths):
            visited = sorted(unit for hop in path.hops for unit in hop.units)
            if visited != list(range(self.units)):
                raise ValueError(f"path of microbatch {microbatch} visits units {visited}, not 0..{self.units - 1}")
            for hop in path.hops:
                if not 0 <= hop.rank < self.world_size:
                    raise ValueError(f"path of microbatch {microbatch} names rank {hop.rank} of {self.world_size}")

    @property
    def microbatches(self) -> int:
        """M: microbatches per step, over all replicas."""
        return len(self.paths)

    def hosted(self, rank: int) -> tuple[int, ...]:
        """Units that `rank` hosts, ascending."""
        return tuple(sorted({u for path in self.paths for hop in path.hops if hop.rank == rank for u in hop.units}))

    def holders(self, unit: int) -> tuple[int, ...]:
        """Ranks that host `unit`, ascending: they exchange its gradient."""
        return tuple(sorted({hop.rank for path in self.paths for hop in path.hops if unit in hop.units}))

    def microbatches_at(self, rank: int, unit: int) -> tuple[int, ...]:
        """Microbatches whose gradient of `unit` is computed at `rank`, ascending."""
        return tuple(
            m for m, path in enumerate(self.paths) if any(hop.rank == rank and unit in hop.units for hop in path.hops)
        )

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of this plan, hex. Equal digests mean equal layouts."""
        value = [
            self.world_size,
            self.units,
            self.schedule,
            [[[hop.rank, list(hop.units)] for hop in path.hops] for path in self.paths],
        ]
        return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()

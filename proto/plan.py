"""The plan: which rank hosts which units, and which path each microbatch takes. Pure values.

    units        0 1 2 3 4 5 6 7          a unit is one layer of the user's ordered list
    rank 0..3   [0 1|2 3|4 5|6 7]         replica 0: path of microbatches 0..M/2-1
    rank 4..7   [0 1|2 3|4 5|6 7]         replica 1: path of microbatches M/2..M-1

A rank hosts the units that it works on, which are those its paths visit, and those that it shadows: a shadow runs no
microbatch of its unit, gets the finished gradient each step and applies the same update, so it has the same bits.

A plan is the same on every rank and is compared by hash. Nothing else in the system knows the layout:
1F1B, GPipe, interleaving, swapped orders, rerouting and uneven replicas are all just paths. Invariants,
checked at construction (an invalid plan cannot exist):

* every path visits units 0..units-1, each once, in the order the model is trained in that path;
* every microbatch 0..M-1 has exactly one path;
* a rank named in a path or by a shadow lies in 0..world_size-1;
* nobody shadows a unit that it works on, nor one that nobody works on.
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


@dataclass(frozen=True, slots=True, order=True)
class Shadow:
    """`rank` keeps `unit` without running it."""

    unit: int
    rank: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Layout of one step. `paths[m]` is the path of microbatch m; len(paths) == M."""

    world_size: int
    units: int
    paths: tuple[Path, ...]
    schedule: ScheduleKind = "1f1b"
    shadows: tuple[Shadow, ...] = ()

    def __post_init__(self) -> None:
        for microbatch, path in enumerate(self.paths):
            visited = sorted(unit for hop in path.hops for unit in hop.units)
            if visited != list(range(self.units)):
                raise ValueError(f"path of microbatch {microbatch} visits units {visited}, not 0..{self.units - 1}")
            for hop in path.hops:
                if not 0 <= hop.rank < self.world_size:
                    raise ValueError(f"path of microbatch {microbatch} names rank {hop.rank} of {self.world_size}")
        if len(set(self.shadows)) < len(self.shadows):
            raise ValueError(f"a shadow is named twice: {self.shadows}")
        for shadow in self.shadows:
            workers = self.workers(shadow.unit)
            if not 0 <= shadow.rank < self.world_size or not workers or shadow.rank in workers:
                raise ValueError(f"{shadow} cannot be: {self.world_size} ranks, of which {workers} work on the unit")

    @property
    def microbatches(self) -> int:
        """M: microbatches per step, over all replicas."""
        return len(self.paths)

    def worked(self, rank: int) -> tuple[int, ...]:
        """Units that `rank` runs microbatches of, ascending."""
        return tuple(sorted({u for path in self.paths for hop in path.hops if hop.rank == rank for u in hop.units}))

    def hosted(self, rank: int) -> tuple[int, ...]:
        """Units whose state `rank` has, ascending: those it works on and those it shadows."""
        shadowed = {shadow.unit for shadow in self.shadows if shadow.rank == rank}
        return tuple(sorted(shadowed.union(self.worked(rank)))) if shadowed else self.worked(rank)

    def workers(self, unit: int) -> tuple[int, ...]:
        """Ranks that compute gradients of `unit`, ascending: they exchange them."""
        return tuple(sorted({hop.rank for path in self.paths for hop in path.hops if unit in hop.units}))

    def holders(self, unit: int) -> tuple[int, ...]:
        """Ranks that have the state of `unit`, ascending, all the same: its workers and its shadows."""
        return tuple(sorted({*self.workers(unit), *(shadow.rank for shadow in self.shadows if shadow.unit == unit)}))

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
            *([[[shadow.unit, shadow.rank] for shadow in self.shadows]] if self.shadows else []),
        ]
        return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()

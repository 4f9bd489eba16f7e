"""The plan of CheckFree+: every other microbatch visits the first two stages, and the last two, in reverse. Pure.

    even microbatches   E S1 ▸ S2 ▸ S3 ▸ ... ▸ S(s-1) ▸ Ss H       E, H: the units before and after the blocks; they
    odd microbatches    E ▸ S2 ▸ S1 ▸ S3 ▸ ... ▸ Ss ▸ S(s-1) ▸ H   stay at the first and the last rank
    shadows             E at the rank of S2, H at that of S(s-1)

S2 so learns what S1 does, and S(s-1) what Ss does: a lost end of the pipeline is replaced by a copy of its partner.
Odd numbers and not the second half of a step: woven, the two orders cost less than one switch between them would
(weave.py). What is at the edges nobody else learns, so their partners keep them as shadows. Validation has no use
for any of this: it runs a chain. Not here: recovery, and what the order costs in convergence. Invariants:

* units are hosted as in the chain of the same split; only the order of visits and the shadows differ;
* every replica swaps by the microbatch's number in the step: which ones are swapped is the same in every layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Hop, Path, Plan, ScheduleKind, Shadow

from .planner import grid_plan, partition

STAGES_MIN = 4
"""With fewer, a stage would be in both pairs."""


def swapped_plan(
    *,
    units: int,
    blocks: Sequence[int],
    stages: int,
    replicas: int,
    microbatches: int,
    schedule: ScheduleKind = "1f1b",
    split: Sequence[int] | None = None,
    shadows: bool = False,
) -> Plan:
    """The swapped plan on `replicas` pipelines. Blocks are dealt evenly unless `split` gives each stage's units."""
    _check(stages, blocks, microbatches // max(replicas, 1))
    begin, end = blocks[0], blocks[-1] + 1
    split = swap_split(units, blocks, stages, split)
    chain = grid_plan(
        units=units, stages=stages, replicas=replicas, microbatches=microbatches, schedule=schedule, split=split
    )
    hops = chain.paths[0].hops
    if hops[0].units[-1] < begin or hops[1].units[0] < begin:
        raise ConfigError(f"swapped stages: the first stage needs layers {begin - 1} and {begin}", split=split)
    if hops[-1].units[0] >= end or hops[-2].units[-1] >= end:
        raise ConfigError(f"swapped stages: the last stage needs layers {end - 1} and {end}", split=split)
    ways = {path: _swapped(path, begin, end) for path in dict.fromkeys(chain.paths)}
    kept: tuple[Shadow, ...] = ()
    if shadows:
        kept = tuple(
            Shadow(unit, rank)
            for path in ways
            for rank, edge in ((path.hops[1].rank, range(begin)), (path.hops[-2].rank, range(end, units)))
            for unit in edge
        )
    paths = tuple(ways[path] if number % 2 else path for number, path in enumerate(chain.paths))
    return Plan(chain.world_size, units, paths, schedule, kept)


def partner(stage: int, stages: int) -> int | None:
    """The stage that learns what `stage` does, numbered from 0; None for those in the middle."""
    pairs = {0: 1, 1: 0, stages - 1: stages - 2, stages - 2: stages - 1}
    return pairs.get(stage) if stages >= STAGES_MIN else None


def alone(plan: Plan) -> Plan:
    """The same microbatches in the same orders on one rank: what `plan` must compute, bit for bit."""
    paths = {
        path: Path((Hop(0, tuple(unit for hop in path.hops for unit in hop.units)),))
        for path in dict.fromkeys(plan.paths)
    }
    return Plan(1, plan.units, tuple(paths[path] for path in plan.paths), plan.schedule)


def swap_costs(units: int, blocks: Sequence[int]) -> tuple[float, ...]:
    """What units cost as far as is known before they run: edges next to nothing, so that they fit anywhere."""
    alike = set(blocks)
    return tuple(1.0 if unit in alike else 0.0 for unit in range(units))


def swap_split(units: int, blocks: Sequence[int], stages: int, split: Sequence[int] | None = None) -> tuple[int, ...]:
    """Units of each stage, unless given: blocks evenly, and the edges with the first and the last."""
    if split is not None:
        return tuple(split)
    begin, end = blocks[0], blocks[-1] + 1
    cuts = partition(swap_costs(units, blocks)[begin:end], stages)
    sizes = [high - low for low, high in cuts]
    sizes[0] += begin
    sizes[-1] += units - end
    return tuple(sizes)


def _check(stages: int, blocks: Sequence[int], each: int) -> None:
    if stages < STAGES_MIN:
        raise ConfigError(f"swapped stages: {STAGES_MIN} stages are needed, so that both ends have two, not {stages}")
    if len(blocks) < stages:
        raise ConfigError(
            f"swapped stages: {stages} stages need as many layers in a row with the same names, shapes and types of "
            f"tensors, the model has {len(blocks)}"
        )
    if each < 2:
        raise ConfigError("swapped stages: every replica needs 2 microbatches a step, one for each order")


def _swapped(path: Path, begin: int, end: int) -> Path:
    """The other order of a chain whose blocks are units begin..end-1."""
    first, second, *inner, before, last = path.hops
    hops = (
        Hop(first.rank, tuple(unit for unit in first.units if unit < begin)),
        second,
        Hop(first.rank, tuple(unit for unit in first.units if unit >= begin)),
        *inner,
        Hop(last.rank, tuple(unit for unit in last.units if unit < end)),
        before,
        Hop(last.rank, tuple(unit for unit in last.units if unit >= end)),
    )
    return Path(tuple(hop for hop in hops if hop.units))

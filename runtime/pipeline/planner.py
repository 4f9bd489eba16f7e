"""The planner: from "so many ranks, layers and microbatches" to a plan. Pure.

    costs   3 1 1 1 2 2 2          partition(costs, 3) ──▶ [0,2) [2,5) [5,7)      largest part: 4
    8 microbatches, 3 replicas     share(8, 3)         ──▶ 0..2  3..5  6..7
    7 layers, 3 stages x 2 replicas, 8 microbatches    grid_plan(...)             rank = replica * 3 + stage

It decides who hosts what and which microbatch goes where, for a regular grid. It does not decide when
(schedule.py does), measures nothing, and knows nothing of failures: a rerouted or re-split layout is just
another plan. Invariants:

* the result depends on the arguments alone, so every rank computes the same plan;
* every stage gets at least one layer and every replica at least one microbatch;
* no partition has a smaller largest part; among the best, counts are as even as possible.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Hop, Path, Plan, ScheduleKind

TICKS = 1 << 32
"""Resolution of costs: the largest one becomes this integer, so 0.1 + 0.2 == 0.3 and ties are ties."""


def to_ticks(costs: Sequence[float]) -> list[int]:
    """Costs as integers relative to the largest. Sums of floats depend on their order; these do not."""
    for index, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ConfigError("a cost must be a finite number, at least 0", index=index, cost=cost)
    largest = max(costs, default=0.0)
    return [round(cost / largest * TICKS) for cost in costs] if largest else [0] * len(costs)


def partition(costs: Sequence[float], stages: int) -> tuple[tuple[int, int], ...]:
    """Cut layers into `stages` runs [begin, end) whose largest cost is the least possible.

    Ties prefer even counts, then longer runs first: equal layers are cut 3/3/2, never 4/3/1.
    """
    layers = len(costs)
    _at_least_one("stages", stages)
    if stages > layers:
        raise ConfigError(f"{stages} stages need at least {stages} layers, the model has {layers}")
    before = [0, *accumulate(to_ticks(costs))]
    bound = _least_bottleneck(before, stages)
    return _evenest(before, stages, bound)


def _least_bottleneck(before: Sequence[int], stages: int) -> int:
    """Cost of the dearest stage in the best cut; before[i] is the cost of the first i layers."""
    layers = len(before) - 1
    best = list(before)
    for stage in range(2, stages + 1):
        shorter = best
        best = [0] * (layers + 1)
        for end in range(stage, layers + 1):
            # shorter[cut] rises with cut, the last run's cost falls: the least maximum is where they cross.
            cuts = range(stage - 1, end)
            spent = before[end]
            cross = bisect_left(cuts, 0, key=lambda cut: shorter[cut] + before[cut] - spent)
            near = cuts[max(cross - 1, 0) : cross + 1]
            best[end] = min(max(shorter[cut], spent - before[cut]) for cut in near)
    return best[layers]


def _evenest(before: Sequence[int], stages: int, bound: int) -> tuple[tuple[int, int], ...]:
    """Of all cuts with no stage above `bound`: least sum of squared counts, then longer runs first."""
    layers = len(before) - 1
    # unevenness[begin] of the best cut of layers begin.. into the number of stages handled so far.
    unevenness: dict[int, int] = {layers: 0}
    choices: list[dict[int, int]] = []
    for stage in reversed(range(stages)):
        rest, unevenness, choice = unevenness, {}, {}
        for begin in range(stage, layers - (stages - stage) + 1):
            for end in range(begin + 1, layers + 1):
                if before[end] - before[begin] > bound:
                    break
                if end not in rest:
                    continue
                value = (end - begin) ** 2 + rest[end]
                if value <= unevenness.get(begin, value):
                    unevenness[begin], choice[begin] = value, end
        choices.append(choice)
    ends = [0]
    for choice in reversed(choices):
        ends.append(choice[ends[-1]])
    return tuple(pairwise(ends))


def share(microbatches: int, replicas: int) -> tuple[range, ...]:
    """Deal microbatches to replicas in contiguous blocks as equal as possible, larger ones first.

    Contiguous, because an aligned block sums to few nodes of the gradient tree: less to exchange.
    """
    _at_least_one("replicas", replicas)
    if replicas > microbatches:
        raise ConfigError(f"{replicas} replicas need at least {replicas} microbatches a step, there are {microbatches}")
    size, larger = divmod(microbatches, replicas)
    edges = accumulate((size + (replica < larger) for replica in range(replicas)), initial=0)
    return tuple(range(begin, end) for begin, end in pairwise(edges))


def choose_grid(world_size: int, stages: int | None, replicas: int | None) -> tuple[int, int]:
    """(stages, replicas) that use every rank; what is left open follows. Nothing given: one long pipeline."""
    _at_least_one("ranks", world_size)
    for name, value in (("stages", stages), ("replicas", replicas)):
        if value is not None:
            _at_least_one(name, value)
    if stages is not None and replicas is not None:
        needed = stages * replicas
        if needed != world_size:
            raise ConfigError(f"{world_size} ranks cannot hold {replicas} replicas of {stages} stages: {needed} needed")
        return stages, replicas
    given = stages if stages is not None else replicas
    if given is None:
        return world_size, 1
    quotient, remainder = divmod(world_size, given)
    if quotient == 0 or remainder:
        what = f"replicas of {given} stages" if stages is not None else f"{given} replicas"
        near = [n for n in (quotient * given, (quotient + 1) * given) if n]
        raise ConfigError(f"{world_size} ranks do not divide into {what}: use {' or '.join(map(str, near))} ranks")
    return (given, quotient) if stages is not None else (quotient, given)


def grid_plan(
    *,
    units: int,
    stages: int,
    replicas: int,
    microbatches: int,
    interleave: int = 1,
    schedule: ScheduleKind = "1f1b",
    costs: Sequence[float] | None = None,
    split: Sequence[int] | None = None,
) -> Plan:
    """Plan of `replicas` equal pipelines: rank = replica * stages + stage.

    With interleave v every rank hosts v chunks that are `stages` apart, so hop i is at stage i % stages.
    Units are cut by `split` (their number in each chunk), else by `costs` (one each), else evenly.
    """
    for name, value in (("stages", stages), ("replicas", replicas), ("interleave", interleave)):
        _at_least_one(name, value)
    if schedule not in ("1f1b", "gpipe"):
        raise ConfigError(f"there is no schedule {schedule!r}: use '1f1b' or 'gpipe'")
    if interleave > 1 and stages == 1:
        raise ConfigError("interleave needs at least 2 stages: one stage has nobody to alternate with")
    chunks = _chunks(units, stages * interleave, costs, split)
    paths: list[Path] = []
    for replica, block in enumerate(share(microbatches, replicas)):
        hops = tuple(
            Hop(replica * stages + i % stages, tuple(range(begin, end))) for i, (begin, end) in enumerate(chunks)
        )
        paths += [Path(hops)] * len(block)
    return Plan(stages * replicas, units, tuple(paths), schedule)


def _chunks(
    units: int, chunks: int, costs: Sequence[float] | None, split: Sequence[int] | None
) -> tuple[tuple[int, int], ...]:
    """Cut `units` as asked for; every way to ask wrongly has its own sentence."""
    if split is not None and costs is not None:
        raise ConfigError("costs and split both say how to cut the layers: give one of them")
    if costs is not None and len(costs) != units:
        raise ConfigError(f"{len(costs)} costs for {units} layers: one each is needed")
    if split is None:
        return partition(costs if costs is not None else [1.0] * units, chunks)
    if len(split) != chunks:
        raise ConfigError(f"split names {len(split)} parts, the plan has {chunks}", split=tuple(split))
    if min(split) < 1:
        raise ConfigError("split leaves a part without layers", split=tuple(split))
    if sum(split) != units:
        raise ConfigError(f"split adds up to {sum(split)} layers, the model has {units}", split=tuple(split))
    return tuple(pairwise(accumulate(split, initial=0)))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")

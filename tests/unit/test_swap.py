"""The swapped plan: who visits what in which order, who keeps what besides, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Hop, Path, Plan, Shadow
from holdfast.runtime.pipeline.blocks import longest_run
from holdfast.runtime.pipeline.planner import grid_plan
from holdfast.runtime.pipeline.swap import alone, swap_costs, swapped_plan

FOUR: dict[str, Any] = {"units": 10, "blocks": range(1, 9), "stages": 4, "replicas": 1, "microbatches": 4}


def plain(stages: int, each: int, before: int, after: int, odd: bool) -> list[tuple[int, list[int]]]:
    """The order as the paper words it, by stage numbers from 1: (rank, units) of each hop."""
    numbers = list(range(1, stages + 1))
    if odd:
        numbers = [2, 1, *numbers[2:-2], stages, stages - 1]
    blocks = {k: [before + (k - 1) * each + i for i in range(each)] for k in numbers}
    embedding, head = list(range(before)), [before + stages * each + i for i in range(after)]
    if not odd:
        blocks[1], blocks[stages] = embedding + blocks[1], blocks[stages] + head
        return [(k - 1, blocks[k]) for k in numbers]
    return [(0, embedding), *[(k - 1, blocks[k]) for k in numbers], (stages - 1, head)]


@pytest.mark.parametrize("stages", [4, 5, 6, 12])
@pytest.mark.parametrize("replicas", [1, 3])
def test_odd_microbatches_visit_the_ends_in_reverse_and_even_ones_in_order(stages: int, replicas: int) -> None:
    each, before, after, microbatches = 2, 1, 2, 14
    units = before + stages * each + after
    plan = swapped_plan(
        units=units, blocks=range(before, units - after), stages=stages, replicas=replicas, microbatches=microbatches
    )
    shares = {1: [14], 3: [5, 5, 4]}[replicas]
    replica_of = [replica for replica, share in enumerate(shares) for _ in range(share)]
    for microbatch, path in enumerate(plan.paths):
        expected = plain(stages, each, before, after, microbatch % 2 == 1)
        first = replica_of[microbatch] * stages
        assert [(hop.rank, list(hop.units)) for hop in path.hops] == [(first + rank, u) for rank, u in expected]


def test_ranks_work_on_the_same_units_as_in_the_chain() -> None:
    chain = grid_plan(units=10, stages=4, replicas=1, microbatches=4, split=[3, 2, 2, 3])
    plan = swapped_plan(**FOUR)
    assert [plan.worked(rank) for rank in range(4)] == [chain.hosted(rank) for rank in range(4)]
    assert plan.shadows == ()
    assert plan.hosted(1) == plan.worked(1) == (3, 4)


def test_the_partners_shadow_the_edges_in_every_replica() -> None:
    plan = swapped_plan(**(FOUR | {"units": 11, "replicas": 2, "shadows": True}))
    assert set(plan.shadows) == {
        *(Shadow(0, rank) for rank in (1, 5)),
        *(Shadow(unit, rank) for unit in (9, 10) for rank in (2, 6)),
    }
    assert plan.hosted(1) == (0, 3, 4)
    assert plan.worked(1) == (3, 4)
    assert plan.hosted(2) == (5, 6, 9, 10)
    assert plan.holders(0) == (0, 1, 4, 5)
    assert plan.workers(0) == (0, 4)
    assert plan.microbatches_at(1, 0) == ()
    assert plan.microbatches_at(0, 0) == (0, 1)


def test_a_model_of_blocks_alone_has_no_edges_to_keep() -> None:
    plan = swapped_plan(units=8, blocks=range(8), stages=4, replicas=1, microbatches=2, shadows=True)
    assert plan.shadows == ()
    assert [hop.rank for hop in plan.paths[1].hops] == [1, 0, 3, 2]


def test_blocks_are_dealt_evenly_whatever_the_edges_weigh() -> None:
    plan = swapped_plan(units=14, blocks=range(3, 13), stages=4, replicas=1, microbatches=2)
    assert [plan.worked(rank) for rank in range(4)] == [tuple(range(0, 6)), (6, 7, 8), (9, 10), (11, 12, 13)]


def test_one_rank_alone_runs_every_microbatch_in_the_same_order() -> None:
    plan = swapped_plan(**FOUR, shadows=True)
    single = alone(plan)
    assert (single.world_size, single.shadows, single.schedule) == (1, (), plan.schedule)
    assert [path.hops for path in single.paths[:2]] == [
        (Hop(0, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),),
        (Hop(0, (0, 3, 4, 1, 2, 7, 8, 5, 6, 9)),),
    ]


def test_edges_cost_nothing_and_blocks_one_each() -> None:
    assert swap_costs(6, (1, 2, 4)) == (0, 1, 1, 0, 1, 0)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"stages": 3}, "4 stages are needed, so that both ends have two, not 3"),
        ({"blocks": (4, 5, 6)}, "4 stages need as many layers in a row with the same names"),
        ({"blocks": ()}, "the model has 0"),
        ({"microbatches": 1}, "every replica needs 2 microbatches"),
        ({"microbatches": 7, "replicas": 4}, "every replica needs 2 microbatches"),
        ({"split": [1, 4, 3, 2]}, "the first stage needs layers 0 and 1 [split=(1, 4, 3, 2)]"),
        ({"split": [3, 3, 3, 1]}, "the last stage needs layers 8 and 9 [split=(3, 3, 3, 1)]"),
        ({"split": [3, 3, 3]}, "split names 3 parts, the plan has 4"),
    ],
)
def test_what_cannot_be_swapped_is_refused_in_one_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        swapped_plan(**(FOUR | wrong))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- shadows in a plan


CHAIN = Path((Hop(0, (0,)), Hop(1, (1,))))


def test_shadows_are_part_of_what_plans_are_compared_by() -> None:
    plan = Plan(3, 2, (CHAIN,))
    shadowed = replace(plan, shadows=(Shadow(0, 2),))
    assert plan.digest() != shadowed.digest() != replace(plan, shadows=(Shadow(1, 2),)).digest()


@pytest.mark.parametrize(
    "shadows",
    [(Shadow(0, 0),), (Shadow(0, 3),), (Shadow(2, 1),), (Shadow(0, 2), Shadow(0, 2))],
    ids=["works on it", "no such rank", "no such unit", "twice"],
)
def test_a_shadow_that_cannot_be_is_no_plan(shadows: tuple[Shadow, ...]) -> None:
    with pytest.raises(ValueError, match="hadow"):
        Plan(3, 2, (CHAIN,), shadows=shadows)


# ---- blocks


@pytest.mark.parametrize(
    ("kinds", "blocks"),
    [
        ("abbbbc", (1, 2, 3, 4)),
        ("ab", ()),
        ("", ()),
        ("aabbb", (2, 3, 4)),
        ("aabb", (0, 1)),
        ("a.b.b..bc", (2, 4, 7)),
        ("....", ()),
    ],
)
def test_blocks_are_the_longest_run_of_one_kind(kinds: str, blocks: tuple[int, ...]) -> None:
    assert longest_run([kind.replace(".", "") for kind in kinds]) == blocks

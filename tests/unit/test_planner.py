"""The planner's plans and its refusals: cuts, shares, grids."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Hop, Path
from holdfast.runtime.pipeline.planner import choose_grid, grid_plan, partition, share


def sizes(parts: tuple[tuple[int, int], ...]) -> list[int]:
    return [end - begin for begin, end in parts]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([0, 1, 2, 4, 5, 8, 16]), min_size=1, max_size=9), st.data())
def test_no_other_cut_has_a_smaller_largest_part_nor_as_small_a_one_and_evener_counts(
    costs: list[int], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    inner = combinations(range(1, len(costs)), stages - 1)
    cuts = [tuple(pairwise((0, *cut, len(costs)))) for cut in inner]

    def merit(parts: tuple[tuple[int, int], ...]) -> tuple[int, int, list[int]]:
        largest = max(sum(costs[begin:end]) for begin, end in parts)
        return largest, sum((end - begin) ** 2 for begin, end in parts), [begin - end for begin, end in parts]

    assert partition(costs, stages) == min(cuts, key=merit)


def test_equal_layers_are_cut_as_evenly_as_they_can_be_longer_runs_first() -> None:
    assert sizes(partition([1.0] * 8, 3)) == [3, 3, 2]
    assert sizes(partition([0.0] * 8, 3)) == [3, 3, 2]


def test_sums_of_equal_floats_are_equal_whatever_their_place() -> None:
    # 0.1 added up has another last bit than the difference of two such sums: floats would cut 2/3/3/2.
    assert sizes(partition([0.1] * 10, 4)) == [3, 3, 2, 2]


def test_a_dear_layer_gets_a_stage_of_its_own() -> None:
    assert partition([1, 1, 1, 9, 1, 1], 3) == ((0, 3), (3, 4), (4, 6))


def test_a_deep_model_is_cut_without_a_search_through_all_cuts() -> None:
    costs = [(index * 7919) % 97 + 1 for index in range(300)]
    parts = partition(costs, 24)
    assert len(parts) == 24
    assert max(sum(costs[begin:end]) for begin, end in parts) < 1.2 * sum(costs) / 24


def test_more_stages_than_layers_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"^4 stages need at least 4 layers, the model has 3$"):
        partition([1.0] * 3, 4)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_cost_that_is_no_cost_is_refused_by_its_index(cost: float) -> None:
    with pytest.raises(ConfigError, match="index=1"):
        partition([1.0, cost, 1.0], 2)


def test_shares_are_blocks_as_equal_as_possible_larger_first() -> None:
    assert share(8, 3) == (range(0, 3), range(3, 6), range(6, 8))
    assert share(4, 4) == (range(0, 1), range(1, 2), range(2, 3), range(3, 4))


def test_a_replica_without_a_microbatch_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 replicas need at least 5 microbatches a step, there are 4"):
        share(4, 5)


def test_a_grid_follows_from_what_is_given() -> None:
    assert choose_grid(8, None, None) == (8, 1)
    assert choose_grid(8, 4, None) == (4, 2)
    assert choose_grid(8, None, 4) == (2, 4)
    assert choose_grid(8, 2, 4) == (2, 4)


@pytest.mark.parametrize(
    ("world_size", "stages", "replicas", "sentence"),
    [
        (5, 2, 2, "5 ranks cannot hold 2 replicas of 2 stages: 4 needed"),
        (3, 2, 2, "3 ranks cannot hold 2 replicas of 2 stages: 4 needed"),
        (5, 2, None, "5 ranks do not divide into replicas of 2 stages: use 4 or 6 ranks"),
        (5, None, 3, "5 ranks do not divide into 3 replicas: use 3 or 6 ranks"),
        (3, 4, None, "3 ranks do not divide into replicas of 4 stages: use 4 ranks"),
        (0, None, None, "ranks must be at least 1, not 0"),
        (4, 0, None, "stages must be at least 1, not 0"),
        (4, 2, -1, "replicas must be at least 1, not -1"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_one_that_does(
    world_size: int, stages: int | None, replicas: int | None, sentence: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_grid(world_size, stages, replicas)
    assert str(refused.value) == sentence


def test_replicas_lie_one_after_another_and_take_blocks_of_microbatches() -> None:
    plan = grid_plan(units=5, stages=2, replicas=2, microbatches=3)
    first, second = (Path((Hop(r, (0, 1, 2)), Hop(r + 1, (3, 4)))) for r in (0, 2))
    assert plan.world_size == 4
    assert plan.paths == (first, first, second)
    assert plan.schedule == "1f1b"


def test_interleaved_chunks_of_a_rank_are_a_round_apart() -> None:
    plan = grid_plan(units=8, stages=2, replicas=1, microbatches=2, interleave=2, schedule="gpipe")
    assert plan.paths[0] == Path((Hop(0, (0, 1)), Hop(1, (2, 3)), Hop(0, (4, 5)), Hop(1, (6, 7))))
    assert plan.hosted(0) == (0, 1, 4, 5)
    assert plan.schedule == "gpipe"


def test_layers_are_cut_by_cost_or_by_an_explicit_split() -> None:
    by_cost = grid_plan(units=4, stages=2, replicas=1, microbatches=1, costs=[3, 1, 1, 1])
    by_split = grid_plan(units=4, stages=2, replicas=1, microbatches=1, split=[3, 1])
    assert [hop.units for hop in by_cost.paths[0].hops] == [(0,), (1, 2, 3)]
    assert [hop.units for hop in by_split.paths[0].hops] == [(0, 1, 2), (3,)]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"split": [2, 2, 2]}, "split names 3 parts, the plan has 2"),
        ({"split": [6, 0]}, "split leaves a part without layers"),
        ({"split": [3, 4]}, "split adds up to 7 layers, the model has 6"),
        ({"costs": [1.0] * 5}, "5 costs for 6 layers: one each is needed"),
        ({"costs": [1.0] * 6, "split": [3, 3]}, "costs and split both say how to cut the layers"),
        ({"stages": 1, "interleave": 2}, "interleave needs at least 2 stages"),
        ({"interleave": 4}, "8 stages need at least 8 layers, the model has 6"),
        ({"interleave": 0}, "interleave must be at least 1, not 0"),
        ({"schedule": "zero-bubble"}, "there is no schedule 'zero-bubble'"),
        ({"replicas": 5}, "5 replicas need at least 5 microbatches"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_sentence(wrong: dict[str, object], sentence: str) -> None:
    asked: dict[str, object] = {"units": 6, "stages": 2, "replicas": 1, "microbatches": 4} | wrong
    with pytest.raises(ConfigError) as refused:
        grid_plan(**asked)  # type: ignore[arg-type]
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_same_question_gives_the_same_plan_and_another_one_another() -> None:
    plans = [grid_plan(units=7, stages=3, replicas=2, microbatches=m, costs=[3, 1, 1, 1, 2, 2, 2]) for m in (8, 8, 9)]
    assert plans[0].digest() == plans[1].digest() != plans[2].digest()

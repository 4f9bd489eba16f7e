"""Rebuilding a stage from its neighbours, against the formula written out plainly."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from holdfast.proto.errors import ConfigError
from holdfast.runtime.recovery.neighbours import (
    Average,
    Copy,
    Layout,
    NeighbourOptions,
    Rebuild,
    Term,
    combine,
    describe,
    plan_rebuild,
)

FLOOR = 1e-4


def pipeline(counts: list[int], *, edges: bool = True, shadows: Mapping[int, tuple[int, ...]] | None = None) -> Layout:
    """One rank a stage with so many blocks each; embedding on the first rank, head on the last."""
    holders = [(rank,) for rank, count in enumerate(counts) for _ in range(count)]
    kinds = ["block"] * len(holders)
    if edges:
        holders = [(0,), *holders, (len(counts) - 1,)]
        kinds = ["embedding", *kinds, "head"]
    for unit, ranks in (shadows or {}).items():
        holders[unit] = ranks
    return Layout(tuple(kinds), tuple(holders))


def others(stages: int, *lost: int) -> set[int]:
    return set(range(stages)) - set(lost)


def weights_of(layout: Layout, seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        unit: {"w": torch.randn(4, 3, generator=generator), "norm": torch.randn(4, generator=generator)}
        for unit in range(len(layout.kinds))
    }


@pytest.mark.parametrize("stages", [4, 6, 12])
@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_every_inner_stage_is_the_weighted_average_of_its_neighbours_layer_by_layer(stages: int, exponent: int) -> None:
    layers = 2
    layout = pipeline([layers] * stages)
    tensors = weights_of(layout)
    norms = {unit: 0.1 + unit / 7 for unit in range(len(layout.kinds))}
    for lost in range(1, stages - 1):
        plan = plan_rebuild(layout, lost, others(stages, lost), norms, NeighbourOptions(exponent=exponent))
        assert plan.missing == ()
        first = 1 + lost * layers
        assert [recipe.unit for recipe in plan.recipes] == [first, first + 1]
        # Plainly: the norm of a stage's gradient, to the power, plus a little.
        left_norm = (norms[first - 2] ** 2 + norms[first - 1] ** 2) ** 0.5
        right_norm = (norms[first + 2] ** 2 + norms[first + 3] ** 2) ** 0.5
        left, right = left_norm**exponent + FLOOR, right_norm**exponent + FLOOR
        for j, recipe in enumerate(plan.recipes):
            made = combine(recipe, lambda unit, rank: tensors[unit])
            for name in ("w", "norm"):
                a, b = tensors[first - layers + j][name], tensors[first + layers + j][name]
                assert torch.equal(made[name], (a * left + b * right) / (left + right))


@pytest.mark.parametrize("stages", [4, 6, 12])
def test_first_and_last_stage_are_copies_of_the_stage_beside_them(stages: int) -> None:
    layout = pipeline([2] * stages, edges=False)
    first = plan_rebuild(layout, 0, others(stages, 0), {})
    assert first.recipes == (Copy(0, 2, 1, exact=False), Copy(1, 3, 1, exact=False))
    end = 2 * stages
    last = plan_rebuild(layout, stages - 1, others(stages, stages - 1), {})
    assert last.recipes == (
        Copy(end - 2, end - 4, stages - 2, exact=False),
        Copy(end - 1, end - 3, stages - 2, exact=False),
    )


def test_a_unit_that_a_live_rank_hosts_too_is_taken_from_there_exactly() -> None:
    layout = pipeline([1] * 4, shadows={0: (0, 1), 5: (2, 3)})
    assert plan_rebuild(layout, 0, others(4, 0), {}).recipes == (
        Copy(0, 0, 1, exact=True),
        Copy(1, 2, 1, exact=False),
    )
    recipes = plan_rebuild(layout, 1, others(4, 1), {}).recipes
    assert recipes[0] == Copy(0, 0, 0, exact=True), "the shadow of the embedding comes back from the embedding"
    assert isinstance(recipes[1], Average)


def test_an_edge_without_another_live_holder_is_missing_and_nothing_is_made_up_for_it() -> None:
    layout = pipeline([2, 2, 2])
    plan = plan_rebuild(layout, 0, others(3, 0), {})
    assert plan.missing == (0,)
    assert [recipe.unit for recipe in plan.recipes] == [1, 2]
    shadowed = pipeline([2, 2, 2], shadows={0: (0, 1)})
    assert plan_rebuild(shadowed, 0, others(3, 0, 1), {}).missing == (0,), "its shadow is lost too"


def test_two_stages_that_are_not_adjacent_are_rebuilt_each_from_its_own_neighbours() -> None:
    layout = pipeline([1] * 6, edges=False)
    live = others(6, 1, 3)
    assert _ranks(plan_rebuild(layout, 1, live, {})) == [(0, 2)]
    assert _ranks(plan_rebuild(layout, 3, live, {})) == [(2, 4)]


def test_adjacent_stages_lost_together_are_interpolated_by_depth_between_live_layers() -> None:
    layout = pipeline([2] * 4, edges=False)  # units 0 1 | 2 3 | 4 5 | 6 7
    live = others(4, 1, 2)
    recipes = plan_rebuild(layout, 1, live, {}).recipes + plan_rebuild(layout, 2, live, {}).recipes
    weight = 1 + FLOOR  # without a gradient yet all stages count the same
    expected = {
        2: ((1, weight * (1 - 1 / 5)), (6, weight * (1 / 5))),
        3: ((1, weight * (1 - 2 / 5)), (6, weight * (2 / 5))),
        4: ((1, weight * (1 - 3 / 5)), (6, weight * (3 / 5))),
        5: ((1, weight * (1 - 4 / 5)), (6, weight * (4 / 5))),
    }
    found = {r.unit: tuple((t.unit, t.weight) for t in r.terms) for r in recipes if isinstance(r, Average)}
    assert found == expected


@pytest.mark.parametrize(("lost", "beside"), [((0, 1), 2), ((4, 5), 3)])
def test_with_an_end_and_its_neighbour_lost_both_are_copies_of_the_nearest_live_stage(
    lost: tuple[int, int], beside: int
) -> None:
    layout = pipeline([2] * 6, edges=False)
    for rank in lost:
        for j, recipe in enumerate(plan_rebuild(layout, rank, others(6, *lost), {}).recipes):
            assert recipe == Copy(2 * rank + j, 2 * beside + j, beside, exact=False)


def test_of_all_stages_but_one_the_one_that_is_left_is_copied_everywhere() -> None:
    layout = pipeline([1] * 4, edges=False)
    for rank in (0, 1, 3):
        assert plan_rebuild(layout, rank, {2}, {}).recipes == (Copy(rank, 2, 2, exact=False),)
    assert plan_rebuild(layout, 0, set(), {}) == Rebuild((), (0,))


def test_uneven_stages_are_interpolated_by_depth_between_the_layers_beside_them() -> None:
    layout = pipeline([3, 3, 2, 2], edges=False)  # units 0 1 2 | 3 4 5 | 6 7 | 8 9
    norms = {unit: float(unit + 1) for unit in range(10)}
    left = (1 + 4 + 9) ** 0.5 + FLOOR
    right = (49 + 64) ** 0.5 + FLOOR
    recipes = plan_rebuild(layout, 1, others(4, 1), norms).recipes
    for recipe, share in zip(recipes, (1 / 4, 2 / 4, 3 / 4), strict=True):
        assert isinstance(recipe, Average)
        assert [(t.unit, t.weight) for t in recipe.terms] == [(2, left * (1 - share)), (6, right * share)]


def test_the_copy_of_an_uneven_end_pairs_layers_of_equal_depth() -> None:
    recipes = plan_rebuild(pipeline([4, 2], edges=False), 0, {1}, {}).recipes
    assert [(r.unit, r.from_unit) for r in recipes if isinstance(r, Copy)] == [(0, 4), (1, 4), (2, 5), (3, 5)]
    recipes = plan_rebuild(pipeline([4, 2], edges=False), 1, {0}, {}).recipes
    assert [(r.unit, r.from_unit) for r in recipes if isinstance(r, Copy)] == [(4, 0), (5, 2)]


def test_with_one_layer_a_stage_interpolation_is_the_average() -> None:
    even, norms = pipeline([1, 1, 1], edges=False), {0: 0.3, 2: 0.9}
    (average,) = plan_rebuild(even, 1, {0, 2}, norms).recipes
    (uneven,) = plan_rebuild(pipeline([1, 1, 2], edges=False), 1, {0, 2}, {**norms, 3: 0.0}).recipes
    assert isinstance(average, Average)
    assert isinstance(uneven, Average)
    shares = [[t.weight / sum(u.weight for u in r.terms) for t in r.terms] for r in (average, uneven)]
    assert shares[0] == pytest.approx(shares[1])


def test_a_stage_without_a_gradient_yet_counts_as_much_as_the_other() -> None:
    (recipe,) = plan_rebuild(pipeline([1, 1, 1], edges=False), 1, {0, 2}, {0: 0.25}).recipes
    assert isinstance(recipe, Average)
    assert recipe.terms == (Term(0, 0, 0.25 + FLOOR), Term(2, 2, 0.25 + FLOOR))


def test_chunks_of_an_interleaved_pipeline_are_stages_of_their_own() -> None:
    layout = Layout(("b",) * 8, ((0,), (0,), (1,), (1,), (0,), (0,), (1,), (1,)))
    recipes = plan_rebuild(layout, 1, {0}, {}).recipes
    assert [recipe.unit for recipe in recipes] == [2, 3, 6, 7]
    assert all(isinstance(recipe, Average) for recipe in recipes[:2])
    assert recipes[2:] == (Copy(6, 4, 0, exact=False), Copy(7, 5, 0, exact=False))


def test_layers_without_state_are_no_edge_and_need_no_source() -> None:
    kinds = ("embed", "b", "", "b", "", "b", "head")
    layout = Layout(kinds, ((0,), (0,), (0,), (1,), (1,), (2,), (2,)))
    assert layout.blocks == (1, 3, 5)
    plan = plan_rebuild(layout, 1, {0, 2}, {})
    assert [recipe.unit for recipe in plan.recipes] == [3]
    assert plan.missing == ()


def test_all_replicas_of_a_lost_stage_get_the_same_recipe() -> None:
    layout = Layout(("b",) * 3, ((0, 3), (1, 4), (2, 5)))
    plans = [plan_rebuild(layout, rank, {0, 2, 3, 5}, {0: 0.5, 2: 0.7}) for rank in (1, 4)]
    assert plans[0] == plans[1]


def test_the_learning_rate_factor_stays_or_goes_back_to_one_in_a_straight_line() -> None:
    assert [NeighbourOptions().factor(steps) for steps in (0, 1, 10**6)] == [1.1, 1.1, 1.1]
    decaying = NeighbourOptions(lr_factor=1.2, lr_decay_steps=4)
    assert [decaying.factor(steps) for steps in range(6)] == pytest.approx([1.2, 1.15, 1.1, 1.05, 1.0, 1.0])


@pytest.mark.parametrize("wrong", [{"exponent": 3}, {"clip": "never"}, {"lr_factor": 0}, {"lr_decay_steps": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="neighbours: "):
        NeighbourOptions(**wrong)  # type: ignore[arg-type]


def test_a_counter_is_not_averaged() -> None:
    tensors = {0: {"n": torch.tensor(5)}, 2: {"n": torch.tensor(9)}}
    recipe = Average(1, (Term(0, 0, 0.1), Term(2, 2, 0.4)))
    assert combine(recipe, lambda unit, rank: tensors[unit]) == {"n": torch.tensor(9)}


def test_what_was_done_is_said_with_shares() -> None:
    recipes = (Copy(0, 0, 1, exact=True), Average(1, (Term(0, 0, 1.0), Term(2, 2, 3.0))))
    assert describe(recipes) == "layer 0 taken from rank 1, averaged from 0.250 of rank 0 and 0.750 of rank 2"


def _ranks(plan: Rebuild) -> list[tuple[int, ...]]:
    return [tuple(term.rank for term in recipe.terms) for recipe in plan.recipes if isinstance(recipe, Average)]

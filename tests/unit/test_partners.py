"""CheckFree+ as recipes: what a lost rank of the swapped plan is rebuilt from, against the rules written out."""

from __future__ import annotations

import pytest

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Plan
from holdfast.runtime.pipeline.swap import STAGES_MIN, partner, swapped_plan
from holdfast.runtime.recovery.neighbours import (
    Average,
    Copy,
    Layout,
    NeighbourOptions,
    Rebuild,
    plan_rebuild,
)

EACH = 2
"""Blocks of a stage."""


def plan_of(stages: int, *, replicas: int = 1, after: int = 2) -> Plan:
    units = 1 + EACH * stages + after
    return swapped_plan(
        units=units,
        blocks=range(1, 1 + EACH * stages),
        stages=stages,
        replicas=replicas,
        microbatches=4 * replicas,
        shadows=True,
    )


def rebuild(
    plan: Plan, rank: int, *lost: int, options: NeighbourOptions | None = None, swapped: bool = True
) -> Rebuild:
    hosted = {unit for path in plan.paths for hop in path.hops for unit in hop.units}
    edges = [unit for unit in hosted if unit == 0 or unit > EACH * (len(plan.paths[0].hops))]
    kinds = tuple(f"edge {unit}" if unit in edges else "block" for unit in range(plan.units))
    layout = Layout(kinds, tuple(plan.holders(unit) for unit in range(plan.units)))
    live = set(range(plan.world_size)) - {rank, *lost}
    return plan_rebuild(layout, rank, live, {}, options, swapped=swapped)


def expected(stage: int, stages: int, averaged: bool) -> list[tuple[int, ...]]:
    """By stage numbers from 1, as the paper and its code have it: the stages that stage `stage` is made of."""
    copies = {1: 2, stages: stages - 1}
    if not averaged:
        copies |= {2: 1, stages - 1: stages}
    sources = (copies[stage],) if stage in copies else (stage - 1, stage + 1)
    return [tuple(1 + EACH * (source - 1) + layer for source in sources) for layer in range(EACH)]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("stages", [4, 6, 12])
def test_ends_are_copied_from_their_partners_and_the_middle_is_averaged(stages: int, averaged: bool) -> None:
    options = NeighbourOptions(partners="average" if averaged else "copy")
    plan = plan_of(stages)
    for stage in range(1, stages + 1):
        made = rebuild(plan, stage - 1, options=options)
        assert made.missing == ()
        blocks = [r for r in made.recipes if 1 <= r.unit <= EACH * stages]
        assert [r.unit for r in blocks] == [EACH * (stage - 1) + 1 + layer for layer in range(EACH)]
        found = [
            (recipe.from_unit,) if isinstance(recipe, Copy) else tuple(term.unit for term in recipe.terms)
            for recipe in blocks
        ]
        assert found == expected(stage, stages, averaged)
        assert not any(isinstance(recipe, Copy) and recipe.exact for recipe in blocks)


@pytest.mark.parametrize("stages", [4, 6, 12])
def test_edges_come_back_exactly_from_whoever_else_keeps_them(stages: int) -> None:
    plan = plan_of(stages)
    head = (1 + EACH * stages, 2 + EACH * stages)
    for rank, units, source in (
        (0, (0,), 1),
        (1, (0,), 0),
        (stages - 1, head, stages - 2),
        (stages - 2, head, stages - 1),
    ):
        exact = [r for r in rebuild(plan, rank).recipes if isinstance(r, Copy) and r.exact]
        assert exact == [Copy(unit, unit, source, exact=True) for unit in units]


def test_an_edge_is_lost_with_both_that_keep_it_and_both_ends_at_once_are_not() -> None:
    plan = plan_of(6)
    assert rebuild(plan, 0, 1).missing == (0,)
    assert rebuild(plan, 1, 0).missing == (0,)
    for rank, other in ((0, 5), (5, 0), (1, 4), (4, 1)):
        assert rebuild(plan, rank, other).missing == ()


def test_a_stage_whose_partner_is_lost_too_is_made_of_what_is_left() -> None:
    made = rebuild(plan_of(6), 1, 0)
    copies = [recipe for recipe in made.recipes if isinstance(recipe, Copy)]
    assert [(copy.unit, copy.from_unit) for copy in copies] == [(3, 5), (4, 6)]


def test_stages_that_are_not_swapped_have_no_partners() -> None:
    made = rebuild(plan_of(6), 1, swapped=False)
    assert all(isinstance(recipe, Average) for recipe in made.recipes if recipe.unit > 0)
    assert [partner(stage, 6) for stage in range(6)] == [1, 0, None, None, 5, 4]
    assert [partner(stage, STAGES_MIN - 1) for stage in range(3)] == [None, None, None]


def test_a_replica_is_always_taken_exactly() -> None:
    made = rebuild(plan_of(4, replicas=2), 0)
    assert made.recipes == tuple(Copy(unit, unit, 4 if unit else 1, exact=True) for unit in (0, 1, 2))


def test_another_word_for_partners_is_refused() -> None:
    with pytest.raises(ConfigError, match="partners is 'copy' or 'average', got 'swap'"):
        NeighbourOptions(partners="swap")  # type: ignore[arg-type]

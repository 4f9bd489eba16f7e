"""Schedules of any layout are complete and cannot deadlock; the classical ones are the classical ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Hop, Path, Plan
from holdfast.runtime.pipeline.planner import grid_plan, share
from holdfast.runtime.pipeline.schedule import (
    Action,
    Schedule,
    check,
    consumer,
    make_schedule,
    receives,
    send_order,
    sends,
)
from holdfast.runtime.pipeline.swap import swap_costs, swapped_plan
from holdfast.runtime.pipeline.weave import Stop, weave

thorough = settings(derandomize=True, deadline=None, max_examples=120)


def chain(ranks: list[int], edges: list[int]) -> Path:
    """Path over `ranks`, the i-th running units edges[i]..edges[i + 1] - 1."""
    spans = pairwise(edges)
    return Path(tuple(Hop(rank, tuple(range(*span))) for rank, span in zip(ranks, spans, strict=True)))


def swapped(stages: int, microbatches: int, *, alternate: bool = False) -> Plan:
    """CheckFree+: half of the microbatches visit the first two and the last two stages in reverse."""
    order = list(range(stages))
    order[0], order[1] = order[1], order[0]
    order[-1], order[-2] = order[-2], order[-1]
    ways = Path(tuple(Hop(s, (s,)) for s in range(stages))), Path(tuple(Hop(s, (s,)) for s in order))
    half = microbatches // 2
    return Plan(stages, stages, tuple(ways[m % 2 if alternate else m >= half] for m in range(microbatches)))


def words(schedule: Schedule, rank: int) -> str:
    """A rank's list with microbatches only, as it is drawn in the literature."""
    return " ".join(f"{action.kind}{action.microbatch}" for action in schedule.ranks[rank].actions)


@st.composite
def grids(draw: st.DrawFn) -> Plan:
    stages, replicas = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    interleave = draw(st.integers(1, 3)) if stages > 1 else 1
    split = draw(st.lists(st.integers(1, 3), min_size=stages * interleave, max_size=stages * interleave))
    return grid_plan(
        units=sum(split),
        stages=stages,
        replicas=replicas,
        microbatches=draw(st.integers(replicas, 14)),
        interleave=interleave,
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        split=split,
    )


@st.composite
def uneven_replicas(draw: st.DrawFn) -> Plan:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    microbatches = draw(st.integers(len(lengths), 12))
    paths: list[Path] = []
    for first, length, block in zip(
        accumulate(lengths, initial=0), lengths, share(microbatches, len(lengths)), strict=False
    ):
        cuts = sorted(draw(st.sets(st.integers(1, 5), min_size=length - 1, max_size=length - 1)))
        paths += [chain(list(range(first, first + length)), [0, *cuts, 6])] * len(block)
    return Plan(sum(lengths), 6, tuple(paths), draw(st.sampled_from(["1f1b", "gpipe"])))


@st.composite
def any_paths(draw: st.DrawFn) -> Plan:
    """Anything a plan can say: units in any order, ranks again and again, one after itself, or never."""
    world_size, units = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    ways: list[Path] = []
    for _ in range(draw(st.integers(1, 4))):
        order = draw(st.permutations(range(units)))
        cuts = sorted(draw(st.sets(st.integers(1, max(1, units - 1)), max_size=units - 1)) - {units})
        spans = pairwise([0, *cuts, units])
        ways.append(Path(tuple(Hop(draw(st.integers(0, world_size - 1)), tuple(order[b:e])) for b, e in spans)))
    paths = draw(st.lists(st.sampled_from(ways), min_size=1, max_size=10))
    return Plan(world_size, units, tuple(paths), draw(st.sampled_from(["1f1b", "gpipe"])))


@st.composite
def checkfree_plus(draw: st.DrawFn) -> Plan:
    stages, replicas = draw(st.integers(4, 8)), draw(st.integers(1, 2))
    before, blocks, after = draw(st.integers(0, 2)), draw(st.integers(stages, 2 * stages)), draw(st.integers(0, 2))
    return swapped_plan(
        units=before + blocks + after,
        blocks=range(before, before + blocks),
        stages=stages,
        replicas=replicas,
        microbatches=draw(st.integers(2 * replicas, 14)),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        shadows=draw(st.booleans()),
    )


swaps = st.builds(swapped, st.integers(4, 7), st.integers(1, 12), alternate=st.booleans())
plans = st.one_of(grids(), uneven_replicas(), swaps, checkfree_plus(), any_paths())


@st.composite
def asked(draw: st.DrawFn) -> tuple[Plan, Schedule]:
    """A plan with the schedule for random costs, and for some random limits."""
    plan = draw(plans)
    limits = draw(st.dictionaries(st.integers(0, plan.world_size - 1), st.integers(1, 5), max_size=3))
    costs = draw(st.none() | st.lists(st.floats(0, 9), min_size=plan.units, max_size=plan.units))
    schedule = make_schedule(
        plan,
        forward_cost=draw(st.sampled_from([1.0, 0.0, 0.3, 5.0])),
        backward_cost=draw(st.sampled_from([2.0, 0.0, 0.7])),
        unit_costs=costs,
        in_flight=limits if plan.schedule == "1f1b" else None,
    )
    return plan, schedule


# ---- every plan


@thorough
@given(asked())
def test_no_schedule_can_deadlock_even_if_receives_are_posted_no_action_ahead(
    case: tuple[Plan, Schedule],
) -> None:
    plan, schedule = case
    check(plan, schedule)
    check(plan, schedule, lookahead=0)


@thorough
@given(asked())
def test_messages_of_every_pair_of_ranks_are_received_in_the_order_they_are_sent(
    case: tuple[Plan, Schedule],
) -> None:
    plan, schedule = case
    counted = 0
    for a in range(plan.world_size):
        for b in range(plan.world_size):
            order = send_order(plan, schedule, a, b) if a != b else ()
            for action in order:
                assert receives(plan, b, consumer(action)) == a
            counted += len(order)
    crossings = sum(x.rank != y.rank for path in plan.paths for x, y in pairwise(path.hops))
    assert counted == 2 * crossings


def clock(plan: Plan, schedule: Schedule, cost: Callable[[Action], float]) -> dict[Action, tuple[float, float]]:
    """(start, end) of every action when each list runs as soon as it can, the slow and obvious way."""
    times: dict[Action, tuple[float, float]] = {}
    total = sum(len(mine.actions) for mine in schedule.ranks)
    while len(times) < total:
        known = len(times)
        for mine in schedule.ranks:
            free = 0.0
            for action in mine.actions:
                kind, m, hop = action.kind, action.microbatch, action.hop
                last = len(plan.paths[m].hops) - 1
                if kind == "F":
                    needs = [Action("F", m, hop - 1)] if hop else []
                else:
                    needs = [Action("B", m, hop + 1)] if hop < last else [Action("F", m, hop)]
                if any(need not in times for need in needs):
                    break
                start = max([free, *(times[need][1] for need in needs)])
                times[action] = start, start + cost(action)
                free = times[action][1]
        assert len(times) > known, "deadlock"
    return times


@thorough
@given(plans, st.sampled_from([{"F": 1, "B": 2}, {"F": 1, "B": 1}, {"F": 4, "B": 1}]))
def test_a_send_is_reaped_at_the_first_action_that_starts_after_it_was_consumed(
    plan: Plan, costs: dict[str, int]
) -> None:
    schedule = make_schedule(plan, forward_cost=costs["F"], backward_cost=costs["B"])
    times = clock(plan, schedule, lambda action: costs[action.kind])
    assert schedule.makespan == max((end for _, end in times.values()), default=0)
    for rank, mine in enumerate(schedule.ranks):
        expected: list[list[int]] = [[] for _ in mine.actions]
        for j, action in enumerate(mine.actions):
            if sends(plan, rank, action) is not None:
                consumed = times[consumer(action)][1]
                later = (i for i, other in enumerate(mine.actions) if times[other][0] >= consumed)
                first = next(later, None)
                if first is not None:
                    expected[first].append(j)
        assert list(map(list, mine.reap)) == expected


@thorough
@given(plans)
def test_every_rank_computes_the_same_schedule_from_its_own_copy_of_the_plan(plan: Plan) -> None:
    copies = tuple(Path(tuple(Hop(hop.rank, hop.units) for hop in path.hops)) for path in plan.paths)
    assert make_schedule(replace(plan, paths=copies)) == make_schedule(plan)


@thorough
@given(plans)
def test_validation_may_leave_all_backwards_out(plan: Plan) -> None:
    schedule = make_schedule(plan)
    arrived: set[tuple[int, int]] = set()
    lists = [[a for a in mine.actions if a.kind == "F"] for mine in schedule.ranks]
    while any(lists):
        ready = [mine for mine in lists if mine and (not mine[0].hop or (mine[0].microbatch, mine[0].hop) in arrived)]
        assert ready, "deadlock"
        action = ready[0].pop(0)
        arrived.add((action.microbatch, action.hop + 1))


# ---- the classical orders


@thorough
@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 3), st.floats(0.1, 4))
def test_a_chain_runs_classical_1f1b_in_each_replica_by_itself(
    stages: int, each: int, replicas: int, backward_cost: float
) -> None:
    plan = grid_plan(units=stages, stages=stages, replicas=replicas, microbatches=each * replicas)
    schedule = make_schedule(plan, backward_cost=backward_cost)
    for rank in range(plan.world_size):
        replica, stage = divmod(rank, stages)
        block = range(replica * each, (replica + 1) * each)
        warm_up = min(stages - 1 - stage, each)
        expected = [f"F{m}" for m in block[:warm_up]]
        for k in range(each - warm_up):
            expected += [f"F{block[warm_up + k]}", f"B{block[k]}"]
        expected += [f"B{m}" for m in block[each - warm_up :]]
        assert words(schedule, rank) == " ".join(expected)
        assert schedule.ranks[rank].peak_in_flight == min(stages - stage, each)


@thorough
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 3))
def test_a_chain_takes_as_long_as_the_textbook_says(stages: int, microbatches: int, replicas: int) -> None:
    plan = grid_plan(units=stages, stages=stages, replicas=replicas, microbatches=microbatches * replicas)
    assert make_schedule(plan).makespan == (microbatches + stages - 1) * 3
    assert make_schedule(replace(plan, schedule="gpipe")).makespan == (microbatches + stages - 1) * 3


def test_1f1b_of_four_stages_as_it_is_drawn() -> None:
    schedule = make_schedule(grid_plan(units=4, stages=4, replicas=1, microbatches=6))
    assert [words(schedule, rank) for rank in range(4)] == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5",
    ]


def test_neighbouring_hops_on_one_rank_run_as_one_stage() -> None:
    plan = Plan(2, 4, (Path((Hop(0, (0,)), Hop(0, (1,)), Hop(1, (2,)), Hop(1, (3,)))),) * 2)
    schedule = make_schedule(plan)
    check(plan, schedule)
    assert " ".join(map(str, schedule.ranks[0].actions)) == "F0.0 F0.1 F1.0 F1.1 B0.1 B0.0 B1.1 B1.0"
    assert " ".join(map(str, schedule.ranks[1].actions)) == "F0.2 F0.3 B0.3 B0.2 F1.2 F1.3 B1.3 B1.2"


@thorough
@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4))
def test_full_groups_run_megatrons_interleaved_order_in_its_time(stages: int, rounds: int, groups: int) -> None:
    microbatches = groups * stages
    plan = grid_plan(units=stages * rounds, stages=stages, replicas=1, microbatches=microbatches, interleave=rounds)
    schedule = make_schedule(plan)
    total = microbatches * rounds

    def nth(rank: int, k: int, kind: str) -> str:
        turn = k % (stages * rounds) // stages
        if kind == "B":
            turn = rounds - 1 - turn
        return f"{kind}{k // (stages * rounds) * stages + k % stages}.{turn * stages + rank}"

    for rank in range(stages):
        warm_up = min(total, (stages - rank - 1) * 2 + (rounds - 1) * stages)
        expected = [nth(rank, k, "F") for k in range(warm_up)]
        for k in range(total - warm_up):
            expected += [nth(rank, warm_up + k, "F"), nth(rank, k, "B")]
        expected += [nth(rank, k, "B") for k in range(total - warm_up, total)]
        assert list(map(str, schedule.ranks[rank].actions)) == expected
    assert schedule.makespan == (total + stages - 1) * 3


@thorough
@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 16))
def test_a_group_that_is_not_full_costs_no_more_than_a_full_one(stages: int, rounds: int, microbatches: int) -> None:
    plan = grid_plan(units=stages * rounds, stages=stages, replicas=1, microbatches=microbatches, interleave=rounds)
    schedule = make_schedule(plan)
    check(plan, schedule)
    padded = -(-microbatches // stages) * stages
    assert schedule.makespan <= (padded * rounds + stages - 1) * 3


@thorough
@given(st.integers(1, 6), st.integers(1, 8))
def test_gpipe_runs_all_forwards_then_all_backwards_both_ascending(stages: int, microbatches: int) -> None:
    plan = grid_plan(units=stages, stages=stages, replicas=1, microbatches=microbatches, schedule="gpipe")
    schedule = make_schedule(plan)
    order = [f"{kind}{m}" for kind in "FB" for m in range(microbatches)]
    for rank in range(stages):
        assert words(schedule, rank) == " ".join(order)
        assert schedule.ranks[rank].peak_in_flight == microbatches


@thorough
@given(any_paths())
def test_gpipe_never_mixes_forwards_and_backwards_at_a_rank(plan: Plan) -> None:
    for mine in make_schedule(replace(plan, schedule="gpipe")).ranks:
        kinds = [action.kind for action in mine.actions]
        assert kinds == sorted(kinds, reverse=True)


# ---- the greedy orders


@thorough
@given(st.integers(2, 7), st.integers(1, 16), st.data())
def test_a_limit_in_flight_is_kept_on_every_chain(stages: int, microbatches: int, data: st.DataObject) -> None:
    plan = grid_plan(units=stages, stages=stages, replicas=1, microbatches=microbatches)
    limits = data.draw(st.dictionaries(st.integers(0, stages - 1), st.integers(1, 4), min_size=1))
    schedule = make_schedule(plan, in_flight=limits)
    check(plan, schedule)
    assert all(schedule.ranks[rank].peak_in_flight <= limit for rank, limit in limits.items())


@thorough
@given(st.integers(1, 7), st.integers(1, 16))
def test_the_greedy_order_under_classical_limits_is_the_classical_order(stages: int, microbatches: int) -> None:
    plan = grid_plan(units=stages, stages=stages, replicas=1, microbatches=microbatches)
    limits = {rank: stages - rank for rank in range(stages)}
    assert make_schedule(plan, in_flight=limits) == make_schedule(plan)


def test_a_limit_on_one_replica_leaves_the_other_classical() -> None:
    plan = grid_plan(units=3, stages=3, replicas=2, microbatches=12)
    free, limited = make_schedule(plan), make_schedule(plan, in_flight={3: 1})
    assert limited.ranks[:3] == free.ranks[:3]
    assert limited.ranks[3].peak_in_flight == 1
    assert limited.makespan > free.makespan


def test_a_limit_that_would_block_is_exceeded_and_that_is_told() -> None:
    there, back = Path((Hop(0, (0,)), Hop(1, (1,)))), Path((Hop(1, (0,)), Hop(0, (1,))))
    plan = Plan(2, 2, (there, back))
    # Both ranks are full after their first forward, and each microbatch needs the other rank next.
    schedule = make_schedule(plan, in_flight={0: 1, 1: 1})
    check(plan, schedule)
    assert max(mine.peak_in_flight for mine in schedule.ranks) == 2


@pytest.mark.parametrize(("stages", "microbatches"), [(4, 8), (4, 16), (6, 16), (8, 32), (8, 64)])
@pytest.mark.parametrize("alternate", [False, True])
def test_swapped_halves_cost_at_most_a_tenth_over_a_chain_with_two_or_three_more_in_flight(
    stages: int, microbatches: int, alternate: bool
) -> None:
    plan = swapped(stages, microbatches, alternate=alternate)
    schedule = make_schedule(plan)
    check(plan, schedule)
    assert schedule.makespan <= 1.1 * 3 * (microbatches + stages - 1)
    assert max(mine.peak_in_flight for mine in schedule.ranks) <= stages + 3


def test_swapped_halves_of_four_as_a_trace() -> None:
    schedule = make_schedule(swapped(4, 4))
    assert [" ".join(map(str, mine.actions)) for mine in schedule.ranks] == [
        "F0.0 F2.1 F1.0 F3.1 B2.1 B0.0 B3.1 B1.0",
        "F2.0 F0.1 F3.0 F1.1 B0.1 B2.0 B1.1 B3.0",
        "F0.2 F2.3 B2.3 B0.2 F1.2 F3.3 B3.3 B1.2",
        "F2.2 F0.3 B0.3 B2.2 F3.2 F1.3 B1.3 B3.2",
    ]
    assert schedule.makespan == 18


# ---- the woven orders


def woven(stages: int, microbatches: int, replicas: int = 1) -> tuple[Plan, tuple[float, ...]]:
    """A CheckFree+ plan of one block a stage, and its units' costs."""
    blocks = range(1, stages + 1)
    plan = swapped_plan(
        units=stages + 2, blocks=blocks, stages=stages, replicas=replicas, microbatches=microbatches * replicas
    )
    return plan, swap_costs(stages + 2, blocks)


@pytest.mark.parametrize(
    ("stages", "microbatches"), [(4, 8), (4, 16), (4, 17), (5, 16), (6, 16), (6, 24), (8, 32), (12, 24), (12, 48)]
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_swapped_stages_cost_at_most_a_twentieth_over_1f1b_with_two_more_in_flight(
    stages: int, microbatches: int, replicas: int
) -> None:
    plan, costs = woven(stages, microbatches, replicas)
    schedule = make_schedule(plan, unit_costs=costs)
    check(plan, schedule)
    assert schedule.makespan <= 1.0501 * 3 * (microbatches + stages - 1)
    edges = {0, stages + 1}
    for mine in schedule.ranks:
        held = accumulate(
            (1 if a.kind == "F" else -1) * (not edges.issuperset(plan.paths[a.microbatch].hops[a.hop].units))
            for a in mine.actions
        )
        assert max(held) <= stages + 2


@pytest.mark.parametrize("head", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("backward_cost", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("stages", [4, 6])
def test_the_woven_order_holds_on_costs_that_it_was_not_made_for(
    stages: int, backward_cost: float, head: float
) -> None:
    plan, costs = woven(stages, 16)
    chain = grid_plan(units=stages + 2, stages=stages, replicas=1, microbatches=16, split=[2, *[1] * (stages - 2), 2])
    true = [0.02, *[1.0] * stages, head]

    def takes(which: Plan) -> float:
        def cost(action: Action) -> float:
            units = which.paths[action.microbatch].hops[action.hop].units
            return sum(true[unit] for unit in units) * (backward_cost if action.kind == "B" else 1.0)

        times = clock(which, make_schedule(which, unit_costs=costs), cost)
        return max(end for _, end in times.values())

    assert takes(plan) <= 1.05 * takes(chain)


def test_four_swapped_stages_as_a_trace() -> None:
    plan, costs = woven(4, 4)
    schedule = make_schedule(plan, unit_costs=costs)
    assert [" ".join(map(str, mine.actions)) for mine in schedule.ranks] == [
        "F1.0 F0.0 F1.2 F3.0 F2.0 F3.2 B1.2 B0.0 B1.0 B3.2 B2.0 B3.0",
        "F1.1 F0.1 F3.1 F2.1 B0.1 B1.1 B2.1 B3.1",
        "F0.2 F1.4 B1.4 B0.2 F2.2 F3.4 B3.4 B2.2",
        "F1.3 F0.3 F1.5 B1.5 B0.3 B1.3 F3.3 F2.3 F3.5 B3.5 B2.3 B3.3",
    ]
    assert schedule.makespan == pytest.approx(18)


@thorough
@given(st.permutations(range(5)), st.permutations(range(5)), st.lists(st.booleans(), min_size=1, max_size=12))
def test_any_two_orders_of_the_same_ranks_weave_into_a_sound_schedule_or_none(
    a: list[int], b: list[int], turns: list[bool]
) -> None:
    ways = [Path(tuple(Hop(rank, (unit,)) for unit, rank in enumerate(order))) for order in (a, b)]
    plan = Plan(5, 5, tuple(ways[turn] for turn in turns))
    check(plan, make_schedule(plan))
    made = weave({m: tuple(Stop(hop.rank) for hop in path.hops) for m, path in enumerate(plan.paths)})
    assert made is None or {r: len(order) for r, order in made.orders.items()} == dict.fromkeys(
        range(5), 2 * len(turns)
    )


@pytest.mark.parametrize(
    "ways", [["0123"], ["0123", "1032", "0132"], ["0123", "0122"], ["0123", "0124"], ["0123", "012"]]
)
def test_what_is_not_two_orders_of_the_same_ranks_is_not_woven(ways: list[str]) -> None:
    assert weave({m: tuple(Stop(int(rank)) for rank in ways[m % len(ways)]) for m in range(6)}) is None


def test_an_interleaved_plan_under_limits_is_near_the_time_of_megatrons() -> None:
    plan = grid_plan(units=8, stages=4, replicas=1, microbatches=8, interleave=2)
    limits = {0: 12, 1: 10, 2: 8, 3: 6}
    schedule = make_schedule(plan, in_flight=limits)
    check(plan, schedule)
    assert all(schedule.ranks[rank].peak_in_flight <= limit for rank, limit in limits.items())
    assert schedule.makespan <= 1.05 * 3 * (2 * 8 + 3)


def test_a_dead_ranks_microbatches_can_go_through_its_peer() -> None:
    plan = grid_plan(units=4, stages=4, replicas=2, microbatches=8)
    around = Path(tuple(replace(hop, rank=5) if hop.rank == 1 else hop for hop in plan.paths[0].hops))
    rerouted = replace(plan, paths=(around,) * 4 + plan.paths[4:])
    schedule = make_schedule(rerouted)
    check(rerouted, schedule)
    assert schedule.ranks[1].actions == ()
    assert len(schedule.ranks[5].actions) == 2 * 8
    assert schedule.makespan <= 1.3 * make_schedule(plan).makespan


def test_costs_of_units_shape_the_schedule_and_its_makespan() -> None:
    plan = grid_plan(units=3, stages=2, replicas=1, microbatches=1, split=[2, 1])
    assert make_schedule(plan, unit_costs=[1, 2, 4]).makespan == (3 + 4) * 3
    assert make_schedule(plan, forward_cost=0, backward_cost=0).makespan == 0


def test_a_plan_without_work_has_an_empty_schedule() -> None:
    for plan in (Plan(2, 0, ()), Plan(2, 0, (Path(()),))):
        schedule = make_schedule(plan)
        check(plan, schedule)
        assert schedule.makespan == 0
        assert [mine.actions for mine in schedule.ranks] == [(), ()]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"in_flight": {0: 0}}, "in_flight needs ranks of the plan and at least 1 [rank=0 limit=0]"),
        ({"in_flight": {9: 2}}, "in_flight needs ranks of the plan and at least 1 [rank=9 limit=2]"),
        ({"unit_costs": [1.0]}, "1 unit costs for 2 units: one each is needed"),
        ({"forward_cost": -1.0}, "a cost must be a finite number, at least 0"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_in_one_sentence(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_schedule(grid_plan(units=2, stages=2, replicas=1, microbatches=2), **wrong)  # type: ignore[arg-type]
    assert sentence in str(refused.value)


def test_gpipe_refuses_a_limit_that_it_could_not_keep() -> None:
    plan = grid_plan(units=2, stages=2, replicas=1, microbatches=2, schedule="gpipe")
    with pytest.raises(ConfigError, match="gpipe keeps every forward in flight"):
        make_schedule(plan, in_flight={0: 1})


# ---- check itself must be able to say no


PLAN = grid_plan(units=4, stages=4, replicas=1, microbatches=6)
GOOD = make_schedule(PLAN)


def changed(rank: int, **fields: object) -> Schedule:
    ranks = list(GOOD.ranks)
    ranks[rank] = replace(ranks[rank], **fields)  # type: ignore[arg-type]
    return replace(GOOD, ranks=tuple(ranks))


def with_actions(rank: int, *order: int) -> Schedule:
    return changed(rank, actions=tuple(GOOD.ranks[rank].actions[i] for i in order), reap=((),) * len(order))


def with_reap(schedule: Schedule, rank: int, before: int, *sent: int) -> Schedule:
    ranks = list(schedule.ranks)
    reap = tuple(sent if i == before else () for i in range(len(ranks[rank].actions)))
    ranks[rank] = replace(ranks[rank], reap=reap)
    return replace(schedule, ranks=tuple(ranks))


def test_check_refuses_a_lost_and_a_doubled_action() -> None:
    with pytest.raises(AssertionError, match="not each action once"):
        check(PLAN, with_actions(3, *range(11)))
    with pytest.raises(AssertionError, match="not each action once"):
        check(PLAN, with_actions(3, *range(11), 0))


def test_check_refuses_an_action_at_another_rank() -> None:
    exchanged = replace(GOOD, ranks=(*GOOD.ranks[:2], GOOD.ranks[3], GOOD.ranks[2]))
    with pytest.raises(AssertionError, match="is not at rank"):
        check(PLAN, exchanged)


def test_check_refuses_a_wrong_peak() -> None:
    with pytest.raises(AssertionError, match="peak_in_flight is wrong"):
        check(PLAN, changed(1, peak_in_flight=2))


def test_check_refuses_messages_out_of_order() -> None:
    # Rank 1 takes F1 before F0. Tags would sort that out; a transport without them would not.
    with pytest.raises(AssertionError, match="rank 1 expects other messages than 0 sends"):
        check(PLAN, with_actions(1, 1, 0, *range(2, 12)))


def test_check_finds_a_deadlock_in_orders_that_do_not_fit() -> None:
    # Rank 0 wants B0 before it sends F3, rank 1 wants F3 before it runs B0.
    order = (0, 1, 2, 4, 3, *range(5, 12))
    mine = (replace(with_actions(rank, *order).ranks[rank], peak_in_flight=4) for rank in (0, 1))
    with pytest.raises(AssertionError, match=r"deadlock: rank 0 at B0\.0, rank 1 at F3\.1"):
        check(PLAN, replace(GOOD, ranks=(*mine, *GOOD.ranks[2:])))


def test_check_refuses_to_reap_twice_too_early_or_what_was_never_sent() -> None:
    last = len(GOOD.ranks[0].actions) - 1
    with pytest.raises(AssertionError, match="reaps a send twice"):
        check(PLAN, with_reap(GOOD, 0, last, 0, 0))
    with pytest.raises(AssertionError, match="reaps what it did not send"):
        check(PLAN, with_reap(GOOD, 0, 1, 1))
    with pytest.raises(AssertionError, match="reaps what it did not send"):
        check(PLAN, with_reap(GOOD, 0, last, 4))  # B0 ends at rank 0


def test_check_finds_two_ranks_that_wait_for_each_others_receive() -> None:
    # Rank 0 waits for F3's send before it takes B0; rank 1 waits for B0's send before it takes F3. Receives
    # posted one action ahead resolve that, receives posted in time do not.
    crossed = with_reap(with_reap(GOOD, 0, 4, 3), 1, 4, 3)
    check(PLAN, crossed, lookahead=1)
    with pytest.raises(AssertionError, match=r"deadlock: rank 0 at B0\.0, rank 1 at F3\.1"):
        check(PLAN, crossed, lookahead=0)

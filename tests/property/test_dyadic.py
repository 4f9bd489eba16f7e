"""The dyadic sum gives the same bits in every layout; a plain sum does not."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.runtime.pipeline.dyadic import (
    DyadicSum,
    SequentialSum,
    add_values,
    maximal_nodes,
    sibling,
    tree_total,
)


def gradients(microbatches: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(17, generator=generator) * 10 ** (m % 5) for m in range(microbatches)]


def slow_total(values: list[torch.Tensor]) -> torch.Tensor:
    """The definition, written another way: split at the largest power of two below the length."""
    if len(values) == 1:
        return values[0].clone()
    half = 1 << ((len(values) - 1).bit_length() - 1)
    return slow_total(values[:half]) + slow_total(values[half:])


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10_000))
def test_any_deal_of_microbatches_to_ranks_in_any_order_gives_the_same_bits(m: int, ranks: int, seed: int) -> None:
    values = gradients(m, seed)
    deal = random.Random(seed)
    parts: list[DyadicSum] = [DyadicSum() for _ in range(ranks)]
    order = list(range(m))
    deal.shuffle(order)
    holder = {microbatch: deal.randrange(ranks) for microbatch in order}
    for microbatch in order:
        parts[holder[microbatch]].add(microbatch, [values[microbatch].clone()])
    nodes = {}
    for rank, part in enumerate(parts):
        assert set(part.nodes) == set(maximal_nodes(k for k in order if holder[k] == rank))
        nodes |= part.nodes
    (total,) = tree_total(nodes, m, add_values)
    assert total is not None
    assert torch.equal(total, slow_total(values))


def test_a_running_sum_differs_so_the_tree_is_what_makes_them_equal() -> None:
    values = gradients(8, 3)
    left, right = SequentialSum(), SequentialSum()
    for m in range(8):
        left.add(m, [values[m].clone()])
    for m in reversed(range(8)):
        right.add(m, [values[m].clone()])
    (a,), (b,) = left.total(8), right.total(8)
    assert a is not None
    assert b is not None
    assert not torch.equal(a, b)


def test_a_gradient_that_does_not_exist_is_not_a_zero() -> None:
    total = DyadicSum()
    total.add(0, [None, torch.tensor([-0.0])])
    total.add(1, [None, None])
    none, kept = total.total(2)
    assert none is None
    assert kept is not None
    assert torch.signbit(kept).item()


@settings(derandomize=True, deadline=None)
@given(st.sets(st.integers(0, 63), min_size=1))
def test_maximal_nodes_cover_each_microbatch_once_and_no_two_could_merge(microbatches: set[int]) -> None:
    nodes = maximal_nodes(microbatches)
    covered = [m for level, index in nodes for m in range(index << level, (index + 1) << level)]
    assert sorted(covered) == sorted(microbatches)
    assert not any(sibling(node) in nodes for node in nodes)

"""Gradient exchange among the holders of a unit, and between tied parameters. Order is fixed by the plan.

Each holder sends its maximal tree nodes to every other holder; each merges all of them in the tree's order.
No reduction is ever done by rank order, so the result does not depend on how many replicas there are, nor on
which microbatches each had. Exchanges run in the order of their first unit on all ranks, and all sends and
receives of one are posted before any is waited for: they cannot deadlock. Holders are here those that work on a unit;
its shadows get the total when all this is over (shadow.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from holdfast.proto.plan import Plan

from ..comm.group import Group
from .dyadic import DyadicSum, Node, SequentialSum, Values, add_values, maximal_nodes, tree_total

_TAG_BASE = 1 << 29
Sums = Mapping[int, DyadicSum | SequentialSum]
Parameters = Mapping[int, Sequence[torch.nn.Parameter]]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Units whose gradients go between the same ranks in the same nodes."""

    units: tuple[int, ...]
    holders: tuple[int, ...]
    nodes: tuple[tuple[Node, ...], ...]
    """Per holder, the nodes that it holds."""


@dataclass(frozen=True, slots=True)
class Tie:
    """Parameter `second` of unit `second_unit` is the same parameter as `first` of `first_unit`."""

    first_unit: int
    first: str
    second_unit: int
    second: str


def plan_exchanges(plan: Plan, *, exact: bool) -> tuple[Exchange, ...]:
    """All exchanges of a plan, ordered by first unit; units with one holder need none."""
    grouped: dict[tuple[tuple[int, ...], tuple[tuple[Node, ...], ...]], list[int]] = {}
    for unit in range(plan.units):
        holders = plan.workers(unit)
        if len(holders) < 2:
            continue
        nodes = tuple(
            maximal_nodes(plan.microbatches_at(rank, unit)) if exact else ((0, index),)
            for index, rank in enumerate(holders)
        )
        grouped.setdefault((holders, nodes), []).append(unit)
    return tuple(
        Exchange(tuple(units), holders, nodes)
        for (holders, nodes), units in sorted(grouped.items(), key=lambda item: item[1][0])
    )


def exchange(
    group: Group,
    exchanges: Sequence[Exchange],
    rank: int,
    sums: Sums,
    parameters: Parameters,
    microbatches: int,
    *,
    exact: bool,
) -> dict[int, Values]:
    """Total gradient of every unit worked on here, over all microbatches and holders.

    Raises Fenced or PeerLost.
    """
    merged = {unit: dict(total.nodes) for unit, total in sums.items()}
    leaves = dict.fromkeys(sums, microbatches if exact else 1)
    for index, what in enumerate(exchanges):
        if rank not in what.holders:
            continue
        me = what.holders.index(rank)
        if not exact:
            for unit in what.units:
                merged[unit] = {what.nodes[me][0]: merged[unit][(0, 0)]}
                leaves[unit] = len(what.holders)
        _swap(group, what, me, merged, parameters, _TAG_BASE + 2 * index)
    return {unit: tree_total(nodes, leaves[unit], add_values) for unit, nodes in merged.items()}


def _swap(
    group: Group,
    what: Exchange,
    me: int,
    merged: dict[int, dict[Node, Values]],
    parameters: Parameters,
    tag: int,
) -> None:
    """Send our nodes to the other holders, receive theirs."""
    mine = [_flatten(merged, what.units, node, parameters) for node in what.nodes[me]]
    outgoing = torch.cat(mine) if len(mine) > 1 else mine[0]
    size = mine[0].numel()
    others = [index for index in range(len(what.holders)) if index != me]
    incoming = {index: torch.empty(len(what.nodes[index]) * size, dtype=outgoing.dtype) for index in others}
    works = [group.irecv(incoming[index], what.holders[index], tag) for index in others]
    works += [group.isend(outgoing, what.holders[index], tag) for index in others]
    for work in works:
        group.wait(work)
    for index in others:
        for node, flat in zip(what.nodes[index], incoming[index].split(size), strict=True):
            _unflatten(merged, what.units, node, parameters, flat)


def _flatten(
    merged: dict[int, dict[Node, Values]], units: Sequence[int], node: Node, parameters: Parameters
) -> torch.Tensor:
    """One node's gradients of all units in one vector, followed by one flag per gradient: present or not.

    The vector has the widest dtype of the parameters; a round trip through a wider float is exact.
    """
    pieces, flags = [], []
    dtype = _widest(parameters, units)
    for unit in units:
        for parameter, gradient in zip(parameters[unit], merged[unit][node], strict=True):
            value = gradient if gradient is not None else torch.zeros_like(parameter)
            pieces.append(value.reshape(-1).to(dtype))
            flags.append(float(gradient is not None))
    return torch.cat([*pieces, torch.tensor(flags, dtype=dtype, device=pieces[0].device)])


def _unflatten(
    merged: dict[int, dict[Node, Values]],
    units: Sequence[int],
    node: Node,
    parameters: Parameters,
    flat: torch.Tensor,
) -> None:
    every = [p for unit in units for p in parameters[unit]]
    flags = flat[-len(every) :].tolist()
    offset, position = 0, 0
    for unit in units:
        values: Values = []
        for parameter in parameters[unit]:
            piece = flat[offset : offset + parameter.numel()]
            values.append(piece.view(parameter.shape).to(parameter.dtype) if flags[position] else None)
            offset, position = offset + parameter.numel(), position + 1
        merged[unit][node] = values


def _widest(parameters: Parameters, units: Sequence[int]) -> torch.dtype:
    dtypes = {p.dtype for unit in units for p in parameters[unit]}
    return dtypes.pop() if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32


def exchange_ties(
    group: Group,
    plan: Plan,
    ties: Sequence[Tie],
    rank: int,
    gradients: dict[tuple[int, str], torch.Tensor | None],
) -> None:
    """Both copies of a tied parameter get first + second, in this order. `gradients` is updated.

    The i-th holder of one side pairs with holder i modulo the number of holders of the other.
    """
    for index, tie in enumerate(ties):
        first, second = plan.workers(tie.first_unit), plan.workers(tie.second_unit)
        tag = _TAG_BASE + (1 << 20) + 2 * index
        works, received = [], {}
        for ours, theirs, name, other, offset in (
            (first, second, (tie.first_unit, tie.first), (tie.second_unit, tie.second), 0),
            (second, first, (tie.second_unit, tie.second), (tie.first_unit, tie.first), 1),
        ):
            if rank not in ours:
                continue
            gradient = gradients[name]
            assert gradient is not None, f"tied parameter {name} got no gradient"
            me = ours.index(rank)
            source = theirs[me % len(theirs)]
            if source == rank:
                continue  # both copies are here
            buffer = torch.empty_like(gradient, memory_format=torch.contiguous_format)
            works.append(group.irecv(buffer, source, tag + 1 - offset))
            received[other] = buffer
            works += [
                group.isend(gradient.contiguous(), peer, tag + offset)
                for position, peer in enumerate(theirs)
                if position % len(ours) == me and peer != rank
            ]
        for work in works:
            group.wait(work)
        names = ((tie.first_unit, tie.first), (tie.second_unit, tie.second))
        sides = [received.get(name, gradients.get(name)) for name in names]
        if sides[0] is None or sides[1] is None:
            continue  # neither copy is on this rank
        total = sides[0] + sides[1]
        for name in names:
            if name in gradients:
                gradients[name] = total.clone()

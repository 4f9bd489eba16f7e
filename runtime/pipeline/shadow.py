"""Shadows get what their unit's worker has: gradients each step, weights once at the start.

    worker of E   g g g, buffers  ──▶ shadow of E      one gradient of |E| a step, after all sums and ties; both then
    worker of H   g g             ──▶ shadow of H      apply the same update to the same bits

The i-th shadow of a unit is served by its i-th worker: in a grid of replicas each by its own. Tensors are received as
they are, one message each, and not in one flat vector: an update must not depend on where a gradient lies in memory.
All are posted before any is waited for. Invariant: afterwards everything handed on has the same bits on both ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from holdfast.proto.plan import Plan

from ..comm.group import Group, Work

if TYPE_CHECKING:
    from ..state import ModelState

_TAG_BASE = (1 << 29) + (1 << 21)
_TENSORS_MAX = 1 << 10

Gradients = dict[tuple[int, str], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Link:
    """`source` works on `unit`, `target` shadows it."""

    unit: int
    source: int
    target: int


def plan_links(plan: Plan) -> tuple[Link, ...]:
    """Who serves whom, in an order that is the same on all ranks."""
    served: dict[int, int] = {}
    links = []
    for shadow in sorted(plan.shadows):
        workers, turn = plan.workers(shadow.unit), served.get(shadow.unit, 0)
        served[shadow.unit] = turn + 1
        links.append(Link(shadow.unit, workers[turn % len(workers)], shadow.rank))
    return tuple(links)


class Shadows:
    """What a rank hands to shadows of its units, and gets for those that it shadows."""

    def __init__(self, plan: Plan, rank: int, state: ModelState) -> None:
        self._links = plan_links(plan)
        self._state = state
        self._mine = {link.unit for link in self._links if rank in (link.source, link.target)}

    def start(self, group: Group) -> None:
        """Weights and buffers, before the first step: layers given as modules may differ between processes."""
        kept = {unit: list(self._state.modules[unit].parameters()) for unit in self._mine}
        self._hand_tensors(group, {unit: [*kept[unit], *self._state.buffers(unit)] for unit in self._mine})

    def hand_on(self, group: Group, gradients: Gradients) -> None:
        """Final gradients, and buffers as the step's forwards left them. `gradients` is updated.

        A gradient that does not exist crosses as zeros under a flag that says so: what crosses is known beforehand.
        Raises Fenced or PeerLost.
        """
        if not self._mine:
            return
        crossing: dict[int, list[torch.Tensor]] = {}
        keys = {unit: [key for key in gradients if key[0] == unit] for unit in self._mine}
        for unit in self._mine:
            given = [(parameter, gradients[key]) for key in keys[unit] for parameter in [self._state.parameters[key]]]
            if given:
                there = torch.tensor([g is not None for _, g in given], dtype=torch.uint8, device=given[0][0].device)
                values = [torch.zeros_like(parameter) if g is None else g for parameter, g in given]
                crossing[unit] = [there, *values]
        for unit, (there, *values) in _cross(group, self._links, crossing).items():
            flagged = zip(keys[unit], values, there.tolist(), strict=True)
            gradients.update({key: value if flag else None for key, value, flag in flagged})
        self._hand_tensors(group, {unit: self._state.buffers(unit) for unit in self._mine})

    def _hand_tensors(self, group: Group, tensors: Mapping[int, Sequence[torch.Tensor]]) -> None:
        with torch.no_grad():
            for unit, values in _cross(group, self._links, tensors).items():
                for tensor, value in zip(tensors[unit], values, strict=True):
                    tensor.copy_(value)


def _cross(
    group: Group, links: Sequence[Link], tensors: Mapping[int, Sequence[torch.Tensor]]
) -> dict[int, list[torch.Tensor]]:
    """Send what we work on, receive what we shadow, into fresh memory: of a broken group nothing may arrive later."""
    works: list[Work] = []
    held: list[torch.Tensor] = []
    received: dict[int, list[torch.Tensor]] = {}
    for index, link in enumerate(links):
        tag, own = _TAG_BASE + index * _TENSORS_MAX, tensors.get(link.unit, ())
        assert len(own) < _TENSORS_MAX, f"unit {link.unit} has {len(own)} tensors"
        if group.rank == link.source:
            sent = [tensor.detach().contiguous() for tensor in own]
            works += [group.isend(tensor, link.target, tag + i) for i, tensor in enumerate(sent) if tensor.numel()]
            held += sent
        elif group.rank == link.target and own:
            fresh = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in own]
            works += [group.irecv(tensor, link.source, tag + i) for i, tensor in enumerate(fresh) if tensor.numel()]
            received[link.unit] = fresh
    for work in works:
        group.wait(work)
    return received

"""ZeRO-1: of what several ranks hold, each keeps the optimizer's state of a part, updates that, and gets the rest.

    parameter   |■■■■■■■■■■■■|□□□□□□□□□□□□|      ■ an nn.Parameter over this rank's part of the same memory:
    gradient    |■■■■■■■■■■■■|            |        what the optimizer is given instead, once the user's function made it
    exp_avg ... |■■■■■■■■■■■■|
                      └── optimizer.step() ──▶ gather(): own parts to all other holders, theirs into their places

The user's function sees whole parameters, so groups made by shape, name or identity are what they are without ZeRO-1;
then parts stand in for them. Weights and gradients stay whole: the norm is of whole gradients, and layers compute as
ever. A parameter that does not lie in row-major order is not cut: every holder updates it, as without ZeRO-1.

Not here: where the cuts are (cut.py), what a failure does (engine.py). Invariants:

* an optimizer is taken only if it was seen to give the same bits on parts as on the whole (prove.py);
* between optimizer.step() and the end of gather() the weights are of two steps: nobody may call them a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from holdfast.proto.plan import Plan

from .comm.group import Group
from .cut import Range, cut_unit
from .prove import prove, stand_in

_TAG = (1 << 29) + (1 << 21)
Key = tuple[int, str]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit's weights as their holders update them, each part as its bytes, where they lie."""

    unit: int
    me: int
    holders: tuple[int, ...]
    parts: tuple[tuple[torch.Tensor, ...], ...]
    """By holder."""


@dataclass(frozen=True, slots=True)
class _Swap:
    """One unit's messages under way."""

    works: tuple[Any, ...]
    outgoing: torch.Tensor
    incoming: Mapping[int, torch.Tensor]


class Shards:
    """This rank's parts of what it holds with others."""

    def __init__(self, rank: int, parameters: Mapping[Key, nn.Parameter], cuts: Mapping[Key, _Cut]) -> None:
        self._own = {key: cut.ranges[cut.holders.index(rank)] for key, cut in cuts.items()}
        self._by_name = {f"{unit}.{name}": own for (unit, name), own in self._own.items()}
        self._elementwise: frozenset[str] = frozenset()
        self._units: list[_Unit] = []
        for unit in sorted({unit for unit, _ in cuts}):
            keys = [key for key in cuts if key[0] == unit]
            holders = cuts[keys[0]].holders
            flat = {key: parameters[key].detach().view(-1) for key in keys}
            parts = tuple(
                tuple(_bytes(flat[key], cuts[key].ranges[index]) for key in keys) for index in range(len(holders))
            )
            self._units.append(_Unit(unit, holders.index(rank), holders, parts))

    def take_over(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[Key, nn.Parameter], *, proven: bool
    ) -> dict[Key, nn.Parameter]:
        """Let parts stand in for the parameters of an optimizer that has not stepped; what it updates from now on.

        `proven`: the process before this one has tried it. Raises ConfigError for an optimizer that would then compute
        other numbers.
        """
        self._elementwise = prove(optimizer, again=proven)
        trained = {key: self._part_of(key, parameter) for key, parameter in parameters.items()}
        cut = {id(parameters[key]): (trained[key], own) for key, own in self._own.items()}
        stand_in(optimizer, cut, self._elementwise)
        return trained

    def _part_of(self, key: Key, parameter: nn.Parameter) -> nn.Parameter:
        if key not in self._own:
            return parameter
        start, stop = self._own[key]
        return nn.Parameter(parameter.detach().view(-1)[start:stop])

    def part(self, key: Key, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """This rank's part of a gradient."""
        if gradient is None or key not in self._own:
            return gradient
        start, stop = self._own[key]
        return gradient.reshape(-1)[start:stop]

    def region(self, name: str, state: str) -> Range | None:
        """The elements of an optimizer's state of parameter `name` that are kept here; None: all of them."""
        return self._by_name.get(name) if state in self._elementwise else None

    def gather(self, group: Group, between: Callable[[], None] = lambda: None) -> None:
        """Give all holders the parts that were updated here, take theirs. Raises Fenced or PeerLost: the weights are
        then of two steps.

        All messages of a unit are posted before any is waited for, in the order of units: no deadlock. One unit's are
        under way while another's are put in place. `between`: called after each unit.
        """
        under_way: tuple[_Unit, _Swap] | None = None
        for unit in self._units:
            swap = _start(group, unit)
            if under_way is not None:
                _end(group, *under_way)
                between()
            under_way = unit, swap
        if under_way is not None:
            _end(group, *under_way)


@dataclass(frozen=True, slots=True)
class _Cut:
    holders: tuple[int, ...]
    ranges: tuple[Range, ...]


def make_shards(plan: Plan, rank: int, parameters: Mapping[Key, nn.Parameter]) -> Shards | None:
    """The parts of `rank`; None if it shares nothing that is trained with anybody. Shadows keep all of their units."""
    cuts: dict[Key, _Cut] = {}
    for unit in plan.worked(rank):
        holders = plan.workers(unit)
        keys = [key for key, parameter in parameters.items() if key[0] == unit and parameter.is_contiguous()]
        if len(holders) > 1 and keys:
            ranges = cut_unit([parameters[key].numel() for key in keys], len(holders), first=unit)
            cuts |= {key: _Cut(holders, parts) for key, parts in zip(keys, ranges, strict=True)}
    return Shards(rank, parameters, cuts) if cuts else None


def _bytes(flat: torch.Tensor, part: Range) -> torch.Tensor:
    return flat[part[0] : part[1]].view(torch.uint8)


def _start(group: Group, unit: _Unit) -> _Swap:
    outgoing = torch.cat(unit.parts[unit.me])
    others = [index for index in range(len(unit.holders)) if index != unit.me]
    sizes = {index: sum(part.numel() for part in unit.parts[index]) for index in others}
    incoming = {i: torch.empty(size, dtype=torch.uint8, device=outgoing.device) for i, size in sizes.items() if size}
    works = [group.irecv(buffer, unit.holders[index], _TAG + unit.unit) for index, buffer in incoming.items()]
    if outgoing.numel():
        works += [group.isend(outgoing, unit.holders[index], _TAG + unit.unit) for index in others]
    return _Swap(tuple(works), outgoing, incoming)


def _end(group: Group, unit: _Unit, swap: _Swap) -> None:
    for work in swap.works:
        group.wait(work)
    for index, buffer in swap.incoming.items():
        parts = unit.parts[index]
        for part, data in zip(parts, buffer.split([part.numel() for part in parts]), strict=True):
            part.copy_(data)

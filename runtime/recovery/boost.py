"""The learning rate of rebuilt layers: multiplied inside optimizer.step(), and nowhere else.

    scheduler ─▶ group["lr"] ─┬─ pre-step hook: groups cut in rebuilt and other parameters, lr * factor for the former
                              ├─ the optimizer's own step
                              └─ post-step hook: the groups as they were ─▶ scheduler.step() sees what it set

So it works with every scheduler, also with one that computes the next rate from the last, and what a rank tells of its
learning rate stays the script's. Kept by unit, not by rank: it moves with a layer, and all replicas of one agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .neighbours import NeighbourOptions


class Boosts:
    """Which units were rebuilt, after which step; hooked into one optimizer."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        parameters: Mapping[int, Iterable[nn.Parameter]],
        options: NeighbourOptions,
        committed: Callable[[], int],
    ) -> None:
        """`committed`: the last step before the one that the optimizer makes."""
        self.since: dict[int, int] = {}
        """Unit -> the step after which it was rebuilt last."""
        self._unit_of = {id(p): unit for unit, listed in parameters.items() for p in listed}
        self._options = options
        self._committed = committed
        self._whole: list[dict[str, Any]] | None = None
        if optimizer is not None:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def factor(self, unit: int) -> float:
        """Of the learning rate of `unit` in the next step."""
        since = self.since.get(unit)
        return 1.0 if since is None else self._options.factor(self._committed() - since)

    def _before(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        factors = {unit: factor for unit in self.since if (factor := self.factor(unit)) != 1.0}
        if not factors:
            return
        self._whole = optimizer.param_groups
        optimizer.param_groups = [part for group in self._whole for part in self._parts(group, factors)]

    def _parts(self, group: dict[str, Any], factors: Mapping[int, float]) -> list[dict[str, Any]]:
        """The group as one group for each factor. What a step changes in a part's settings is not kept."""
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factor = factors.get(self._unit_of.get(id(parameter), -1), 1.0)
            by_factor.setdefault(factor, []).append(parameter)
        return [
            {**group, "params": listed, "lr": group["lr"] * factor if factor != 1.0 else group["lr"]}
            for factor, listed in by_factor.items()
        ]

    def _after(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if self._whole is not None:
            optimizer.param_groups, self._whole = self._whole, None

"""Validation of a committed state: the mean loss over the same microbatches every time. Collective, changes no state.

    due at step s ─▶ forward only, over the training plan's layout ─▶ gather ─▶ (s, loss), the same on every rank

Not here: when it is due (engine.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from holdfast.proto.lease import Phase
from holdfast.proto.plan import Plan

from .config import TrainerConfig
from .data import make_source
from .gather import merge
from .lease import Lease
from .pipeline.executor import Executor

if TYPE_CHECKING:
    from .comm.group import Group


class Validation:
    """The validation data of a job, and its newest result."""

    def __init__(
        self,
        config: TrainerConfig,
        make_plan: Callable[[int], Plan],
        make_executor: Callable[[Plan], Executor],
        lease: Lease,
    ) -> None:
        self._count = config.validation_microbatches or config.step_microbatches
        self._source = make_source(
            config.validation,
            microbatch_size=config.microbatch_size,
            microbatches=self._count,
            seed=config.seed,
            shuffle=False,
        )
        self._executor = make_executor(make_plan(self._count))  # of more paths if there are more replicas
        self._start: Any = copy.deepcopy(self._source.state())
        self._lease = lease
        self._warm = False
        self.newest: tuple[int, float] | None = None
        """Step and loss of the newest validation in this generation."""

    def attach(self, group: Group) -> None:
        """A new generation: what was validated before may have to be done again by a replacement, so by all."""
        self._executor.attach(group)
        self.newest = None

    def run(self, group: Group, step: int) -> tuple[int, float]:
        """Validate the state after `step`. Raises Fenced or PeerLost."""
        self._lease.renew(Phase.USER)
        self._source.load_state(copy.deepcopy(self._start))  # a stream too: every validation sees the same
        self._source.begin(1)
        if not self._warm:
            self._lease.warm_up()  # evaluation mode may compile, and its data may be lazy
        outcome = self._executor.run(1, self._source, train=False, first=self._count)
        if not self._warm:
            self._lease.warmed()  # a step that hangs after it is noticed as soon as any other
            self._warm = True
        vector = torch.full((2 * self._count,), math.nan, dtype=torch.float64)
        for microbatch, (value, tokens) in outcome.losses.items():
            vector[microbatch], vector[self._count + microbatch] = value.double().cpu(), tokens
        self._lease.renew(Phase.WAITING)
        values = merge(group.allgather(vector))
        totals, counts = values[: self._count], values[self._count :]
        self.newest = (step, math.fsum(totals) / math.fsum(counts))
        return self.newest

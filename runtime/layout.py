"""From what the user asked and how many ranks there are to the plans of training and of validation.

    chain     every microbatch visits the layers in order; interleaved if asked for
    swapped   every other one visits the ends in reverse (pipeline/swap.py); validation is a chain of the same split
    one rank  with `swap` and `stages`: the swapped order of that many stages in one process, to compare with

Stages are swapped if the script says so (`swap`), or to recover by --recovery neighbours+, then with shadows. Which
layers are blocks must be known before ranks talk, for all layers and not only the hosted ones: a function that makes a
layer is called once for its shapes, with initial values left out. (torch's meta device would do, but loads its compiler
for an arange: 820 modules, seconds in every replacement.) That ranks have come to the same plan is seen from its digest
when they join. Not here: what a plan is for (engine.py), how it is made (pipeline/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Plan

from .config import TrainerConfig
from .pipeline.blocks import longest_run
from .pipeline.planner import choose_grid, grid_plan
from .pipeline.swap import alone, swap_costs, swap_split, swapped_plan
from .recovery.ladder import Mode
from .state import LayerSpec, build_unit, kind_of

RANDOM_FILLS: Final = frozenset(
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_")
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The grid of a job."""

    config: TrainerConfig
    units: int
    stages: int
    replicas: int
    swap: bool = False
    shadows: bool = False
    single: bool = False
    """All of it on one rank."""
    blocks: tuple[int, ...] = ()
    """Known if stages are swapped."""

    @staticmethod
    def of(config: TrainerConfig, layers: Sequence[LayerSpec], world_size: int, recovery: Mode) -> Layout:
        """Raises ConfigError, one line, for what cannot be laid out so."""
        plus = recovery == "neighbours+"
        if not (config.swap or plus):
            return Layout(config, len(layers), *choose_grid(world_size, config.stages, config.replicas))
        if config.interleave > 1:
            raise ConfigError("swapped stages and interleave are two ways to visit the stages: use one of them")
        single = world_size == 1 and not plus
        ranks = (config.stages or 1) * (config.replicas or 1) if single else world_size
        stages, replicas = choose_grid(ranks, config.stages, config.replicas)
        blocks = longest_run(kinds_of(layers)) if config.blocks is None else _given(config.blocks, len(layers))
        return Layout(config, len(layers), stages, replicas, True, config.shadows or plus, single, blocks)

    def training(self) -> Plan:
        """The plan of a step."""
        if not self.swap:
            return self._chain(self.config.step_microbatches, self.config.split)
        plan = swapped_plan(
            units=self.units,
            blocks=self.blocks,
            stages=self.stages,
            replicas=self.replicas,
            microbatches=self.config.step_microbatches,
            schedule=self.config.schedule,
            split=self.config.split,
            shadows=self.shadows,
        )
        return alone(plan) if self.single else plan

    def validation(self, microbatches: int) -> Plan:
        """A plan of forwards in order, which hosts what the training plan hosts.

        With fewer microbatches than replicas it is of one each: those beyond the data are left out when it is run.
        """
        microbatches = max(microbatches, self.replicas)
        if not self.swap:
            return self._chain(microbatches, self.config.split)
        plan = self._chain(microbatches, swap_split(self.units, self.blocks, self.stages, self.config.split))
        return alone(plan) if self.single else plan

    @property
    def costs(self) -> tuple[float, ...] | None:
        """Costs of the units, for the schedule of the training plan; None for all the same."""
        return swap_costs(self.units, self.blocks) if self.swap and not self.single else None

    def _chain(self, microbatches: int, split: Sequence[int] | None) -> Plan:
        return grid_plan(
            units=self.units,
            stages=self.stages,
            replicas=self.replicas,
            microbatches=microbatches,
            interleave=self.config.interleave,
            schedule=self.config.schedule,
            split=split,
        )


def _given(blocks: tuple[int, int], units: int) -> tuple[int, ...]:
    first, last = blocks
    if not 0 <= first < last < units:
        raise ConfigError(
            f"blocks are the first and the last layer of one kind, got {first} and {last} of {units} layers"
        )
    return tuple(range(first, last + 1))


def kinds_of(layers: Sequence[LayerSpec]) -> list[str]:
    """The kind of every layer, hosted here or not; a function is called once for all its places in the list."""
    known: dict[int, str] = {}
    with _Unfilled():
        for unit, layer in enumerate(layers):
            if id(layer) not in known:
                # A module stays where it is.
                made = layer if isinstance(layer, nn.Module) else build_unit(layer, unit, 0, torch.device("cpu"))
                known[id(layer)] = kind_of(made)
    return [known[id(layer)] for layer in layers]


class _Unfilled(TorchFunctionMode):
    """Leaves out initial values: memory that nobody writes to is none, and drawing them is most of a layer's making."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in RANDOM_FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)

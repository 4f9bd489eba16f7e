"""The simulator: what six ranks would compute, in one process, by the runtime's own Engine.

    Engine (runtime/engine.py) ── plan of six ranks, collapsed onto one: same units in the same order for every
      │                           microbatch, so the same bits (sums, clipping, optimizer are the engine's own)
      ├── neighbours' weights and learning rates: the planner of rebuilds and the boosts of runtime/recovery
      └── between two steps: lose(stages) does what the method says

It simulates no time and no messages. Not here: who fails when (trace.py), what a method is (methods.py).
Invariants: without failures it is a one-process Trainer, bit for bit (tests/unit/test_convergence.py); with the
recipes of `holdfast run --recovery` and its trace it is the six-rank job, loss by loss (real.py compares).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.proto.errors import PeerLost
from holdfast.runtime import rng
from holdfast.runtime.config import TrainerConfig
from holdfast.runtime.engine import Engine
from holdfast.runtime.recovery.neighbours import Average, Copy, Layout, NeighbourOptions, Recipe, combine, plan_rebuild
from holdfast.runtime.recovery.rejoin import Session
from holdfast.runtime.state import build_unit

from .methods import Method
from .settings import SPLIT, STAGES, UNITS, Settings, trainer_arguments, validation_windows
from .trace import Trace, by_iteration

QUICK_WINDOWS = 128
"""Windows of validation text for the curve; always the same ones, so methods compare better than the noise."""
STEADY_WINDOWS = 384
"""For the impulse responses."""
LANDING = 1
"""A replica of the state after step s is whole on its host once step s + LANDING is committed."""


def units_of(stage: int) -> range:
    """Units of a stage's rank."""
    begin = sum(SPLIT[:stage])
    return range(begin, begin + SPLIT[stage])


def block_of(stage: int) -> int:
    """The unit that recipes rebuild."""
    return stage + 1


LAYOUT = Layout(
    ("embedding", *["block"] * STAGES, "head"), tuple((stage,) for stage in (0, *range(STAGES), STAGES - 1))
)
"""For the planner of rebuilds: which ranks hold which units. Embedding and head are never asked for (methods.py)."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The whole state after a step."""

    step: int
    tensors: dict[tuple[str, str], torch.Tensor]
    metadata: dict[str, Any]
    norms: dict[int, float]


@dataclass(slots=True)
class Curve:
    """What a run gave. `losses[w-1]` is the training loss of wall iteration w, at step `steps[w-1]`."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    final: float = math.nan
    cpu_s: float = 0.0


class Simulator(Engine):
    """An engine over all units, whose stages can be lost."""

    def __init__(
        self, settings: Settings, seed: int, *, swapped: bool = False, options: NeighbourOptions | None = None
    ) -> None:
        self.settings, self.seed = settings, seed
        arguments = trainer_arguments(settings, seed)
        self._layers = arguments["layers"]
        session = Session.from_environment()
        # On one rank the runtime collapses the swapped plan of six; the other one is a chain on any number of ranks.
        grid = {"swap": True, "stages": STAGES, "split": SPLIT} if swapped else {}
        super().__init__(TrainerConfig(**arguments, **grid, neighbours=options or NeighbourOptions()), session)
        self._units = [[key for key in self.state.parameters if key[0] == unit] for unit in range(UNITS)]
        session.rejoin(self, settings.iterations, PeerLost("start"))

    # ---- state --------------------------------------------------------------------------------------

    def capture(self) -> Checkpoint:
        """Everything that a rollback takes back; the data's position is the step."""
        tensors = {(entry.name, entry.state): entry.tensor.clone() for entry in self.state.entries()}
        return Checkpoint(self.step, tensors, self.metadata(), dict(self.forward.norms))

    def become(self, checkpoint: Checkpoint) -> None:
        """Be in that state."""
        self.load(checkpoint.step, checkpoint.tensors, checkpoint.metadata)
        self.forward.norms = dict(checkpoint.norms)

    # ---- a lost stage -------------------------------------------------------------------------------

    def lose(self, stages: Iterable[int], method: Method, iteration: int) -> None:
        """Rebuild stages' blocks from their neighbours, or at random. Moments start anew, at another rate."""
        lost = tuple(stages)
        live = frozenset(range(STAGES)).difference(lost)
        assert self.state.optimizer is not None
        for stage in lost:
            block, made = block_of(stage), self._recipe(stage, live, method)
            if made is None:
                seed = rng.key(self.seed, 0xF1E5, iteration)
                fresh = build_unit(self._layers[block], block, seed, torch.device("cpu"))
                values = {name: p.detach() for name, p in fresh.named_parameters()}
            else:
                values = combine(made, lambda unit, rank: self._weights(unit))
            with torch.no_grad():
                for key in self._units[block]:
                    self.state.parameters[key].copy_(values[key[1]])
                    self.state.optimizer.state.pop(self.state.parameters[key], None)
            if method.keep_moments and made is not None:
                self._average_moments(block, [live_block for live_block in _sources(made)])
            self.forward.boosts.since[block] = self.step

    def _recipe(self, stage: int, live: frozenset[int], method: Method) -> Recipe | None:
        """What the runtime's planner says, or the variant of the method; None: at random."""
        if method.kind == "random":
            return None
        block = block_of(stage)
        if method.kind == "copy":
            source = stage - 1 if stage else 1
            return Copy(block, block_of(source), source, exact=False)
        rebuild = plan_rebuild(
            LAYOUT, stage, live, self.forward.norms, self.config.neighbours, swapped=self.layout.swap
        )
        return next(made for made in rebuild.recipes if made.unit == block)

    def _average_moments(self, block: int, sources: list[int]) -> None:
        """The plain mean of the sources' moments; the step count of the first."""
        assert self.state.optimizer is not None
        for name in (key[1] for key in self._units[block]):
            states = [self.state.optimizer.state[self.state.parameters[(unit, name)]] for unit in sources]
            self.state.optimizer.state[self.state.parameters[(block, name)]] = {
                key: sum(state[key] for state in states) / len(states) for key in states[0]
            }

    def return_to(self, stage: int, replica: Checkpoint) -> None:
        """The stale stage: this rank's state alone goes back, moments too."""
        assert self.state.optimizer is not None
        with torch.no_grad():
            for key in itertools.chain(*(self._units[unit] for unit in units_of(stage))):
                parameter, name = self.state.parameters[key], f"{key[0]}.{key[1]}"
                parameter.copy_(replica.tensors[(name, "weight")])
                states = {s: t.clone() for (n, s), t in replica.tensors.items() if n == name and s != "weight"}
                if states:
                    self.state.optimizer.state[parameter] = states
                else:
                    self.state.optimizer.state.pop(parameter, None)

    def _weights(self, unit: int) -> dict[str, torch.Tensor]:
        return {key[1]: self.state.parameters[key].detach() for key in self._units[unit]}

    # ---- measuring ----------------------------------------------------------------------------------

    def validate(self, windows: int | None = None) -> float:
        """Mean loss over the first `windows` validation windows (all: None), stages in standard order."""
        data = validation_windows(self.settings.context)
        count = len(data) if windows is None else min(windows, len(data))
        total = 0.0
        with torch.no_grad():
            for begin in range(0, count, 256):
                end = min(begin + 256, count)
                x, y = data.batch(begin, end)
                for module in self.state.modules.values():
                    x = module.eval()(x)
                total += float(self.config.loss(x, y)) * (end - begin)
        return total / count


def _sources(made: Recipe) -> list[int]:
    return [term.unit for term in made.terms] if isinstance(made, Average) else [made.from_unit]


def options_of(method: Method) -> NeighbourOptions:
    """The runtime's options for a method."""
    if method.catch_up:
        return NeighbourOptions(lr_factor=1.0 + method.catch_up, lr_decay_steps=method.every)
    return NeighbourOptions(exponent=method.exponent, lr_factor=method.lr_factor, partners=method.partners)


# ---- a run -------------------------------------------------------------------------------------------------


class Run:
    """One method on one trace. `prefix`: the unbroken run up to `start`, if it is the same up to there."""

    def __init__(
        self,
        settings: Settings,
        seed: int,
        method: Method,
        trace: Trace,
        *,
        start: Checkpoint | None = None,
        prefix: Curve | None = None,
        validate_every: int = 25,
    ) -> None:
        self.method, self.validate_every = method, validate_every
        self.simulator = Simulator(settings, seed, swapped=method.swapped, options=options_of(method))
        self.failing = by_iteration(trace) if method.kind != "none" else {}
        self.curve = Curve()
        self.kept: dict[int, Checkpoint] = {}
        self._begin = 1
        if start is not None and prefix is not None:
            self.simulator.become(start)
            self._begin = start.step + 1
            self.curve.losses, self.curve.steps = prefix.losses[: start.step], prefix.steps[: start.step]
            self.curve.validation = [point for point in prefix.validation if point[0] <= start.step]
        self._keep()

    def all(self, observe: Callable[[Simulator, int], None] | None = None) -> Curve:
        """Run to the last iteration. `observe(simulator, iteration)` after each."""
        simulator, curve = self.simulator, self.curve
        started = time.process_time()
        for iteration in range(self._begin, simulator.settings.iterations + 1):
            self.fail(iteration)
            simulator.train_step()
            assert simulator.report is not None
            curve.losses.append(simulator.report.loss)
            curve.steps.append(simulator.step)
            self._keep()
            if iteration % self.validate_every == 0:
                curve.validation.append((iteration, simulator.validate(QUICK_WINDOWS)))
            if observe is not None:
                observe(simulator, iteration)
        curve.final = simulator.validate(simulator.settings.final_windows)
        curve.cpu_s = time.process_time() - started
        return curve

    def fail(self, iteration: int) -> None:
        """What the method does about the stages that are lost now."""
        lost = self.failing.get(iteration, ())
        if not lost:
            return
        match self.method.kind:
            case "stale":
                for stage in lost:
                    self.simulator.return_to(stage, self.newest(self.simulator.step - LANDING))
                    if self.method.catch_up:
                        self.simulator.forward.boosts.since |= dict.fromkeys(units_of(stage), self.simulator.step)
            case "rollback":
                self.simulator.become(self.newest(self.simulator.step))
            case _:
                self.simulator.lose(lost, self.method, iteration)

    def newest(self, step: int) -> Checkpoint:
        """The newest kept state that is not newer than `step`; at the least the first one."""
        return self.kept[max(min(self.kept), max((at for at in self.kept if at <= step), default=0))]

    def _keep(self) -> None:
        """Keep the last two states of multiples of `every`: the newest may not have landed yet."""
        every = self.method.every
        if every and self.simulator.step % every == 0 and self.simulator.step not in self.kept:
            self.kept[self.simulator.step] = self.simulator.capture()
            for old in sorted(self.kept)[:-2]:
                del self.kept[old]

"""Trainer: the user's door. A training loop that survives the death of any rank, bit for bit.

    trainer = Trainer(layers=[...], loss=loss_fn, optimizer=lambda p: AdamW(p), data=dataset,
                      microbatch_size=4, microbatches=8)
    for step in trainer.steps(until=1000):
        result = step.run()

A survivor stays inside `run()` while a rank is replaced; a replacement starts the script from the top and
joins at the step that the job resumes from. Not here: what a step computes (engine.py), how a generation is
formed and restored (recovery/rejoin.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from holdfast.proto.errors import ConfigError, Fenced, PeerLost
from holdfast.proto.ids import NO_STEP
from holdfast.proto.lease import Phase

from .config import TrainerConfig
from .engine import Engine
from .recovery.rejoin import Session
from .state import Entry


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one committed step gave; the same on every rank but for `seconds`."""

    step: int
    loss: float
    """Mean over the global batch, in microbatch order."""
    validation_loss: float | None
    """Mean over the validation microbatches, when one was due at this step."""
    tokens: int
    """Elements of all targets."""
    seconds: float
    """Wall time of `run()`, recoveries included."""
    grad_norm: float
    lr: float
    skipped: bool
    """The update was left out because a gradient was not finite (skip_nonfinite or loss_scale)."""
    recovered: tuple[str, ...]
    """One line per recovery that this rank survived during the call."""
    snapshot_step: int
    """Newest step whose state every rank had wholly in its snapshot manager; -1 for none."""


class Step:
    """One step to be run, exactly once."""

    def __init__(self, trainer: Trainer, number: int) -> None:
        self._trainer = trainer
        self.number = number

    def run(self) -> StepResult:
        """Train until this step is committed everywhere, through any failure; returns its result."""
        return self._trainer._run(self.number)

    def every(self, n: int) -> bool:
        """Whether this step's number is a multiple of n."""
        return self.number % n == 0


class Trainer:
    """Pipeline- and data-parallel training of an ordered list of layers.

    Arguments (keyword only):
      layers: ordered list of nn.Modules, or functions that return one. A function is called only on ranks
        that host the layer, with generators seeded by (seed, index): cheap and the same in every layout.
        A layer takes and returns a tensor, or a tuple of at most 8 tensors.
      loss: function of (last layer's output, target) -> scalar mean over the microbatch, or (sum, count) when
        counts differ between microbatches; the step's loss is then sum over sums / sum over counts.
      optimizer: function of a list of parameters -> torch optimizer.
      scheduler: function of an optimizer -> LR scheduler, stepped after each committed step.
      data: map-style dataset of (input, target), shuffled by seed; or an iterable of collated (inputs, targets)
        microbatches with state_dict/load_state_dict.
      microbatch_size, and microbatches per step over all replicas (or batch_size = their product).
      validation, validate_every, validation_microbatches: evaluated inside run() every so many steps.
      stages, replicas: the grid; rank = replica * stages + stage. Default: one pipeline over all ranks.
      split: layers per stage; interleave: chunks per rank; schedule: "1f1b" or "gpipe".
      swap: every other microbatch visits the first two and the last two of at least 4 stages in reverse, as `holdfast
        run --recovery neighbours+` asks for. Each function is then called once more on every rank, for its shapes,
        unless `blocks` tells the first and the last layer of those that are of one kind. shadows: what is before and
        after these is kept by a second stage too. On one rank `swap` with `stages` gives the order of so many stages.
      snapshot_every: keep the state of every so many steps in memory (1); a failure redoes what is since.
      clip_norm: global gradient norm; autocast: torch.bfloat16 or torch.float16; loss_scale: number or "dynamic";
      skip_nonfinite: leave out updates with infinite or NaN gradients; checkpoint_activations: recompute.
      neighbours: NeighbourOptions(exponent, clip, lr_factor, lr_decay_steps), the numbers of `holdfast run --recovery
        neighbours` (docs/RECOVERY.md).
      seed; shuffle; exact: False trades the gradient tree for a plain running sum; state: name -> object with
        state_dict/load_state_dict, captured at each commit and restored with everything else (change them inside
        layers, loss or data, not between steps); device: "cpu" or "cuda".
      zero: 1 shards the optimizer's state over the replicas of each layer (ZeRO-1), with the same bits; for
        optimizers that treat each element alone, which is tried at the start (default: --zero, else 0).

    Raises ConfigError for what cannot be done (under `holdfast run`: one line, exit code 2).
    """

    def __init__(self, **arguments: Any) -> None:
        self._session = Session.from_environment()
        self._until = 0
        try:
            try:
                config = TrainerConfig(**arguments)
            except TypeError as error:
                raise ConfigError(f"Trainer: {_argument_error(error)}") from None
            self._session.check_faults()
            self._engine = Engine(config, self._session)
        except ConfigError as error:
            self._refuse(error)

    @property
    def rank(self) -> int:
        """This process' rank."""
        return self._session.identity.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._session.identity.world_size

    @property
    def step(self) -> int:
        """Steps committed so far."""
        return self._engine.step

    def steps(self, until: int) -> Iterator[Step]:
        """Every step that is still to be run, up to `until`, wherever the job is.

        A replacement process gets only those after the resume point. After the last step all ranks wait until
        its state is kept everywhere, so that none can lose what another already reported.
        """
        if self._until:
            self._refuse(ConfigError("trainer.steps() was called before; a job has one loop over its steps"))
        self._until = until
        self._guarded(self._join)
        while self._engine.step < until:
            number = self._engine.step + 1
            self._session.lease.renew(Phase.USER)
            self._engine.injector.at("user", number)
            yield Step(self, number)
            if self._engine.step < number:
                self._refuse(ConfigError(f"step {number} was not run: call step.run() in the loop"))
        self._guarded(self._finish)
        self._session.lease.renew(Phase.USER)

    def final_state(self) -> dict[str, torch.Tensor]:
        """This rank's weights, buffers and optimizer state: "unit.name" and "unit.name@state" -> copy.

        With ZeRO-1 "unit.name@state[start:stop]": the elements that this rank keeps, in row-major order.
        """
        return {_label(entry): entry.tensor.clone() for entry in self._engine.state.entries()}

    # ---- inside -------------------------------------------------------------------------------------

    def _join(self) -> None:
        self._session.rejoin(self._engine, self._until, PeerLost("start"))
        self._survive(lambda: self._advance(0))

    def _run(self, number: int) -> StepResult:
        if number != self._engine.step + 1:
            self._refuse(ConfigError(f"step {number} was run already; each step is run once"))
        started = time.monotonic()
        recovered: list[str] = []
        self._guarded(lambda: self._survive(lambda: self._advance(number), recovered))
        report = self._engine.report
        assert report is not None and report.step == number
        self._session.lease.renew(Phase.USER)
        return StepResult(
            step=number,
            loss=report.loss,
            validation_loss=self._engine.validation_loss(number),
            tokens=report.tokens,
            seconds=time.monotonic() - started,
            grad_norm=report.grad_norm,
            lr=report.lr,
            skipped=report.skipped,
            recovered=tuple(recovered),
            snapshot_step=report.snapshot_step,
        )

    def _advance(self, number: int) -> None:
        """Come to the state after `number` from wherever the generation resumed.

        Every rank does the same collectives on the way, whether it is told of a step for the first time or
        redoes it: so the validation that was due at the resume step comes first.
        """
        self._engine.validate_if_due()
        while self._engine.step < number:
            self._engine.train_step()
            self._engine.validate_if_due()

    def _finish(self) -> None:
        def attempt() -> None:
            self._advance(self._until)  # a rank that died now may have taken everybody back a step
            self._engine.finish()

        self._survive(attempt)
        self._session.goodbye(self._engine.step)

    def _survive(self, attempt: Any, recovered: list[str] | None = None) -> None:
        """Run `attempt` to its end, through as many generations as it takes."""
        while True:
            try:
                attempt()
                return
            except (Fenced, PeerLost) as error:
                started = time.monotonic()
                before = "between two steps" if self._engine.step == NO_STEP else f"at {self._engine.step}"
                # Its traceback holds the broken step's tensors, just when a copy of the state may be needed.
                self._session.rejoin(self._engine, self._until, error.with_traceback(None))
                if recovered is not None:
                    inexact = f"; NOT exact: {self._session.announced}" if self._session.announced else ""
                    recovered.append(
                        f"generation {self._session.generation}: {self._session.reason}; resumed from step "
                        f"{self._engine.step} (was {before}) after {(time.monotonic() - started) * 1e3:.0f} ms"
                        f"{inexact}"
                    )
            except BaseException:
                # It ends the process, as a rule, and to print where it came from may take a while: that is no hang.
                self._session.lease.warm_up()
                self._session.lease.renew(self._session.lease.phase)
                raise

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except ConfigError as error:
            self._refuse(error)

    def _refuse(self, error: ConfigError) -> NoReturn:
        """One line and exit code 2 under an agent; the error itself in plain Python."""
        if not self._session.managed:
            raise error
        self._session.config_error(str(error))
        sys.stdout.flush()
        raise SystemExit(2)


def _label(entry: Entry) -> str:
    part = "" if entry.whole is None else f"[{entry.start}:{entry.start + entry.tensor.numel()}]"
    return entry.name if entry.state in ("weight", "buffer") else f"{entry.name}@{entry.state}{part}"


def _argument_error(error: TypeError) -> str:
    text = str(error)
    return text.partition("__init__() ")[2] or text

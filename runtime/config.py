"""What a user asks of a Trainer, checked before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from holdfast.proto.errors import ConfigError

from .recovery.neighbours import NeighbourOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Arguments of Trainer, one field each; Trainer's docstring explains them."""

    layers: Sequence[Any]
    loss: Callable[[Any, Any], Any]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    data: Any
    microbatch_size: int
    microbatches: int | None = None
    batch_size: int | None = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    validation: Any = None
    validate_every: int = 0
    validation_microbatches: int | None = None
    stages: int | None = None
    replicas: int | None = None
    split: Sequence[int] | None = None
    swap: bool = False
    shadows: bool = False
    blocks: tuple[int, int] | None = None
    interleave: int = 1
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    checkpoint_activations: bool = False
    loss_scale: float | Literal["dynamic"] | None = None
    skip_nonfinite: bool = False
    snapshot_every: int = 1
    seed: int = 0
    shuffle: bool = True
    exact: bool = True
    state: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    zero: int | None = None
    neighbours: NeighbourOptions = field(default_factory=NeighbourOptions)

    def __post_init__(self) -> None:
        for name in ("microbatch_size", "interleave", "snapshot_every"):
            _positive(name, getattr(self, name))
        for name in ("microbatches", "batch_size", "stages", "replicas", "validation_microbatches"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if (self.microbatches is None) == (self.batch_size is None):
            raise ConfigError("give either microbatches (per step) or batch_size (samples per step)")
        if self.batch_size is not None and self.batch_size % self.microbatch_size:
            raise ConfigError(
                f"batch_size {self.batch_size} is not divisible by microbatch_size {self.microbatch_size}"
            )
        if self.zero not in (None, 0, 1) or isinstance(self.zero, bool):
            raise ConfigError(f"zero is 0 or 1 (optimizer state sharded over replicas), got {self.zero!r}")
        if self.schedule not in ("1f1b", "gpipe"):
            raise ConfigError(f"schedule is '1f1b' or 'gpipe', got {self.schedule!r}")
        if self.shadows and not self.swap:
            raise ConfigError("shadows keep the layers at the ends of swapped stages: use swap=True with them")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0, got {self.clip_norm}")
        if self.validate_every and self.validation is None:
            raise ConfigError("validate_every is set but no validation data is given")
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(f"autocast is torch.bfloat16 or torch.float16, got {self.autocast!r}")
        scale = self.loss_scale
        if scale not in (None, "dynamic") and (not isinstance(scale, (int, float)) or not scale > 0):
            raise ConfigError(f"loss_scale is a number above 0 or 'dynamic', got {scale!r}")
        if not isinstance(self.state, Mapping):
            raise ConfigError(f"state is a dict of name -> object, got a {type(self.state).__qualname__}")
        if not isinstance(self.neighbours, NeighbourOptions):
            raise ConfigError(f"neighbours is a NeighbourOptions(...), got a {type(self.neighbours).__qualname__}")
        if not callable(self.loss):
            raise ConfigError("loss is a function of (output of the last layer, target)")
        if not callable(self.optimizer):
            raise ConfigError("optimizer is a function of a list of parameters, such as lambda p: AdamW(p, lr=3e-4)")

    def with_zero(self, option: str, recovery: str) -> TrainerConfig:
        """With `--zero` of the command, which the environment told (empty: not given). Raises ConfigError.

        `recovery`: the mode; moments that only a lost rank had are in no other's memory, so all but exact are refused.
        """
        if option not in ("", "0", "1"):
            raise ConfigError(f"--zero is 0 or 1, got {option!r}")
        if option and self.zero not in (None, int(option)):
            raise ConfigError(
                f"the script says zero={self.zero} and the command --zero {option}: leave out one of them"
            )
        zero = int(option) if option else self.zero or 0
        if zero and recovery != "exact":
            raise ConfigError(f"--recovery {recovery} does not go with ZeRO-1: leave out one of them")
        return replace(self, zero=zero)

    @property
    def step_microbatches(self) -> int:
        """M: microbatches per optimizer step, over all replicas."""
        if self.microbatches is not None:
            return self.microbatches
        assert self.batch_size is not None
        return self.batch_size // self.microbatch_size


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")

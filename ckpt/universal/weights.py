"""How much each checkpoint counts in a merge: kernels, named by what they compute. Pure; each sums to 1.

    uniform       1                                  ema         (1 - b) b^(newer ones), the oldest gets the rest
    explicit      given                              last-k      1 for the k newest, else 0
    loss-power    (1 / loss)^a                       step-power  step^a
    loss-exp      exp(-a (loss - min) / (max - min)) step-exp    exp(a step / max)
    score-power   score^a

`a`, the penalty, is one number whatever the number of checkpoints; 0 makes every kernel uniform. Where "newer"
matters, it is the step that tells. Invariant: the weight of a checkpoint does not depend on the order given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from .errors import UsageError

Values = Sequence[float]


def _loss_power(values: Values, penalty: float) -> list[float]:
    low = min(values)
    if low <= 0:
        raise UsageError("loss-power needs losses above 0; loss-exp takes any", lowest=low)
    return [(low / value) ** penalty for value in values]


def _loss_exp(values: Values, penalty: float) -> list[float]:
    low, high = min(values), max(values)
    return [math.exp(-penalty * (value - low) / (high - low)) if high > low else 1.0 for value in values]


def _power(values: Values, penalty: float) -> list[float]:
    high = max(values)
    if min(values) < 0 or high <= 0:
        raise UsageError("a power of values that are not above 0", lowest=min(values), highest=high)
    return [(value / high) ** penalty for value in values]


def _step_exp(values: Values, penalty: float) -> list[float]:
    high = max(values)
    if high <= 0:
        raise UsageError("step-exp needs a step above 0", highest=high)
    return [math.exp(penalty * (value / high - 1)) for value in values]


KERNELS: Final[Mapping[str, tuple[str, Callable[[Values, float], list[float]]]]] = MappingProxyType(
    {
        "loss-power": ("loss", _loss_power),
        "loss-exp": ("loss", _loss_exp),
        "step-power": ("step", _power),
        "step-exp": ("step", _step_exp),
        "score-power": ("score", _power),
    }
)
"""What the kernel needs of each checkpoint, and how it weighs."""
MODES: Final = ("uniform", "explicit", "ema", "last-k", *KERNELS)


def normalized(raw: Values) -> list[float]:
    """Scaled to sum 1. The sum is exact before it is rounded, so the order of `raw` does not matter."""
    if not raw or any(not math.isfinite(weight) for weight in raw):
        raise UsageError("weights that are no numbers", weights=list(raw))
    total = math.fsum(raw)
    if total <= 0:
        raise UsageError("weights that do not add up to more than 0", weights=list(raw))
    return [weight / total for weight in raw]


def kernel(mode: str, values: Values, penalty: float) -> list[float]:
    """Weights by a metric of each checkpoint."""
    if not math.isfinite(penalty) or penalty < 0:
        raise UsageError("a penalty is a number from 0 on", penalty=penalty)
    if any(not math.isfinite(value) for value in values):
        raise UsageError("a metric that is no number", values=list(values))
    try:
        return normalized(KERNELS[mode][1](values, penalty))
    except OverflowError:
        raise UsageError("a penalty too large for these values", penalty=penalty) from None


def ema(steps: Values, beta: float) -> list[float]:
    """Exponential moving average over the steps: what it would be had it been kept while training."""
    if not 0 <= beta < 1:
        raise UsageError("beta is from 0 on and below 1", beta=beta)
    ranks = _ranks(steps)
    oldest = len(steps) - 1
    return normalized([beta**newer * (1 - beta if newer < oldest else 1.0) for newer in ranks])


def last(steps: Values, count: int) -> list[float]:
    """The newest `count`, uniformly."""
    if not 1 <= count <= len(steps):
        raise UsageError("last-k needs a k from 1 to the number of checkpoints", k=count, checkpoints=len(steps))
    return normalized([1.0 if newer < count else 0.0 for newer in _ranks(steps)])


def explicit(given: Values, count: int) -> list[float]:
    """The weights given, one each, scaled to sum 1; they may be negative if their sum is not."""
    if len(given) != count:
        raise UsageError("one weight for each checkpoint", weights=len(given), checkpoints=count)
    return normalized(given)


def _ranks(steps: Values) -> list[int]:
    """How many are newer, for each."""
    if len(set(steps)) != len(steps):
        raise UsageError("two checkpoints of one step: which is newer cannot be told", steps=list(steps))
    return [sum(other > step for other in steps) for step in steps]

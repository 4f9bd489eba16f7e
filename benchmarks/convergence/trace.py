"""Failure traces: which stage fails at the start of which iteration. Pure.

    seed ──▶ one number in [0, 1) per (iteration, stage) ──▶ below the rate: that stage fails there

The numbers depend on the seed alone, so a trace at a lower rate holds (but for the last rule) a part of the
failures of a higher one, and all methods meet the same failures. Rules: the first iterations are clean; of
adjacent stages in one iteration only the first fails, since no method here survives the loss of both.
Iterations are wall iterations, 1-based: a rollback does not meet the failures of its past again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

RATES: Final = {"5 %": 0.0009, "10 %": 0.002, "16 %": 0.004}
"""The paper's labels, and the probability per stage and iteration that its code uses for them (500M model)."""
CLEAN: Final = 50


@dataclass(frozen=True, slots=True)
class Failure:
    """`stage` (0-based) is lost when iteration `iteration` (1-based) is about to begin."""

    iteration: int
    stage: int


Trace = tuple[Failure, ...]


def draw(seed: int, rate: float, stages: int, iterations: int, *, interior: bool = False, clean: int = CLEAN) -> Trace:
    """The trace of a seed. `interior`: the same numbers, but the first and the last stage never fail."""
    chance = random.Random(f"holdfast convergence trace {seed}")
    failures: list[Failure] = []
    for iteration in range(1, iterations + 1):
        drawn = [chance.random() for _ in range(stages)]
        if iteration <= clean:
            continue
        for stage, value in enumerate(drawn):
            if value >= rate or (interior and stage in (0, stages - 1)):
                continue
            if failures and failures[-1] == Failure(iteration, stage - 1):
                continue
            failures.append(Failure(iteration, stage))
    return tuple(failures)


def by_iteration(trace: Trace) -> dict[int, tuple[int, ...]]:
    """Iteration -> the stages that fail there."""
    found: dict[int, tuple[int, ...]] = {}
    for failure in trace:
        found[failure.iteration] = (*found.get(failure.iteration, ()), failure.stage)
    return found


def scripted_faults(trace: Trace, until: int) -> str:
    """The same failures as SIGKILLs of `holdfast run --faults`, rank = stage, up to iteration `until`."""
    return ";".join(
        f"rank={failure.stage},step={failure.iteration},at=user,kind=kill"
        for failure in trace
        if failure.iteration <= until
    )

"""From the lines of a campaign to numbers. Pure.

validation curve ─▶ first iteration at or below a target          lines of all seeds ─▶ table cells
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

TARGETS: Final = (2.0, 1.9, 1.8)
TAIL: Final = 5
"""Points at the end of a curve whose mean is steadier than the last one."""
Line = Mapping[str, Any]


def first_at(curve: Sequence[Sequence[float]], target: float) -> int | None:
    """The first iteration whose validation loss is at or below `target`; None if there is none."""
    return next((int(iteration) for iteration, loss in curve if loss <= target), None)


def tail(curve: Sequence[Sequence[float]]) -> float:
    """Mean of the curve's last points."""
    return statistics.fmean(loss for _, loss in curve[-TAIL:])


def failures_until(failures: Sequence[Sequence[int]], iteration: int) -> int:
    """How many stages were lost up to and with an iteration."""
    return sum(at <= iteration for at, _ in failures)


def rolled_back(failures: Iterable[int], every: int, iterations: int) -> list[int]:
    """The step that each wall iteration computes under rollback to multiples of `every`, with failures at these."""
    failing, steps, step = set(failures), [], 0
    for iteration in range(1, iterations + 1):
        if iteration in failing:
            step -= step % every
        step += 1
        steps.append(step)
    return steps


def at_step(curve: Sequence[Sequence[float]], step: int) -> float:
    """Validation loss at a step, linear between the points of a curve; the ends continue."""
    before = max((point for point in curve if point[0] <= step), key=lambda point: point[0], default=curve[0])
    after = min((point for point in curve if point[0] >= step), key=lambda point: point[0], default=curve[-1])
    if before[0] == after[0]:
        return float(before[1])
    share = (step - before[0]) / (after[0] - before[0])
    return float(before[1] + share * (after[1] - before[1]))


def replayed(unbroken: Line, failures: Sequence[Sequence[int]], every: int, iterations: int) -> dict[str, Any]:
    """What rollback gives, read off the run without failures: it computes the same steps again, to the same bits.

    Losses of steps are exact; validation between the curve's points is interpolated, and the final one is the unbroken
    run's moved by what the curve (which sees less of the text) says the missing steps are worth.
    """
    steps = rolled_back((at for at, _ in failures), every, iterations)
    curve, points = unbroken["validation"], [iteration for iteration, _ in unbroken["validation"]]
    return {
        "steps": steps,
        "losses": [unbroken["losses"][step - 1] for step in steps] if unbroken["losses"] else [],
        "validation": [[at, at_step(curve, steps[at - 1])] for at in points],
        "final": unbroken["final"] + at_step(curve, steps[-1]) - at_step(curve, iterations),
        "failures": list(failures),
        "replayed": True,
    }


def smoothed(losses: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values, fewer at the start."""
    return [statistics.fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def cell(values: Sequence[float | int | None], digits: int = 3) -> str:
    """All seeds' values for a table, in the order of the seeds; "-" for what was not reached."""
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def mean(values: Sequence[float | None]) -> float | None:
    """Of all seeds; None if one has none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None

"""What a rank keeps beside its state so that a job can go on without a snapshot of its last step.

    cut off at the barrier ─▶ pending: final gradients, and what the forward changed ─┐ the others have applied it?
    commit                 ─▶ told: what the barrier told, for those cut off at it    ├─▶ apply it too: same bits
                              norms: of each hosted unit's last gradient              ┘   else it is done again
    a stage was rebuilt    ─▶ since: the first step that is not what an unbroken run would have made

One value a unit and no message in a healthy step: the barrier carries the norms anyway. Not here: who applies what
(ladder.py), rebuilding (rebuild.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from holdfast.proto.ids import NO_STEP

from .boost import Boosts
from .ladder import Mode

if TYPE_CHECKING:
    from ..gather import Gathered
    from ..undo import Undo

Gradients = dict[tuple[int, str], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that only lacks its commit."""

    step: int
    gradients: Gradients
    after: Undo
    """What the forward changed: taking "back" to it is going forward."""


class Forward:
    """Of one rank. Main thread only."""

    def __init__(self, mode: Mode, boosts: Boosts, *, clipped: bool) -> None:
        """`clipped`: norms are those after clipping."""
        self.mode: Mode = mode
        self.boosts = boosts
        self.pending: Pending | None = None
        self.told: Gathered | None = None
        self.told_step = int(NO_STEP)
        self.norms: dict[int, float] = {}
        self.since = 0
        """First step that was not exact; 0: all were."""
        self._clipped = clipped
        self._raw: dict[int, float] = {}

    @property
    def on(self) -> bool:
        """Whether this job may go on without a snapshot of its last step."""
        return self.mode != "exact"

    def cut_off(self, step: int, gradients: Gradients, after: Undo) -> None:
        """The step broke off with final gradients: it may yet be committed."""
        self.pending = Pending(step, gradients, after)

    @property
    def ready_step(self) -> int:
        """The step that only lacks its commit; NO_STEP for none."""
        return self.pending.step if self.pending is not None else int(NO_STEP)

    def measured(self, norms: Mapping[tuple[int, str], float]) -> None:
        """Norms of this rank's final gradients, unscaled, by parameter."""
        squares: dict[int, list[float]] = {}
        for (unit, _), norm in norms.items():
            squares.setdefault(unit, []).append(norm**2)
        self._raw = {unit: math.sqrt(math.fsum(listed)) for unit, listed in squares.items()}

    def applied(self, step: int, gathered: Gathered, mean: float, final: float) -> None:
        """The step was committed; gradients were multiplied by `final`, of which `mean` is not clipping."""
        self.pending = None
        self.told, self.told_step = gathered, step
        scale = final if self._clipped else mean
        if all(map(math.isfinite, self._raw.values())):
            self.norms = {unit: norm * scale for unit, norm in self._raw.items()}

    # ---- captured with the state ----------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """What belongs to the state; nothing as long as the run is exact."""
        if not self.since and not self.boosts.since:
            return {}
        return {"lossy": {"since": self.since, "rebuilt": {str(u): s for u, s in sorted(self.boosts.since.items())}}}

    def load(self, metadata: Mapping[str, Any]) -> None:
        """Undo metadata()."""
        lossy = metadata.get("lossy", {"since": 0, "rebuilt": {}})
        self.since = int(lossy["since"])
        self.boosts.since = {int(unit): int(step) for unit, step in lossy["rebuilt"].items()}
        self.pending, self.norms = None, {}
        self.told, self.told_step = None, int(NO_STEP)

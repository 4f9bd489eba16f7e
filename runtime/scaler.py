"""Loss scaling for fp16: one scale for the whole job, changed by all ranks from the same flags.

Grows twofold after `growth_interval` finite steps, halves on a step with infinite gradients, which is
skipped (Micikevicius et al., Mixed Precision Training, 2018; the constants are torch.amp.GradScaler's).
Powers of two only, so that scaling and unscaling are exact.
"""

from __future__ import annotations

from typing import Literal


class LossScaler:
    """Fixed or dynamic scale. Pure state; no tensors."""

    def __init__(self, scale: float | Literal["dynamic"] | None, growth_interval: int = 2000) -> None:
        self.dynamic = scale == "dynamic"
        self.scale = 65536.0 if scale == "dynamic" else float(scale or 1.0)
        self.growth_interval = growth_interval
        self.finite_steps = 0

    def update(self, finite: bool) -> None:
        """Account for a step."""
        if not self.dynamic:
            return
        if not finite:
            self.scale, self.finite_steps = self.scale / 2.0, 0
            return
        self.finite_steps += 1
        if self.finite_steps == self.growth_interval:
            self.scale, self.finite_steps = self.scale * 2.0, 0

    def state_dict(self) -> dict[str, float | int]:
        """Captured with the state."""
        return {"scale": self.scale, "finite_steps": self.finite_steps}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Undo state_dict."""
        self.scale, self.finite_steps = float(state["scale"]), int(state["finite_steps"])

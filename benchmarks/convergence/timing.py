"""From iterations to time and traffic, with the paper's constants. Pure.

    T = N_iter * t_iter * (1 + o) + N_fail * t_rec          o: the method's overhead per iteration

o of a copy that goes to another host every k iterations is its bytes over the traffic that a stage has anyway. The
paper's own constants are used as they are; what they do not say is computed from its 500M shape. None of this is a
measurement: real.py measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ITERATION_S: Final = 91.3
RECOVERY_S: Final = 30.0
REDUNDANT_PAPER: Final = 0.654
"""Redundant computation as the paper measured it: half the microbatch size, and a second forward."""
REDUNDANT_COMPUTE: Final = 0.33
"""One more forward and nothing else: a third of forward and backward."""
TRAFFIC_BYTES: Final = 0.94e9
"""Activations and gradients that cross one stage boundary in an iteration, low estimate (reference); see Shape."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The paper's 500M model and its batch."""

    dim: int = 1024
    layers: int = 4
    """Of a stage."""
    stages: int = 6
    vocabulary: int = 32_000
    tokens: int = 262_144
    """Of an iteration, all replicas."""

    @property
    def stage_parameters(self) -> int:
        """Attention has four matrices dim x dim, SwiGLU three of dim x 4 dim."""
        return self.layers * (4 + 3 * 4) * self.dim**2

    @property
    def edge_parameters(self) -> int:
        """Embedding, or head."""
        return self.vocabulary * self.dim

    @property
    def stage_state_bytes(self) -> int:
        """Weights and Adam's two moments in float32."""
        return 12 * self.stage_parameters

    @property
    def boundary_bytes(self) -> int:
        """Activations forth and gradients back over one boundary of stages in bf16."""
        return 2 * 2 * self.tokens * self.dim

    def stale_share(self, every: int) -> float:
        """Traffic of the replicas over the job's own: all stages and both edges, over all boundaries.

        The paper's pipeline has embedding and head in a stage of their own, so there are `stages` boundaries.
        """
        state = 12 * (self.stages * self.stage_parameters + 2 * self.edge_parameters)
        return state / every / (self.stages * self.boundary_bytes)

    def edge_share(self) -> float:
        """CheckFree+: gradients of embedding and head to a second host each iteration, float32."""
        return 2 * 4 * self.edge_parameters / (self.stages * self.boundary_bytes)


PAPER: Final = Shape()


def overhead(kind: str, every: int) -> float:
    """Share of an iteration that a method costs when nothing fails."""
    if kind in ("stale", "rollback"):
        return PAPER.stage_state_bytes / every / TRAFFIC_BYTES
    return 0.0


def modelled_h(iterations: int, failures: int, overhead: float) -> float:
    """Hours, by the formula above."""
    return (iterations * ITERATION_S * (1.0 + overhead) + failures * RECOVERY_S) / 3600.0


def measured_s(iterations: int, failures: int, step_s: float, recovery_s: float) -> float:
    """Seconds for the same, from a step and a recovery that were measured."""
    return iterations * step_s + failures * recovery_s

"""The methods that are compared: what happens to a lost stage, and in which order the stages are trained. Pure.

    kind       what a lost stage gets                                                           the others
    none       it is never lost                                                                 -
    average    the neighbours' weights, averaged; fresh moments; learning rate x lr_factor      go on
    copy       one neighbour's weights; fresh moments; learning rate x lr_factor                go on
    random     initial weights of another seed; fresh moments; learning rate x lr_factor        go on
    stale      its own weights and moments, up to `every` iterations old                        go on
    rollback   its own weights and moments of the last multiple of `every` steps                go back too

The embedding and the head survive in average, copy and random (the paper keeps them in a stage that never fails, or
replicates them); in stale and rollback they are part of their rank's state and come back as old as the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["none", "average", "copy", "random", "stale", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One line of the tables."""

    name: str
    title: str
    kind: Kind
    swapped: bool = False
    """Half of the microbatches run with the first two and the last two stages in swapped order (CheckFree+)."""
    exponent: float = 1.0
    """Of the gradient norms that weigh the average; 0: uniform."""
    lr_factor: float = 1.1
    every: int = 0
    partners: Literal["copy", "average"] = "copy"
    """CheckFree+: S2 and S(s-1) are copies of the stages that they swap with, or averages."""
    keep_moments: bool = False
    """Average the neighbours' moments as well, instead of starting with none."""
    catch_up: float = 0.0
    """stale: the learning rate is raised by this part after a loss, and comes back linearly within `every`."""


def _reinit(name: str, title: str, kind: Kind, **more: object) -> Method:
    return Method(name=name, title=title, kind=kind, **more)  # type: ignore[arg-type]


_ALL: Final = (
    Method(name="none", title="no failure", kind="none"),
    Method(name="swap-only", title="swap only, no failure", kind="none", swapped=True),
    _reinit("checkfree", "CheckFree", "average"),
    _reinit("checkfree+", "CheckFree+", "average", swapped=True),
    _reinit("copy", "copy neighbour", "copy"),
    _reinit("uniform", "uniform average", "average", exponent=0),
    _reinit("random", "random reinit", "random"),
    Method(name="stale-10", title="stale stage k=10", kind="stale", every=10),
    Method(name="stale-50", title="stale stage k=50", kind="stale", every=50),
    Method(name="rollback-10", title="rollback K=10", kind="rollback", every=10),
    Method(name="rollback-50", title="rollback K=50", kind="rollback", every=50),
    Method(name="rollback-100", title="rollback K=100", kind="rollback", every=100),
)
_ABLATIONS: Final = (
    _reinit("checkfree-e2", "CheckFree, squared norms", "average", exponent=2),
    _reinit("checkfree-lr1.0", "CheckFree, lr x 1.0", "average", lr_factor=1.0),
    _reinit("checkfree-lr1.2", "CheckFree, lr x 1.2", "average", lr_factor=1.2),
    _reinit("checkfree-moments", "CheckFree, neighbours' moments", "average", keep_moments=True),
    _reinit("checkfree+averages", "CheckFree+, S2 and S5 averaged", "average", swapped=True, partners="average"),
    Method(name="stale-50-catch-up", title="stale k=50, decayed catch-up", kind="stale", every=50, catch_up=0.5),
    Method(name="stale-100", title="stale stage k=100", kind="stale", every=100),
)
METHODS: Final[Mapping[str, Method]] = {method.name: method for method in (*_ALL, *_ABLATIONS)}
MAIN: Final = tuple(method.name for method in _ALL)
ABLATIONS: Final = tuple(method.name for method in _ABLATIONS)

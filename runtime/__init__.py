"""What runs inside a rank. `from holdfast.runtime import Trainer` is the user's door.

Names are resolved on first use, so that the pure parts (recovery.decide, pipeline.planner) can be imported
by the coordinator without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "holdfast.runtime":
    raise ImportError(f"import holdfast.runtime, not {__name__}: the checkout itself is on sys.path")

if TYPE_CHECKING:
    from .recovery.neighbours import NeighbourOptions
    from .trainer import StepResult, Trainer

__all__ = ["NeighbourOptions", "StepResult", "Trainer"]


def __getattr__(name: str) -> Any:
    if name == "NeighbourOptions":
        from .recovery import neighbours

        return neighbours.NeighbourOptions
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

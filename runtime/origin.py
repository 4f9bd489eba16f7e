"""Where a captured state comes from: what a checkpoint must know of its rank besides the state itself. Values only.

Written with every snapshot, so small: who hosted what under which layout, what the order of data and random numbers
depends on, and in which generation the state was made. The saver puts states together only if they agree on that:
what two generations computed for one step need not be the same bits where exactness is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine


def origin(engine: Engine, same: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of the engine's state as it is now, as capturable values; `same`: what unchanging() gave."""
    due = same["validates"] and engine.step > 0 and engine.step % engine.config.validate_every == 0
    return {**same, "generation": engine.born, "validation_due": due}


def unchanging(engine: Engine) -> dict[str, Any]:
    """What of it is the same at every step: looked up once, as a plan of many paths is long."""
    config, plan = engine.config, engine.plan
    return {
        "world_size": plan.world_size,
        "units": plan.units,
        "hosted": list(plan.worked(engine.rank)),
        "replica": replica_of(engine),
        "replicas": len(plan.workers(0)),
        "ties": [[f"{tie.first_unit}.{tie.first}", f"{tie.second_unit}.{tie.second}"] for tie in engine.ties],
        "optimizer": optimizer_kind(engine),
        "seed": config.seed,
        "shuffle": config.shuffle,
        "microbatch_size": config.microbatch_size,
        "microbatches": config.step_microbatches,
        "exact": config.exact,
        "compute": engine.compute,
        "validates": config.validation is not None and config.validate_every > 0,
    }


def replica_of(engine: Engine) -> int:
    """Which of those who work on its units this rank is."""
    worked = engine.plan.worked(engine.rank)
    return engine.plan.workers(worked[0]).index(engine.rank) if worked else 0


def optimizer_kind(engine: Engine) -> str:
    """Class of the optimizer; empty without parameters."""
    optimizer = engine.state.optimizer
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" if optimizer is not None else ""

"""How `holdfast run` is told to make up for lost state, checked before anything starts.

    --recovery exact                      snapshots every step (the default)
    --recovery neighbours | neighbours+   none, but what checkpoints are written from
    --recovery stale --stale-every K      one every K steps
    --recovery auto                       every step, and what is left when they are not enough

Not here: what the modes do (runtime/recovery/ladder.py).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final

from holdfast.proto import env
from holdfast.proto.errors import ConfigError
from holdfast.runtime.recovery.ladder import MODES

STALE_EVERY: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovering:
    """What was asked for, as ranks find it in their environment."""

    mode: str = "exact"
    snapshots: bool = True
    every: int = 0
    """Steps between snapshots; 0: as the script says."""

    def environment(self) -> dict[str, str]:
        """Variables of every rank."""
        found = {env.RECOVERY: self.mode, env.SNAPSHOTS: "on" if self.snapshots else "off"}
        return found | ({env.SNAPSHOT_EVERY: str(self.every)} if self.every else {})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `holdfast run` that are about recovery."""
    add = parser.add_argument_group("holdfast, recovery").add_argument
    add(
        "--recovery",
        choices=MODES,
        default="exact",
        help="how lost state is made up for: exactly (default); from the neighbour stages; by an older copy of the "
        "lost stage alone; or by the best that is left (auto). All but exact are said to be not exact where they are",
    )
    add(
        "--stale-every",
        type=int,
        default=None,
        metavar="K",
        help=f"with --recovery stale: steps between the copies of a stage (default {STALE_EVERY})",
    )


def plan_recovering(arguments: argparse.Namespace) -> Recovering:
    """The checked wish. Raises ConfigError with one line."""
    mode, every = arguments.recovery, arguments.stale_every
    snapshots = arguments.snapshots == "on"
    if every is not None and mode != "stale":
        raise ConfigError(f"--stale-every is for --recovery stale, not for {mode}")
    if every is not None and every < 1:
        raise ConfigError(f"--stale-every must be at least 1, got {every}")
    if mode == "stale":
        if not snapshots:
            raise ConfigError("--recovery stale goes back to snapshots: leave out --snapshots off")
        return Recovering(mode=mode, every=every or STALE_EVERY)
    if mode in ("neighbours", "neighbours+"):
        # Nothing is copied in a healthy step, unless there are checkpoints, which are written from snapshots.
        saving = bool(arguments.checkpoint_dir)
        return Recovering(mode=mode, snapshots=saving, every=arguments.checkpoint_every if saving else 0)
    return Recovering(mode=mode, snapshots=snapshots)

"""Which checkpoint of a folder is the newest, and which may go.

    runs/
      step-00000100/  step-00000200/     committed checkpoints
      latest                             one line: the name of one of them; swapped by rename

What to remove is decided by a pure function over what is there; removing makes a checkpoint unreadable in one
rename before the first file goes, so that a crash leaves it whole or hidden. Invariants:

* "latest" never names something that was not committed when it was written;
* plan_prune() never names the newest committed checkpoint, nor one that is protected.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .disk import Disk, explained
from .errors import IncompleteError, UsageError
from .manifest import COMMIT

POINTER: Final = "latest"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint, as pruning sees it."""

    name: str
    step: int
    metric: float | None = None


def committed(folder: Path) -> bool:
    """Whether a folder has a COMMIT. Says nothing about what the bytes are worth."""
    return (folder / COMMIT).is_file()


def write_latest(folder: Path | str, name: str, disk: Disk | None = None) -> None:
    """Point "latest" to a committed checkpoint in the folder."""
    base, disk = Path(folder), disk or Disk()
    if "/" in name or name.startswith(".") or not committed(base / name):
        raise UsageError("latest can only point to a committed checkpoint of its folder", name=name, folder=str(base))
    fresh = base / f".{POINTER}.tmp-{os.getpid()}"
    with explained(base / POINTER, "pointing to the latest checkpoint"):
        disk.write_file(fresh, name.encode() + b"\n")
        disk.rename(fresh, base / POINTER)
        disk.fsync_directory(base)


def read_latest(folder: Path | str) -> Path:
    """The checkpoint that "latest" points to. IncompleteError if there is none."""
    base = Path(folder)
    try:
        name = (base / POINTER).read_bytes()[:4096].decode("utf-8", "replace").strip()
    except FileNotFoundError:
        raise IncompleteError("no checkpoint here yet", folder=str(base), file=POINTER) from None
    if not name or "/" in name or name.startswith(".") or not committed(base / name):
        raise IncompleteError("latest points to nothing that was committed", folder=str(base), name=repr(name))
    return base / name


def plan_prune(
    found: Sequence[Candidate],
    *,
    keep_last: int,
    keep_best: int = 0,
    best: Literal["min", "max"] = "min",
    protected: Collection[str] = (),
) -> list[str]:
    """Names to remove, oldest first: neither among the newest, nor among the best, nor protected."""
    if keep_last < 0 or keep_best < 0:
        raise UsageError("a negative number of checkpoints to keep", keep_last=keep_last, keep_best=keep_best)
    newest = sorted(found, key=lambda one: (one.step, one.name), reverse=True)
    sign = 1 if best == "min" else -1
    # A NaN is no best; of two equal ones the newer is kept.
    rated = [one for one in newest if one.metric is not None and not math.isnan(one.metric)]
    rated.sort(key=lambda one: sign * (one.metric or 0.0))
    kept = {one.name for one in [*newest[: max(keep_last, 1)], *rated[:keep_best]]} | set(protected)
    return [one.name for one in reversed(newest) if one.name not in kept]


def prune(folder: Path | str, names: Iterable[str], disk: Disk | None = None) -> None:
    """Remove checkpoints: hidden by one rename, then deleted."""
    base, disk = Path(folder), disk or Disk()
    for name in names:
        if "/" in name or name.startswith(".") or not name:
            raise UsageError("not the name of a checkpoint of this folder", name=repr(name))
        hidden = base / f".{name}.removed-{os.urandom(4).hex()}"
        with explained(base / name, "removing a checkpoint"):
            disk.rename(base / name, hidden)
            disk.fsync_directory(base)
            disk.remove_tree(hidden)


def leftovers(folder: Path | str) -> list[Path]:
    """Hidden folders that interrupted writes and removals left. A write in progress is among them."""
    marks = (".tmp-", ".removed-")
    return sorted(p for p in Path(folder).iterdir() if p.name.startswith(".") and any(m in p.name for m in marks))

"""What the saver decides: which step, under which name, when the next one is due. Pure but for one listing.

folder/step-00000010  step-00000020 ...     committed ones count, whatever "latest" says

due = 20:   shelf of every rank ──▶ first step >= 20 that all hold whole ──▶ pick() ──▶ step-00000020
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

from holdfast.proto.ids import NO_STEP

from ..memory.client import HalfInfo
from ..universal.latest import committed

NAME: Final = re.compile(r"step-(\d{8,15})\Z")
WHOLE: Final = ("COPIED", "SEALED")


def name_of(step: int) -> str:
    """The folder's name of a checkpoint of `step`."""
    return f"step-{step:08}"


def committed_steps(folder: Path | str) -> dict[int, Path]:
    """Step -> path of the committed checkpoints in a folder, ascending; none if there is no such folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    found = {int(match[1]): Path(folder) / name for name in names if (match := NAME.match(name))}
    return {step: path for step, path in sorted(found.items()) if committed(path)}


def next_due(last: int, every: int) -> int:
    """The first multiple of `every` after `last`, which is NO_STEP if nothing was saved yet."""
    return (max(last, 0) // every + 1) * every


def whole_everywhere(halves: Iterable[HalfInfo], slots: Collection[int]) -> list[int]:
    """Steps that every slot holds whole, ascending."""
    held: Mapping[int, set[int]] = {slot: set() for slot in slots}
    for half in halves:
        if half.slot in held and half.state in WHOLE and half.step != NO_STEP:
            held[half.slot].add(half.step)
    return sorted(set.intersection(*held.values())) if held else []


def pick(halves: Iterable[HalfInfo], slots: Collection[int], due: int) -> int | None:
    """The step to save now: the one that ranks leave untouched, the first from `due` on; None for none."""
    return next((step for step in whole_everywhere(halves, slots) if step >= due), None)


def pick_last(halves: Iterable[HalfInfo], slots: Collection[int], saved: int) -> int | None:
    """The step to save at the end of the job: the newest, unless it was saved already."""
    steps = whole_everywhere(halves, slots)
    return steps[-1] if steps and steps[-1] > max(saved, 0) else None

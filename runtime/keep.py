"""Which half of the double buffer a snapshot may overwrite, so that what recovery may need is never lost. Pure.

    sealed     newest step that every rank holds whole: what a lost process resumes from
    protected  newest step whose parity every host holds too: what a lost host resumes from

    due        step from which on a checkpoint is wanted: the first one kept since is the saver's until it is copied

    two halves    ── protected == sealed ──▶ the other half is free
    of every rank ── protected < sealed  ──▶ both are needed: this snapshot is left out, and counted

All ranks decide from the same two numbers, so they begin the same snapshots. A rank that decided from its own
halves alone could fall into step with nobody: two ranks that each skip every second snapshot, in turn, protect
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from holdfast.proto.ids import NO_STEP

if TYPE_CHECKING:
    from .gather import Kept

PATIENCE: Final = 8
"""Steps that parity may lag behind before fresh snapshots without it are preferred to none at all."""
HOLD_NS: Final = 60_000_000_000
"""Longest that snapshots are left out for a saver that copies: 60 GB, on a slow and busy host."""
SILENT_NS: Final = 3_000_000_000
"""A saver that lives beats twice a second; nothing is kept for one that does not."""


def choose(steps: Sequence[int], step: int, kept: Kept, *, must: bool = False) -> int | None:
    """The half for a snapshot of `step`; None: leave it out. `must`: recovery or the job's end needs it."""
    if kept.placement:
        half = choose_protected_half(steps, step, sealed=kept.sealed, protected=kept.protected, must=must)
    else:
        half = choose_half(steps, kept.sealed)
    if half is None or must or steps[half] == NO_STEP:
        return half
    return None if steps[half] == reserved(steps, kept) else half


def reserved(steps: Sequence[int], kept: Kept) -> int:
    """The step that is the saver's: the first from `due` on of those that every rank holds; NO_STEP for none."""
    if kept.due == NO_STEP:
        return int(NO_STEP)
    return min((held for held in steps if kept.due <= held <= kept.sealed), default=int(NO_STEP))


def patient(*, beat_age_ns: int, held_ns: int) -> bool:
    """Whether a half is still kept for the saver, which beat so long ago, since it was wanted."""
    return beat_age_ns <= SILENT_NS and held_ns <= HOLD_NS


def choose_half(steps: Sequence[int], keep: int) -> int:
    """The half to overwrite: never the one that holds `keep`, the newest step that every rank holds; else the older."""
    free = [half for half, step in enumerate(steps) if step == NO_STEP or step != keep]
    return min(free, key=lambda half: steps[half])


def choose_protected_half(
    steps: Sequence[int], step: int, *, sealed: int, protected: int, must: bool = False
) -> int | None:
    """The half for a snapshot of `step` in a job with parity; None: leave it out.

    `must`: the step that the job resumes from, or its last: rather lose a snapshot without parity than go without.
    """
    late = must or (sealed != NO_STEP and step - sealed > PATIENCE)
    needed = {protected} if protected != NO_STEP else {sealed}
    if not late:
        needed.add(sealed)
        if protected == NO_STEP:
            needed.update(steps)  # whichever of them parity is being computed for
    needed.discard(NO_STEP)
    free = [half for half, held in enumerate(steps) if held not in needed]
    return min(free, key=lambda half: steps[half]) if free else None

"""What a rank leaves untouched for the saver: the half of a due step, until it is copied, but never for long.

    page ── due, beat ──▶ due(): what this rank brings to the step's barrier ──▶ keep.choose(), the same on all ranks

Reads two words of shared memory a step; without a saver nothing. Not here: the decision (keep.py). Invariant: a
saver that is dead, or does not get done, holds up snapshots for a bounded time, and training for none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.ckpt.saver.page import Page
from holdfast.proto.errors import ConfigError
from holdfast.proto.ids import NO_STEP

from .keep import patient, reserved

if TYPE_CHECKING:
    from .gather import Kept

log = logging.getLogger(__name__)


class Hold:
    """One rank's view of the saver's page. Main thread only."""

    def __init__(self, path: str) -> None:
        """`path` of the page; empty: there is no saver."""
        self._page: Page | None = None
        self._since: tuple[int, int] = (int(NO_STEP), 0)  # which due step is held, since when (ns)
        if path:
            try:
                self._page = Page(path)
            except ConfigError as error:
                log.warning("no checkpoints: %s", error)

    def due(self, steps: Sequence[int]) -> int:
        """From which step on a checkpoint is wanted; NO_STEP for none, or if `steps` were held for it long enough."""
        if self._page is None:
            return int(NO_STEP)
        due, now_ns = self._page.due, time.monotonic_ns()
        if due == NO_STEP:
            return due
        if max(steps) < due or self._since[0] != due:
            self._since = (due, now_ns)
        beat_age_ns, held_ns = now_ns - self._page.beat_ns, now_ns - self._since[1]
        return due if patient(beat_age_ns=beat_age_ns, held_ns=held_ns) else int(NO_STEP)

    def kept(self, rank: int, steps: Sequence[int], kept: Kept) -> None:
        """Rank 0 says which step all ranks leave untouched, NO_STEP for none: savers of several hosts go by it."""
        if self._page is not None and rank == 0:
            self._page.reserved = reserved(steps, kept)

    def validated(self, step: int, loss: float) -> None:
        """The validation loss of `step`, for whoever picks the best checkpoint."""
        if self._page is not None:
            self._page.validated(step, loss)

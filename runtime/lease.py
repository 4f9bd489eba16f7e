"""The rank's side of the lease page: renewals by the training thread, and how long it may take at most.

The lease adapts: ten times the longest recent gap between two renewals in a compute phase, decaying a little
with each committed step, so that a slow model is not taken for a hung one. Until a whole warm step was
measured a gap may be LEASE_WARMUP_S (lazy imports, compilation, cold caches). Faults ordered from outside are
looked for at each renewal (one memory read).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from holdfast.proto.ids import NO_STEP
from holdfast.proto.lease import COMPUTE_PHASES, LeasePage, Phase, Word

LEASE_WARMUP_S: Final = 60.0
_GAPS: Final = 10  # lease = longest recent gap times this
_DECAY: Final = 0.98  # per committed step
_MEASURED_STEPS: Final = 2  # the first one of a process is cold, the next one shows every phase


class Lease:
    """Training thread only, but for `beat`."""

    def __init__(self, page: LeasePage, on_order: Callable[[int], None] | None = None) -> None:
        self._page = page
        self._on_order = on_order
        self._last_ns = time.monotonic_ns()
        self._gap_ns = 0.0
        self._steps = 0
        self.phase = Phase.STARTING
        page.set(Word.LEASE_NS, int(LEASE_WARMUP_S * 1e9))

    def renew(self, phase: Phase) -> None:
        """Progress was made; `phase` is what comes now."""
        now_ns = time.monotonic_ns()
        if self._steps and self.phase in COMPUTE_PHASES:
            self._gap_ns = max(self._gap_ns, now_ns - self._last_ns)
        self._last_ns, self.phase = now_ns, phase
        self._page.renew(now_ns, phase)
        order = self._page.get(Word.FAULT_ORDER)
        if order and self._on_order is not None:
            self._page.set(Word.FAULT_ORDER, 0)
            self._on_order(order - 1)

    def committed(self, step: int, loss: float, seconds: float, tokens: int) -> None:
        """A step was committed: figures for the display; the lease adapts from now on."""
        page = self._page
        page.set(Word.STEP, step + 1)
        page.set(Word.STEP_NS, int(seconds * 1e9))
        page.set(Word.COMMIT_NS, time.monotonic_ns())
        page.set(Word.TOKENS, page.get(Word.TOKENS) + tokens)
        if abs(loss) < 1e12:
            page.set(Word.LOSS_MICRO, int(loss * 1e6))
        self._steps += 1
        self._set_lease(1)
        self._gap_ns *= _DECAY

    def joined(self, generation: int, step: int) -> None:
        """A new generation stands; its first step is a warm-up again (new peers, cold caches)."""
        self._page.set(Word.GENERATION, generation)
        self._page.set(Word.STEP, step + 1 if step != NO_STEP else 0)
        self._set_lease(2)

    def warm_up(self) -> None:
        """Something is done for the first time: let it take its time, until `warmed` or the next commit."""
        self._page.set(Word.LEASE_NS, int(LEASE_WARMUP_S * 1e9))

    def warmed(self) -> None:
        """It is done."""
        self._set_lease(1)

    def _set_lease(self, factor: int) -> None:
        if self._steps < _MEASURED_STEPS:
            self.warm_up()
        else:
            self._page.set(Word.LEASE_NS, int(self._gap_ns * _GAPS * factor))

    def snapshot(self, step: int, skipped: int) -> None:
        """A snapshot was wholly copied."""
        self._page.set(Word.SNAPSHOT_STEP, step + 1)
        self._page.set(Word.SKIPPED, skipped)

    def beat(self) -> None:
        """The monitor thread is alive (any thread)."""
        self._page.set(Word.BEAT_NS, time.monotonic_ns())

    @property
    def page(self) -> LeasePage:
        """The page itself."""
        return self._page

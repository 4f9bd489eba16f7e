"""One thread, one selector: the agent's descriptors, timers and a fixed tick, all handled by the same thread.

    other threads ── post(call) ──▶ ┌────────┐ ── descriptor readable ──▶ callback
    timers        ── later(s)   ──▶ │  Loop  │ ── every tick_s        ──▶ tick
                                    └────────┘
State that only callbacks touch needs no lock. A callback that raises does not end the loop: the error goes to
`on_crash`, which ends the job in an orderly way. Not here: anything about ranks.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]


class Timer:
    """A call that is due; `cancel` makes it nothing."""

    __slots__ = ("call",)

    def __init__(self, call: Call | None) -> None:
        self.call = call

    def cancel(self) -> None:
        """Do not call."""
        self.call = None


class Loop:
    """See the module's docstring. `watch`, `unwatch`, `later` are for callbacks, or before `start`."""

    def __init__(self, on_crash: Callable[[BaseException], None]) -> None:
        self._on_crash = on_crash
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, self._drain)
        self._posted: deque[Call] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._tick: Call | None = None
        self._tick_s = 0.0
        self._next_tick = 0.0
        self._running = True
        self._thread = threading.Thread(target=self._run, name="holdfast-agent", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the loop's own descriptors (any thread but the loop's)."""
        self.post(self._halt)
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            os.close(self._wake)
        self._selector.close()

    def _halt(self) -> None:
        self._running = False

    def post(self, call: Call) -> None:
        """Have `call` made by the loop's thread, soon (any thread)."""
        self._posted.append(call)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def every(self, seconds: float, call: Call) -> None:
        """Make `call` every so many seconds; replaces the tick that was set."""
        self._tick, self._tick_s, self._next_tick = call, seconds, time.monotonic()

    def later(self, seconds: float, call: Call) -> Timer:
        """Make `call` once, so many seconds from now."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def watch(self, descriptor: int, call: Call) -> None:
        """Make `call` whenever the descriptor is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, call)

    def unwatch(self, descriptor: int) -> None:
        """Watch it no more; harmless if it was not watched. Before the descriptor is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(descriptor)

    # ---- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._running:
            for key, _ in self._selector.select(self._timeout()):
                # An earlier callback of this round may have closed the descriptor, or re-used its number.
                if self._selector.get_map().get(key.fd) is key:
                    self._guarded(key.data)
            self._run_due()

    def _timeout(self) -> float | None:
        due = [self._timers[0][0]] if self._timers else []
        if self._tick is not None:
            due.append(self._next_tick)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _run_due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            call = heapq.heappop(self._timers)[2].call
            if call is not None:
                self._guarded(call)
        if self._tick is not None and now >= self._next_tick:
            # After a stall one tick is enough: catching up would only burn the time that is short.
            self._next_tick = max(self._next_tick + self._tick_s, now)
            self._guarded(self._tick)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._posted:
            self._guarded(self._posted.popleft())

    def _guarded(self, call: Call) -> None:
        try:
            call()
        except Exception as error:
            self._on_crash(error)

"""Asks a service now and then whether it still answers; one that is alive but does not is ended, to be restarted.

A pidfd shows only the end of a process. A coordinator that is stopped, or spins, keeps its streams open and
answers nobody: every rank would wait for it for ever. Restarting it costs training nothing, so a probe that
is too strict does little harm. Not here: the restart (services.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Final

from .processes import tell

PERIOD_S: Final = 1.0


class Probe:
    """A daemon thread that calls `ask` once a second and kills `pid()` after `patience_s` without an answer."""

    def __init__(self, name: str, ask: Callable[[], bool], pid: Callable[[], int], patience_s: float) -> None:
        self._name = name
        self._ask = ask
        self._pid = pid
        self._patience_s = patience_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"holdfast-probe-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No process is killed after this returns."""
        self._stop.set()
        self._thread.join(self._patience_s)

    def _run(self) -> None:
        answered_s, watched = time.monotonic(), self._pid()
        while not self._stop.wait(PERIOD_S):
            asked_s = time.monotonic()
            if self._ask() or self._pid() != watched:
                answered_s, watched = time.monotonic(), self._pid()
                continue
            if asked_s - answered_s < self._patience_s or not watched or self._stop.is_set():
                continue
            tell(f"the {self._name} has not answered for {time.monotonic() - answered_s:.0f} s; ending it")
            try:
                os.kill(watched, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
            answered_s = time.monotonic()

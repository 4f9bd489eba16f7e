"""Drops what is slow to destroy in a thread of its own: a gloo group's destructor blocks.

~ProcessGroupGloo joins its threads: 10 ms a pair when healthy, up to the group's timeout when an operation
is stuck. It releases the GIL, so dropping the last reference elsewhere costs the training thread nothing.
"""

from __future__ import annotations

import threading
import time


class Reaper:
    """Drops lists of objects, each in a daemon thread."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def drop_later(self, held: list[object]) -> None:
        """Empty `held` soon (any thread). The list must have the last references to what is in it.

        Whoever still names one of the objects when the thread runs, be it a local variable or an argument on its
        way out, destroys it in the end, and blocks instead of the thread.
        """
        thread = threading.Thread(target=held.clear, name="holdfast-reaper", daemon=True)
        thread.start()
        self._threads = [*(t for t in self._threads if t.is_alive()), thread]

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is dropped; whether it is.

        Before the interpreter ends: a daemon thread that comes back from C++ then is unwound through a destructor
        that may not throw, and the C++ runtime ends the process ("terminate called without an active exception").
        """
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

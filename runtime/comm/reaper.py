"""Drops what is slow to destroy in a thread of its own: a gloo group's destructor blocks.

~ProcessGroupGloo joins its threads: 10 ms a pair when healthy, up to the group's timeout when an operation
is stuck. It releases the GIL, so dropping the last reference elsewhere costs the training thread nothing.
"""

from __future__ import annotations

import threading


def drop_later(held: list[object]) -> None:
    """Empty `held` in a daemon thread. The list must have the last references to what is in it.

    Whoever still names one of the objects when the thread runs, be it a local variable or an argument on its
    way out, destroys it in the end, and blocks instead of the thread.
    """
    threading.Thread(target=held.clear, name="holdfast-reaper", daemon=True).start()

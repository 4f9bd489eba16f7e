"""Drops what is slow to destroy in a thread of its own: a gloo group's destructor blocks.

~ProcessGroupGloo joins its threads: 10 ms a pair when healthy, up to the group's timeout when an operation
is stuck. It releases the GIL, so dropping the last reference elsewhere costs the training thread nothing.
"""

from __future__ import annotations

import threading


def drop_later(*objects: object) -> None:
    """Drop the last references to `objects` in a daemon thread. The caller must keep none."""
    held = list(objects)
    threading.Thread(target=held.clear, name="holdfast-reaper", daemon=True).start()

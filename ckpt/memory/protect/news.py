"""A counter that threads wait on: something changed, look again. Nothing more is said, so nothing is lost.

    writer  change the state ▸ bump()          reader  seen = news.count ▸ look ▸ wait(seen, s) ▸ look again

Two of them form a chain: what this host holds is news for its peers and for itself, what peers hold is news
for itself only. Were it one, each host's echo would wake all others for ever.
"""

from __future__ import annotations

import threading


class News:
    """Whoever waits for any change of a shared state."""

    def __init__(self, also: News | None = None) -> None:
        self._condition = threading.Condition()
        self._count = 1
        self._also = also

    @property
    def count(self) -> int:
        """Take it before looking at the state."""
        return self._count

    def bump(self) -> None:
        """The state has changed already."""
        with self._condition:
            self._count += 1
            self._condition.notify_all()
        if self._also is not None:
            self._also.bump()

    def wait(self, seen: int, timeout_s: float) -> int:
        """Until the count is not `seen`, or `timeout_s` has passed; the count."""
        with self._condition:
            self._condition.wait_for(lambda: self._count != seen, timeout_s)
            return self._count

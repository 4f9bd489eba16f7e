"""Closing a group never destroys gloo's group in the caller: its destructor blocks as long as an operation is stuck."""

from __future__ import annotations

import threading
from typing import Any

from holdfast.proto.errors import Fenced
from holdfast.runtime.comm.group import Group

TIMES = 300


class Backend:
    """Makes nothing and wakes nothing."""

    def create(self, store: Any, rank: int, world_size: int) -> Any:
        raise NotImplementedError

    def wake(self, process_group: Any) -> None:
        """As gloo's."""


def test_only_the_reaper_destroys_a_group_whether_it_is_closed_or_aborted_first() -> None:
    destroyed: list[str] = []
    ended = threading.Semaphore(0)

    class ProcessGroup:
        def __del__(self) -> None:
            destroyed.append(threading.current_thread().name)
            ended.release()

    for number in range(TIMES):
        group = Group(generation=1, rank=0, world_size=2, backend=Backend(), publish=lambda key, value: None)
        group._process_group = ProcessGroup()
        monitor = threading.Thread(target=group.abort, args=(Fenced(2, "test"),))
        if number % 2:
            monitor.start()
        group.close()
        if number % 2:
            monitor.join()
    for _ in range(TIMES):
        assert ended.acquire(timeout=10.0)
    assert set(destroyed) == {"holdfast-reaper"}

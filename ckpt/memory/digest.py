"""Digests of arena memory, and the one thread that computes them.

    loop thread ── submit(job, then) ──▶ worker thread: job()       xxh3 releases the GIL, so the loop
    loop thread ◀── eventfd ── collect(): then(result)              answers while gigabytes are digested

One worker, because a second one would only fight over the same memory bandwidth. Does not know what an
arena is. Invariants:

* `then` runs on the thread that calls collect(), in the order in which the jobs ran;
* a job that fails in a way its author did not foresee ends the process through collect(): a manager that
  can no longer digest must not look alive.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import PriorityQueue
from typing import Final

import xxhash

from holdfast.proto.errors import HoldfastError

DIGEST_BYTES: Final = 16
_CHUNK_BYTES: Final = 16 << 20
"""A few milliseconds of work: how late an abandoned digest notices it."""


def digest_of(data: memoryview | bytes, *more: memoryview | bytes) -> bytes:
    """xxh3-128 of `data`, and of what follows it."""
    if not more:
        return xxhash.xxh3_128_digest(data)
    state = xxhash.xxh3_128(data)
    for part in more:
        state.update(part)
    return state.digest()


def digest_while(data: memoryview, wanted: Callable[[], bool]) -> bytes | None:
    """xxh3-128 of `data`; None as soon as `wanted()`, asked before each chunk, is false."""
    state = xxhash.xxh3_128()
    for start in range(0, data.nbytes, _CHUNK_BYTES):
        if not wanted():
            return None
        state.update(data[start : start + _CHUNK_BYTES])
    return state.digest()


Then = Callable[[object], None]
"""Takes what a job returned, or the HoldfastError or OSError that it raised."""


class Worker:
    """One daemon thread with a queue of jobs."""

    def __init__(self) -> None:
        self.wake_fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._order = itertools.count()
        self._jobs: PriorityQueue[tuple[bool, int, Callable[[], object], Then]] = PriorityQueue()
        self._done: deque[tuple[Then, object]] = deque()
        threading.Thread(target=self._run, name="smp-worker", daemon=True).start()

    def submit(self, job: Callable[[], object], then: Then, *, urgent: bool = False) -> None:
        """Run `job` in the worker, then `then(result or error)` in collect(). Urgent ones go first."""
        self._jobs.put((not urgent, next(self._order), job, then))

    def collect(self) -> None:
        """Hand out the results that are there."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            return
        while self._done:
            then, result = self._done.popleft()
            if isinstance(result, BaseException) and not isinstance(result, (HoldfastError, OSError)):
                raise result
            then(result)

    def _run(self) -> None:
        while True:
            _, _, job, then = self._jobs.get()
            result: object
            try:
                result = job()
            except BaseException as error:
                result = error
            self._done.append((then, result))
            os.eventfd_write(self.wake_fd, 1)
            del job, then, result

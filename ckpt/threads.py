"""Threads, from a library that is imported when they are wanted: it takes a tenth of the time of a short command."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


def threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of so many, which `py-spy` and tracebacks show by this name."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(count, thread_name_prefix=name)

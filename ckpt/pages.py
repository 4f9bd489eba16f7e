"""What the kernel is told about memory that is about to be filled. Advice: a kernel that does not know it ignores it.

populate   map the pages of an arena now: its memory is there, but a first store to each page would still trap
enlarge    give fresh memory in huge pages: 2 MiB at a trap instead of 4 KiB, where the system allows it to those
           who ask. A load into new memory takes a third less time (measured, benchmarks/checkpoints.py)
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Final

_POPULATE_READ: Final = 22
"""Linux 5.14; Python does not name it. Of shared memory it maps writable pages too, in batches of neighbours."""
_HUGEPAGE: Final = 14
_HUGE: Final = 2 << 20


def _libc_madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise  # not mmap.madvise(): that one holds the GIL meanwhile
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_madvise: Final = _libc_madvise()


def populate(memory: memoryview, start: int, stop: int) -> None:
    """Map the pages of bytes [start, stop) of a writable mapping, which begins at a page."""
    start, stop = start // mmap.PAGESIZE * mmap.PAGESIZE, min(stop, memory.nbytes)
    if start < stop:
        held = ctypes.c_char.from_buffer(memory, start)  # the mapping cannot go while the GIL is free
        _madvise(ctypes.addressof(held), stop - start, _POPULATE_READ)


def enlarge(memory: memoryview) -> None:
    """Huge pages for what of this writable memory is a whole one of them. What was touched before stays as it is."""
    if memory.nbytes < _HUGE:
        return
    held = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(held)
    low, high = -(-start // _HUGE) * _HUGE, (start + memory.nbytes) // _HUGE * _HUGE
    if low < high:
        _madvise(low, high - low, _HUGEPAGE)

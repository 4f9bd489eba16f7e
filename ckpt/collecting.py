"""When Python looks for garbage.

Opening a checkpoint makes values by the thousand and throws none away. Every few hundred make Python look through all
there are, and now and then through everything that torch has made too: a quarter of a second, once in some loads
(measured). Nothing else of the process waits for it: what is garbage meanwhile is found a little later.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection until the end, unless another thread wants them. Also a decorator."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

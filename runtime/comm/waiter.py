"""A disposable thread that does every blocking wait of one generation, so that the main thread can leave it.

    main ──call(fn)──▶ jobs ──▶ waiter thread runs fn() ──▶ replies ──▶ main
    monitor thread ──abort(fenced)─────────────────────────▶ replies     main raises Fenced at once

gloo has no abort, and an operation whose message is in flight never gets its peer's death as an error. So
the main thread never blocks inside gloo: it waits for a reply, and an abort is simply another reply. A
waiter whose operation is stuck is abandoned; the group's timeout ends it. Costs about 7 us a hop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar, cast

from holdfast.proto.errors import Fenced

T = TypeVar("T")


class Waiter:
    """Runs blocking calls for one generation. Used by one thread; `abort` may come from any thread."""

    def __init__(self, generation: int) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._replies: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
        self._fenced: Fenced | None = None
        self._thread = threading.Thread(target=self._run, name=f"holdfast-waiter-g{generation}", daemon=True)
        self._thread.start()

    def call(self, fn: Callable[[], T]) -> T:
        """Run `fn` in the waiter thread and return its result.

        Raises Fenced as soon as the generation is aborted, whatever `fn` does; else what `fn` raised.
        """
        if self._fenced is not None:
            raise self._fenced.again()
        self._jobs.put(fn)
        result, error = self._replies.get()
        if self._fenced is not None:
            raise self._fenced.again()
        if error is not None:
            raise error
        return cast(T, result)

    def abort(self, fenced: Fenced) -> None:
        """Free the main thread now and refuse later calls. Idempotent."""
        if self._fenced is None:
            self._fenced = fenced
            self._replies.put((None, None))

    def close(self) -> None:
        """Let the thread end once it is free."""
        self._jobs.put(None)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                reply: tuple[object, BaseException | None] = (job(), None)
            except BaseException as error:  # handed to the caller, who decides
                # A traceback would pin the frames, and with them the tensors of an abandoned step.
                reply = (None, error.with_traceback(None))
            del job
            self._replies.put(reply)
            del reply

"""The saver's loop: wait for a due step, copy it, write it, tidy up, say so.

    watch the shelf ──▶ pick ──▶ copy (ranks leave it untouched) ──▶ due = nothing ──▶ compose ▸ write ▸ latest ▸ prune
          ▲                                                                                            │
          └──────────────────────── due = next multiple after the newest step ◀───────────────────────┘

While it writes nothing is due: training that is faster than the disk gets fewer checkpoints, never fewer snapshots.
Whatever fails costs that checkpoint only, and is told; the next one is tried. Ends at stop(), after a last
checkpoint of the newest state that all ranks have whole. Invariants:

* nothing is due before the saver beats, and nothing stays due while it does not look;
* "latest" and pruning follow a commit, never precede it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast.proto.errors import HoldfastError, PeerLost, SnapshotError, SnapshotIncomplete
from holdfast.proto.ids import NO_STEP

from ..memory.client import HalfInfo, SmpClient
from ..universal.disk import Disk
from ..universal.errors import CheckpointError
from ..universal.latest import Candidate, leftovers, plan_prune, prune, write_latest
from ..universal.save import save_universal
from .choose import committed_steps, name_of, next_due, pick, pick_last
from .compose import Composed, compose
from .copy import Taken, free, take
from .page import Page

log = logging.getLogger("holdfast.saver")

BEAT_S: Final = 0.5
WATCH_S: Final = 0.2
"""How long stop() may go unnoticed."""
RECONNECT_S: Final = 5.0
"""Without a snapshot manager for so long there is no job any more: its agent restarts it within milliseconds."""
RETRY_S: Final = 0.1
VALIDATION_S: Final = 60.0
"""Longest that a written checkpoint waits for the validation of its step to be rated; else it goes unrated."""
_METRIC_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to save, where, and what to keep."""

    folder: Path
    every: int
    keep: int
    keep_best: int
    world_size: int
    start: int
    """Step that the job starts from."""
    job: str


class Saver:
    """See the module's docstring. One thread, and one that beats."""

    def __init__(
        self,
        connect: Callable[[], SmpClient],
        page: Page,
        options: Options,
        tell: Callable[[dict[str, Any]], None],
        disk: Disk | None = None,
    ) -> None:
        self._connect = connect
        self._page = page
        self._options = options
        self._tell = tell
        self._disk = disk or Disk()
        self._client: SmpClient | None = None
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._slots = range(options.world_size)
        self._saved = max([options.start, *committed_steps(options.folder)], default=int(NO_STEP))
        self._next = next_due(self._saved, options.every)
        self._told: str = ""

    def stop(self) -> None:
        """The job ends: write what is newest, and return from run(). Safe in a signal handler."""
        self._stopping.set()

    def run(self) -> bool:
        """Until stop(), or until there is no snapshot manager any more (False)."""
        beats = threading.Thread(target=self._beat, name="saver-beat", daemon=True)
        beats.start()
        try:
            self._clear_leftovers()
            since = 0
            while not self._stopping.is_set():
                try:
                    since, halves = self._need_client().watch(since, WATCH_S)
                except PeerLost:
                    if not self._reconnect():
                        return False
                    since = 0
                    continue
                if self._turn(halves):
                    since = 0  # what came meanwhile was not looked at
            self._last()
            return True
        finally:
            self._page.due = int(NO_STEP)
            self._ended.set()
            beats.join()

    def _turn(self, halves: tuple[HalfInfo, ...]) -> bool:
        """Save what is due, if it is there. Whether that took a while."""
        self._page.due = self._next
        step = pick(halves, self._slots, self._next)
        if step is not None:
            self._save(step, halves)
        return step is not None

    # ---- the manager ----------------------------------------------------------------------------------

    def _need_client(self) -> SmpClient:
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _reconnect(self) -> bool:
        """Whether there is a snapshot manager again; its agent restarts it."""
        deadline = time.monotonic() + RECONNECT_S
        while not self._stopping.wait(RETRY_S) and time.monotonic() < deadline:
            if self._client is not None:
                self._client.close()
                self._client = None
            with contextlib.suppress(PeerLost):
                self._need_client()
                return True
        return self._stopping.is_set()

    def _beat(self) -> None:
        while not self._ended.is_set():
            self._page.beat_ns = time.monotonic_ns()
            self._ended.wait(BEAT_S)

    # ---- one checkpoint -------------------------------------------------------------------------------

    def _last(self) -> None:
        """The newest state that is whole: what a job that is stopped, or done, or failed, leaves."""
        self._page.due = int(NO_STEP)
        try:
            halves = self._need_client().list()
            step = pick_last(halves, self._slots, self._saved)
            if step is not None:
                self._save(step, halves, last=True)
        except PeerLost as error:
            log.warning("no last checkpoint: %s", error)

    def _save(self, step: int, halves: tuple[HalfInfo, ...], *, last: bool = False) -> None:
        """Copy, write, tidy up. Afterwards the next one is due, whether this one came to be or not."""
        started = time.monotonic()
        try:
            taken = take(self._need_client(), step, halves, self._slots)
        except SnapshotIncomplete as error:
            log.info("step %d is not to be had: %s", step, error)  # overwritten meanwhile: look again
            self._stopping.wait(RETRY_S)
            return
        except (SnapshotError, PeerLost) as error:
            self._failed(step, error)
            return
        copied = time.monotonic()
        self._page.due = int(NO_STEP)
        try:
            path, nbytes = self._write(step, taken, last=last)
        except SnapshotIncomplete as error:
            log.info("step %d is not whole: %s", step, error)
            self._next = step + 1
            return
        except HoldfastError as error:
            self._failed(step, error)
            return
        finally:
            free(taken)
        self._written(step, path, nbytes, started=started, copied=copied)

    def _written(self, step: int, path: Path, nbytes: int, *, started: float, copied: float) -> None:
        self._saved = max(self._saved, step)
        self._next = next_due(max(self._saved, self._newest()), self._options.every)
        self._told = ""
        seconds = {"seconds": round(time.monotonic() - started, 3), "copy_seconds": round(copied - started, 3)}
        self._tell({"event": "checkpoint_written", "step": step, "path": str(path), "bytes": nbytes, **seconds})
        self._tidy(step)

    def _write(self, step: int, taken: list[Taken], *, last: bool) -> tuple[Path, int]:
        options = self._options
        path = options.folder / name_of(step)
        composed = compose(taken, job=options.job, time_s=time.time())
        try:
            details = composed.rated(self._metric(composed, step, last=last))
            checkpoint = save_universal(path, composed.parts, details, disk=self._disk)
        finally:
            composed.parts.clear()  # views of memory that is about to be freed
        return path, sum(facts.nbytes for facts in checkpoint.files.values())

    def _metric(self, composed: Composed, step: int, *, last: bool) -> float | None:
        """By what it is rated: the validation loss if the job validates, else the loss of its step."""
        if not composed.validates:
            return composed.loss
        if not composed.validation_due:
            return None
        deadline = time.monotonic() + (0.0 if last else VALIDATION_S)
        while (metric := self._page.validation(step)) is None and time.monotonic() < deadline:
            if self._stopping.wait(RETRY_S):
                break
        return metric

    def _newest(self) -> int:
        try:
            halves = self._need_client().list()
        except PeerLost:
            return int(NO_STEP)
        return max((half.step for half in halves if half.slot in self._slots), default=int(NO_STEP))

    def _failed(self, step: int, error: HoldfastError) -> None:
        self._page.due = int(NO_STEP)
        self._next = next_due(max(step, self._newest()), self._options.every)
        reason = str(error)
        first = reason.partition("[")[0] != self._told
        self._told = reason.partition("[")[0]
        self._tell({"event": "checkpoint_failed", "step": step, "reason": reason, "first": first})

    # ---- the folder -----------------------------------------------------------------------------------

    def _tidy(self, step: int) -> None:
        """Point to the new one, and let old ones go. What fails here costs disk space, not a checkpoint."""
        options = self._options
        try:
            write_latest(options.folder, name_of(step), self._disk)
            found = [Candidate(path.name, at, metric_of(path)) for at, path in committed_steps(options.folder).items()]
            prune(options.folder, plan_prune(found, keep_last=options.keep, keep_best=options.keep_best), self._disk)
        except CheckpointError as error:
            self._tell({"event": "checkpoint_untidy", "step": step, "reason": str(error)})

    def _clear_leftovers(self) -> None:
        """Remove what savers before this one were killed in the middle of; a folder that somebody holds is theirs."""
        with contextlib.suppress(OSError):
            for path in leftovers(self._options.folder):
                if not path.name.startswith(".step-") or not path.is_dir() or path.is_symlink():
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._disk.remove_tree(path)
                    log.info("removed %s of an interrupted write", path)
                except OSError as error:
                    log.info("left %s: %s", path, error)
                finally:
                    os.close(fd)


def metric_of(path: Path) -> float | None:
    """By what a checkpoint is rated; None if it is not."""
    try:
        with (path / "state" / "trainer.json").open("rb") as file:
            value = json.loads(file.read(_METRIC_BYTES_MAX)).get("metric")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

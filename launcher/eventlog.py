"""The event record: JSON lines, appended by the coordinator, which is also its log to restart from."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path


class EventLog:
    """Append-only JSON lines; each line is written whole and flushed, so a killed coordinator loses none."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("ab", buffering=0) if path is not None else None
        self._torn = False

    def write(self, event: dict[str, object]) -> None:
        """Append one event, stamped with wall clock and monotonic time."""
        if self._file is None:
            return
        stamped = {"time": round(time.time(), 6), "monotonic_ns": time.monotonic_ns(), **event}
        line = json.dumps(stamped, separators=(",", ":")).encode() + b"\n"
        try:
            # A line that could not be written whole is ended first, so that only itself is lost.
            written = self._file.write(b"\n" + line if self._torn else line)
            self._torn = written is None or written < len(line)
        except OSError as error:
            if not self._torn:
                print(f"holdfast: the event record cannot be written: {error}", file=sys.stderr, flush=True)
            self._torn = True


def last_generation(lines: Iterable[str]) -> tuple[int, dict[int, int]]:
    """Generation number and members of the last generation in a log; (0, {}) for an empty one.

    A torn last line (the coordinator was killed while writing) is skipped. A fence after the last formed
    generation means that nothing stands: members are empty then.
    """
    generation, members = 0, dict[int, int]()
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "fence":
            generation, members = int(event["generation"]), {}
        elif event.get("event") == "formed":
            generation = int(event["generation"])
            members = {int(rank): int(incarnation) for rank, incarnation in event["members"].items()}
    return generation, members


def claim(path: Path, job: str, *, anew: bool) -> None:
    """Make `path` the record of `job`: one of another job, or with `anew` any, is kept under another name."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        first = file.readline()
    try:
        ours = json.loads(first).get("job") == job
    except (ValueError, AttributeError):
        ours = False
    if ours and not anew:
        return  # hosts with a common file system write one record
    number = 1
    while (older := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(older)

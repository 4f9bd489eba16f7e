"""What people and programs see: tables or one JSON object on stdout, notes and a progress bar on stderr.

    stdout   result, once, at the end             stderr   notes; and on a terminal
                                                  ██████▌     63 %  1.2 of 1.9 GB  312 MB/s  2 s left

The bar is drawn by a thread that asks how far the work is; the work does not know of it. Invariants: with
--json stdout holds exactly one JSON object; without a terminal stderr holds no control characters.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

REDRAW_S: Final = 0.2
WIDTH: Final = 24


class Console:
    """Where the output of one verb goes."""

    def __init__(self, *, json: bool, verb: str, progress: bool = True) -> None:
        self.json: Final = json
        self.verb: Final = verb
        self._progress = progress and sys.stderr.isatty()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Something to know that is no error; also in the JSON object."""
        self.notes.append(text)
        print(f"holdfast ckpt {self.verb}: note: {text}", file=sys.stderr)

    def result(self, value: Mapping[str, Any], lines: Iterable[str]) -> None:
        """The outcome: `value` for programs, `lines` for people."""
        if self.json:
            notes = {"notes": self.notes} if self.notes else {}
            print(json.dumps(plain({**value, **notes}), ensure_ascii=False, allow_nan=False))
        else:
            for line in lines:
                print(shown(line))
        sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, what: str, total: int, done: Callable[[], int]) -> Iterator[None]:
        """Draw a bar while the block runs."""
        if not self._progress or total <= 0:
            yield
            return
        stop = threading.Event()
        began = time.monotonic()

        def draw() -> None:
            while not stop.wait(REDRAW_S):
                text = bar(what, done(), total, time.monotonic() - began)
                print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

        thread = threading.Thread(target=draw, name="checkpoint-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def bar(what: str, done: int, total: int, seconds: float) -> str:
    """One line of progress."""
    part = min(done / total, 1.0)
    eighths = round(part * WIDTH * 8)
    drawn = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
    rate = done / seconds if seconds > 0 else 0.0
    left = f"{duration((total - done) / rate)} left" if rate and done < total else "finishing"
    return f"{what} {drawn:<{WIDTH}} {part:4.0%}  {human(done)} of {human(total)}  {human(round(rate))}/s  {left}"


def human(nbytes: int) -> str:
    """A number of bytes for people."""
    value, units = float(nbytes), ["B", "KB", "MB", "GB", "TB", "PB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Columns, aligned: numbers right, text left."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(row[at].replace(",", "").replace(".", "").isdigit() for row in cells) for at in range(len(head))]
    widths = [max(len(head[at]), *(len(row[at]) for row in cells), 0) for at in range(len(head))]
    lines = []
    for row in [list(head), *cells]:
        parts = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return lines


def shown(line: str) -> str:
    """A line without control characters: names in a checkpoint may be anything."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in line)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: infinities and NaN become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

"""Where a run's files lie: the event record, torch's logs and error files; and what of them goes when it has ended.

--log-dir, else holdfast-runs/JOB ──▶ made, or one line that says why not ──▶ tidy(): empty folders go
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from holdfast.proto.errors import ConfigError


class RunFolder:
    """Where the run's files lie: the event record, torch's logs and error files."""

    def __init__(self, arguments: argparse.Namespace, job: str) -> None:
        self._made: list[Path] = []
        self._private: Path | None = None
        self.events: Path | None = None
        folder = Path(arguments.log_dir) if arguments.log_dir else Path("holdfast-runs") / job
        if arguments.events == "none":
            if not arguments.log_dir:
                folder = self._private = Path(tempfile.mkdtemp(prefix="holdfast-logs-"))
        else:
            self.events = Path(arguments.events).absolute() if arguments.events else folder.absolute() / "events.jsonl"
        self.folder = folder.absolute()
        try:
            for path in {self.folder, *([self.events.parent] if self.events else [])}:
                self._make(path)
        except OSError as error:
            raise ConfigError(f"cannot write {error.filename}: {error.strerror}; give --log-dir or --events") from None
        arguments.log_dir = arguments.log_dir or str(self.folder)

    def _make(self, path: Path) -> None:
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._made += missing  # deepest first

    def tidy(self) -> None:
        """At the end: take away what is empty."""
        for root in (self._private, *self._made):
            if root is None or not root.is_dir():
                continue
            for path in sorted(root.rglob("*"), key=lambda one: len(one.parts), reverse=True):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
            with contextlib.suppress(OSError):
                root.rmdir()

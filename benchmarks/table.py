"""What all benchmarks print: JSON lines on stdout, and on --markdown FILE a table with the machine and its load.

    report = Report(arguments.markdown, "Rebuild of a lost host")      add_markdown(parser) makes the option
    report.line({...})       one JSON line now; kept for the end
    report.table(columns, rows) ▸ report.close()                      appended to FILE, fit for results/

Measures nothing but the machine: its processor, its memory, and how busy it was before and after.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_markdown(parser: argparse.ArgumentParser) -> None:
    """The option."""
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append a table, and what was printed, there")


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def shown(values: dict[str, float], unit: str = "") -> str:
    """A spread as a cell."""
    return f"{values['median']:g}{unit} ({values['min']:g}-{values['max']:g})"


def machine() -> str:
    """Processor, memory, software."""
    model = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "?")
    memory = next((int(x.split()[1]) >> 20 for x in _lines("/proc/meminfo") if x.startswith("MemTotal:")), 0)
    torch = importlib.metadata.version("torch")
    software = f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch}"
    return f"{os.cpu_count()} x {model}, {memory} GiB; {software}"


def load() -> str:
    """The load of the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


class Report:
    """The lines and tables of one benchmark."""

    def __init__(self, path: Path | None, title: str) -> None:
        self._path = path
        self._title = title
        self._lines: list[str] = []
        self._tables: list[str] = []
        self._began, self._load = time.monotonic(), load()

    def line(self, value: dict[str, Any], *, print_as: str | None = None) -> None:
        """Print it, as JSON as a rule."""
        text = json.dumps(value)
        self._lines.append(text)
        print(text if print_as is None else print_as, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
        """A table for the file, and a sentence under it."""
        body = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in body)
        self._tables.append(f"{text}\n\n{note}".strip())

    def close(self) -> None:
        """Append all of it to the file."""
        if self._path is None:
            return
        took = time.monotonic() - self._began
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_files(sys.argv[1:])])
        where = f"{machine()}. {time.strftime('%Y-%m-%d')}; {took:.0f} s; load before {self._load}, after {load()}."
        code = ["\n".join(("```json", *self._lines, "```"))] if self._lines else []
        parts = [f"## {self._title}", f"`{command}`", where, *self._tables, *code]
        with self._path.open("a") as file:
            file.write("\n\n".join(parts) + "\n\n")


def _without_files(words: Sequence[str]) -> list[str]:
    """What was asked for, without where it went."""
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if not {before, word} & {"--markdown", "--out"}]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

"""A whole process, measured from outside: wall time, CPU of it and its children, memory of all of them together.

    run([...]) ──▶ wall    from fork to exit                    cpu   user + system, of all that it waited for
                   rss     most resident memory of any one      sum_rss, sum_pss   of the process tree (all are sampled)

The page cache is part of what is measured and so is brought into one state: `warm` reads the source, `settle` writes
back what earlier runs left dirty. Sampling runs in the benchmark's process, so its cost is in nobody's CPU time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_S = 0.05
PSS_EVERY = 4
"""Proportional sizes cost the kernel a walk over all pages, so they are asked for in each fourth sample."""
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Spent:
    """What one run took."""

    wall: float
    cpu: float
    rss: int
    sum_rss: int
    sum_pss: int


def run(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Spent:
    """Run it to its end; SystemExit with the end of its output if that is a failure."""
    with open(log, "wb") as output:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd)
        sampler = _Sampler(child.pid)
        sampler.start()
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        sampler.end()
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}\n{tail}")
    # Not ru_maxrss: a child begins with its parent's.
    return Spent(wall, used.ru_utime + used.ru_stime, sampler.peak, max(sampler.rss, sampler.peak), sampler.pss)


class _Sampler(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(name="sampler", daemon=True)
        self.rss = self.pss = self.peak = 0
        self._pid = pid
        self._over = threading.Event()

    def run(self) -> None:
        count = 0
        while not self._over.wait(SAMPLE_S):
            pids = list(_tree(self._pid))
            self.rss = max(self.rss, sum(_rss(pid) for pid in pids))
            self.peak = max(self.peak, *(_status(f"/proc/{pid}/status", "VmHWM:") for pid in pids))
            if count % PSS_EVERY == 0:
                self.pss = max(self.pss, sum(_status(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids))
            count += 1

    def end(self) -> None:
        self._over.set()
        self.join()


def _tree(pid: int) -> Iterable[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from _tree(int(child))


def _rss(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0


def _status(path: str, key: str) -> int:
    """Bytes of an entry in one of the kernel's tables; 0 if the process has gone."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def warm(path: Path) -> int:
    """Read all files below into the page cache; their bytes."""
    total = 0
    buffer = memoryview(bytearray(4 << 20))
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb", buffering=0) as source:
                while got := source.readinto(buffer):
                    total += got
    return total


def settle(*gone: Path) -> None:
    """Remove earlier outputs, and wait until nothing is left to be written back."""
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()


def durable(path: Path) -> float:
    """Seconds to make what a peer wrote without fsync as durable as what we wrote with it."""
    started = time.perf_counter()
    for file in [path, *path.rglob("*")]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - started


def spread(pairs: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest of the rounds."""
    values = sorted(pairs)
    return {
        "median": round(statistics.median(values), 4),
        "min": round(values[0], 4),
        "max": round(values[-1], 4),
    }


def of(rounds: Sequence[Spent], what: str) -> dict[str, Any]:
    """One figure over all rounds, in seconds or in MB."""
    scale = 1.0 if what in ("wall", "cpu") else 1e6
    return spread(getattr(one, what) / scale for one in rounds)

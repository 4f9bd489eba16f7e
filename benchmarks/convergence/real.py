"""The same trace twice: six ranks whose processes get SIGKILL, and the simulator. Every step's loss must agree.

    trace ─▶ --faults rank=S,step=W,at=user,kind=kill ─▶ holdfast run --recovery ... job.py ─▶ losses, times ─┐
          └▶ Run(settings, seed, method, trace) ─────────────────────────────────────────────▶ losses ───────┴▶ equal?

Measured besides: the median step, the time of each recovery, and the job's wall time. Six ranks share the cores of
one machine, and all bytes go over loopback: times are of this machine, and a step's are not those of a cluster.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from .methods import METHODS, Method
from .settings import STAGES, Settings
from .simulator import Run
from .trace import Trace, draw, scripted_faults

JOB: Final = Path(__file__).resolve().parent / "job.py"
ITERATIONS: Final = 120
CLEAN: Final = 20
RATE: Final = 0.015
"""Far above the paper's: many failures in a short run."""
DEADLINE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Case:
    """A method as `holdfast run` knows it, and as the simulator does.

    k = 11, because the trace has no failure right after such a step: whether a copy that has just begun is whole by
    then is a race, and if so the real job returns to the present step, exactly. The simulator never counts on it.
    """

    name: str
    options: tuple[str, ...]
    method: Method
    failing: bool = True
    interior: bool = False


CASES: Final = (
    Case("no failure", (), METHODS["none"], failing=False),
    Case("exact", (), METHODS["none"]),
    Case("stale k=11", ("--recovery", "stale", "--stale-every", "11"), replace(METHODS["stale-10"], every=11)),
    Case("CheckFree", ("--recovery", "neighbours"), METHODS["checkfree"], interior=True),
    Case("CheckFree+", ("--recovery", "neighbours+"), METHODS["checkfree+"]),
)


def trace_of(case: Case, seed: int) -> Trace:
    """Who is killed when."""
    if not case.failing:
        return ()
    return draw(seed, RATE, STAGES, ITERATIONS, interior=case.interior, clean=CLEAN)


def run_job(case: Case, settings: Settings, seed: int, trace: Trace, folder: Path) -> dict[str, Any]:
    """`holdfast run` with six ranks. Raises RuntimeError if it does not end well."""
    sizes = {name: value for name, value in asdict(settings).items() if value != getattr(Settings(), name)}
    faults = scripted_faults(trace, settings.iterations)
    command = [
        sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", str(STAGES), "--standbys", "2",
        "--events", str(folder / "events.jsonl"), *(["--faults", faults] if faults else []), *case.options,
        str(JOB), "--settings", json.dumps(sizes), "--seed", str(seed), "--losses", str(folder / "steps.jsonl"),
    ]  # fmt: skip
    started = time.monotonic()
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S)
    seconds = time.monotonic() - started
    if ended.returncode:
        raise RuntimeError(f"{case.name}: exit code {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    steps = {line["step"]: line for line in map(json.loads, (folder / "steps.jsonl").read_text().splitlines())}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {"wall_s": seconds, "steps": [steps[step] for step in sorted(steps)], "events": events}


def compare(case: Case, settings: Settings, seed: int) -> dict[str, Any]:
    """One case: both sides, and what they differ in."""
    trace = trace_of(case, seed)
    with tempfile.TemporaryDirectory(prefix="holdfast-convergence-") as name:
        job = run_job(case, settings, seed, trace, Path(name))
    simulated = Run(settings, seed, case.method, trace, validate_every=settings.iterations + 1).all().losses
    real = [line["loss"] for line in job["steps"]]
    recoveries = [event["total_ms"] for event in job["events"] if event["event"] == "recovery"]
    failed = {failure.iteration for failure in trace}
    begin = job["steps"][0]["ns"]
    return {
        "kind": "real",
        "case": case.name,
        "seed": seed,
        "iterations": settings.iterations,
        "killed": [[failure.iteration, failure.stage] for failure in trace],
        "steps_missing": settings.iterations - len(real),
        "steps_equal": sum(a == b for a, b in zip(real, simulated, strict=False)),
        "largest_difference": max(abs(a - b) for a, b in zip(real, simulated, strict=False)),
        "wall_s": round(job["wall_s"], 2),
        "step_s": round(statistics.median(line["s"] for line in job["steps"] if line["step"] not in failed), 4),
        "recovery_ms": [round(value) for value in recoveries],
        "losses": real,
        "at_s": [round((line["ns"] - begin) / 1e9, 3) for line in job["steps"]],
    }


def main(path: Path, seed: int, names: Sequence[str]) -> int:
    """All cases, or those of these names; 1 if any step's loss differs."""
    settings = replace(Settings(), iterations=ITERATIONS)
    bad = 0
    for case in CASES:
        if names and case.name not in names:
            continue
        line = compare(case, settings, seed)
        bad += line["steps_equal"] < settings.iterations
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        told = {key: value for key, value in line.items() if key not in ("losses", "at_s")}
        print(json.dumps(told), flush=True)
    return 1 if bad else 0

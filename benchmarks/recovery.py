"""(a) From SIGKILL of one rank to the next committed step: Holdfast against torchrun --max-restarts with DCP.

    python benchmarks/recovery.py [--rounds 5] [--preset demo]          also: holdfast bench recovery

The two take turns in one run: each round trains the same model with 4 ranks under both, kills one seeded rank
with SIGKILL at a seeded moment, and takes the time until some step is committed after it (torchrun: by the
restarted rank 0, whatever step that is, so steps it lost cost it nothing here; they are listed). torchrun gets
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which its restarts fail with gloo. Prints one JSON line. Goals:
ratio <= 1/40; Holdfast <= 0.15 s + one step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "pretrain.py"
RANKS, STEPS, DEADLINE_S = 4, 36, 240.0


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file so far; a line being written is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def await_line(path: Path, accept: Any, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """First line that `accept` likes. Raises RuntimeError at the deadline or when the job ended without it."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        ended = process.poll() is not None
        for line in lines(path):
            if accept(line):
                return line
        if ended:
            break
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    raise RuntimeError(f"no such line in {path.name}: the job ended with {process.poll()}")


def holdfast(folder: Path, preset: str, chance: random.Random) -> dict[str, float]:
    """One job, one kill. Seconds from SIGKILL to the next commit, and the median step."""
    events = folder / "events.jsonl"
    command = [
        sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", str(RANKS), "--standbys", "1",
        "--events", str(events), str(EXAMPLE), "--preset", preset, "--steps", str(STEPS),
        "--step-log", str(folder / "steps.jsonl"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        steps = folder / "steps.jsonl"
        await_line(steps, lambda line: line["step"] >= 12, process)
        started = [event for event in lines(events) if event["event"] == "rank_started"]
        victim = chance.choice([event for event in started if event["incarnation"] == 0])
        time.sleep(chance.uniform(0.0, 0.4))
        kill_ns = time.monotonic_ns()
        os.kill(victim["pid"], signal.SIGKILL)
        recovery = await_line(events, lambda line: line["event"] == "recovery", process)
        committed_ns = recovery["causes"][0]["detected_ns"] + recovery["total_ms"] * 1e6
        process.wait(DEADLINE_S)
    finally:
        process.terminate()
        process.wait()
    seconds = [line["seconds"] for line in lines(steps) if 3 < line["step"] < STEPS]
    spans = {name: recovery[f"{name}_ms"] for name in ("detect", "reform", "restore", "resume")}
    return {"recovery_s": (committed_ns - kill_ns) / 1e9, "step_s": statistics.median(seconds), **spans}


def torchrun(folder: Path, preset: str, chance: random.Random) -> dict[str, float]:
    """The same under torchrun with DCP checkpoints every 5 steps."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
        "--max-restarts", "3", str(HERE / "torchrun_dcp.py"), "--dir", str(folder), "--preset", preset,
        "--steps", str(STEPS), "--every", "5",
    ]  # fmt: skip
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        log = folder / "steps-0.jsonl"
        await_line(log, lambda line: line["step"] >= 12, process)
        victim = chance.randrange(RANKS)
        pid = lines(folder / f"steps-{victim}.jsonl")[-1]["pid"]
        old = lines(log)[-1]["pid"]
        time.sleep(chance.uniform(0.0, 0.4))
        before, kill_ns = lines(log)[-1]["step"], time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        first = await_line(log, lambda line: line["pid"] != old, process)
        process.wait(DEADLINE_S)
    finally:
        process.terminate()
        process.wait()
    return {"recovery_s": (first["ns"] - kill_ns) / 1e9, "steps_lost": before - first["step"] + 1}


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def main(argv: list[str] | None = None) -> int:
    """Run the rounds and print the ratio."""
    parser = argparse.ArgumentParser(
        prog="holdfast bench recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    chance = random.Random(arguments.seed)
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        for run, results in ((holdfast, ours), (torchrun, theirs)):
            folder = Path(tempfile.mkdtemp(prefix="holdfast-bench-"))
            try:
                results.append(run(folder, arguments.preset, chance))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            print(f"round {number + 1} {run.__name__}: {results[-1]}", file=sys.stderr, flush=True)
    mine, peers = [r["recovery_s"] for r in ours], [r["recovery_s"] for r in theirs]
    line = {
        "benchmark": "recovery",
        "rounds": arguments.rounds,
        "preset": arguments.preset,
        "holdfast_s": spread(mine),
        "torchrun_dcp_s": spread(peers),
        "ratio": round(statistics.median(mine) / statistics.median(peers), 4),
        "ratio_spread": spread([a / b for a, b in zip(mine, peers, strict=True)]),
        "goal_ratio": 0.025,
        "step_s": spread([r["step_s"] for r in ours]),
        "holdfast_beyond_one_step_s": spread([r["recovery_s"] - r["step_s"] for r in ours]),
        "goal_beyond_one_step_s": 0.15,
        "spans_ms": {name: spread([r[name] for r in ours]) for name in ("detect", "reform", "restore", "resume")},
        "steps_lost_torchrun": [r["steps_lost"] for r in theirs],
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())

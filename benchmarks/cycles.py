"""Kill and recover, again and again, in one job: file descriptors, threads, processes, memory must stay flat.

    python benchmarks/cycles.py [--cycles 200] [--out results.json]

Kills seeded ranks (never rank 0, which is watched) with SIGKILL, each after the one before was survived. Samples
rank 0, the agent, the coordinator and the snapshot manager: open descriptors, threads, resident memory; the
number of processes of the job; and the host's shared memory. "Flat": between the first and the last tenth of
the cycles, descriptors, threads and processes do not grow, memory grows by at most 5 %. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
RANKS = 4
DEADLINE_S = 60.0


def shared_kib() -> int:
    """Shared memory of the host, KiB (memfds count in it)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1])
    return 0


def sample(processes: dict[str, psutil.Process], agent: psutil.Process) -> dict[str, int]:
    """What the watched processes hold now."""
    found = {"processes": 1 + len(agent.children(recursive=True)), "shared_kib": shared_kib()}
    for name, process in processes.items():
        with process.oneshot():
            found[f"{name}_fds"] = process.num_fds()
            found[f"{name}_threads"] = process.num_threads()
            found[f"{name}_rss_kib"] = process.memory_info().rss // 1024
    return found


def classify(agent: psutil.Process, rank_pid: int) -> dict[str, psutil.Process]:
    """The long-lived processes of a job, by their command lines."""
    found = {"agent": agent, "rank0": psutil.Process(rank_pid)}
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "holdfast.launcher.coordinator" in command and process.ppid() == agent.pid:
            found["coordinator"] = process
        if "holdfast.ckpt.memory.manager" in command and process.ppid() in (agent.pid, 1):
            found["snapshots"] = process
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="holdfast-cycles-") as name:
        events = Path(name, "events.jsonl")
        script = str(HERE.parent / "examples" / "pretrain.py")
        command = [
            sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", str(RANKS), "--standbys", "1",
            "--max-restarts", str(arguments.cycles + 10), "--events", str(events), script, "--preset", "tiny",
            "--steps", "1000000", "--microbatches", "4", "--microbatch-size", "1", "--context", "32",
        ]  # fmt: skip
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return watch(job, events, arguments, chance)
        finally:
            job.terminate()
            job.wait()


def watch(job: subprocess.Popen[bytes], events: Path, arguments: argparse.Namespace, chance: random.Random) -> int:
    """Kill, wait, sample."""
    offset, pids, totals = 0, dict[int, int](), list[float]()
    samples: list[dict[str, int]] = []

    def read() -> None:
        nonlocal offset
        with events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                event = json.loads(line)
                if event["event"] == "rank_started":
                    pids[event["rank"]] = event["pid"]
                elif event["event"] == "recovery":
                    totals.append(event["total_ms"])

    def until(count: int) -> bool:
        limit = time.monotonic() + DEADLINE_S
        while time.monotonic() < limit and job.poll() is None:
            if events.exists():
                read()
                if len(totals) >= count and len(pids) == RANKS:
                    return True
            time.sleep(0.01)
        return False

    until(0)
    time.sleep(8.0)  # start-up of four cold ranks
    agent = psutil.Process(job.pid)
    rank0 = pids[0]
    processes = classify(agent, rank0)
    for cycle in range(arguments.cycles):
        victim = chance.randrange(1, RANKS)
        time.sleep(chance.uniform(0.05, 0.25))
        psutil.Process(pids[victim]).kill()
        if not until(cycle + 1):
            print(json.dumps({"benchmark": "cycles", "failed": f"cycle {cycle}: rank {victim} not recovered"}))
            return 1
        time.sleep(0.6)  # the next standby is forked meanwhile; a gauge in flux says nothing
        samples.append(sample(processes, agent))
    read()
    window = max(1, len(samples) // 10)
    first, last = samples[:window], samples[-window:]
    gauges: dict[str, Any] = {}
    grown = []
    for gauge in samples[0]:
        a, b = statistics.median(s[gauge] for s in first), statistics.median(s[gauge] for s in last)
        gauges[gauge] = [a, b]
        if b > (a * 1.05 if gauge.endswith("kib") else a):
            grown.append(gauge)
    line = {
        "benchmark": "cycles",
        "cycles": arguments.cycles,
        "rank0_same_pid": pids[0] == rank0,
        "recovery_ms": {"median": statistics.median(totals), "max": max(totals)},
        "grown": grown,
        "gauges_first_last": gauges,
    }
    print(json.dumps(line))
    if arguments.out:
        arguments.out.write_text(json.dumps(line, indent=1) + "\n")
    return 1 if grown or pids[0] != rank0 else 0


if __name__ == "__main__":
    sys.exit(main())

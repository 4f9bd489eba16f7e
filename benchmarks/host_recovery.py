"""From the death of a whole host to the next committed step: Holdfast against torchrun with DCP checkpoints.

    python benchmarks/host_recovery.py [--rounds 3] [--hosts 3] [--preset demo] [--markdown FILE]

Hosts are network namespaces on this machine, one rank each. The two take turns; in each round all processes of the
last host are killed at the same moment. Holdfast: its rank goes on on another host, its state decoded from parity in
memory. torchrun: the host is started again at once (its agents wait for it: the number of nodes is fixed) and all ranks
load the newest checkpoint, on a disk that all hosts share. Time until some step is committed; torchrun's steps since
the checkpoint are lost and listed, and cost it nothing here; the step that Holdfast does again is in its time. Hosts'
leases are long, which a busy machine needs and a killed host does not wait for: its kernel closes its connections.
A ratio is of one round. Prints one JSON line. Goal: ratio <= 1/20.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "helpers")]

from host_losses import is_protected
from hosts import Hosts, start_job, wait_for
from recovery import lines
from table import Report, add_markdown, shown, spread

EXAMPLE = HERE.parent / "examples" / "pretrain.py"
STEPS, WARM, DEADLINE_S = 60, 12, 240.0
GOAL = 0.05


def holdfast(size: int, preset: str) -> dict[str, float]:
    """One job, one lost host."""
    with Hosts(size) as hosts:
        steps = hosts.folder / "steps.jsonl"
        arguments = ["--preset", preset, "--steps", str(STEPS), "--step-log", str(steps)]
        options = ["--redundancy", "xor", "--lease-min", "10", "--host-lease", "20"]
        job = start_job(hosts, EXAMPLE, arguments, options=options, out=False)
        wait_for(lambda: is_protected(job) and any(line["step"] >= WARM for line in lines(steps)), DEADLINE_S, "steps")
        before, killed_ns = lines(steps)[-1]["step"], time.monotonic_ns()
        hosts[size - 1].kill()
        wait_for(lambda: [e for e in job.events() if e["event"] == "recovery"], DEADLINE_S, "recovery")
        event = next(e for e in job.events() if e["event"] == "recovery")
        committed_ns = event["causes"][0]["detected_ns"] + event["total_ms"] * 1e6
        seconds = [line["seconds"] for line in lines(steps) if 3 < line["step"] <= before]
        job.kill()
    spans = {name: event[f"{name}_ms"] for name in ("reform", "restore", "resume")}
    return {"recovery_s": (committed_ns - killed_ns) / 1e9, "step_s": statistics.median(seconds), **spans}


def torchrun(size: int, preset: str) -> dict[str, float]:
    """The same under torchrun, the host started again at once."""
    with Hosts(size) as hosts, tempfile.TemporaryDirectory() as shared:
        endpoint = f"{hosts[0].address}:{hosts[0].free_port()}"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(size), "--nproc-per-node", "1",
            "--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "bench",
        ]  # fmt: skip
        script = [str(HERE / "torchrun_dcp.py"), "--dir", shared, "--preset", preset, "--steps", str(STEPS)]
        # The hosts' names resolve nowhere: torchrun is told addresses.
        commands = [[*command, "--local-addr", host.address, *script, "--every", "5"] for host in hosts]
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        for host, command in zip(hosts, commands, strict=True):
            host.popen(command, env=environment)
        log = Path(shared, "steps-0.jsonl")
        wait_for(lambda: any(line["step"] >= WARM for line in lines(log)), DEADLINE_S, "steps")
        old, before, killed_ns = lines(log)[-1]["pid"], lines(log)[-1]["step"], time.monotonic_ns()
        hosts[size - 1].kill()
        hosts[size - 1].popen(commands[size - 1], env=environment)
        wait_for(lambda: any(line["pid"] != old for line in lines(log)), DEADLINE_S, "torchrun going on")
        first = next(line for line in lines(log) if line["pid"] != old)
        for host in hosts:
            host.kill()
    return {"recovery_s": (first["ns"] - killed_ns) / 1e9, "steps_lost": before - first["step"] + 1}


def main() -> int:
    """Run the rounds and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--preset", default="demo")
    add_markdown(parser)
    arguments = parser.parse_args()
    reason = Hosts.available()
    if reason is not None:
        print(f"not run: {reason}")
        return 2
    report = Report(arguments.markdown, "Death of a host to the next committed step")
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        for run, results in ((holdfast, ours), (torchrun, theirs)):
            results.append(run(arguments.hosts, arguments.preset))
            print(f"round {number + 1} {run.__name__}: {results[-1]}", file=sys.stderr, flush=True)
    mine, peers = [r["recovery_s"] for r in ours], [r["recovery_s"] for r in theirs]
    line: dict[str, Any] = {
        "benchmark": "host_recovery",
        "rounds": arguments.rounds,
        "hosts": arguments.hosts,
        "preset": arguments.preset,
        "holdfast_s": spread(mine),
        "torchrun_dcp_s": spread(peers),
        "ratio": spread([a / b for a, b in zip(mine, peers, strict=True)], 4),
        "goal_ratio": GOAL,
        "step_s": spread([r["step_s"] for r in ours]),
        "beyond_one_step_s": spread([r["recovery_s"] - r["step_s"] for r in ours]),
        "spans_ms": {name: spread([r[name] for r in ours], 1) for name in ("reform", "restore", "resume")},
        "steps_lost_torchrun": [r["steps_lost"] for r in theirs],
    }
    report.line(line)
    ratio = line["ratio"]
    met = "met" if ratio["median"] <= GOAL else "missed"
    columns = ["hosts", "model", "step s", "Holdfast s", "beyond a step s", "torchrun + DCP s", "ratio", "goal"]
    cells = [shown(line[name]) for name in ("step_s", "holdfast_s", "beyond_one_step_s", "torchrun_dcp_s")]
    note = f"Steps that torchrun lost, which cost it nothing here: {line['steps_lost_torchrun']}."
    report.table(columns, [[arguments.hosts, arguments.preset, *cells, shown(ratio), f"<= {GOAL}: {met}"]], note)
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

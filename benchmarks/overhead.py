"""(b) Healthy step time with a snapshot sealed every step, over the same without any, in the same processes.

    python benchmarks/overhead.py [--steps 240] [--preset small] [--hosts 2 3 4 --redundancy xor] [--markdown FILE]

With --hosts the ranks run on that many hosts (network namespaces, one rank each) and parity of each snapshot is kept on
the others; without, four ranks on this one. Runs itself under `holdfast run` and switches snapshots on and off in
blocks of 8 steps: a round is a block with and a block without, which first is seeded chance, and the first two steps of
a block are not counted. A ratio is of one round: median step with over median step without.

The goal on one host follows from the machine: a copy of the state costs at least one memcpy, so ratio <= 1 + 1.5 x
(memcpy time of the state / step time) + 0.01, with the memcpy measured in the same run (one thread, warm pages, all
ranks' state). Several hosts have no goal: here they share the cores, and pay with a step's time for what a real host
does beside it, the parity and the sending of all others included. Prints one JSON line for each number of hosts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from table import Report, add_markdown, spread

BLOCK, SETTLE = 8, 2


def rank_main(arguments: argparse.Namespace) -> None:
    sys.path.insert(0, str(HERE.parent / "examples"))
    import torch
    from model import PRESETS, build_layers, loss
    from text import TextDataset, load_tokens

    from holdfast.runtime import Trainer

    cfg = PRESETS[arguments.preset]
    trainer = Trainer(
        layers=build_layers(cfg),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        data=TextDataset(load_tokens(), cfg.context, "train", 0),
        microbatch_size=1,
        microbatches=4,
    )
    chance = random.Random(0)
    blocks = [on for _ in range(arguments.steps // (2 * BLOCK)) for on in chance.sample((True, False), 2)]
    times: list[list[float]] = [[] for _ in blocks]
    kept = -1
    lost = unprotected = 0
    warm = 6
    for step in trainer.steps(until=warm + BLOCK * len(blocks)):
        index, position = divmod(step.number - 1 - warm, BLOCK)
        on = blocks[index] if index >= 0 else True
        # A snapshot of step s overlaps step s+1: the switch takes effect one step before the block.
        following = divmod(step.number - warm, BLOCK)[0]
        coming = blocks[following] if 0 <= following < len(blocks) else True
        trainer._engine.snapshots.every = 1 if coming else 1 << 60
        result = step.run()
        if index >= 0 and position >= SETTLE:
            times[index].append(result.seconds)
            if on:
                lost += result.snapshot_step != step.number - 1
                unprotected += trainer._engine.kept.protected < step.number - 1
        kept = result.snapshot_step
    state = sum(t.numel() * t.element_size() for t in trainer.final_state().values())
    source = torch.ones(state // 4)
    target = torch.empty_like(source)
    copies = []
    for _ in range(12):
        started = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - started)
    row = {"blocks": [[on, values] for on, values in zip(blocks, times, strict=True)], "state": state, "kept": kept}
    row["lost"] = lost
    row["unprotected"] = unprotected
    row["memcpy_s"] = statistics.median(copies[2:])
    Path(arguments.out, f"{trainer.rank}.json").write_text(json.dumps(row))


def run(arguments: argparse.Namespace, hosts: int, folder: str) -> None:
    """This script under `holdfast run`, on one host or on several."""
    script = [str(Path(__file__).resolve()), "--steps", str(arguments.steps), "--preset", arguments.preset]
    if hosts == 1:
        command = [sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", "4", "--events", "none"]
        subprocess.run([*command, *script, "--out", folder], check=True)
        return
    sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
    from hosts import Hosts, start_job

    with Hosts(hosts) as machines:
        leases = ["--host-lease", "20", "--lease-min", "10"]
        options = ["--redundancy", arguments.redundancy, "--standbys", "0", *leases]
        job = start_job(machines, Path(script[0]), [*script[1:], "--out", folder], options=options, out=False)
        ended = job.wait(1200.0)
        if ended.code:
            raise SystemExit(ended.err)


def measure(arguments: argparse.Namespace, hosts: int) -> dict[str, Any]:
    """One job, as a line."""
    with tempfile.TemporaryDirectory(prefix="holdfast-overhead-") as folder:
        run(arguments, hosts, folder)
        ranks = 4 if hosts == 1 else hosts
        rows: list[dict[str, Any]] = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    blocks = rows[0]["blocks"]
    steps = {on: sorted(s for which, values in blocks for s in values if which == on) for on in (True, False)}
    rounds = [dict(blocks[at : at + 2]) for at in range(0, len(blocks), 2)]
    ratios = [statistics.median(one[True]) / statistics.median(one[False]) for one in rounds]
    step_s, memcpy_s = statistics.median(steps[False]), sum(row["memcpy_s"] for row in rows)

    def tenths(values: list[float]) -> list[float]:
        return [round(values[int(q * (len(values) - 1))] * 1e3, 2) for q in (0.1, 0.9)]

    return {
        "benchmark": "overhead",
        "preset": arguments.preset,
        "hosts": hosts,
        "redundancy": arguments.redundancy if hosts > 1 else "none",
        "state_mb": round(sum(row["state"] for row in rows) / 1e6, 1),
        "step_ms": round(step_s * 1e3, 2),
        "step_ms_p10_p90": tenths(steps[False]),
        "with_snapshots_ms": round(statistics.median(steps[True]) * 1e3, 2),
        "with_snapshots_ms_p10_p90": tenths(steps[True]),
        "ratio": {**spread(ratios, 4), "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]]},
        "rounds": len(rounds),
        "memcpy_ms": round(memcpy_s * 1e3, 2),
        "goal": round(1 + 1.5 * memcpy_s / step_s + 0.01, 4) if hosts == 1 else None,
        "steps_counted": [len(steps[True]), len(steps[False])],
        "steps_not_kept_in_time": rows[0]["lost"],
        "steps_without_parity_in_time": rows[0]["unprotected"] if hosts > 1 else None,
    }


def as_row(line: dict[str, Any]) -> list[object]:
    """The line in a table."""
    ratio, late = line["ratio"], line["steps_without_parity_in_time"]
    goal = f"<= {line['goal']}: {'met' if ratio['median'] <= line['goal'] else 'missed'}" if line["goal"] else ""
    cells = [line["hosts"], line["redundancy"], line["state_mb"], line["step_ms"], line["with_snapshots_ms"]]
    low, high = ratio["quartiles"]
    late = f"{late} of {line['steps_counted'][0]}" if late is not None else ""
    return [*cells, f"{ratio['median']:g} ({low:g}-{high:g})", goal, late]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1])
    parser.add_argument("--redundancy", default="xor")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    add_markdown(parser)
    arguments = parser.parse_args()
    if arguments.steps < 4 * BLOCK:
        parser.error(f"--steps {arguments.steps} makes fewer than two rounds of {2 * BLOCK}")
    if "RANK" in os.environ:
        rank_main(arguments)
        return 0
    report = Report(arguments.markdown, "A snapshot every step, over none")
    rows = []
    for hosts in arguments.hosts:
        line = measure(arguments, hosts)
        report.line(line)
        rows.append(as_row(line))
    columns = ["hosts", "redundancy", "state MB", "step ms", "with ms", "ratio (quartiles)", "goal", "parity late"]
    report.table(columns, rows, "A step's parity is late if the whole next step was over before all hosts had it.")
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

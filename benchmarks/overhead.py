"""(b) Healthy step time with a snapshot sealed every step, over the same without any, in the same processes.

    python benchmarks/overhead.py [--steps 200] [--preset small] [--hosts 3 --redundancy xor]

With --hosts the ranks run on that many hosts (network namespaces, one rank each) and parity of each snapshot is kept on
the others; without, four ranks on this one.
Runs itself under `holdfast run` with 4 ranks and switches snapshots on and off in blocks of steps, in seeded
random order; the first two steps of a block are not counted. The goal follows from the machine: a copy of the
state costs at least one memcpy, so ratio <= 1 + 1.5 x (memcpy time of the state / step time) + 0.01, with the
memcpy measured in the same run (one thread, warm pages, all ranks' state). Prints one JSON line.
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
    blocks = [on for _ in range(arguments.steps // (2 * BLOCK)) for on in (True, False)]
    random.Random(0).shuffle(blocks)
    times: dict[bool, list[float]] = {True: [], False: []}
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
            times[on].append(result.seconds)
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
    row = {"times": {str(on): values for on, values in times.items()}, "state": state, "kept": kept, "lost": lost}
    row["unprotected"] = unprotected
    row["memcpy_s"] = statistics.median(copies[2:])
    Path(arguments.out, f"{trainer.rank}.json").write_text(json.dumps(row))


def run(arguments: argparse.Namespace, folder: str) -> None:
    """This script under `holdfast run`, on one host or on several."""
    script = [str(Path(__file__).resolve()), "--steps", str(arguments.steps), "--preset", arguments.preset]
    if arguments.hosts == 1:
        command = [sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", "4", "--events", "none"]
        subprocess.run([*command, *script, "--out", folder], check=True)
        return
    sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
    from hosts import Hosts, start_job

    with Hosts(arguments.hosts) as hosts:
        options = ["--redundancy", arguments.redundancy, "--standbys", "0"]
        job = start_job(hosts, Path(script[0]), [*script[1:], "--out", folder], options=options, out=False)
        ended = job.wait(1200.0)
        if ended.code:
            raise SystemExit(ended.err)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--redundancy", default="xor")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="holdfast-overhead-") as folder:
        run(arguments, folder)
        ranks = 4 if arguments.hosts == 1 else arguments.hosts
        rows: list[dict[str, Any]] = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    with_, without = sorted(rows[0]["times"]["True"]), sorted(rows[0]["times"]["False"])
    step_s = statistics.median(without)
    memcpy_s = sum(row["memcpy_s"] for row in rows)
    line = {
        "benchmark": "overhead",
        "preset": arguments.preset,
        "hosts": arguments.hosts,
        "redundancy": arguments.redundancy if arguments.hosts > 1 else "none",
        "state_mb": round(sum(row["state"] for row in rows) / 1e6, 1),
        "step_ms": round(step_s * 1e3, 2),
        "step_ms_p10_p90": [round(without[int(q * (len(without) - 1))] * 1e3, 2) for q in (0.1, 0.9)],
        "with_snapshots_ms": round(statistics.median(with_) * 1e3, 2),
        "with_snapshots_ms_p10_p90": [round(with_[int(q * (len(with_) - 1))] * 1e3, 2) for q in (0.1, 0.9)],
        "ratio": round(statistics.median(with_) / step_s, 4),
        "memcpy_ms": round(memcpy_s * 1e3, 2),
        "goal": round(1 + 1.5 * memcpy_s / step_s + 0.01, 4),
        "steps_counted": [len(with_), len(without)],
        "steps_not_kept_in_time": rows[0]["lost"],
        "steps_without_parity_in_time": rows[0]["unprotected"] if arguments.hosts > 1 else None,
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One checkpoint, every layout, with and without ZeRO-1: the next 20 steps and the final state, bit for bit.

    python benchmarks/resume_matrix.py [--sgd] [--sources "PP=4" ...] [--targets "PP=1" ...] [--out results.json]

    unbroken: one process, 30 steps
    PP=4, DP=2 x PP=2 ZeRO-1, DP=4 ZeRO-1 ── checkpoint of step 10 ──▶ each layout below ── steps 11..30 ──▶ equal?

The job is tests/helpers/scripts/savejob.py: tied embedding, dropout, two parameter groups, a scheduler of schedulers,
clipping, validation; parameters that do not divide by the holders (width 18). Prints one line per run and a JSON
summary; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from jobs import Ended, job, reference

SCRIPT = ROOT / "tests" / "helpers" / "scripts" / "savejob.py"
STEP, STEPS = 10, 30
ALONE = ("--standbys", "0")  # nobody dies here
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "PP=1": (1, ()),
    "PP=2": (2, ()),
    "PP=3 uneven": (3, ("--split", "1,5,2")),
    "DP=2 x PP=2": (4, ("--stages", "2", "--replicas", "2")),
    "DP=3": (3, ("--stages", "1", "--replicas", "3")),
}
SOURCES: dict[str, tuple[int, tuple[str, ...], str]] = {
    "PP=4": (4, ("--stages", "4"), "0"),
    "DP=2 x PP=2 ZeRO-1": (*LAYOUTS["DP=2 x PP=2"], "1"),
    "DP=4 ZeRO-1": (4, ("--stages", "1", "--replicas", "4"), "1"),
}


def differences(run: Ended, unbroken: Ended, since: int) -> list[str]:
    """What is not as in the unbroken run."""
    import torch

    if run.code != 0:
        return [f"exit code {run.code}: {run.err[-300:]}"]
    found = (
        [] if run.told() == [row for row in unbroken.told() if row["step"] > since] else ["the figures of the steps"]
    )
    one, other = run.state(), unbroken.state()
    if one.keys() != other.keys():
        return [*found, f"names: {sorted(one.keys() ^ other.keys())[:3]}"]
    return found + [name for name in one if not torch.equal(one[name], other[name])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sgd", action="store_true", help="SGD with momentum instead of AdamW")
    parser.add_argument("--width", default="18")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--targets", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    common = ("--steps", str(STEPS), "--width", arguments.width, *(["--sgd"] if arguments.sgd else []))
    rows: list[dict[str, Any]] = []

    def tell(source: str, target: str, zero: str, run: Ended, unbroken: Ended, since: int, seconds: float) -> None:
        found = differences(run, unbroken, since)
        rows.append({"from": source, "to": target, "zero": int(zero), "differs": found, "seconds": round(seconds, 1)})
        verdict = "the same bits" if not found else f"DIFFERS: {found[:3]}"
        print(f"{source:>20} -> {target:<12} zero={zero} {seconds:5.1f} s  {verdict}", flush=True)

    with tempfile.TemporaryDirectory(prefix="holdfast-matrix-") as name:
        folder = Path(name)
        unbroken = reference(folder / "unbroken", SCRIPT, *common)
        for number, source in enumerate(arguments.sources):
            ranks, layout, zero = SOURCES[source]
            base = folder / f"source{number}"
            options = (*ALONE, "--zero", zero, "--checkpoint-dir", str(base / "saved"), "--checkpoint-every", str(STEP))
            wait = ("--step-seconds", "0.05")  # a checkpoint of a due step is written while the next steps last
            started = time.monotonic()
            run = job(base, ranks, SCRIPT, *common, *layout, *wait, "--out", str(base / "out"), options=options)
            tell("the start", source, zero, run, unbroken, 0, time.monotonic() - started)
            for target in arguments.targets:
                count, grid = LAYOUTS[target]
                for wanted in ("0", "1"):
                    where = base / f"{target} {wanted}".replace(" ", "-")
                    resume = (*ALONE, "--zero", wanted, "--resume", str(base / "saved" / f"step-{STEP:08}"))
                    started = time.monotonic()
                    run = job(where, count, SCRIPT, *common, *grid, "--out", str(where / "out"), options=resume)
                    tell(source, target, wanted, run, unbroken, STEP, time.monotonic() - started)
    bad = [row for row in rows if row["differs"]]
    summary = {"runs": len(rows), "optimizer": "SGD with momentum" if arguments.sgd else "AdamW", "different": len(bad)}
    print(json.dumps(summary))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**summary, "rows": rows}, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

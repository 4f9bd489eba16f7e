"""Convergence under failures: CheckFree, CheckFree+, stale stage, rollback and others on the same failure traces.

    holdfast bench convergence --out FOLDER [--resume]     the campaign: hours of one core; a line a run in runs.jsonl
    holdfast bench convergence --out FOLDER --report       tables (report.md) and plots (*.png) of what is there
    holdfast bench convergence --out FOLDER --real         six ranks, real SIGKILLs: equal to the simulator, and timed

Six stages learn the source of Python's standard library; seeded traces at the paper's failure probabilities decide
which stage is lost when, for all methods alike. The simulator is the runtime's own engine on one rank (convergence/).
Plots need matplotlib, nothing else does. Last line printed: one JSON value. Exit code 1 if a real run differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from convergence import campaign, real, report
from convergence.settings import Settings


def main(argv: list[str] | None = None) -> int:
    """One of the three parts."""
    parser = argparse.ArgumentParser(
        prog="holdfast bench convergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results are, or go")
    parser.add_argument("--resume", action="store_true", help="go on with what the folder has; its runs are not redone")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0.. of the campaign (3)")
    parser.add_argument("--iterations", type=int, default=Settings().iterations, help="of each run (%(default)s)")
    parser.add_argument("--real", action="store_true", help="the multi-process part alone")
    parser.add_argument("--case", action="append", default=[], help=f"of it: {', '.join(c.name for c in real.CASES)}")
    parser.add_argument("--seed", type=int, default=1, help="of the multi-process part (1)")
    parser.add_argument("--report", action="store_true", help="tables and plots alone")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.iterations < 1:
        parser.error("--seeds and --iterations must be at least 1")
    unknown = set(arguments.case) - {case.name for case in real.CASES}
    if unknown:
        parser.error(f"--case {sorted(unknown)[0]!r} is none of {', '.join(case.name for case in real.CASES)}")
    torch.set_num_threads(1)
    out, settings = arguments.out, replace(Settings(), iterations=arguments.iterations)
    out.mkdir(parents=True, exist_ok=True)
    runs = out / "runs.jsonl"
    if arguments.real:
        return real.main(out / "real.jsonl", arguments.seed, arguments.case)
    if not arguments.report:
        if runs.exists() and not arguments.resume:
            parser.error(f"{runs} is there: --resume goes on with it, --report shows it")
        campaign.main(runs, settings, range(arguments.seeds))
    print(json.dumps(report.write(out, settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

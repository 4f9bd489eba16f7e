"""The main job without snapshots: killed stages are rebuilt from their neighbours. Next to the same job left alone.

    python examples/demo_neighbours.py [--recovery neighbours+] [--steps 240] [--kills 5] [--out loss.svg]

Shows live progress of both runs, what every lost stage was rebuilt from, and draws both loss curves with the kills
marked. Nothing here is exact, and it says so: what the other stages learnt is kept, the lost stage's own part is not.
With `neighbours` only inner stages are killed, since nobody else has the embedding and the head; with `neighbours+` any
is. Exit code 0 only if every kill was survived.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from curve import Line, svg
from demo import HERE, HOLDFAST, recoveries, run

RANKS = 4


def plan_kills(seed: int, mode: str, steps: int, count: int) -> list[tuple[int, int]]:
    """(step, rank) of each SIGKILL, ascending: in the middle three quarters of the run."""
    chance = random.Random(seed)
    ranks = range(1, RANKS - 1) if mode == "neighbours" else range(RANKS)
    begin, end = steps // 8, max(steps // 8 + 1, steps * 7 // 8)
    chosen = sorted(chance.sample(range(begin, end), min(count, end - begin)))
    return [(step, chance.choice(ranks)) for step in chosen]


def job(arguments: argparse.Namespace, out: Path, *options: str) -> list[str]:
    """The command both runs have in common."""
    return [
        *HOLDFAST, "run", "--nproc-per-node", str(RANKS), "--standbys", "1", "--events", str(out / "events.jsonl"),
        *options, str(HERE / "pretrain.py"), "--preset", arguments.preset, "--steps", str(arguments.steps),
        "--log-every", str(max(1, arguments.steps // 12)), "--microbatch-size", "2",
        "--step-log", str(out / "steps.jsonl"),
    ]  # fmt: skip


def losses(log: Path, width: int = 8) -> list[tuple[float, float]]:
    """(step, mean loss of the last steps); a step that was redone counts once."""
    found = {line["step"]: line["loss"] for line in map(json.loads, log.read_text().splitlines())}
    steps = sorted(found)
    return [
        (step, statistics.fmean(found[s] for s in steps[max(0, i - width + 1) : i + 1])) for i, step in enumerate(steps)
    ]


def main() -> int:
    """Both runs and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recovery", choices=("neighbours", "neighbours+", "stale", "auto"), default="neighbours")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each run (240)")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs in the first run (5)")
    parser.add_argument("--seed", type=int, default=1, help="decides when and whom (1)")
    parser.add_argument("--preset", default="demo", help="size of the model (demo)")
    parser.add_argument("--out", type=Path, default=Path("loss.svg"), help="the plot (loss.svg)")
    arguments = parser.parse_args()
    if arguments.steps < 16 or arguments.kills < 1:
        parser.error("--steps must be at least 16 and --kills at least 1")
    kills = plan_kills(arguments.seed, arguments.recovery, arguments.steps, arguments.kills)
    folder = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    broken, unbroken = folder / "with-kills", folder / "without"
    for out in (broken, unbroken):
        out.mkdir()
    faults = ";".join(f"rank={rank},step={step},at=user,kind=kill" for step, rank in kills)
    try:
        options = ("--recovery", arguments.recovery, "--faults", faults)
        run(f"{RANKS} stages, {len(kills)} killed, --recovery {arguments.recovery}", job(arguments, broken, *options))
        run("the same job, left alone", job(arguments, unbroken))
        survived = recoveries(broken / "events.jsonl")
        curves = [losses(out / "steps.jsonl") for out in (broken, unbroken)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n=== verdict")
    for event in survived:
        made = event.get("inexact", {})
        assert isinstance(made, dict)
        how = "; ".join(f"rank {rank} {told['how'] or told['rung']}" for rank, told in made.items()) or "exact"
        print(f"  after step {event['resume_step']:>4}, {event['total_ms']:.0f} ms: {how}")
    ends = [curve[-1][1] for curve in curves]
    print(f"loss at the end {ends[0]:.4f}, without kills {ends[1]:.4f} (means of 8 steps): NOT the same run")
    lines = [Line("stages killed", curves[0]), Line("left alone", curves[1])]
    title = f"{arguments.preset}: {len(kills)} stages killed, --recovery {arguments.recovery}"
    marks = [(step, f"S{rank + 1}") for step, rank in kills]
    arguments.out.write_text(svg(title, lines, marks, "step", "training loss (mean of 8 steps)", "SIGKILL of a stage"))
    print(f"plot: {arguments.out}")
    return 0 if len(survived) == len(kills) and len(curves[0]) == arguments.steps else 1


if __name__ == "__main__":
    sys.exit(main())

"""Seeded faults at every point of a step and of a recovery; each run must end bit-identical to the unbroken one.

    python benchmarks/campaign.py [--seeds 10] [--kills 10] [--kinds kill] [--layouts PP=4 ...] [--out results.json]

For each layout (PP=4, and DP=2 x PP=2 without and with ZeRO-1) one unbroken run, then one run per seed with
scripted faults. Checked in each: exit code 0; parameters and optimizer state torch.equal to the unbroken run's;
every fault fired; only the ranks that were hit have a new pid. Prints one line per run and a JSON summary; exit
code 1 if any check fails. A run is replayed by its seed.
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
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "pretrain.py"
ZERO1 = "DP=2xPP=2 ZeRO-1"
LAYOUTS = {"PP=4": ["--stages", "4"], "DP=2xPP=2": ["--stages", "2"], ZERO1: ["--stages", "2"]}
OPTIONS = {ZERO1: ["--zero", "1"]}  # of `holdfast run`; those above are the script's
WORLD_SIZE, MICROBATCHES, STEPS = 4, 8, 40
POINTS = ("forward", "backward", "exchange", "commit", "optimizer", "applied", "snapshot", "user")
DURING = ("join", "build", "restore")


def plan_faults(seed: int, layout: str, count: int, kinds: tuple[str, ...] = ("kill",)) -> list[str]:
    """`count` scripted faults: every third comes with a second one that hits a survivor during the recovery."""
    chance = random.Random(f"{seed} {layout}")
    faults: list[str] = []
    steps = sorted(chance.sample(range(2, STEPS), min(STEPS - 2, count)))
    for step in steps:
        if len(faults) >= count:
            break
        rank = chance.randrange(WORLD_SIZE)
        point = chance.choice((*POINTS, "gather") if layout == ZERO1 else POINTS)
        kind = chance.choice(kinds)
        at = f"{point}:{hosted_microbatch(chance, rank, layout)}" if point in ("forward", "backward") else point
        faults.append(f"rank={rank},step={step},at={at},kind={kind}")
        # With ZeRO-1 and after the barrier, a survivor's live state may be that of no step: none could be named.
        torn = layout == ZERO1 and point in ("optimizer", "applied", "gather")
        if len(faults) % 3 == 1 and len(faults) < count and not torn:
            other = chance.choice([r for r in range(WORLD_SIZE) if r != rank])
            during = chance.choice(DURING)
            faults.append(f"rank={other},step={{live}}{step},at={during},kind=kill")
    # A survivor's live state is that of the step before the one in which the peer died, or of that step itself
    # if the peer died after the barrier: the script names the one that certainly comes.
    return [fault.replace("{live}", "") if "{live}" not in fault else _live(fault, faults) for fault in faults]


def _rank(fault: str) -> int:
    return int(fault.partition(",")[0].removeprefix("rank="))


def _step(fault: str) -> int:
    return int(fault.split(",")[1].removeprefix("step="))


def _during(fault: str) -> bool:
    """Whether it hits in the recovery from the fault before it."""
    return fault.split(",")[2].removeprefix("at=") in DURING


def _live(fault: str, faults: list[str]) -> str:
    partner = faults[faults.index(fault) - 1]
    after = any(f"at={point}," in partner for point in ("optimizer", "applied", "snapshot", "user"))
    head, _, tail = fault.partition("{live}")
    number, _, rest = tail.partition(",")
    return f"{head}{int(number) if after and 'at=user' not in partner else int(number) - 1},{rest}"


def hosted_microbatch(chance: random.Random, rank: int, layout: str) -> int:
    """A microbatch that `rank` runs: all in a pipeline, its replica's half with two replicas."""
    if layout == "PP=4":
        return chance.randrange(MICROBATCHES)
    half = MICROBATCHES // 2
    return (rank // 2) * half + chance.randrange(half)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left."""

    code: int
    output: str
    events: list[dict[str, Any]]
    state: dict[str, Any]
    seconds: float

    def pids(self) -> dict[int, list[int]]:
        """Rank -> pids that held it, in order."""
        held: dict[int, list[int]] = {}
        for event in self.events:
            if event["event"] == "rank_started":
                held.setdefault(event["rank"], []).append(event["pid"])
        return held

    def recoveries(self) -> list[dict[str, Any]]:
        """Recovery records."""
        return [event for event in self.events if event["event"] == "recovery"]


def run_job(layout: str, faults: list[str] | None = None, *, timeout_s: float = 300.0) -> Run:
    """`holdfast run` with 4 ranks of the example; waits for its end. Kills it (and so all of it) at the deadline."""
    import torch  # noqa: F401  (the comparison needs it; fail early)
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="holdfast-campaign-") as name:
        folder = Path(name)
        command = [
            sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", str(WORLD_SIZE),
            "--standbys", "2", "--lease-min", "1.0", "--events", str(folder / "events.jsonl"),
            *OPTIONS.get(layout, []), "--faults", ";".join(faults or []), str(SCRIPT),
            "--preset", "tiny", "--steps", str(STEPS), "--microbatches", str(MICROBATCHES), "--microbatch-size", "2",
            "--context", "32", "--validate-every", "16", "--out", str(folder / "state"), *LAYOUTS[layout],
        ]  # fmt: skip
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            output = process.communicate()[0] + f"\n[campaign] no end within {timeout_s:.0f} s"
        seconds = time.monotonic() - started
        log = folder / "events.jsonl"
        events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        state: dict[str, Any] = {}
        for path in sorted((folder / "state").glob("*.safetensors")):
            state |= load_file(path)
        return Run(process.returncode, output, events, state, seconds)


def verify(run: Run, reference: Run, faults: list[str]) -> list[str]:
    """What is wrong with a run; empty if nothing is."""
    import torch

    wrong = []
    if run.code:
        wrong.append(f"exit code {run.code}")
    different = [n for n in reference.state if n not in run.state or not torch.equal(run.state[n], reference.state[n])]
    if different or run.state.keys() != reference.state.keys():
        wrong.append(f"{len(different)} of {len(reference.state)} tensors differ, first {different[:1]}")
    hit = Counter(_rank(fault) for fault in faults)
    # A peer that died after the barrier: on a busy machine this rank may not have heard the barrier's end, and is then
    # a step behind the one that its fault names.
    unsure = Counter(_rank(one) for before, one in pairwise(faults) if _during(one) and _step(one) == _step(before))
    for rank, pids in run.pids().items():
        if not 1 + hit[rank] - unsure[rank] <= len(pids) <= 1 + hit[rank]:
            wrong.append(f"rank {rank} was hit {hit[rank]} times and had {len(pids)} processes")
    return wrong


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs per layout (5)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=10, help="faults per run (10)")
    parser.add_argument("--kinds", default="kill", help="comma-separated fault kinds (kill)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, help="write the summary there")
    arguments = parser.parse_args()
    summary: dict[str, Any] = {"benchmark": "campaign", "kills": 0, "runs": 0, "failed": [], "points": Counter()}
    totals: list[float] = []
    for layout in arguments.layouts:
        reference = run_job(layout)
        if reference.code:
            print(reference.output)
            return 1
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            faults = plan_faults(seed, layout, arguments.kills, tuple(arguments.kinds.split(",")))
            run = run_job(layout, faults)
            wrong = verify(run, reference, faults)
            print(
                f"{layout} seed {seed}: {len(faults)} faults, {run.seconds:.0f} s: {'; '.join(wrong) or 'equal'}",
                flush=True,
            )
            if wrong:
                summary["failed"].append({"layout": layout, "seed": seed, "faults": faults, "wrong": wrong})
                print(run.output[-3000:])
            summary["kills"] += len(faults)
            summary["runs"] += 1
            summary["points"].update(fault.split("at=")[1].split(",")[0].partition(":")[0] for fault in faults)
            totals += [event["total_ms"] for event in run.recoveries()]
    if totals:
        totals.sort()
        summary["recovery_ms"] = {
            "count": len(totals),
            "median": statistics.median(totals),
            "p90": totals[int(0.9 * (len(totals) - 1))],
            "max": totals[-1],
        }
    print(json.dumps(summary))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

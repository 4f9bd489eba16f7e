"""The main job, with stages killed while it trains, next to the same job left alone. Then: are they equal?

    python examples/demo.py [--steps 240] [--kills 5] [--keep DIR]

Shows live progress of both runs, every recovery with its four spans, and at the end compares all parameters
and optimizer state with torch.equal. Exit code 0 only if every kill fired, was survived, and every bit agrees.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
HOLDFAST = [sys.executable, "-m", "holdfast.launcher.cli"]


def job(arguments: argparse.Namespace, out: Path) -> list[str]:
    """The command both runs have in common."""
    return [
        *HOLDFAST, "run", "--nproc-per-node", "4", "--standbys", "1", "--events", str(out / "events.jsonl"),
        str(HERE / "pretrain.py"), "--preset", arguments.preset, "--steps", str(arguments.steps),
        "--validate-every", str(max(1, arguments.steps // 4)), "--log-every", str(max(1, arguments.steps // 12)),
        "--microbatch-size", "2", "--out", str(out / "state"),
    ]  # fmt: skip


def run(title: str, command: list[str]) -> float:
    """Run a command with its output on the terminal; its wall time in seconds."""
    print(f"\n=== {title}\n    {' '.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"demo: {title}: exit code {code}")
    return time.monotonic() - started


def recoveries(events: Path) -> list[dict[str, object]]:
    """Recovery records of a run."""
    lines = (json.loads(line) for line in events.read_text().splitlines())
    return [event for event in lines if event["event"] == "recovery"]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All ranks' final state."""
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        whole |= load_file(path)
    return whole


def compare(broken: Path, unbroken: Path) -> bool:
    """Say whether the two final states are equal, bit for bit."""
    left, right = state(broken / "state"), state(unbroken / "state")
    different = [name for name in sorted(left.keys() | right.keys()) if name not in left or name not in right]
    different += [name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])]
    elements = sum(tensor.numel() for tensor in left.values())
    if different:
        print(f"NOT EQUAL: {len(different)} of {len(left)} tensors differ, first {sorted(different)[0]}")
        return False
    print(
        f"BIT-IDENTICAL: {len(left)} tensors, {elements:,} numbers (parameters and optimizer state), torch.equal on all"
    )
    return True


def main() -> int:
    """Both runs and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each run (240)")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs in the first run (5)")
    parser.add_argument("--every", default="6s", help="mean time between them (6s)")
    parser.add_argument("--seed", type=int, default=1, help="decides when and whom (1)")
    parser.add_argument("--preset", default="demo", help="size of the model (demo)")
    parser.add_argument("--keep", type=Path, help="keep event records and final states there")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    broken, unbroken = folder / "with-kills", folder / "without"
    for out in (broken, unbroken):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    chaos = [
        *HOLDFAST, "chaos", "--seed", str(arguments.seed), "--every", arguments.every, "--kinds", "kill",
        "--count", str(arguments.kills), "--json", str(broken / "chaos.json"), "--",
    ]  # fmt: skip
    try:
        slow = run(f"4 stages, {arguments.kills} of them killed while they train", [*chaos, *job(arguments, broken)])
        fast = run("the same job, left alone", job(arguments, unbroken))
        faults = json.loads((broken / "chaos.json").read_text())["faults"]
        survived = sum(fault["survived"] for fault in faults)
        print(
            f"\n=== verdict\n{survived} of {arguments.kills} kills survived in {slow:.0f} s, without any {fast:.0f} s"
        )
        for event in recoveries(broken / "events.jsonl"):
            spans = ", ".join(f"{name} {event[f'{name}_ms']:.0f} ms" for name in ("reform", "restore", "resume"))
            total = f"{event['total_ms']:.0f} ms after detection"
            print(f"  resumed from step {event['resume_step']:>4}, {total} ({spans})")
        equal = compare(broken, unbroken)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if equal and survived == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())

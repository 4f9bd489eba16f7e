"""`holdfast bench NAME`: runs one of the benchmark scripts of the repository, which the wheel does not carry.

A benchmark is a script in benchmarks/ that interleaves both sides in one run and prints JSON lines. It is
looked for in the current folder and those above it, so that what is measured is what one sees.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from holdfast.proto.errors import ConfigError

BENCHMARKS: Final = {
    "recovery": "SIGKILL to the next committed step, against torchrun --max-restarts with DCP",
    "overhead": "healthy step time with a snapshot every step, against none",
    "engine": "the pipeline engine, against a hand-written 1F1B and torch.distributed.pipelining",
    "swap": "the step of swapped stages (CheckFree+) on emulated devices, against 1F1B",
    "rebuild": "all groups rebuilt, against torch's destroy and init",
    "cycles": "200 kills in one job: descriptors, threads, memory flat",
    "checkpoints": "convert, adopt, export, save, load and verify, against DeepSpeed's tools, DCP and safetensors",
    "campaign": "seeded faults at every point of a step; every run bit-identical to the unbroken one",
    "convergence": "CheckFree, CheckFree+, stale stage, rollback: loss under the same failures",
}


EXAMPLES: Final = """examples:
  holdfast bench recovery --rounds 5
  holdfast bench engine --help
"""


def find(name: str, start: Path) -> Path:
    """The script of a benchmark. Raises ConfigError."""
    for folder in (start, *start.parents):
        script = folder / "benchmarks" / f"{name}.py"
        if script.is_file():
            return script
    raise ConfigError(f"no benchmarks/{name}.py here or above: run this in a checkout of the repository")


def main(argv: Sequence[str]) -> int:
    """Entry point of `holdfast bench`; returns the script's exit code."""
    listed = "\n".join(f"  {name:<11} {text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="holdfast bench",
        description="Run a benchmark of the repository.",
        epilog=f"benchmarks:\n{listed}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(BENCHMARKS), metavar="NAME", help="which one")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="given to the script; --help for its own")
    arguments = parser.parse_args(list(argv))
    script = find(arguments.name, Path.cwd())
    return subprocess.run([sys.executable, str(script), *arguments.arguments], check=False).returncode

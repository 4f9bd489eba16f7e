"""The real job's script: what the simulator simulates, on six ranks under `holdfast run`.

    holdfast run --nproc-per-node 6 job.py --settings JSON --seed N --losses FILE

Rank 0 appends one JSON line a step; a step that was redone appears again, and the last line counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from convergence.settings import SPLIT, STAGES, Settings, trainer_arguments
from holdfast.runtime import Trainer


def main() -> None:
    """Train to the last iteration."""
    parser = argparse.ArgumentParser(description="Six stages that learn the standard library.")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(**arguments.settings)
    trainer = Trainer(**trainer_arguments(settings, arguments.seed), stages=STAGES, split=SPLIT)
    for step in trainer.steps(until=settings.iterations):
        result = step.run()
        if trainer.rank == 0:
            line = {"step": result.step, "loss": result.loss, "s": result.seconds, "ns": time.monotonic_ns()}
            with arguments.losses.open("a") as log:
                log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""A small model for jobs over several hosts: state from a few hundred KB up, steps that last as long as is asked for.

    hostjob.py [--steps N] [--step-seconds S] [--width N] [--stages N] [--replicas N] [--flip RANK:STEP] [--out DIR]

With AdamW the whole state is about 72 * width**2 bytes: 0.3 MB at --width 64, 16 MB at --width 470. Prints a line for
each step of each rank, so that a test can wait for one. One process without an agent is the reference: any layout on
any hosts must end with its bits; --step-seconds changes none of them (and is over once the file that --hurry names
exists). --flip does: one bit of a weight, as a bad memory would.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.runtime import Trainer

WORDS, CONTEXT, BLOCKS, SAMPLES = 32, 4, 6, 50


class Words(nn.Module):
    """The first layer. Waits in each forward, so that a step lasts although there is little to compute."""

    def __init__(self, width: int, seconds: float, hurry: Path | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.seconds = seconds
        self.hurry = hurry

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seconds > 0 and not (self.hurry is not None and self.hurry.exists()):
            threading.Event().wait(self.seconds)
        embedded: torch.Tensor = self.embed(x)
        return embedded


class Block(nn.Module):
    """A residual layer with dropout: random numbers are part of what must survive."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.drop(torch.tanh(self.linear(h)))
        return h + changed


class Samples:
    """Fewer than some steps take, so that epochs end."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = (torch.arange(CONTEXT + 1) * (index + 1) + index) % WORDS
        return words[:-1], words[1:]


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small job for several hosts.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="shortest step")
    parser.add_argument("--hurry", type=Path, help="steps are not made to last once this file exists")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--stages", type=int)
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--flip", default="", help="damage the first layer of that rank after that step")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    width, microbatches = arguments.width, arguments.microbatches
    # The replicas of the first stage share a step's microbatches, and wait at the same time.
    wait_s = arguments.step_seconds * (arguments.replicas or 1) / microbatches
    layout = {name: value for name in ("stages", "replicas") if (value := getattr(arguments, name)) is not None}
    built: list[Words] = []

    def words() -> Words:
        built.append(Words(width, wait_s, arguments.hurry))
        return built[-1]

    trainer = Trainer(
        layers=[
            words,
            *[lambda: Block(width)] * BLOCKS,
            lambda: nn.Linear(width, WORDS),
        ],
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        data=Samples(),
        microbatch_size=2,
        microbatches=microbatches,
        clip_norm=1.0,
        **layout,
    )
    told = []
    for step in trainer.steps(until=arguments.steps):
        result = step.run()
        told.append({"step": result.step, "loss": result.loss, "norm": result.grad_norm, "skipped": result.skipped})
        if arguments.flip == f"{trainer.rank}:{result.step}":
            built[-1].embed.weight.data.view(torch.int32)[0, 0] ^= 1
        print(f"hostjob: rank {trainer.rank} step {result.step}", flush=True)
    if arguments.out is not None:
        write(arguments.out, trainer, json.dumps(told))


def write(folder: Path, trainer: Trainer, told: str) -> None:
    """Whole files or none: a host may die here, and another rank write the same again."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank-{trainer.rank}"
    aside = folder / f".{name}.{os.getpid()}"
    save_file(trainer.final_state(), aside)
    os.replace(aside, folder / f"{name}.safetensors")
    aside.write_text(told)
    os.replace(aside, folder / f"{name}.json")


if __name__ == "__main__":
    main()

"""A job to be saved and resumed: everything that a checkpoint must bring over to another layout, in 8 small units.

    savejob.py [--steps N] [--step-seconds S] [--width N] [--layers N] [--stages N] [--replicas N] [--split A,B,..]
               [--interleave N] [--sgd] [--out DIR]

Tied embedding and head, dropout, two parameter groups, a scheduler of schedulers, clipping, validation, data that
draws random numbers. One process without an agent is the reference. Prints a line for each step of each rank.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.runtime import Trainer

WORDS, CONTEXT, SAMPLES = 32, 4, 37


class Words(nn.Module):
    """The first layer. Waits in each forward, so that a step lasts although there is little to compute."""

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seconds > 0 and self.training:
            threading.Event().wait(self.seconds)
        embedded: torch.Tensor = self.embed(x)
        return embedded


class Block(nn.Module):
    """A residual layer with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.drop(torch.tanh(self.linear(self.norm(h))))
        return h + changed


class Head:
    """Makes the last layer, whose matrix is the first one's; a factory, as every rank must know of the tie."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.holdfast_ties = {"weight": (0, "embed.weight")}

    def __call__(self) -> nn.Module:
        return nn.Linear(self.width, WORDS, bias=False)


class Samples:
    """Fewer than some steps take, so that epochs end; shifted at random."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = (torch.arange(CONTEXT + 1) * (index + 1) + index + random.randrange(3)) % WORDS
        return words[:-1], words[1:]


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Two groups; a stage may have no parameters for one of them."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 2e-3}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    schedulers = torch.optim.lr_scheduler
    warm_up = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=12)
    return schedulers.SequentialLR(optimizer, [warm_up, schedulers.CosineAnnealingLR(optimizer, 40)], milestones=[12])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A job to be saved and resumed.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="shortest step")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--split", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--sgd", action="store_true")
    for name in ("stages", "replicas", "interleave"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    width = arguments.width
    # The replicas of the first stage share a step's microbatches, and wait at the same time.
    wait_s = arguments.step_seconds * (arguments.replicas or 1) / 4
    names = ("stages", "replicas", "interleave", "split")
    layout = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    trainer = Trainer(
        layers=[lambda: Words(width, wait_s), *[lambda: Block(width)] * (arguments.layers - 2), Head(width)],
        loss=loss,
        optimizer=adamw if not arguments.sgd else lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        scheduler=schedule,
        data=Samples(),
        microbatch_size=2,
        microbatches=4,
        clip_norm=1.0,
        validation=Samples(),
        validate_every=5,
        validation_microbatches=2,
        **layout,
    )
    told = []
    for step in trainer.steps(until=arguments.steps):
        result = step.run()
        told.append({"step": result.step, "loss": result.loss, "validation": result.validation_loss,
                     "norm": result.grad_norm, "lr": result.lr, "skipped": result.skipped})  # fmt: skip
        print(f"savejob: rank {trainer.rank} step {result.step}", flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_file(trainer.final_state(), arguments.out / f"rank-{trainer.rank}.safetensors")
        (arguments.out / f"rank-{trainer.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()

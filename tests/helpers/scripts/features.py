"""Small models with one odd thing each, trained to --steps; --out gets the final state of this rank.

    features.py CASE [--steps N] [--out DIR] [Trainer's layout: --stages N --replicas N --interleave N --schedule S]

One process without an agent is the reference: any layout, with any faults, must end with its bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.runtime import Trainer

DIM, WORDS, CONTEXT = 8, 16, 4


class Pair(nn.Module):
    """Gives a tuple: what flows and an integer tensor that takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embed(x), x


class Mix(nn.Module):
    """Takes and gives the tuple; dropout, and batch statistics in buffers that change in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.norm = nn.BatchNorm1d(DIM)
        self.drop = nn.Dropout(0.3)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.norm(self.linear(h).flatten(0, 1)).view_as(h)
        return h + self.drop(torch.tanh(mixed)), x


class Frozen(nn.Module):
    """A stage of its own may have nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(DIM) + 0.5, requires_grad=False)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h * self.scale + x.unsqueeze(-1).to(h.dtype) / WORDS


class Shift(nn.Module):
    """No parameters, and its output takes no gradient: the first stage has no backward to do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1) % WORDS


class Tally(nn.Module):
    """A head tied to the embedding, with a buffer that its forward changes and a parameter that nothing uses."""

    holdfast_ties = {"words": (0, "weight")}  # noqa: RUF012
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.rand(WORDS, DIM))
        self.unused = nn.Parameter(torch.rand(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return h @ self.words.T


class Widen(nn.Module):
    """Hands on 8 MB, far beyond what sockets buffer: a peer that dies leaves them half sent."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.repeat_interleave(32768, dim=1)


class Narrow(nn.Module):
    """Back to the words."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h[:, ::32768]


class Stream:
    """Microbatches without end, from a generator whose place is state_dict."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while self.place % 23 or not self.place:  # an epoch ends in the middle of a step
            yield self.read()
        self.place += 1

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.place)
        self.place += 1
        words = torch.randint(0, WORDS, (2, CONTEXT + 1), generator=generator)
        return words[:, :-1], words[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Augmented:
    """10 samples (so that epochs wrap inside a step), shifted by all three random generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.arange(CONTEXT + 1) * (index + 1) + random.randrange(3) + int(np.random.randint(3))
        words = (words + torch.randint(0, 3, ())) % WORDS
        return words[:-1], words[1:]


class Counter:
    """A user's own state, which the loss changes: what an unfinished step did to it must be taken back."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def remembered(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Weighs each microbatch by what came before it."""
    value = cross_entropy(logits, target) * (1.0 + 0.01 * len(COUNTER.losses))
    COUNTER.losses.append(value.item())
    return value


def counted(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and count over what is not padding (word 0): counts differ between microbatches."""
    total = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0, reduction="sum")
    return total, (target != 0).sum()


def exploding(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Overflows in half precision until the scale has come down."""
    return cross_entropy(logits, target) * 8.0


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Dropout(0.1))


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=40, cycle_momentum=False)


def case(name: str) -> dict[str, Any]:
    head: Callable[[], nn.Module] = lambda: nn.Linear(DIM, WORDS)  # noqa: E731
    plain: dict[str, Any] = {
        "layers": [lambda: nn.Embedding(WORDS, DIM), body, body, body, body, head],
        "loss": cross_entropy,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "data": Augmented(),
        "microbatch_size": 2,
        "microbatches": 6,
    }
    if name == "odd":
        return plain | {
            "layers": [Shift, Pair, Mix, Frozen, Mix2, head],
            "optimizer": lambda p: torch.optim.SGD(p, lr=1e-2),
            "scheduler": one_cycle,
            "data": Stream(),
            "loss": remembered,
            "state": {"counter": COUNTER},
        }
    if name == "epochs":
        return plain | {
            "loss": counted,
            "clip_norm": 0.5,
            "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
            "validation": Augmented(),
            "validate_every": 4,
            "validation_microbatches": 1,  # fewer than replicas
        }
    if name == "swapped":
        return plain | {
            "layers": [lambda: nn.Embedding(WORDS, DIM), *[body] * 5, Tally],
            "clip_norm": 0.05,
            "validation": Augmented(),
            "validate_every": 4,
            "validation_microbatches": 3,
            "stages": 4,
            "swap": True,
            "shadows": True,
        }
    if name == "large":
        return plain | {"layers": [lambda: nn.Embedding(WORDS, DIM), Widen, body, Narrow, head], "microbatches": 3}
    if name == "half":
        return plain | {"autocast": torch.float16, "loss_scale": "dynamic", "loss": exploding}
    assert name == "plain"
    return plain


class Mix2(nn.Module):
    """Batch statistics again, on the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.norm(h.flatten(0, 1)).view_as(h)


COUNTER = Counter()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--die-after-the-loop", type=int, default=-1, metavar="RANK")
    for name in ("stages", "replicas", "interleave"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--schedule")
    arguments = parser.parse_args()
    layout = {
        name: getattr(arguments, name)
        for name in ("stages", "replicas", "interleave", "schedule")
        if getattr(arguments, name) is not None
    }
    trainer = Trainer(**case(arguments.case), **layout)
    told = []
    for step in trainer.steps(until=arguments.steps):
        result = step.run()
        told.append({"step": result.step, "loss": result.loss, "validation": result.validation_loss,
                     "norm": result.grad_norm, "skipped": result.skipped})  # fmt: skip
    if trainer.rank == arguments.die_after_the_loop and os.environ.get("HOLDFAST_INCARNATION") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_file(trainer.final_state(), arguments.out / f"rank-{trainer.rank}.safetensors")
        (arguments.out / f"rank-{trainer.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()

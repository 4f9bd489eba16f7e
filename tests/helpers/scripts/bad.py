"""One mistake each, by name: what a user gets wrong in a script. See tests/multiprocess/test_bad_input.py."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from holdfast.runtime import Trainer

DIM = 4


class Dataset:
    def __init__(self, length: int = 32) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((DIM,), float(index)), torch.zeros(DIM)


class Empty:
    """A stream that has nothing."""

    def __iter__(self) -> Any:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Holding:
    """A user's object whose state_dict holds something that cannot be captured."""

    def __init__(self, held: Callable[[], Any]) -> None:
        self.held = held()

    def state_dict(self) -> dict[str, Any]:
        return {"held": {"deep": [self.held]}}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Scheduler(torch.optim.lr_scheduler.LambdaLR):
    """Forgets to leave its function out of its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"factor": lambda step: 1.0}


class Ragged(nn.Module):
    """Gives what no wire can carry."""

    def forward(self, x: torch.Tensor) -> Any:
        return {"x": x}


def unit() -> nn.Module:
    return nn.Linear(DIM, DIM)


def mistakes() -> dict[str, dict[str, Any]]:
    return {
        "none": {},
        "stages": {"layers": [unit]},
        "batch": {"microbatches": None, "batch_size": 7},
        "both": {"batch_size": 8},
        "replicas": {"stages": 1, "microbatches": 1},
        "grid": {"stages": 3},
        "argument": {"microbatchsize": 3},
        "missing": {"loss": ...},
        "shape": {"layers": [unit, unit, lambda: nn.Linear(DIM + 1, DIM), unit]},
        "input": {"layers": [lambda: nn.Embedding(3, DIM), unit, unit, unit]},
        "output": {"layers": [unit, Ragged, unit, unit]},
        "layer": {"layers": [unit, unit, "unit", unit]},
        "factory": {"layers": [unit, unit, lambda: 3, unit]},
        "broken factory": {"layers": [unit, lambda: nn.Linear(-1, DIM), unit, unit]},
        "lazy": {"layers": [unit, unit, lambda: nn.LazyLinear(DIM), unit]},
        "complex": {"layers": [unit, unit, lambda: nn.Linear(DIM, DIM, dtype=torch.complex64), unit]},
        "loss": {"loss": lambda y, target: y - target},
        "loss number": {"loss": lambda y, target: 1.0},
        "loss fails": {"loss": lambda y, target: nn.functional.cross_entropy(y, target.long().flatten())},
        "loss detached": {"loss": lambda y, target: (y.detach() - target).square().mean()},
        "optimizer": {"optimizer": torch.optim.SGD},
        "optimizer instance": {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])},
        "optimizer fails": {"optimizer": lambda p: torch.optim.SGD(p, lr=-1.0)},
        "optimizer none": {"optimizer": lambda p: None},
        "plateau": {"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
        "scheduler": {"scheduler": lambda o: Scheduler(o, lambda step: 1.0)},
        "state socket": {"state": {"mine": Holding(socket.socket)}},
        "state lambda": {"state": {"mine": Holding(lambda: lambda: 0)}},
        "state set": {"state": {"mine": Holding(lambda: {1, 2})}},
        "state complex": {"state": {"mine": Holding(lambda: torch.zeros(2, dtype=torch.complex64))}},
        "state none": {"state": {"mine": 3}},
        "empty": {"data": Dataset(0)},
        "empty stream": {"data": Empty()},
        "data": {"data": (pair for pair in [])},
        "data shape": {"data": [1, 2, 3]},
        "data pair": {"data": [(torch.zeros(DIM),)] * 8},
        "validation": {"validate_every": 2},
        "validation kind": {"validate_every": 2, "validation": 7},
        "clip": {"clip_norm": 0.0},
        "schedule": {"schedule": "zigzag"},
        "split": {"split": [1, 1]},
        "interleave": {"interleave": 5},
        "device": {"device": "tpu"},
        "autocast": {"autocast": "bf16"},
        "scale": {"loss_scale": "auto"},
    }


def main() -> None:
    arguments: dict[str, Any] = {
        "layers": [unit, unit, unit, unit],
        "loss": nn.functional.mse_loss,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "data": Dataset(),
        "microbatch_size": 2,
        "microbatches": 4,
        **mistakes()[sys.argv[1]],
    }
    trainer = Trainer(**{name: value for name, value in arguments.items() if value is not ...})
    for step in trainer.steps(until=3):
        step.run()


if __name__ == "__main__":
    main()

"""One rank of a DeepSpeed job that takes two steps and saves: the checkpoint that the peers and we convert.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 python deepspeed_rank.py '{"stage": 2, "scale": 1, "save": FOLDER, ...}'

Runs in an environment that has DeepSpeed, and need not have Holdfast. One short sequence a step: what counts is that
DeepSpeed wrote the files, not what the model learned.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import deepspeed
import torch
from state import BLOCKS, VOCABULARY, WIDTH, shapes
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(-1, -2) / WIDTH**0.5, -1) @ v)
        return x + self.down(torch.tanh(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, scale: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY * scale, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS * scale)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).float().square().mean()


def main() -> None:
    options = json.loads(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{options['rendezvous']}",
        rank=rank,
        world_size=world,
        verbose=False,
    )
    torch.manual_seed(7)
    model = Model(options["scale"])
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes(options["scale"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": options["stage"]},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(2):
        generator = torch.Generator().manual_seed(step * world + rank)
        engine.backward(engine(torch.randint(0, VOCABULARY, (1, 16), generator=generator)))
        engine.step()
    engine.save_checkpoint(options["save"], tag="step")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

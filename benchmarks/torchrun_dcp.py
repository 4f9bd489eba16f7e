"""The peer of recovery.py: the same model and batch under plain torchrun, checkpointed with DCP, hand-written 1F1B.

    torchrun --standalone --nproc-per-node 4 --max-restarts 3 benchmarks/torchrun_dcp.py --dir D --every 5 ...

What a careful torchrun user writes: every rank saves its stage through torch.distributed.checkpoint every so many
steps and, after torchrun restarted everything, loads the newest complete checkpoint and goes on. Each
committed step is one line in D/steps-RANK.jsonl (monotonic clock).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "examples")]

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from engine import hand_written
from model import PRESETS, build_layers, loss
from ranks import Rank
from text import TextDataset, load_tokens

from holdfast.runtime.pipeline.planner import grid_plan


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--microbatch-size", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    cfg = PRESETS[arguments.preset]
    layers = build_layers(cfg)
    plan = grid_plan(units=len(layers), stages=world_size, replicas=1, microbatches=arguments.microbatches)
    torch.manual_seed(rank)
    stage = torch.nn.Sequential(*[layers[unit]() for unit in plan.hosted(rank)])
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    for parameter in stage.parameters():  # DCP loads only into state that exists
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    data = TextDataset(load_tokens(), cfg.context, "train", 0)
    first = restore(arguments.dir, rank, stage, optimizer)
    me = Rank.__new__(Rank)
    me.rank, me.world_size = rank, world_size
    per_step = arguments.microbatches * arguments.microbatch_size
    with (arguments.dir / f"steps-{rank}.jsonl").open("a", buffering=1) as log:
        for step in range(first + 1, arguments.steps + 1):
            samples = [data[((step - 1) * per_step + i) % len(data)] for i in range(per_step)]
            shape = (arguments.microbatches, arguments.microbatch_size, cfg.context)
            x, y = (torch.stack([s[k] for s in samples]).view(shape) for k in (0, 1))
            optimizer.zero_grad(set_to_none=True)
            hand_written(me, None, stage, loss, x, y, (arguments.microbatch_size, cfg.context, cfg.dim))(step)
            norms = torch.stack(torch._foreach_norm([p.grad for p in stage.parameters() if p.grad is not None]))
            total = norms.square().sum()
            dist.all_reduce(total)
            optimizer.step()
            log.write(json.dumps({"step": step, "ns": time.monotonic_ns(), "pid": os.getpid()}) + "\n")
            if step % arguments.every == 0:
                save(arguments.dir, rank, step, stage, optimizer)


def state(rank: int, stage: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """This stage's state, under keys of its own."""
    weights = {f"{rank}.w.{name}": value for name, value in stage.state_dict().items()}
    moments = {
        f"{rank}.o.{index}.{key}": value
        for index, kept in enumerate(optimizer.state.values())
        for key, value in kept.items()
    }
    return {**weights, **moments}


def save(folder: Path, rank: int, step: int, stage: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One DCP checkpoint; the marker is written when all ranks are done."""
    dcp.save(state(rank, stage, optimizer), checkpoint_id=str(folder / f"step-{step}"))
    if rank == 0:
        (folder / "latest.tmp").write_text(str(step))
        (folder / "latest.tmp").rename(folder / "latest")


def restore(folder: Path, rank: int, stage: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint in place; its step, 0 without one."""
    if not (folder / "latest").exists():
        return 0
    step = int((folder / "latest").read_text())
    dcp.load(state(rank, stage, optimizer), checkpoint_id=str(folder / f"step-{step}"))
    return step


if __name__ == "__main__":
    main()

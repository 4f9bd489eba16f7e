"""One rank of a job that saves with DCP, or loads what two ranks saved on more ranks: with DCP, and with our load().

    RANK=0 WORLD_SIZE=4 python rank.py '{"do": "load", "folder": .., "ours": .., "rounds": 5, "report": ..}'

All sides take turns in the same processes, each between two barriers: a round's figure is the slowest rank's. Opening
the checkpoint is in it. Bytes read are /proc/self/io's rchar, which counts what was asked of the kernel, cached or not.
The first round compares what both sides loaded, to the bit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from state import shapes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from holdfast.ckpt.tensors import load as load_part

Tensors = dict[str, torch.Tensor]
"""This rank's part of each parameter."""


def share(shape: tuple[int, ...], dim: int, rank: int, world: int) -> tuple[tuple[int, int], ...]:
    """The box of a parameter that a rank has, cut along `dim`, or along the only dim that there is."""
    dim = min(dim, len(shape) - 1)
    assert shape[dim] % world == 0
    size = shape[dim] // world
    return tuple((rank * size, rank * size + size) if at == dim else (0, n) for at, n in enumerate(shape))


def empty(dim: int, rank: int, world: int) -> Tensors:
    boxes = {name: share(shape, dim, rank, world) for name, shape in shapes(1).items()}
    return {name: torch.empty([stop - start for start, stop in box]) for name, box in boxes.items()}


def as_dtensors(parts: Tensors, mesh: Any, dim: int) -> dict[str, DTensor]:
    placed = {name: Shard(min(dim, part.dim() - 1)) for name, part in parts.items()}
    return {name: DTensor.from_local(part, mesh, [placed[name]], run_check=False) for name, part in parts.items()}


def save(folder: str, rank: int, world: int) -> None:
    parts = empty(0, rank, world)
    generator = torch.Generator().manual_seed(rank)
    for part in parts.values():
        part.normal_(generator=generator)
    dcp.save({"model": as_dtensors(parts, init_device_mesh("cpu", (world,)), 0)}, checkpoint_id=folder)


def theirs(options: dict[str, Any], dim: int, rank: int, world: int, mesh: Any) -> Tensors:
    parts = empty(dim, rank, world)
    dcp.load({"model": as_dtensors(parts, mesh, dim)}, checkpoint_id=options["folder"])
    return parts


def ours(folder: str, state: str, dim: int, rank: int, world: int) -> Tensors:
    parts = empty(dim, rank, world)
    cut = {name: min(dim, part.dim() - 1) for name, part in parts.items()}
    return load_part(folder, state=state, into=parts, rank=rank, world=world, dim=cut, jobs=1)


def bytes_asked() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def load(options: dict[str, Any], rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    sides: dict[str, Callable[[int], Tensors]] = {
        "dcp": lambda dim: theirs(options, dim, rank, world, mesh),
        "same_files": lambda dim: ours(options["folder"], "weight", dim, rank, world),
        "ours": lambda dim: ours(options["ours"], "fp32", dim, rank, world),
    }
    report = []
    for dim in (0, 1):
        wanted = sum(part.nbytes for part in empty(dim, rank, world).values())
        expected: Tensors = {}
        for turn in range(-1, options["rounds"]):
            for side, loads in sides.items():
                dist.barrier()
                asked, started, used = bytes_asked(), time.perf_counter(), time.process_time()
                found = loads(dim)
                spent, used = time.perf_counter() - started, time.process_time() - used
                asked = bytes_asked() - asked
                figures = torch.tensor([spent, used, asked / wanted], dtype=torch.float64)
                dist.all_reduce(figures, dist.ReduceOp.MAX)
                if turn < 0:  # warms everything that is imported or built at first use
                    expected = expected or found
                    assert all(torch.equal(expected[name], found[name]) for name in expected), (side, dim)
                else:
                    names = ("wall", "cpu", "amplification")
                    report.append({"dim": dim, "side": side, **dict(zip(names, figures.tolist(), strict=True))})
                del found
    if rank == 0:
        Path(options["report"]).write_text(json.dumps(report))


def main() -> None:
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{options['rendezvous']}", rank=rank, world_size=world)
    if options["do"] == "save":
        save(options["folder"], rank, world)
    else:
        load(options, rank, world)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

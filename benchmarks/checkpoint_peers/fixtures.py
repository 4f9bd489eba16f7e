"""The checkpoints that claims start from, made once in a folder and kept there: by DeepSpeed itself, by DCP, or by us.

    deepspeed(stage)   two ranks of DeepSpeed write them; needs its environment        minutes, and once a compiler
    emitted(scale)     our own writer of DeepSpeed's files: where no peer is measured  seconds
    dcp()              two ranks save with torch.distributed.checkpoint; beside it the same state in our format, tiled

A fixture is there when its folder has the name that says it is whole; a killed run leaves another name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.ckpt.formats import open_any, write_as
from holdfast.ckpt.universal.model import Group
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.save import Part, save_universal
from holdfast.ckpt.universal.write import Details, StatePlan, WriteOptions, Writer

from .state import shapes

HERE = Path(__file__).resolve().parent
STATES = ("fp32", "exp_avg", "exp_avg_sq")
RANKS_S = 900


def environment(python: Path) -> dict[str, str]:
    """One thread a process; tools that are installed beside the interpreter (ninja) are found."""
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    more = {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}
    # An installed package has its bytecode; so must a checkout, or it is the compiler that is measured.
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}, **more}


def run_ranks(python: Path, script: str, world: int, options: Mapping[str, Any], work: Path) -> None:
    """One process for each rank; SystemExit with the end of rank 0's output if one fails."""
    rendezvous = work / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    text = json.dumps({**options, "rendezvous": str(rendezvous)})
    logs = [work / f"rank-{rank}.log" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        env = {**environment(python), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        with open(log, "wb") as out:
            command = [str(python), str(HERE / script), text]
            ranks.append(subprocess.Popen(command, env=env, cwd=work, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
    try:
        codes = [rank.wait(RANKS_S) for rank in ranks]
    finally:
        for child in ranks:
            child.kill()
            child.wait()
    if any(codes):
        tail = "\n".join(logs[0].read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{script} {text} ended with {codes}\n{tail}")


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made at the first call."""
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        subprocess.run(["rm", "-rf", str(unfinished)], check=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def deepspeed(work: Path, python: Path, stage: int, scale: int) -> Path:
    """What two ranks of DeepSpeed wrote."""

    def make(at: Path) -> None:
        run_ranks(python, "deepspeed_rank.py", 2, {"stage": stage, "scale": scale, "save": str(at)}, work)

    return once(work / f"zero{stage}-scale{scale}", make)


def values(scale: int, states: tuple[str, ...] = STATES) -> list[Part]:
    """The whole state, with its bytes made when they are asked for: masters and moments, and weights in bf16."""

    def numbers(index: int, shape: tuple[int, ...]) -> Callable[[], memoryview]:
        return lambda: np.random.default_rng(index).standard_normal(shape, np.float32).data.cast("B")

    def rounded(index: int, shape: tuple[int, ...]) -> Callable[[], memoryview]:
        return lambda: np.random.default_rng(index).standard_normal(shape, np.float32).view("<u2")[..., 1::2].tobytes()

    parts = []
    for index, (name, shape) in enumerate(shapes(scale).items()):
        size = int(np.prod(shape))
        for at, state in enumerate(states):
            role = "param" if state == "fp32" else "optim"
            parts.append(Part(name, state, "F32", shape, 0, size, numbers(3 * index + at, shape), role))
        parts.append(Part(name, "weight", "BF16", shape, 0, size, rounded(3 * index, shape)))
    return parts


def details(scale: int) -> Details:
    """One group, all parameters at step 2."""
    names = tuple(shapes(scale))
    hyper = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    trainer = {"global_steps": 2, "global_samples": 4, "skipped_steps": 0}
    return Details(metadata={"trainer": trainer}, groups=(Group(0, hyper, names),), steps=dict.fromkeys(names, 2))


def emitted(work: Path, scale: int) -> Path:
    """DeepSpeed's ZeRO-2 files for two ranks, as our writer emits them."""

    def make(at: Path) -> None:
        ours = once(work / f"ours-scale{scale}", lambda home: save_parts(home, scale))
        with Reader(open_checkpoint(ours), verify=False) as reader:
            write_as("deepspeed:zero2,dp=2", reader, at)
        subprocess.run(["rm", "-rf", str(ours)], check=True)

    return once(work / f"emitted-scale{scale}", make)


def save_parts(home: Path, scale: int) -> None:
    save_universal(home, values(scale), details(scale), WriteOptions(fsync=False))


def dcp(work: Path) -> tuple[Path, Path]:
    """The parameters in float32, saved by two ranks along dim 0; and the same in our format, in tiles."""

    def make(at: Path) -> None:
        run_ranks(Path(sys.executable), "rank.py", 2, {"do": "save", "folder": str(at)}, work)

    saved = once(work / "dcp", make)

    def ours(at: Path) -> None:
        with Reader(open_any(saved)) as reader, Writer(at, WriteOptions(tile=True)) as writer:
            tensors = list(reader.checkpoint.states.values())
            # Tiles are for the optimizer's files, whose names nobody else's loader knows: so it goes in as masters.
            writer.begin([StatePlan(t.name, "fp32", t.dtype, t.shape) for t in tensors])
            for tensor in tensors:
                writer.put(tensor.name, "fp32", reader.read(*tensor.key))
            writer.commit()

    return saved, once(work / "dcp-ours", ours)

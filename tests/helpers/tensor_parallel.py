"""A checkpoint that says how its parameters are split over tensor-parallel ranks; numbered elements, made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.ckpt.formats.deepspeed import NAMES
from holdfast.ckpt.formats.torchwrite import Tensor, write_torch
from holdfast.ckpt.formats.torchzip import read_torch
from holdfast.ckpt.universal.model import Group
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.save import Part, save_universal
from holdfast.ckpt.universal.write import Details

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (24, 5),
    "column.weight": (12, 5),
    "column.bias": (12,),
    "row.weight": (5, 12),
    "row.bias": (5,),
    "norm.weight": (5,),
    "qkv.weight": (36, 5),
    "gate.weight": (24, 5),
    "frozen.weight": (12, 7),
}
INFO: dict[str, Any] = {
    "universal_checkpoint_version": 0.4,
    "tp_replicated_parameter_patterns": ["^norm\\.weight$", r"row.*bias"],
    "parameter_with_row_parallelism_patterns": ["^row\\.weight$"],
    "parameter_with_2_sub_params_cat_dim_0": [r"gate\.weight"],
    "parameter_with_sub_params": [{"patterns": ["^qkv\\.weight$"], "shape": [[12, 12, 12], -1], "partition_dim": 0}],
    "sub_param_shard_widths": {"^qkv\\.weight$": [[6, 6], [6, 6], [6, 6]]},
}
TRAINED = tuple(name for name in SHAPES if not name.startswith("frozen"))


def numbers(name: str, state: str = "fp32") -> np.ndarray[Any, Any]:
    """Element i of the tensor is i, and something of its own."""
    own = 1000.0 * (list(SHAPES).index(name) + 1) + {"fp32": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5}[state]
    return (np.arange(math.prod(SHAPES[name]), dtype=np.float32) + np.float32(own)).reshape(SHAPES[name])


def rounded(values: np.ndarray[Any, Any]) -> bytes:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def saved(folder: Path) -> Reader:
    """Of one rank, and it says how its parameters are to be split."""
    held = []
    for name, shape in SHAPES.items():
        elements, role = math.prod(shape), "param" if name in TRAINED else "frozen"
        held.append(Part(name, "weight", "BF16", shape, 0, elements, rounded(numbers(name)), role))  # type: ignore[arg-type]
        for state in ("fp32", "exp_avg", "exp_avg_sq") if role == "param" else ():
            role = "param" if state == "fp32" else "optim"
            held.append(Part(name, state, "F32", shape, 0, elements, numbers(name, state).tobytes(), role))  # type: ignore[arg-type]
    held.append(Part("scale", "buffer", "F32", (1,), 0, 1, np.float32([1.5]).tobytes(), "buffer"))
    details = Details(
        metadata={"trainer": {"global_steps": 4}, "client": {"universal_checkpoint_info": INFO}},
        groups=(Group(0, {"lr": 0.1}, TRAINED[:4]), Group(1, {"lr": 0.2}, TRAINED[4:])),
        steps=dict.fromkeys(TRAINED, 4),
        completeness={"optimizer": "exact"},
    )
    save_universal(folder, held, details)
    return Reader(open_checkpoint(folder))


def affine(shape: list[int], *ranks: tuple[list[int], list[dict[str, Any]]]) -> dict[str, Any]:
    given = {str(rank): {"shard_shape": part, "pieces": pieces} for rank, (part, pieces) in enumerate(ranks)}
    return {"affine_map": {"version": 1, "params": {"w": {"logical_shape": shape, "ranks": given}}}}


def rewritten(folder: Path, name: str, change: Callable[[dict[str, Any]], None], *, dtype: str = "BF16") -> None:
    """A model file with something changed; its tensors are read and written as they are."""
    value = dict(read_torch(folder, name, names=NAMES))

    def tensor(stored: Any) -> Tensor:
        with open(folder / stored.file, "rb") as file:
            file.seek(stored.offset)
            data = file.read(stored.nbytes)
        return Tensor(stored.dtype, stored.shape, lambda: [data])

    value["module"] = {key: tensor(stored) for key, stored in value["module"].items()}
    value["frozen_param_fragments"] = None
    change(value)
    write_torch(folder / "new", value)
    (folder / "new").replace(folder / name)

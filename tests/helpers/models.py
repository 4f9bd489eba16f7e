"""Checkpoints of small made-up models, from numpy arrays by name and state; and what a reader reads of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.ckpt.universal.model import Checkpoint, Group
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.save import Part, save_universal
from holdfast.ckpt.universal.write import Details, WriteOptions

Array = np.ndarray[Any, Any]
Tensors = Mapping[tuple[str, str], Array]

DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "uint16": "BF16",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}
"""numpy has no bfloat16: its bits as uint16 stand for it."""
NUMPY = {name: dtype for dtype, name in DTYPES.items()}


def save(target: Path, tensors: Tensors, details: Details | None = None) -> Checkpoint:
    """Write the arrays as one checkpoint of our format."""
    parts = []
    for (name, state), array in tensors.items():
        role = "buffer" if state == "buffer" else "optim" if state.startswith("exp_avg") else "param"
        data = np.ascontiguousarray(array)
        plain = data.reshape(-1).view(np.uint8).data if data.size else b""
        dtype = DTYPES[array.dtype.name]
        parts.append(Part(name, state, dtype, array.shape, 0, array.size, plain, role))  # type: ignore[arg-type]
    return save_universal(target, parts, details, WriteOptions(fsync=False))


def load(reader: Reader) -> dict[tuple[str, str], Array]:
    """Every tensor, read whole."""
    found = {}
    for (name, state), tensor in reader.checkpoint.states.items():
        data = bytes(reader.read(name, state))
        found[name, state] = np.frombuffer(data, NUMPY[tensor.dtype]).reshape(tensor.shape)
    return found


def same(one: Tensors, other: Tensors) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and one[key].tobytes() == other[key].tobytes()
        for key in one
    )


def states(name: str, shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> dict[tuple[str, str], Array]:
    """A parameter as mixed-precision training has it: bf16 weight, fp32 master, two moments."""
    chance = np.random.default_rng([seed, *name.encode()])
    master = (chance.standard_normal(shape) * scale).astype(np.float32)
    bits = np.atleast_1d(master).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(shape)
    return {
        (name, "weight"): rounded,
        (name, "fp32"): master,
        (name, "exp_avg"): chance.standard_normal(shape).astype(np.float32),
        (name, "exp_avg_sq"): chance.random(shape).astype(np.float32),
    }


def llama(
    seed: int = 0, *, layers: int = 2, hidden: int = 16, heads: int = 4, kv_heads: int = 2
) -> dict[tuple[str, str], Array]:
    """A Llama under Hugging Face's names, with optimizer states."""
    dim = hidden // heads
    found: dict[tuple[str, str], Array] = states("model.embed_tokens.weight", (24, hidden), seed)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (40, hidden),
            "mlp.up_proj": (40, hidden),
            "mlp.down_proj": (hidden, 40),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        for part, shape in shapes.items():
            found |= states(f"{at}.{part}.weight", shape, seed)
    return found | states("model.norm.weight", (hidden,), seed) | states("lm_head.weight", (24, hidden), seed)


def details(tensors: Tensors, step: int = 7, **metadata: Any) -> Details:
    """Two groups, matrices and the rest, and steps for all."""
    names = list(dict.fromkeys(name for name, state in tensors if state != "buffer"))
    shapes = {name: array.shape for (name, _), array in tensors.items()}
    matrices = tuple(name for name in names if len(shapes[name]) > 1)
    rest = tuple(name for name in names if len(shapes[name]) < 2)
    groups = (Group(0, {"lr": 0.1, "weight_decay": 0.1}, matrices), Group(1, {"lr": 0.1, "weight_decay": 0.0}, rest))
    return Details(
        metadata={"trainer": {"step": step}, **metadata},
        groups=groups,
        steps=dict.fromkeys(names, step),
        completeness={"optimizer": "exact"},
    )

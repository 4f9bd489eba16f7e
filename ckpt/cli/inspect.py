"""`inspect`: what is in a checkpoint, from its headers: no tensor is read, nothing is executed.

format, source, files ▸ tensors by state and dtype ▸ optimizer groups ▸ what came along ▸ (--tensors) each
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any, Final

from ..universal.model import Checkpoint, TensorState
from ..universal.verify import digested
from .arguments import Parser, add_layout
from .console import Console, human, table
from .source import open_reader

EXAMPLES: Final = {
    "inspect": """\
  holdfast ckpt inspect run/step-00000100
  holdfast ckpt inspect checkpoints/global_step100 --tensors
  holdfast ckpt inspect model.safetensors --json | jq .tensors
  holdfast ckpt inspect hf-model --layout llama-megatron --set kv_heads=8 --tensors"""
}

HYPER_SHOWN: Final = ("lr", "betas", "eps", "weight_decay", "momentum")


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("path", help="checkpoint of any format, or a run's folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_layout(parser)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Show it."""
    with open_reader(arguments, arguments.path) as reader:
        checkpoint = reader.checkpoint
        value = {"path": arguments.path, **describe(checkpoint, tensors=arguments.tensors or arguments.json)}
        console.result(value, lines(checkpoint, value, tensors=arguments.tensors))
    return 0


def parameters(checkpoint: Checkpoint) -> int:
    """Elements of parameters, each name once."""
    sizes: dict[str, int] = {}
    for (name, state), tensor in checkpoint.states.items():
        if tensor.role in ("param", "frozen") and state != "rng":
            sizes[name] = max(sizes.get(name, 0), tensor.elements)
    return sum(sizes.values())


def describe(checkpoint: Checkpoint, *, tensors: bool) -> dict[str, Any]:
    """All of it as JSON."""
    kinds: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for tensor in checkpoint.states.values():
        kinds[tensor.state, tensor.dtype] += tensor.nbytes
        counts[tensor.state, tensor.dtype] += 1
    steps = Counter(checkpoint.steps.values())
    value: dict[str, Any] = {
        "format": checkpoint.format,
        "id": checkpoint.id,
        "adopted": checkpoint.home is not None,
        "digests": digested(checkpoint),
        "parameters": parameters(checkpoint),
        "bytes": checkpoint.nbytes,
        "files": len(files_of(checkpoint)),
        "states": [
            {"state": state, "dtype": dtype, "tensors": counts[state, dtype], "bytes": nbytes}
            for (state, dtype), nbytes in sorted(kinds.items())
        ],
        "groups": [{"hyper": dict(g.hyper), "params": list(g.params)} for g in checkpoint.groups],
        "steps": {str(step): count for step, count in sorted(steps.items())},
        "aliases": dict(checkpoint.aliases),
        "completeness": dict(checkpoint.completeness),
        "source": checkpoint.metadata.get("source", {}),
        "metadata": sorted(checkpoint.metadata),
        "opaque": {name: span.nbytes for name, span in checkpoint.opaque.items()},
    }
    if tensors:
        value["tensors"] = [_tensor(tensor) for tensor in checkpoint.states.values()]
    return value


def files_of(checkpoint: Checkpoint) -> set[str]:
    """Files that the checkpoint's bytes are in."""
    spans = {slab.span.file for tensor in checkpoint.states.values() for slab in tensor.slabs}
    return spans | set(checkpoint.files) | set(checkpoint.own_files)


def _tensor(tensor: TensorState) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "state": tensor.state,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "role": tensor.role,
        "bytes": tensor.nbytes,
        "pieces": len(tensor.slabs),
    }


def lines(checkpoint: Checkpoint, value: dict[str, Any], *, tensors: bool) -> list[str]:
    """The same for people."""
    source = value["source"] if isinstance(value["source"], dict) else {}
    mesh = " ".join(f"{axis}={n}" for axis, n in sorted((source.get("mesh") or {}).items()))
    made = " ".join(str(part) for part in (source.get("framework"), source.get("version")) if part)
    out = [
        f"{value['path']}: {value['format']}{' (adopted)' if value['adopted'] else ''}"
        f", {value['parameters']:,} parameters, {human(value['bytes'])} in {value['files']} files"
        f", {'digests' if value['digests'] else 'no digests'}",
    ]
    if made or mesh:
        out.append(f"written by {made or 'unknown'}{f' on {mesh}' if mesh else ''}")
    rows: list[tuple[object, ...]] = [
        (s["state"], s["dtype"], s["tensors"], human(s["bytes"])) for s in value["states"]
    ]
    out += ["", *table(("state", "dtype", "tensors", "bytes"), rows)]
    if checkpoint.groups:
        rows = [
            (g.index, len(g.params), " ".join(f"{k}={g.hyper[k]}" for k in HYPER_SHOWN if k in g.hyper))
            for g in checkpoint.groups
        ]
        out += ["", *table(("group", "params", "hyper-parameters"), rows)]
    if checkpoint.steps:
        out += ["", "optimizer step: " + ", ".join(f"{step} ({n} parameters)" for step, n in value["steps"].items())]
    if checkpoint.aliases:
        out += ["", "tied: " + ", ".join(f"{alias} = {owner}" for alias, owner in sorted(checkpoint.aliases.items()))]
    if checkpoint.completeness:
        out += ["", "kept: " + ", ".join(f"{topic} {kept}" for topic, kept in sorted(checkpoint.completeness.items()))]
    if checkpoint.opaque:
        out.append("opaque: " + ", ".join(f"{name} ({human(n)})" for name, n in value["opaque"].items()))
    if tensors:
        rows = [
            (t.name, t.state, t.dtype, "x".join(map(str, t.shape)) or "scalar", t.role, len(t.slabs))
            for t in checkpoint.states.values()
        ]
        out += ["", *table(("tensor", "state", "dtype", "shape", "role", "pieces"), rows)]
    return out

"""The model's own tensors in DeepSpeed's files: the module of a rank, pipeline layers, slices of frozen parameters.

    mp_rank_00_model_states.pt   module {"embed.weight": ...}         names as the model has them
    layer_03-model_states.pt     {"up.weight": ...}                   is "3.up.weight", or of a tied module

A tied pipeline module ("tied_modules.embed.weight") lies in the file of each layer that uses it, under a name
that does not say which one it is; it is told by names and shapes, and left out where those do not tell: its fp32
master copy is there anyway. Reads names and places, never data. Invariant: roles (param, frozen, buffer) are
what the files say, never guessed from a name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..universal.errors import CorruptError
from .building import Builder
from .deepspeed_files import Files, check_layers
from .torchzip import Stored, is_counts, read_torch

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: Mapping[str, Any], file: str) -> list[dict[str, tuple[int, ...]]]:
    """param_shapes: for each optimizer group the parameters, in their order, with their shapes."""
    groups = model.get("param_shapes")
    if isinstance(groups, dict):
        groups = [groups]
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, dict) for group in groups):
        raise CorruptError("a model_states file without param_shapes", file=file)
    return [_checked(group, file) for group in groups]


def _checked(group: Mapping[Any, Any], file: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, shape in group.items():
        if not isinstance(shape, (tuple, list)) or not is_counts(tuple(shape)):
            raise CorruptError("a parameter of an impossible shape", file=file, name=name)
        found[str(name)] = tuple(shape)
    return found


def buffers_of(model: Mapping[str, Any], file: str) -> set[str]:
    """buffer_names."""
    names = model.get("buffer_names") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CorruptError("names of buffers that are no list of texts", file=file)
    return set(names)


def shared_of(model: Mapping[str, Any], file: str) -> dict[str, str]:
    """shared_params: tied parameters, alias -> the name that owns them."""
    shared = model.get("shared_params") or {}
    if not isinstance(shared, dict):
        raise CorruptError("shared parameters that are no dictionary", file=file)
    return {str(alias): str(owner) for alias, owner in shared.items()}


def frozen_shapes(model: Mapping[str, Any], file: str) -> dict[str, tuple[int, ...]]:
    """frozen_param_shapes, where they are listed: not by ZeRO-1."""
    frozen = model.get("frozen_param_shapes") or {}
    if not isinstance(frozen, dict):
        raise CorruptError("frozen parameters that are no dictionary", file=file)
    return _checked(frozen, file)


def add_module(builder: Builder, model: Mapping[str, Any], file: str, *, only_buffers: bool = False) -> None:
    """Tensors of the rank's module; tied ones once, under the name that owns them."""
    module = model.get("module")
    if module is None:
        return
    if not isinstance(module, dict):
        raise CorruptError("a model_states file whose module is no dictionary", file=file)
    buffers = buffers_of(model, file)
    frozen = set(frozen_shapes(model, file))
    # ZeRO-1 lists frozen parameters nowhere; ZeRO-0 lists none at all.
    trained = {n for group in shapes_of(model, file) for n in group} if model.get("param_shapes") else module.keys()
    shared = shared_of(model, file)
    for name, tensor in module.items():
        if not isinstance(tensor, Stored) or name in shared or (only_buffers and name not in buffers):
            continue
        if name in buffers:
            builder.whole(name, "buffer", tensor, role="buffer")
        else:
            builder.whole(name, "weight", tensor, role="param" if name in trained - frozen else "frozen")


def add_frozen_slices(builder: Builder, model: Mapping[str, Any], rank: int, world: int, file: str) -> None:
    """ZeRO-3: this rank's slice of each frozen parameter."""
    fragments = model.get("frozen_param_fragments") or {}
    for name, shape in frozen_shapes(model, file).items():
        tensor = fragments.get(name)
        if not isinstance(tensor, Stored):
            raise CorruptError("a frozen parameter without its slice", file=file, name=name)
        elements = math.prod(shape)
        share = -(-elements // world)
        start = min(rank * share, elements)
        stop = min(start + share, elements)
        builder.add(name, "weight", tensor.dtype, shape, tensor.flat_slab(start, stop, 0), role="frozen")


def add_layers(
    builder: Builder, root: Path, files: Files, stages: Sequence[Sequence[Shapes]], tp: int = 0
) -> dict[str, str]:
    """Pipeline layers: "3.up.weight" is "up.weight" of layer_03; tied modules are told by names and shapes.

    `stages`: shapes on tensor-parallel rank `tp`, whose files are read. Returns the prefix of each layer, as far as it
    is known.
    """
    shapes = {name: shape for stage in stages for group in stage for name, shape in group.items()}
    numbered = {int(name.split(".", 1)[0]) for name in shapes if name.split(".", 1)[0].isdigit()}
    if not files.layers:
        return {}
    prefixes: dict[str, str] = {}
    check_layers(files, numbered, {}, tp)
    tied = _tied(shapes)
    for (layer, _), file in sorted(item for item in files.layers.items() if item[0][1] == tp):
        tensors = read_torch(root, file)
        if not isinstance(tensors, dict):
            raise CorruptError("not a layer's file", file=file)
        found = {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, Stored)}
        prefix = f"{layer}." if layer in numbered or not found else _tied_prefix(found, tied)
        if prefix is not None:
            prefixes[str(layer)] = prefix
            for name, tensor in found.items():
                role = "param" if f"{prefix}{name}" in shapes else "frozen"
                builder.whole(f"{prefix}{name}", "weight", tensor, role=role)  # type: ignore[arg-type]
    return prefixes


def _tied(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Prefix "tied_modules.embed." -> local name -> shape."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[0] == "tied_modules" and len(parts) > 2:
            found.setdefault(f"tied_modules.{parts[1]}.", {})[".".join(parts[2:])] = shape
    return found


def _tied_prefix(tensors: Mapping[str, Stored], tied: Mapping[str, Shapes]) -> str | None:
    local = {name: tensor.shape for name, tensor in tensors.items()}
    fits = [prefix for prefix, shapes in tied.items() if dict(shapes) == local]
    return fits[0] if len(fits) == 1 else None

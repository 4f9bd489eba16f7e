"""One file of torch.save: a state dict, or a dictionary of them, read where it lies and written as a stream.

    {"model": {"w": T}, "optimizer": {"state": {0: {"exp_avg": T}}, "param_groups": [...]}, "step": 3}

Which of a file's dictionaries is the model is told by the usual keys; an optimizer's numbered states are given
to the model's parameters in their order, which is what torch's own optimizers do, and only if every shape fits.
Invariants: tensors that share memory exactly are tied, and stay tied; what is not understood is kept as metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..universal.disk import Disk
from ..universal.errors import MappingError, UsageError
from ..universal.model import Checkpoint, Kept, TensorState
from ..universal.read import Reader
from .building import Builder
from .output import Folder
from .pickling import Ordered
from .source import master_of, parameters, stream, value_of
from .torchwrite import Tensor, scalar, write_torch
from .torchzip import Stored, is_torch, number, plain, read_torch

MODELS: Final = ("model", "state_dict", "model_state_dict", "module", "params")
OPTIMIZERS: Final = ("optimizer", "optimizer_state_dict", "optim")
SCHEDULERS: Final = ("scheduler", "lr_scheduler", "lr_scheduler_state_dict", "scheduler_state_dict")


def detect(path: Path) -> bool:
    """A single file that begins like a zip, or has an extension that torch.save's users give."""
    return path.is_file() and (path.suffix in (".pt", ".pth", ".bin", ".ckpt") or is_torch(path))


def open(path: Path) -> Checkpoint:
    """The file's tensors: parameters by name, optimizer states by parameter where they fit."""
    value = read_torch(path.parent, path.name)
    if not isinstance(value, dict):
        raise MappingError("not a dictionary of tensors", file=path.name, kind=type(value).__name__)
    key = next((key for key in MODELS if _tensors(value.get(key))), None)
    model = value if key is None else value[key]
    builder = Builder()
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.items():
        if not isinstance(tensor, Stored):
            continue
        place = (tensor.offset, tensor.shape, tensor.strides, tensor.dtype)
        owner = owners.setdefault(place, str(name)) if tensor.elements else str(name)
        if owner != str(name):
            builder.aliases[str(name)] = owner
        else:
            builder.whole(str(name), "weight", tensor)
    rest = {} if key is None else {str(k): v for k, v in value.items() if k != key}
    kept: dict[str, Kept] = dict.fromkeys(("rng", "data", "scheduler", "optimizer"), "absent")
    metadata: dict[str, Any] = {"source": {"framework": "torch", "version": "", "mesh": {}, "model_key": key or ""}}
    for name in OPTIMIZERS:
        if name in rest and _optimizer(builder, path.parent, rest[name], rest.get("param_names")):
            kept["optimizer"] = "exact"
            del rest[name]
            rest.pop("param_names", None)
    for name in SCHEDULERS:
        if isinstance(rest.get(name), dict):
            metadata["scheduler"], kept["scheduler"] = plain(rest.pop(name)), "exact"
    metadata["client"] = builder.split_client(rest)
    return builder.checkpoint(path.parent, "torch", metadata=metadata, completeness=kept)


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Stored) for item in value.values())


def _optimizer(builder: Builder, root: Path, value: Any, listed: Any) -> bool:
    """torch's optimizer.state_dict(), numbered in the order of the groups' parameters; False if it does not fit.

    `listed`: the names in each group, as write() puts them beside it. Without, there must be one group of as many
    parameters as the model has tensors: which tensor is a buffer, and which group has what, is not in the file.
    """
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        return False
    order = [number for group in groups for number in group["params"]]
    names = [name for name, _ in builder.facts]
    if isinstance(listed, list) and all(isinstance(part, list) for part in listed):
        names = [name for part in listed for name in part]
    elif len(groups) > 1:
        return False
    if len(names) != len(order) or len(set(map(repr, order))) != len(order):
        return False
    shapes = {name: shape for (name, _), (_, shape, _) in builder.facts.items()}
    named = dict(zip(order, names, strict=True))
    found = []
    for index, state in value["state"].items():
        name = named.get(index)
        if name not in shapes or not isinstance(state, dict):
            return False
        for key, tensor in state.items():
            if isinstance(tensor, Stored) and key != "step":
                if tensor.shape != shapes[name]:
                    return False
                found.append((name, str(key), tensor))
    for name, key, tensor in found:
        builder.whole(name, key, tensor, role="optim")
    for index, state in value["state"].items():
        step = number(root, state.get("step"))
        if step is not None:
            builder.step(named[index], step)
    for i, group in enumerate(groups):
        builder.group(i, group, [named[index] for index in group["params"]])
    return True


# ---- writing ------------------------------------------------------------------------------------------------


def tensor_of(reader: Reader, tensor: TensorState, *, dtype: str = "") -> Tensor:
    """A tensor of a checkpoint, whole, to be written into a torch file."""
    return Tensor(dtype or tensor.dtype, tensor.shape, lambda: stream(reader, tensor.name, tensor.state, dtype=dtype))


def model_of(reader: Reader, *, masters: bool = False) -> Ordered:
    """The model's state dict; tied parameters are one storage. `masters`: fp32 copies of what is trained."""
    checkpoint = reader.checkpoint
    model = Ordered()
    for name in parameters(checkpoint):
        value = value_of(checkpoint, name)
        chosen = master_of(checkpoint, name) if masters and value.role == "param" else value
        model[name] = tensor_of(reader, chosen)
    for alias, owner in checkpoint.aliases.items():
        if owner in model:
            model[alias] = model[owner]
    return model


def optimizer_of(reader: Reader) -> dict[str, Any]:
    """torch's optimizer.state_dict() in the order of the groups; empty if the checkpoint has no groups."""
    checkpoint = reader.checkpoint
    states: dict[str, list[TensorState]] = {}
    for tensor in checkpoint.states.values():
        if tensor.role == "optim":
            states.setdefault(tensor.name, []).append(tensor)
    numbers = {name: i for i, name in enumerate(name for group in checkpoint.groups for name in group.params)}
    state: dict[int, Any] = {}
    for name, i in numbers.items():
        if name not in states and name not in checkpoint.steps:
            continue
        entry: dict[str, Any] = {}
        if name in checkpoint.steps:
            entry["step"] = scalar(checkpoint.steps[name])
        entry.update({tensor.state: tensor_of(reader, tensor) for tensor in states.get(name, [])})
        state[i] = entry
    groups = [{**hyper_of(group.hyper), "params": [numbers[n] for n in group.params]} for group in checkpoint.groups]
    return {"state": state, "param_groups": groups}


def hyper_of(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as torch has them: betas is a tuple there, and JSON has none."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hyper.items()}


def write(reader: Reader, target: Path, *, masters: bool = False, disk: Disk | None = None) -> None:
    """{"model", "optimizer", "param_names", "scheduler", "client"}; `masters` writes the fp32 copy as the model."""
    checkpoint = reader.checkpoint
    if not checkpoint.states:
        raise UsageError("a checkpoint without tensors", format=checkpoint.format)
    model = model_of(reader, masters=masters)
    value: dict[str, Any] = {"model": model}
    if checkpoint.groups:
        value["optimizer"] = optimizer_of(reader)
        value["param_names"] = [list(group.params) for group in checkpoint.groups]
    for key in ("scheduler", "trainer"):
        if checkpoint.metadata.get(key) is not None:
            value[key] = checkpoint.metadata[key]
    with Folder(target, disk=disk, single="file.pt") as folder:
        write_torch(folder.path / "file.pt", value, disk=folder.disk)

"""DeepSpeed's universal folders, read: one folder for each parameter, one file for each of its states.

    global_step3_universal/zero/embed.weight/{fp32,exp_avg,exp_avg_sq,step}.pt     ZeRO-1, 2: shaped, with hints
                                                                                   ZeRO-3: flat, no step
                           zero/optimizer_state.pt                                 hyper-parameters
                           *_model_states.pt                                       copied from the source

Shapes, groups, buffers and frozen parameters are taken from the model files. Invariant: a parameter that the
model lists has its fp32 state here, or the folder is refused with the names of those that have not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..universal.errors import CorruptError, IncompleteError, MappingError, UsageError
from ..universal.model import Checkpoint, Slab, Span, safe_path
from .building import Builder
from .deepspeed import NAMES, STATE, Found, Opened, finished, layers_of
from .deepspeed_files import classify, listed, tag_in
from .deepspeed_modules import add_frozen_slices, add_module, shapes_of
from .torchzip import Stored, number, plain, read_torch

ZERO: Final = "zero"
LATEST: Final = "latest_universal"
GLOBAL_STATE: Final = "optimizer_state.pt"


def folder_of(path: Path) -> Path:
    """The tag's folder: `path` itself, or where its `latest_universal` leads."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    tag = tag_in(latest)
    if not safe_path(tag):
        raise UsageError("`latest_universal` names no folder beside it", file=str(latest), tag=tag[:100])
    return path / tag


def detect(path: Path) -> bool:
    """A folder with zero/ in it, or a parent whose latest_universal leads to one."""
    return path.is_dir() and (folder_of(path) / ZERO / GLOBAL_STATE).is_file()


def open(path: Path) -> Checkpoint:
    """The checkpoint, as slabs over the files of the parameters."""
    root = folder_of(path)
    files = classify(listed(root))
    first = files.first()
    main = read_torch(root, first, names=NAMES)
    if not isinstance(main, dict):
        raise CorruptError("not a model_states file of DeepSpeed", file=first)
    opened = Opened(root, files, main)
    stage3 = not files.model
    missing = [
        mp
        for mp in range(opened.mp)
        if (mp not in files.model and not stage3) or (stage3 and (0, mp) not in files.model3)
    ]
    if missing:
        raise IncompleteError(f"model_states of {len(missing)} model-parallel ranks are missing", ranks=missing[:8])
    for rank in range(opened.mp):
        file = files.model3[0, rank] if stage3 else files.model[rank]
        opened.models[rank] = main if file == first else opened.read(file)
    opened.understand()
    for rank, model in opened.models.items():
        file = files.model3[0, rank] if stage3 else files.model[rank]
        add_module(opened.builders[rank], model, file, only_buffers=stage3)
    if stage3:
        for (rank, mp), file in sorted(files.model3.items()):
            add_frozen_slices(opened.builders[mp], opened.read(file), rank, opened.dp, file)
    opened.layers = layers_of(opened)
    found = _states(opened, read_torch(root, f"{ZERO}/{GLOBAL_STATE}", names=NAMES))
    return finished(opened, found, "deepspeed:universal")


def _states(opened: Opened, optimizer: Any) -> Found:
    if not isinstance(optimizer, dict):
        raise CorruptError("not a universal folder's state", file=GLOBAL_STATE)
    inner: dict[str, Any] = optimizer[STATE] if isinstance(optimizer.get(STATE), dict) else {}
    groups = optimizer.get("param_groups") or inner.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CorruptError("a universal folder without hyper-parameters", file=GLOBAL_STATE)
    merged: dict[str, tuple[int, ...]] = {}
    for model in opened.models.values():
        shapes = shapes_of(model, "")
        owners = _owners(groups, len(shapes))
        for owner, group in zip(owners, shapes, strict=True):
            opened.builder.group(owner, groups[owner], list(group))
            merged.update({name: opened.whole(name, shape) for name, shape in group.items()})
    missing = [name for name in merged if not (opened.root / ZERO / name / "fp32.pt").is_file()]
    if missing:
        raise IncompleteError(f"{len(missing)} of {len(merged)} parameters are missing", missing=missing[:8])
    shared = _shared_steps(opened.root, inner)
    for name, shape in merged.items():
        _parameter(opened.builder, opened.root, name, shape, shared)
    stage = 3 if not opened.files.model else 1
    extra = {"clip_grad": plain(optimizer.get("clip_grad"))}
    return Found(stage, scaler=plain(optimizer.get("loss_scaler")), extra=extra)


def _owners(groups: list[Any], shapes: int) -> list[int]:
    if len(groups) == shapes:
        return list(range(shapes))
    counts = [len(group["params"]) if isinstance(group.get("params"), list) else 1 for group in groups]
    if sum(counts) == shapes:
        return [index for index, count in enumerate(counts) for _ in range(count)]
    raise MappingError("hyper-parameters and parameters do not fit", groups=len(groups), shapes=shapes)


def _shared_steps(root: Path, inner: Mapping[str, Any]) -> float | None:
    """ZeRO-3 folders have no step of a parameter: the one that all flat groups agree on."""
    states = inner.get("state")
    steps = {number(root, s.get("step")) for s in states.values()} if isinstance(states, dict) else set()
    return steps.pop() if len(steps) == 1 else None


def _parameter(builder: Builder, root: Path, name: str, shape: tuple[int, ...], shared: float | None) -> None:
    if not safe_path(name) or "/" in name:
        raise CorruptError("a parameter whose name is no folder's", name=name[:100])
    step: float | None = shared
    for file in listed(root / ZERO / name):
        state = file.removesuffix(".pt")
        if state == file:
            continue
        path = f"{ZERO}/{name}/{file}"
        value = read_torch(root, path, names=NAMES)
        if state == "step":
            step = number(root, value)
            continue
        tensor = value.get("param") if isinstance(value, dict) else value
        if not isinstance(tensor, Stored):
            raise CorruptError("a state without its tensor", file=path)
        if isinstance(value, dict) and value.get("is_expert_param"):
            raise MappingError("experts of AutoEP in one tensor are not understood", file=path)
        if tensor.shape not in (shape, (_elements(shape),)) or not tensor.contiguous:
            raise MappingError(
                "a state of another shape than its parameter", file=path, shape=shape, found=tensor.shape
            )
        slab = Slab(Span(path, tensor.offset, tensor.nbytes), tensor.dtype, flat=(0, tensor.elements))
        builder.add(name, state, tensor.dtype, shape, slab, role="param" if state == "fp32" else "optim")
    if step is not None:
        builder.step(name, step)


def _elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)

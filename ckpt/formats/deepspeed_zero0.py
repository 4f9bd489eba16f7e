"""DeepSpeed without ZeRO: everything in one file, the optimizer's states numbered and not named.

    module {"w": bf16} + optimizer {fp32_groups: [[fp32, ...], ...], optimizer_state_dict: {state: {0: ...}}}

Which number is which parameter is nowhere written. It is told from the values: a parameter's weight is its
master copy, rounded. Two parameters that are equal bit for bit (biases that are still zero) are taken in the
model's order, which is the order of the groups in all but contrived jobs. Without master copies (fp32) nothing
tells, and states are left out and said to be absent. Reads each tensor once, in pieces. Invariant: a state is
given to a parameter only if the parameter's weight is the rounded master copy with that number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import xxhash

from ..dtypes import ITEM_BYTES
from ..universal.convert import convert
from ..universal.errors import CorruptError
from ..universal.files import Files
from ..universal.model import Kept
from .building import Builder
from .deepspeed_modules import add_module
from .torchzip import Stored, number

PIECE_ELEMENTS: Final = 1 << 20
Numbered = list[tuple[int, int, Stored]]
"""(group, number, master copy)."""


def zero0(builder: Builder, root: Path, model: Mapping[str, Any], file: str) -> Kept:
    """Weights, buffers, and the optimizer's states if they can be told apart."""
    if not isinstance(model.get("module"), dict):
        raise CorruptError("a model_states file without a module", file=file)
    add_module(builder, model, file)
    optimizer = model.get("optimizer")
    masters = _masters(optimizer)
    if not masters or not isinstance(optimizer, dict):
        return "absent"
    names = _names(root, model, masters)
    if names is None:
        return "absent"
    inner = optimizer["optimizer_state_dict"]
    for (_, index, master), name in zip(masters, names, strict=True):
        builder.whole(name, "fp32", master)
        for state, tensor in inner["state"].get(index, {}).items():
            if state == "step":
                builder.step(name, number(root, tensor) or 0)
            elif isinstance(tensor, Stored) and tensor.shape == master.shape:
                builder.whole(name, str(state), tensor, role="optim")
    for group, hyper in enumerate(inner["param_groups"]):
        members = [name for (owner, _, _), name in zip(masters, names, strict=True) if owner == group]
        builder.group(group, hyper, members)
    return "exact"


def _masters(optimizer: Any) -> Numbered:
    """Master copies with the number under which the optimizer keeps their states; none if that is not there."""
    if not isinstance(optimizer, dict):
        return []
    groups, inner = optimizer.get("fp32_groups"), optimizer.get("optimizer_state_dict")
    if not isinstance(groups, list) or not isinstance(inner, dict):
        return []
    listed = inner.get("param_groups")
    if not isinstance(listed, list) or len(listed) != len(groups) or not isinstance(inner.get("state"), dict):
        return []
    found: Numbered = []
    for index, (masters, hyper) in enumerate(zip(groups, listed, strict=True)):
        numbers = hyper.get("params") if isinstance(hyper, dict) else None
        if not isinstance(masters, list) or not isinstance(numbers, list) or len(masters) != len(numbers):
            return []
        if not all(isinstance(master, Stored) and master.contiguous for master in masters):
            return []
        found += [(index, at, master) for at, master in zip(numbers, masters, strict=True)]
    return found


def _names(root: Path, model: Mapping[str, Any], masters: Numbered) -> list[str] | None:
    """For each master copy the parameter whose weight it is; None if one has none."""
    files = Files(root, links=True)
    try:
        weights: dict[tuple[Any, ...], list[str]] = {}
        for name, tensor in model["module"].items():
            if isinstance(tensor, Stored) and tensor.contiguous and name not in (model.get("buffer_names") or ()):
                key = (tensor.dtype, tensor.shape, _digest(files, tensor, tensor.dtype))
                weights.setdefault(key, []).append(name)
        dtypes = {dtype for dtype, _, _ in weights}
        found: list[str] = []
        for _, _, master in masters:
            keys = [(dtype, master.shape, _digest(files, master, dtype)) for dtype in sorted(dtypes)]
            name = next((weights[key].pop(0) for key in keys if weights.get(key)), None)
            if name is None:
                return None
            found.append(name)
        return found
    finally:
        files.close()


def _digest(files: Files, tensor: Stored, dtype: str) -> bytes:
    """Of the tensor's elements as `dtype`."""
    state = xxhash.xxh3_128()
    for data in _pieces(files, tensor):
        state.update(data if dtype == tensor.dtype else convert(data, tensor.dtype, dtype).tobytes())
    return state.digest()


def _pieces(files: Files, tensor: Stored) -> Iterator[bytes]:
    item = ITEM_BYTES[tensor.dtype]
    for start in range(0, tensor.elements, PIECE_ELEMENTS):
        part = replace(tensor, shape=(min(PIECE_ELEMENTS, tensor.elements - start),), strides=(1,))
        data = bytearray(part.nbytes)
        files.read_into(tensor.file, tensor.offset + start * item, data)
        yield bytes(data)

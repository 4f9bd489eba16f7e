"""Distributed checkpoints of PyTorch for any number of ranks, as dcp.load and FSDP2 take them.

    "fsdp2:dp=4"  ──▶  target/.metadata, target/__0_0.distcp ... __3_0.distcp

Parameters are cut along a dimension as torch.chunk does it for Shard(dim), one file for each rank; buffers and
scalars lie in the first. What is loaded is {"model": {name: T}, "optim": {"state": {name: {"exp_avg": T, ...}},
"param_groups": [...]}} plus the job's own values, the form of get_state_dict(). Parameters are the master
copies: that is what FSDP2 shards and steps on. Streams. Invariant: .metadata names every byte that was written,
and is written last into a folder that appears whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..dtypes import TORCH_NAMES
from ..universal.disk import Disk, explained
from ..universal.errors import UsageError
from ..universal.model import Box, TensorState
from ..universal.read import Reader
from .dcp import META, METADATA, options_of
from .inert import Global
from .objects import unplain
from .output import Folder
from .pickling import Construct, dumps, size
from .source import box_stream, master_of, parameters, value_of
from .torch_file import hyper_of
from .torchwrite import Tensor, archive_into, scalar

FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One archive in one file: a chunk of a tensor, or a value."""

    path: Path_
    rank: int
    value: Any
    shape: tuple[int, ...] | None = None
    """Of the whole tensor; None for a value."""
    box: Box = ()

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


def write(
    reader: Reader,
    target: Path,
    *,
    dp: int = 1,
    dim: int = 0,
    model: str = "model",
    optim: str = "optim",
    flat: bool = False,
    masters: bool = True,
    fsdp2: bool = False,
    disk: Disk | None = None,
) -> None:
    """Files for `dp` ranks, parameters cut along `dim`. `flat`: optimizer keys as flatten_optimizer_state_dict.

    `model` and `optim` are the keys of the job's state dict; an empty `model` puts parameters at the top.
    """
    if dp < 1 or dim < 0:
        raise UsageError("at least one rank, and a dimension from 0 on", dp=dp, dim=dim)
    if fsdp2 and not masters:
        raise UsageError("FSDP2 shards and steps on the master copies")
    items = list(_items(reader, dp, dim, model, optim, flat=flat, masters=masters))
    with Folder(target, disk=disk) as folder:
        stored = [place for rank in range(dp) for place in _write_rank(folder, rank, items)]
        with explained(folder.path / METADATA, "writing a checkpoint's metadata"):
            folder.disk.write_file(folder.path / METADATA, _metadata(items, stored))


def _items(reader: Reader, dp: int, dim: int, model: str, optim: str, *, flat: bool, masters: bool) -> Iterator[Item]:
    checkpoint = reader.checkpoint
    root: Path_ = (model,) if model else ()
    for name in parameters(checkpoint):
        value = value_of(checkpoint, name)
        chosen = master_of(checkpoint, name) if masters and value.role == "param" else value
        yield from _chunks(reader, (*root, name), chosen, dp if value.role != "buffer" else 1, dim)
        for alias in (alias for alias, owner in checkpoint.aliases.items() if owner == name):
            yield from _chunks(reader, (*root, alias), chosen, dp, dim)
    for tensor in checkpoint.states.values():
        if tensor.role == "optim":
            yield from _chunks(reader, _state(optim, tensor.name, tensor.state, flat), tensor, dp, dim)
    for name, step in checkpoint.steps.items():
        yield Item(_state(optim, name, "step", flat), 0, scalar(step), ())
    for index, group in enumerate(checkpoint.groups):
        hyper = hyper_of(group.hyper)
        if flat:
            for name in group.params:
                for key, value in hyper.items():
                    yield Item((optim, f"param_groups.{name}.{key}"), 0, value)
        else:
            for key, value in {**hyper, "params": list(group.params)}.items():
                yield Item((optim, "param_groups", index, key), 0, value)
    for key, value in options_of(checkpoint.metadata).items():
        made = unplain(value, reader)
        yield Item((key,), 0, made, made.shape if isinstance(made, Tensor) else None)
    if checkpoint.metadata.get("scheduler") is not None:
        yield Item(("lr_scheduler",), 0, unplain(checkpoint.metadata["scheduler"]))


def _state(optim: str, name: str, state: str, flat: bool) -> Path_:
    return (optim, f"state.{name}.{state}") if flat else (optim, "state", name, state)


def _chunks(reader: Reader, path: Path_, tensor: TensorState, dp: int, dim: int) -> Iterator[Item]:
    """The tensor as torch.chunk cuts it: equal parts but for the last, and none for ranks that nothing is left for."""
    shape = tensor.shape
    if dp == 1 or not shape or not tensor.elements:
        yield Item(path, 0, _part(reader, tensor, tuple((0, n) for n in shape)), shape, tuple((0, n) for n in shape))
        return
    axis = dim if dim < len(shape) else 0
    step = -(-shape[axis] // dp)
    for rank in range(dp):
        low, high = rank * step, min((rank + 1) * step, shape[axis])
        if low < high:
            box = tuple((low, high) if i == axis else (0, n) for i, n in enumerate(shape))
            yield Item(path, rank, _part(reader, tensor, box), shape, box)


def _part(reader: Reader, tensor: TensorState, box: Box) -> Tensor:
    lengths = tuple(stop - start for start, stop in box)
    return Tensor(tensor.dtype, lengths, lambda: box_stream(reader, tensor.name, tensor.state, box))


def _write_rank(folder: Folder, rank: int, items: list[Item]) -> list[tuple[Item, str, int, int]]:
    """One rank's file; where each of its items lies."""
    file = f"__{rank}_0.distcp"
    mine = [item for item in items if item.rank == rank]
    if not mine:
        return []
    found = []
    path = folder.path / file
    with explained(path, "writing a checkpoint"):
        fd = folder.disk.open(path)
        try:
            at = 0
            for item in mine:
                length = archive_into(folder.disk, fd, path, at, item.value)
                found.append((item, file, at, length))
                # The next archive begins at a multiple of 64 bytes, so that its data does.
                at += -(-length // 64) * 64
            folder.disk.fsync(fd)
        finally:
            os.close(fd)
    return found


# ---- .metadata --------------------------------------------------------------------------------------------------


def _object(name: str, state: Any, module: str = META) -> Construct:
    return Construct(Global(module, name), (), state, new=True)


def _metadata(items: list[Item], stored: list[tuple[Item, str, int, int]]) -> bytes:
    listed: dict[str, Any] = {}
    chunks: dict[str, list[Any]] = {}
    for item in items:
        if item.shape is None:
            listed[item.key] = _object("BytesStorageMetadata", {})
            continue
        offsets = size(tuple(start for start, _ in item.box))
        sizes = size(tuple(stop - start for start, stop in item.box))
        if item.key not in chunks:
            chunks[item.key] = []
            shape = {"size": size(item.shape), "chunks": chunks[item.key]}
            listed[item.key] = _object("TensorStorageMetadata", {"properties": _properties(item.value.dtype), **shape})
        chunks[item.key].append(_object("ChunkStorageMetadata", {"offsets": offsets, "sizes": sizes}))
    numbers: dict[str, int] = {}
    storage = {}
    for item, file, offset, length in stored:
        index = numbers[item.key] = numbers.get(item.key, -1) + 1
        place = None if item.shape is None else size(tuple(start for start, _ in item.box))
        key = {"fqn": item.key, "offset": place, "index": None if item.shape is None else index}
        info = {"relative_path": file, "offset": offset, "length": length}
        storage[_object("MetadataIndex", key)] = _object("_StorageInfo", info, FILESYSTEM)
    state: Mapping[str, Any] = {
        "state_dict_metadata": listed,
        "planner_data": {item.key: item.path for item in items},
        "storage_data": storage,
        "storage_meta": _object(
            "StorageMeta", {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
        ),
        "version": "1.0.0",
    }
    return dumps(_object("Metadata", state))


def _properties(dtype: str) -> Construct:
    """dtype, strided, no gradient, contiguous, not pinned: TensorProperties pickles as this tuple."""
    layout = Construct(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Construct(Global(META, "_MEM_FORMAT_ENCODING"), (0,))
    return _object("TensorProperties", (Global("torch", TORCH_NAMES[dtype]), layout, False, contiguous, False))

"""PyTorch distributed checkpoints (DCP, FSDP2, torchtitan, Megatron's torch_dist), read where they lie.

    .metadata  {"model.w": chunks [(0, 0)+(7, 10), (7, 0)+(6, 10)]} + {(fqn, offset): __1_0.distcp @ 1577, 1833 bytes}
               └─▶ each chunk is a torch.save archive of its own inside of that file ─▶ a box-shaped slab

What is a parameter and what an optimizer's state is told by the paths in planner_data: model / optim.state /
optim.param_groups, nested or flattened. .metadata is a pickle that torch itself loads without any guard; here
it goes through unpickle.py. Invariants:

* a chunk's archive, where it is opened, holds one tensor of exactly the chunk's size and dtype, inside of its part of
  the file; of one that is not opened nothing can be read;
* everything is checked to be there (files, sizes, chunks that cover their tensor) before a Checkpoint is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..dtypes import FROM_TORCH, ITEM_BYTES
from ..universal.disk import explained
from ..universal.errors import CorruptError, IncompleteError
from ..universal.model import Box, Checkpoint, Kept, Slab, Span, safe_path
from .building import Builder
from .dcp_paths import Places, where
from .inert import Global, Instance
from .torchzip import TORCH_GLOBALS, Stored, is_counts, number, opened, plain, read_region
from .unpickle import BYTES_MAX, loads

if TYPE_CHECKING:
    from .registry import Wanted

META: Final = "torch.distributed.checkpoint.metadata"
NAMES: Final = frozenset(
    [
        (META, "Metadata"),
        (META, "TensorStorageMetadata"),
        (META, "BytesStorageMetadata"),
        (META, "ChunkStorageMetadata"),
        (META, "TensorProperties"),
        (META, "MetadataIndex"),
        (META, "StorageMeta"),
        (META, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ]
)
METADATA: Final = ".metadata"


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a file."""

    file: str
    offset: int
    length: int


@dataclass(slots=True)
class Plan:
    """What .metadata says: tensors with their chunks, other values, and where all of it lies."""

    tensors: dict[str, tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = field(
        default_factory=dict
    )
    values: list[str] = field(default_factory=list)
    places: dict[tuple[str, tuple[int, ...] | None], Place] = field(default_factory=dict)
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    version: str = ""


def detect(path: Path) -> bool:
    """A folder with .metadata in it."""
    return path.is_dir() and (path / METADATA).is_file()


def open(path: Path, wanted: Wanted | None = None) -> Checkpoint:
    """The checkpoint, as box-shaped slabs over the .distcp files; without those that `wanted` says no to.

    Those, too, must be there and cover their tensor; only their archives are not opened. Steps and plain values, which
    are archives as well, are always read.
    """
    with explained(path / METADATA, "reading a checkpoint's metadata"):
        if (path / METADATA).stat().st_size > BYTES_MAX:
            raise CorruptError("metadata larger than any checkpoint's", file=METADATA)
        data = (path / METADATA).read_bytes()
    plan = _plan(loads(data, allowed=NAMES | TORCH_GLOBALS, where=METADATA))
    _check_files(path, plan)
    builder = Builder()
    megatron = (path / "metadata.json").is_file()
    places = where(plan.paths, [*plan.tensors, *plan.values], megatron=megatron)
    client = _values(builder, path, plan, places)
    groups = places.groups()
    for index, (hyper, params) in enumerate(groups):
        builder.group(index, hyper, params)
    chunks = {places.of(name).name: len(found) for name, (_, _, found) in plan.tensors.items()}
    places.settle({name for _, params in groups for name in params}, chunks)
    unopened = _add_tensors(builder, path, plan, places, wanted)
    kept: dict[str, Kept] = {
        "optimizer": "exact" if places.optimizer else "absent",
        "scheduler": "exact" if any("scheduler" in key for key in client) else "absent",
        "rng": "exact" if any("rng" in key for key in client) else "absent",
        "data": "exact" if any("data" in key for key in client) else "absent",
    }
    source = {"framework": "megatron" if megatron else "torch.distributed.checkpoint", "version": plan.version}
    metadata = {"client": builder.split_client(client), "source": {**source, "mesh": {}}}
    form = "megatron:torch_dist" if megatron else "dcp"
    found = builder.checkpoint(path, form, metadata=metadata, completeness=kept)
    if not unopened:
        return found
    states = dict(found.states)
    for key, boxes in unopened.items():
        states[key] = replace(states[key], slabs=tuple(s for s in states[key].slabs if s.box not in boxes))
    return replace(found, states=states)


# ---- .metadata ------------------------------------------------------------------------------------------------


def _wrong(what: str, **fields: object) -> CorruptError:
    return CorruptError(what, file=METADATA, **fields)


def _plan(value: Any) -> Plan:
    if not isinstance(value, Instance) or value.cls.name != "Metadata":
        raise _wrong("not the metadata of a distributed checkpoint")
    listed, stored, paths = value.get("state_dict_metadata"), value.get("storage_data"), value.get("planner_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise _wrong("metadata without its tables")
    plan = Plan(version=str(plain(value.get("version", ""))))
    for name, entry in listed.items():
        if not isinstance(name, str) or not isinstance(entry, Instance):
            raise _wrong("an entry that cannot be understood", name=str(name)[:100])
        if entry.cls.name == "BytesStorageMetadata":
            plan.values.append(name)
        else:
            plan.tensors[name] = _tensor(name, entry)
    for key, info in stored.items():
        if not isinstance(key, Instance) or not isinstance(info, Instance):
            raise _wrong("a place that cannot be understood")
        name, offset = key.get("fqn"), key.get("offset")
        file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str) or not safe_path(file) or not is_counts((start, length)):
            raise _wrong("a place outside of the checkpoint", name=str(name)[:100], at=str(file)[:100])
        if info.get("transform_descriptors"):
            raise _wrong("stored through a transform (compression) that is not understood", name=str(name)[:100])
        if offset is not None and not is_counts(offset):
            raise _wrong("a chunk at an impossible place", name=str(name)[:100])
        plan.places[str(name), offset] = Place(file, start, length)
    if isinstance(paths, dict):
        plan.paths = {str(k): tuple(v) for k, v in paths.items() if isinstance(v, (tuple, list))}
    return plan


def _tensor(name: str, entry: Instance) -> tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    properties, shape, chunks = entry.get("properties"), entry.get("size"), entry.get("chunks")
    dtype = None
    if isinstance(properties, Instance):
        state = properties.state
        dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
    if not isinstance(dtype, Global) or dtype.name not in FROM_TORCH:
        raise _wrong("a tensor of an unknown dtype", name=name, dtype=str(dtype))
    if not isinstance(shape, tuple) or not is_counts(shape) or not isinstance(chunks, list):
        raise _wrong("a tensor of an impossible shape", name=name)
    found = []
    for chunk in chunks:
        offsets, sizes = (chunk.get("offsets"), chunk.get("sizes")) if isinstance(chunk, Instance) else (None, None)
        if not isinstance(offsets, tuple) or not isinstance(sizes, tuple) or not is_counts(offsets + sizes):
            raise _wrong("a chunk of an impossible shape", name=name)
        if not len(offsets) == len(sizes) == len(shape):
            raise _wrong("a chunk of another rank than its tensor", name=name)
        found.append((offsets, sizes))
    return FROM_TORCH[dtype.name], shape, found


def _check_files(path: Path, plan: Plan) -> None:
    """Every file that is spoken of is there, and as long as it has to be."""
    ends: dict[str, int] = {}
    for place in plan.places.values():
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    missing = [file for file in sorted(ends) if not (path / file).is_file()]
    if missing:
        raise IncompleteError(f"{len(missing)} of {len(ends)} files are missing", missing=missing[:8])
    for file, end in ends.items():
        if (path / file).stat().st_size < end:
            raise CorruptError("a file that is cut short", file=file, nbytes=(path / file).stat().st_size, needs=end)


# ---- what lies in the files -------------------------------------------------------------------------------------


def _add_tensors(
    builder: Builder, root: Path, plan: Plan, places: Places, choose: Wanted | None
) -> dict[tuple[str, str], set[Box | None]]:
    """A slab for each chunk, file by file; steps and other scalars of the optimizer are read.

    Of a chunk that is not chosen the slab only says that it is there, not where its bytes begin. Gives those.
    """
    unopened: dict[tuple[str, str], set[Box | None]] = {}
    wanted: list[tuple[Place, str, tuple[int, ...], tuple[int, ...]]] = []
    for name, (dtype, shape, chunks) in plan.tensors.items():
        meant = places.of(name)
        elements = math.prod(shape)
        if not chunks and elements and meant.kind != "step":
            raise IncompleteError("a tensor without chunks", name=name)
        if meant.kind in ("value", "optim"):
            builder.add(meant.name, meant.state, dtype, shape, None, role=meant.role)
        for offsets, sizes in chunks:
            place = plan.places.get((name, offsets))
            if place is None:
                raise IncompleteError("a chunk that is nowhere", name=name, offsets=list(offsets))
            if not math.prod(sizes):
                continue
            box = box_of(offsets, sizes)
            if choose is None or meant.kind == "step" or choose(meant.name, meant.state, shape, box):
                wanted.append((place, name, offsets, sizes))
                continue
            slab = Slab(Span(place.file, place.offset, math.prod(sizes) * ITEM_BYTES[dtype]), dtype, box=box)
            builder.add(meant.name, meant.state, dtype, shape, slab, role=meant.role)
            unopened.setdefault((meant.name, meant.state), set()).add(box)
    wanted.sort(key=lambda entry: (entry[0].file, entry[0].offset))
    at = 0
    while at < len(wanted):
        file = wanted[at][0].file
        with opened(root / file) as fd:
            while at < len(wanted) and wanted[at][0].file == file:
                _add_chunk(builder, root, fd, plan, places, wanted[at])
                at += 1
    return unopened


def box_of(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    return tuple((start, start + length) for start, length in zip(offsets, sizes, strict=True))


def _add_chunk(
    builder: Builder,
    root: Path,
    fd: int,
    plan: Plan,
    places: Places,
    entry: tuple[Place, str, tuple[int, ...], tuple[int, ...]],
) -> None:
    place, name, offsets, sizes = entry
    dtype, shape, _ = plan.tensors[name]
    tensor = read_region(fd, place.file, (place.offset, place.offset + place.length))
    if not isinstance(tensor, Stored) or tensor.shape != sizes or tensor.dtype != dtype:
        raise CorruptError("a chunk that is not what the metadata says", file=place.file, name=name, at=place.offset)
    meant = places.of(name)
    if meant.kind == "step":
        step = number(root, tensor)
        if step is not None:
            builder.step(meant.name, step)
        return
    box = box_of(offsets, sizes)
    strides = None if tensor.contiguous else tensor.strides
    slab = Slab(Span(place.file, tensor.offset, tensor.nbytes), dtype, box=box, strides=strides)
    builder.add(meant.name, meant.state, dtype, shape, slab, role=meant.role)


def _values(builder: Builder, root: Path, plan: Plan, places: Places) -> dict[str, Any]:
    """Python values: hyper-parameters go to the groups, steps to the parameters, the rest is the job's own."""
    client: dict[str, Any] = {}
    for name in plan.values:
        place = plan.places.get((name, None)) or next((p for (fqn, _), p in plan.places.items() if fqn == name), None)
        if place is None:
            raise IncompleteError("a value that is nowhere", name=name)
        with opened(root / place.file) as fd:
            value = read_region(fd, place.file, (place.offset, place.offset + place.length))
        meant = places.of(name)
        if meant.kind == "group":
            places.hyper(meant, value)
        elif meant.kind == "step" and isinstance(value, (int, float)):
            builder.step(meant.name, value)
        else:
            client[meant.name if meant.kind == "client" else name] = value
    return client


def options_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the job kept beside model and optimizer."""
    found = metadata.get("client")
    return found if isinstance(found, dict) else {}

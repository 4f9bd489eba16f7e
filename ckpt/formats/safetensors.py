"""Safetensors files and Hugging Face folders: a file, or an index and its files. Weights and buffers only.

    model.safetensors                                      one file
    model.safetensors.index.json + model-0000X-of-0000Y    weight_map says which tensor lies where
    shard-0000R-model-0000X-of-0000Y.safetensors           saved by several ranks: boxes of tensors, in metadata

A header says everything, so reading opens no data. Written files are what transformers, vLLM and others load as
they are. Invariants:

* an index that names a missing file, or a file that lacks a tensor of the index, is refused;
* of shards of several ranks none may be missing: their number is in their names;
* a tied parameter is written once, under the name that owns it, as Hugging Face does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ..dtypes import ITEM_BYTES
from ..universal.direct import DirectFile
from ..universal.disk import Disk, explained
from ..universal.errors import CorruptError, IncompleteError, UsageError
from ..universal.jsonio import parse
from ..universal.model import Checkpoint, Slab, Span, TensorState, safe_path
from ..universal.read import Reader
from ..universal.stheader import Entry, build_header, read_header
from .building import Builder
from .output import Folder
from .source import float_dtype, parameters, stream, value_of

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
INDEX_BYTES_MAX: Final = 256 << 20
SHARD: Final = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
NUMBERED: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
SHARDING: Final = "DCP_SHARDING_INFO"
FILE_BYTES_MAX: Final = 5_000_000_000


def detect(path: Path) -> bool:
    """A .safetensors file, or a folder with an index or with such files."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return path.is_dir() and bool(_files(path))


def _files(folder: Path) -> list[str]:
    with explained(folder, "listing a folder"):
        return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".safetensors"))


def open(path: Path) -> Checkpoint:
    """Tensors by their names, as state "weight"."""
    root, names = (path.parent, [path.name]) if path.is_file() else (path, _files(path))
    index = root / INDEX
    builder = Builder()
    if path.is_dir() and index.is_file():
        _indexed(builder, root, index)
    elif any(SHARD.fullmatch(name) for name in names):
        _sharded(builder, root, [name for name in names if SHARD.fullmatch(name)])
    else:
        if path.is_dir():
            _check_numbered(root, names)
        for name in names:
            for entry in read_header(root / name).entries:
                _whole(builder, name, entry)
    config = root / "config.json"
    metadata: dict[str, Any] = {"source": {"framework": "safetensors", "version": "", "mesh": {}}}
    if config.is_file():
        with explained(config, "reading a model's config"):
            metadata["model_config"] = parse(config.read_bytes(), "config.json")
    kept = dict.fromkeys(("rng", "data", "scheduler", "optimizer"), "absent")
    return builder.checkpoint(root, "safetensors", metadata=metadata, completeness=kept)  # type: ignore[arg-type]


def _whole(builder: Builder, file: str, entry: Entry) -> None:
    if (entry.name, "weight") in builder.facts:
        raise CorruptError("one tensor in two files", tensor=entry.name, file=file)
    box = tuple((0, length) for length in entry.shape)
    slab = Slab(Span(file, entry.offset, entry.nbytes), entry.dtype, box=box)
    builder.add(entry.name, "weight", entry.dtype, entry.shape, slab)


def _indexed(builder: Builder, root: Path, index: Path) -> None:
    with explained(index, "reading an index"):
        if index.stat().st_size > INDEX_BYTES_MAX:
            raise CorruptError("an index larger than any", file=INDEX)
        value = parse(index.read_bytes(), INDEX)
    places = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(places, dict) or not all(isinstance(f, str) and safe_path(f) for f in places.values()):
        raise CorruptError("an index without a weight_map of files beside it", file=INDEX)
    files = sorted(set(places.values()))
    missing = [file for file in files if not (root / file).is_file()]
    if missing:
        raise IncompleteError(f"{len(missing)} of {len(files)} files are missing", missing=missing[:8])
    for file in files:
        entries = {entry.name: entry for entry in read_header(root / file).entries}
        for name in (name for name, place in places.items() if place == file):
            if name not in entries:
                raise IncompleteError("a tensor that the index promises is not in its file", tensor=name, file=file)
            _whole(builder, file, entries[name])


def _check_numbered(root: Path, names: list[str]) -> None:
    """Files numbered "X-of-Y" without an index: all Y must be there."""
    for name in names:
        if match := NUMBERED.fullmatch(name):
            count = int(match[3])
            wanted = [f"{match[1]}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, min(count, 100_000) + 1)]
            missing = sorted(set(wanted) - set(names))
            if missing:
                raise IncompleteError(f"{len(missing)} of {count} files are missing", missing=missing[:8])


def _sharded(builder: Builder, root: Path, names: list[str]) -> None:
    """Files of PyTorch's distributed Hugging Face writer: each rank's boxes, with their offsets in the metadata."""
    headers = {name: read_header(root / name) for name in names}
    found: list[tuple[str, Entry, tuple[int, ...]]] = []
    for name, header in headers.items():
        info = parse(header.metadata.get(SHARDING, "{}").encode(), name)
        for entry in header.entries:
            facts = info.get(entry.name, {}) if isinstance(info, dict) else {}
            offsets = facts.get("saved_offsets") if isinstance(facts, dict) else None
            offsets = [0] * len(entry.shape) if offsets is None else offsets
            if not isinstance(offsets, list) or len(offsets) != len(entry.shape):
                raise CorruptError("a shard without its place", file=name, tensor=entry.name)
            if not all(type(offset) is int and offset >= 0 for offset in offsets):
                raise CorruptError("a shard at an impossible place", file=name, tensor=entry.name)
            found.append((name, entry, tuple(offsets)))
    shapes: dict[str, tuple[int, ...]] = {}
    for _, entry, offsets in found:
        stops = tuple(start + length for start, length in zip(offsets, entry.shape, strict=True))
        known = shapes.setdefault(entry.name, stops)
        shapes[entry.name] = tuple(max(a, b) for a, b in zip(known, stops, strict=True))
    for name, entry, offsets in found:
        box = tuple((start, start + length) for start, length in zip(offsets, entry.shape, strict=True))
        slab = Slab(Span(name, entry.offset, entry.nbytes), entry.dtype, box=box)
        builder.add(entry.name, "weight", entry.dtype, shapes[entry.name], slab)


# ---- writing ------------------------------------------------------------------------------------------------


def chosen(checkpoint: Checkpoint) -> list[TensorState]:
    """What a weights-only format takes: one value for each parameter and buffer."""
    return [value_of(checkpoint, name) for name in parameters(checkpoint)]


def write(
    reader: Reader, target: Path, *, dtype: str = "", file_bytes: int = FILE_BYTES_MAX, disk: Disk | None = None
) -> None:
    """A Hugging Face folder: model.safetensors, or several files and their index.

    `dtype` converts floating-point parameters (not buffers) to it; the CLI asks before that loses something.
    """
    checkpoint = reader.checkpoint
    dtype = float_dtype(dtype) if dtype else ""
    tensors = chosen(checkpoint)
    if not tensors:
        raise UsageError("a checkpoint without weights", format=checkpoint.format)
    dtypes = {t.name: dtype if dtype and t.role != "buffer" and t.dtype in FLOATS else t.dtype for t in tensors}
    parts = list(_split(tensors, dtypes, file_bytes))
    names = (
        [SINGLE]
        if len(parts) == 1
        else [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    )
    with Folder(target, disk=disk) as folder:
        for name, part in zip(names, parts, strict=True):
            write_file(reader, folder.path / name, part, dtypes, disk=folder.disk)
        if len(parts) > 1:
            places = {t.name: name for name, part in zip(names, parts, strict=True) for t in part}
            total = sum(t.elements * ITEM_BYTES[dtypes[t.name]] for t in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            folder.text(INDEX, json.dumps(index, indent=2) + "\n")
        config = checkpoint.metadata.get("model_config")
        if config is not None:
            folder.text("config.json", json.dumps(config, indent=2) + "\n")


FLOATS: Final = frozenset(("F64", "F32", "F16", "BF16"))


def _split(tensors: Iterable[TensorState], dtypes: Mapping[str, str], limit: int) -> Iterable[list[TensorState]]:
    part: list[TensorState] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.elements * ITEM_BYTES[dtypes[tensor.name]]
        if part and size + nbytes > limit:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += nbytes
    yield part


def write_file(
    reader: Reader, path: Path, tensors: list[TensorState], dtypes: Mapping[str, str], *, disk: Disk | None = None
) -> None:
    """One safetensors file, durable on return."""
    disk = disk or Disk()
    facts = [(t.name, dtypes[t.name], t.shape, t.elements * ITEM_BYTES[dtypes[t.name]]) for t in tensors]
    with explained(path, "writing weights"):
        fd = disk.open(path)
        try:
            header = build_header(facts, {"format": "pt"})
            disk.allocate(fd, len(header) + sum(nbytes for *_, nbytes in facts))
            disk.pwrite(fd, memoryview(header), 0)
            with contextlib.closing(DirectFile(disk, path, fd, threading.local())) as file:
                at = len(header)
                for tensor in tensors:
                    for piece in stream(reader, tensor.name, tensor.state, dtype=dtypes[tensor.name]):
                        file.pwrite(piece, at)
                        at += piece.nbytes
            disk.fsync(fd)
        finally:
            os.close(fd)

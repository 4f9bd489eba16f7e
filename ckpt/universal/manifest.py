"""MANIFEST.json and COMMIT: a Checkpoint as canonical JSON, and back with nothing taken on trust.

    COMMIT         {"format":..,"manifest_bytes":N,"manifest_sha256":".."}     written last
       └▶ MANIFEST.json    files, tensors with their slabs and digests, aliases, groups, steps
             └▶ files      payload, state/*.json with the metadata, one file per topic

encode() and decode() are inverse. The digest of the manifest is cryptographic, those of chunks are not: they
find damage, not forgery. Decoding checks types and ranges by constructing the values of model.py, whose
constructors refuse the impossible. Does not open files.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from .chunks import digest
from .errors import CorruptError, IncompleteError, UsageError
from .jsonio import canonical, parse_canonical
from .model import ELEMENTS_MAX, Checkpoint, FileFacts, Group, Slab, Span, TensorState, safe_path

MANIFEST: Final = "MANIFEST.json"
COMMIT: Final = "COMMIT"
FORMAT: Final = "holdfast-checkpoint"
VERSION: Final = 1
MANIFEST_BYTES_MAX: Final = 1 << 30
COMMIT_BYTES_MAX: Final = 4096
TOPIC: Final = re.compile(r"[a-z0-9_]{1,64}\Z")
_HEX32: Final = re.compile(r"[0-9a-f]{32}\Z")


def commit_bytes(manifest: bytes) -> bytes:
    """The content of COMMIT for a manifest: equal manifests, equal bytes. Its own digest tells which is damaged."""
    said = {
        "format": FORMAT,
        "version": VERSION,
        "manifest_bytes": len(manifest),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
    return canonical({**said, "check": digest(canonical(said))})


def check_commit(commit: bytes, manifest: bytes) -> None:
    """Raise, naming the damaged one of the two, unless COMMIT commits this manifest."""
    said = parse_canonical(commit, COMMIT)
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise CorruptError("not a COMMIT of ours", file=COMMIT)
    if said.pop("check", None) != digest(canonical(said)):
        raise CorruptError("a digest differs", file=COMMIT, range=(0, len(commit)))
    if said.get("version") != VERSION:
        raise UsageError("another version of the format: needs another holdfast", version=said.get("version"))
    if said.get("manifest_bytes") != len(manifest):
        raise CorruptError(
            "not as long as COMMIT says", file=MANIFEST, bytes=len(manifest), expected=said.get("manifest_bytes")
        )
    if commit_bytes(manifest) != commit:
        raise CorruptError("a digest differs", file=MANIFEST, range=(0, len(manifest)))


def encode(checkpoint: Checkpoint, *, base: str = "", parents: tuple[str, ...] = ()) -> bytes:
    """MANIFEST.json of a checkpoint. `base`: where the payload is, for an adopted one."""
    for topic in checkpoint.metadata:
        if not TOPIC.match(topic):
            raise UsageError("a topic of metadata that cannot be a file name", topic=repr(topic))
    value: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "id": checkpoint.id,
        "parents": list(parents),
        "layout": checkpoint.format,
        "files": _facts(checkpoint.files),
        "tensors": [_tensor(checkpoint.states[key]) for key in sorted(checkpoint.states)],
        "aliases": dict(checkpoint.aliases),
        "groups": [{"hyper": dict(g.hyper), "params": list(g.params)} for g in checkpoint.groups],
        "steps": dict(checkpoint.steps),
        "metadata": sorted(checkpoint.metadata),
        "completeness": dict(checkpoint.completeness),
        "opaque": {name: [span.file, span.offset, span.nbytes] for name, span in checkpoint.opaque.items()},
    }
    if base:
        value["base"] = base
        value["own_files"] = _facts(checkpoint.own_files)
    return canonical(value)


def _facts(files: Mapping[str, FileFacts]) -> dict[str, Any]:
    return {
        path: {"bytes": facts.nbytes, "rest": facts.rest, **({"probe": facts.probe} if facts.probe else {})}
        for path, facts in files.items()
    }


def _tensor(tensor: TensorState) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "state": tensor.state,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "role": tensor.role,
        "slabs": [_slab(slab) for slab in tensor.slabs],
    }


def _slab(slab: Slab) -> dict[str, Any]:
    value: dict[str, Any] = {"file": slab.span.file, "offset": slab.span.offset, "bytes": slab.span.nbytes}
    if slab.box is not None:
        value["box"] = [list(pair) for pair in slab.box]
    else:
        assert slab.flat is not None
        value["flat"] = list(slab.flat)
    if slab.strides is not None:
        value["strides"] = list(slab.strides)
    if slab.chunk_bytes:
        value["chunk"] = slab.chunk_bytes
        value["digests"] = "".join(slab.digests)
    if slab.codec != "raw":
        value["codec"] = slab.codec
        value["stored"] = list(slab.stored)
    return value


def decode(value: Any, *, home: Path, root: Path, metadata: Mapping[str, Any], label: str) -> Checkpoint:
    """The checkpoint of a parsed manifest. `metadata`: the parsed state/*.json, by topic."""
    with _expected(label):
        return _decode(value, home, root, metadata, label)


@contextlib.contextmanager
def _expected(label: str) -> Iterator[None]:
    """What is not as expected inside is a fault of the manifest, not of ours."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptError("a manifest that is not one", file=label, reason=reason) from error


def topics(value: Any, label: str) -> tuple[tuple[str, ...], str, dict[str, FileFacts]]:
    """Before decode(): the topics of the metadata, the base ("" unless adopted), the files of the folder itself."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CorruptError("not a manifest of ours", file=label)
    if value.get("version") != VERSION:
        raise UsageError(
            "a manifest of another version: a newer holdfast can read it", file=label, version=value.get("version")
        )
    listed, base = value.get("metadata"), value.get("base", "")
    if not isinstance(listed, list) or any(not isinstance(t, str) or not TOPIC.match(t) for t in listed):
        raise CorruptError("topics of metadata that cannot be", file=label)
    if not isinstance(base, str) or "\0" in base:
        raise CorruptError("a base that is no path", file=label)
    with _expected(label):
        return tuple(listed), base, _decode_facts(value.get("own_files" if base else "files"), label)


def _decode(value: Any, home: Path, root: Path, metadata: Mapping[str, Any], label: str) -> Checkpoint:
    if (value["layout"] == "holdfast") == ("base" in value):
        raise CorruptError("a manifest of our own files has no base, any other has one", file=label)
    tensors = [_decode_tensor(item) for item in _list(value["tensors"])]
    states = {tensor.key: tensor for tensor in tensors}
    if len(states) != len(tensors):
        raise CorruptError("a tensor listed twice", file=label)
    files = _decode_facts(value["files"], label)
    for tensor in tensors:
        for slab in tensor.slabs:
            facts = files.get(slab.span.file)
            if facts is None:
                raise IncompleteError("a slab in a file that is not listed", **_where(tensor), file=slab.span.file)
            if slab.span.stop > facts.nbytes:
                raise CorruptError("a slab beyond the end of its file", **_where(tensor), file=slab.span.file)
    return Checkpoint(
        root=root,
        format=_text(value["layout"]),
        states=states,
        aliases={_text(alias): _text(owner) for alias, owner in value["aliases"].items()},
        groups=tuple(
            Group(index, dict(group["hyper"]), tuple(_text(name) for name in _list(group["params"])))
            for index, group in enumerate(_list(value["groups"]))
        ),
        steps={_text(name): _step(step) for name, step in value["steps"].items()},
        metadata=metadata,
        completeness={_text(topic): kept for topic, kept in value["completeness"].items()},
        opaque={_text(name): Span(_text(s[0]), _int(s[1]), _int(s[2])) for name, s in value["opaque"].items()},
        id=_text(value["id"]),
        home=home if root != home else None,
        files=files,
        own_files=_decode_facts(value["own_files"], label) if "base" in value else {},
    )


def _where(tensor: TensorState) -> dict[str, object]:
    return {"name": tensor.name, "state": tensor.state}


def _decode_facts(value: Any, label: str) -> dict[str, FileFacts]:
    if not isinstance(value, dict):
        raise CorruptError("a manifest without files", file=label)
    found = {}
    for path, facts in value.items():
        if not safe_path(path) or not isinstance(facts, dict):
            raise CorruptError("a path that leaves the checkpoint", file=repr(path))
        rest, probe = facts.get("rest"), facts.get("probe", "")
        if not isinstance(rest, str) or not isinstance(probe, str) or not (rest == "" or _HEX32.match(rest)):
            raise CorruptError("a file without its digest", file=path)
        found[path] = FileFacts(_int(facts.get("bytes")), rest, probe)
    return found


def _decode_tensor(item: Any) -> TensorState:
    return TensorState(
        _text(item["name"]),
        _text(item["state"]),
        _text(item["dtype"]),
        tuple(_int(length) for length in _list(item["shape"])),
        tuple(_decode_slab(slab, _text(item["dtype"])) for slab in _list(item["slabs"])),
        item["role"],
    )


def _decode_slab(item: Any, dtype: str) -> Slab:
    digests = _text(item.get("digests", ""))
    if len(digests) % 32 or not re.fullmatch(r"[0-9a-f]*", digests):
        raise CorruptError("digests that are none", file=repr(item.get("file")))
    box, flat, strides = item.get("box"), item.get("flat"), item.get("strides")
    return Slab(
        Span(_text(item["file"]), _int(item["offset"]), _int(item["bytes"])),
        dtype,
        box=None if box is None else tuple((_int(low), _int(high)) for low, high in _list(box)),
        flat=None if flat is None else (_int(flat[0]), _int(flat[1])),
        codec=item.get("codec", "raw"),
        chunk_bytes=_int(item.get("chunk", 0)),
        digests=tuple(digests[at : at + 32] for at in range(0, len(digests), 32)),
        strides=None if strides is None else tuple(_int(step) for step in _list(strides)),
        stored=tuple(_int(size) for size in _list(item.get("stored", []))),
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} where a list belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    return value


def _int(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= ELEMENTS_MAX:
        raise ValueError(f"{value!r} where a size belongs")
    return value


def _step(value: Any) -> int | float:
    if type(value) not in (int, float):
        raise TypeError(f"{type(value).__name__} where a step belongs")
    return value  # type: ignore[no-any-return]

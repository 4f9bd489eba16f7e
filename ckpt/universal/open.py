"""Opening a folder of ours: everything is checked that can be checked without reading the payload.

    COMMIT ─▶ MANIFEST.json ─▶ state/*.json ─▶ values ─▶ cover, overlaps ─▶ sizes of files ─▶ Checkpoint

An offset, a path or a size is used only after it was checked against the file it points into. Invariants:

* a folder without COMMIT is refused, whatever else is in it;
* in our own format no two slabs share a byte, and every file is a regular one below the root.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from ..collecting import uncollected
from .chunks import digest
from .disk import explained
from .errors import CheckpointError, CorruptError, IncompleteError
from .jsonio import parse_canonical
from .manifest import COMMIT, COMMIT_BYTES_MAX, MANIFEST, MANIFEST_BYTES_MAX, check_commit, decode, topics
from .model import Checkpoint, FileFacts, validate

METADATA_BYTES_MAX: Final = 256 << 20


def is_ours(path: Path | str) -> bool:
    """Whether a folder claims to be of our format."""
    return os.path.isfile(os.path.join(path, MANIFEST)) or os.path.isfile(os.path.join(path, COMMIT))


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint in a folder; raises a CheckpointError that says what is wrong with it."""

    def refuse(error: CheckpointError) -> None:
        raise error

    checkpoint = load(Path(path), refuse)
    for name, facts in checkpoint.files.items():
        check_file(checkpoint, name, facts)
    return checkpoint


@uncollected()
def load(home: Path, problem: Callable[[CheckpointError], None]) -> Checkpoint:
    """As open_checkpoint(), without looking at the payload. A broken metadata file goes to `problem`."""
    if not home.is_dir():
        raise IncompleteError("no such folder", path=str(home))
    if not (home / COMMIT).exists():
        raise IncompleteError("not a committed checkpoint: there is no COMMIT", path=str(home), file=COMMIT)
    commit = _read(home, COMMIT, COMMIT_BYTES_MAX)
    manifest = _read(home, MANIFEST, MANIFEST_BYTES_MAX)
    check_commit(commit, manifest)
    value = parse_canonical(manifest, MANIFEST)
    listed, base, own = topics(value, MANIFEST)
    metadata: dict[str, Any] = {}
    for topic in listed:
        path = f"state/{topic}.json"
        try:
            metadata[topic] = _metadata(home, path, own.get(path))
        except CheckpointError as error:
            problem(error)
    root = Path(os.path.normpath(home / base)) if base else home
    checkpoint = decode(value, home=home, root=root, metadata=metadata, label=MANIFEST)
    validate(checkpoint)
    if not base:
        _refuse_overlaps(checkpoint)
    return checkpoint


def _read(home: Path, name: str, bytes_max: int) -> bytes:
    path = home / name
    try:
        with explained(path, "opening a checkpoint"):
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode):
                raise CorruptError("not a regular file", file=name)
            if facts.st_size > bytes_max:
                raise CorruptError("larger than any such file can be", file=name, bytes=facts.st_size)
            return path.read_bytes()
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise IncompleteError("a file of the checkpoint is not there", file=name) from error
        raise


def _metadata(home: Path, path: str, facts: FileFacts | None) -> Any:
    if facts is None:
        raise IncompleteError("metadata in a file that is not listed", file=path)
    data = _read(home, path, METADATA_BYTES_MAX)
    if len(data) != facts.nbytes or digest(data) != facts.rest:
        raise CorruptError("a digest differs", file=path, range=(0, len(data)))
    return parse_canonical(data, path)


def _refuse_overlaps(checkpoint: Checkpoint) -> None:
    spans = [
        (slab.span.file, slab.span.offset, slab.span.stop, tensor.name)
        for tensor in checkpoint.states.values()
        for slab in tensor.slabs
        if slab.span.nbytes
    ]
    for one, other in pairwise(sorted(spans)):
        if one[0] == other[0] and other[1] < one[2]:
            raise CorruptError("two tensors share bytes", file=one[0], one=one[3], other=other[3], offset=other[1])


def check_file(checkpoint: Checkpoint, name: str, facts: FileFacts) -> None:
    """Raise unless the file is there, regular, below the root, and of its size."""
    full = checkpoint.root / name
    try:
        with explained(full, "opening a checkpoint"):
            found = full.stat()
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise IncompleteError("a file of the checkpoint is not there", file=name) from error
        raise
    if not stat.S_ISREG(found.st_mode):
        raise CorruptError("not a regular file", file=name)
    if checkpoint.home is None and not full.resolve().is_relative_to(checkpoint.root.resolve()):
        raise CorruptError("a link that leaves the checkpoint", file=name)
    if found.st_size != facts.nbytes:
        raise CorruptError("a file of another size", file=name, bytes=found.st_size, expected=facts.nbytes)

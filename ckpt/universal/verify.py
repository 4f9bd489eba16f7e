"""What is wrong with a checkpoint, each fault by file, tensor and byte range. Finds all, stops at none.

    quick   COMMIT, MANIFEST, metadata, sizes, unknown files, headers; reads no payload
    full    quick, and every chunk of every file against its digest: one sequential pass

Repairs nothing. A checkpoint without digests (foreign, or adopted without them) can be verified only in its
structure; digested() says so. Invariants: an empty list in full mode means that every byte of every listed
file is the one that was written.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from ..threads import threads
from .copies import differing
from .errors import CheckpointError, CorruptError
from .files import Files, probe
from .journal import FILE_NAME as JOURNAL
from .manifest import COMMIT, MANIFEST
from .model import Checkpoint, FileFacts, Slab, TensorState, validate
from .open import check_file, load
from .read import Reader
from .scan import gaps, rest_digest, scan
from .stheader import read_header

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

QUICK_REST_BYTES_MAX: Final = 64 << 20
"""Headers are below this; what is between slabs of a foreign file may not be."""

Progress = Callable[[int, int], None]
"""Bytes done, bytes in all. Called from any thread, one call at a time."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One fault."""

    file: str
    start: int
    stop: int
    """Byte range in the file; (0, 0) if it is about the file as a whole."""
    name: str
    state: str
    """The tensor whose bytes these are; "" if none."""
    kind: str
    """missing, size, digest, structure, unexpected, copies."""
    message: str


def digested(checkpoint: Checkpoint) -> bool:
    """Whether full verification sees every byte of the tensors."""
    slabs = [slab for tensor in checkpoint.states.values() for slab in tensor.slabs]
    return all(slab.digests or not slab.span.nbytes for slab in slabs)


def verify(
    checkpoint: Checkpoint | Path | str,
    mode: Literal["quick", "full"] = "full",
    progress: Progress | None = None,
    *,
    jobs: int = 2,
) -> list[Finding]:
    """The faults of a checkpoint, sorted; [] if there are none."""
    findings: list[Finding] = []
    if not isinstance(checkpoint, Checkpoint) or checkpoint.format == "holdfast" or checkpoint.home is not None:
        home = checkpoint.home or checkpoint.root if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
        try:
            checkpoint = load(home, lambda error: findings.append(_from_error(error, "")))
        except CheckpointError as error:
            return [_from_error(error, "")]
        findings += _unexpected(checkpoint)
    else:
        try:
            validate(checkpoint)
        except CheckpointError as error:
            findings.append(_from_error(error, ""))
    findings += _Pass(checkpoint, mode, progress, jobs).run()
    if mode == "full" and checkpoint.copies and not findings:
        findings += _copies(checkpoint)
    # A broken metadata file is found by load() and again by its digest.
    return sorted({(f.file, f.start, f.stop, f.name, f.state): f for f in findings}.values())


def _copies(checkpoint: Checkpoint) -> list[Finding]:
    """Replicas of a parameter that have drifted apart."""
    message = "differs from the first rank's copy of the same parameter"
    with Reader(checkpoint, verify=False) as reader:
        return [
            Finding(slab.span.file, slab.span.offset, slab.span.stop, tensor.name, tensor.state, "copies", message)
            for tensor, slab in differing(reader)
        ]


def _from_error(error: CheckpointError, file: str) -> Finding:
    fields = error.fields
    found = fields.get("range")
    low, high = found if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], int) else (0, 0)
    kind = "digest" if "digest" in error.message else "missing" if error.exit_code == 3 else "structure"
    if "size" in error.message:
        kind = "size"
    name, state = str(fields.get("name", "")), str(fields.get("state", ""))
    return Finding(str(fields.get("file", file)), low, high, name, state, kind, str(error))


def _unexpected(checkpoint: Checkpoint) -> list[Finding]:
    home = checkpoint.home or checkpoint.root
    listed = checkpoint.own_files if checkpoint.home is not None else checkpoint.files
    known = {MANIFEST, COMMIT, JOURNAL, *listed}
    found = []
    for folder, _, names in os.walk(home):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), home)
            if path not in known:
                found.append(Finding(path, 0, 0, "", "", "unexpected", "a file that the manifest does not list"))
    return found


class _Pass:
    """One pass over the files of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, mode: str, progress: Progress | None, jobs: int) -> None:
        self._checkpoint = checkpoint
        self._full = mode == "full"
        self._progress = progress
        self._jobs = jobs
        self._findings: list[Finding] = []
        self._lock = threading.Lock()
        self._slabs: dict[str, list[tuple[TensorState, Slab]]] = {}
        for tensor in checkpoint.states.values():
            for slab in tensor.slabs:
                self._slabs.setdefault(slab.span.file, []).append((tensor, slab))
        self._total = sum(slab.span.nbytes for held in self._slabs.values() for _, slab in held if slab.digests)
        self._done = 0

    def run(self) -> list[Finding]:
        checkpoint = self._checkpoint
        with threads(self._jobs, "checkpoint-verify") as pool:
            self._folder(checkpoint.root, checkpoint.files, pool)
            if checkpoint.home is not None:
                self._folder(checkpoint.home, checkpoint.own_files, pool)
        return self._findings

    def _folder(self, root: Path, listed: dict[str, FileFacts] | object, pool: ThreadPoolExecutor) -> None:
        payload = root == self._checkpoint.root
        files = Files(root, links=self._checkpoint.format != "holdfast" or self._checkpoint.home is not None)
        names = dict(listed) if isinstance(listed, dict) else {}
        if payload:
            for path in self._slabs:
                names.setdefault(path, FileFacts(-1))
        try:
            for path, facts in sorted(names.items()):
                try:
                    self._file(files, path, facts, pool, payload=payload)
                except CheckpointError as error:
                    self._findings.append(_from_error(error, path))
        finally:
            files.close()

    def _file(self, files: Files, path: str, facts: FileFacts, pool: ThreadPoolExecutor, *, payload: bool) -> None:
        held = self._slabs.get(path, []) if payload else []
        size = files.size(path)
        if facts.nbytes >= 0 and payload:
            try:
                check_file(self._checkpoint, path, facts)
            except CorruptError as error:
                self._findings.append(_from_error(error, path))
        cut = [(tensor, slab) for tensor, slab in held if slab.span.stop > size]
        for tensor, slab in cut:
            low, high = max(size, slab.span.offset), slab.span.stop
            self._add(path, low, high, tensor, "missing", "the file ends before these bytes")
        whole = [slab for _, slab in held]
        if facts.rest and size == facts.nbytes:
            rest = sum(high - low for low, high in gaps(whole, size))
            if (self._full or rest <= QUICK_REST_BYTES_MAX) and rest_digest(files, path, whole, size) != facts.rest:
                low, high = gaps(whole, size)[0] if rest else (0, size)
                self._add(path, low, high, None, "digest", "a digest differs in bytes outside of all tensors")
            elif path.endswith(".safetensors") and self._checkpoint.home is None:
                self._header(path, whole)
        if facts.probe and size == facts.nbytes and probe(files, path, size) != facts.probe:
            self._add(path, 0, 0, None, "digest", "not the file that was adopted: its first or last bytes differ")
        if self._full:
            self._payload(files, path, [(t, s) for t, s in held if s.digests and s.span.stop <= size], pool)

    def _header(self, path: str, slabs: list[Slab]) -> None:
        """The header and the manifest speak of the same bytes."""
        entries = {(e.offset, e.nbytes) for e in read_header(self._checkpoint.root / path).entries if e.nbytes}
        if entries != {(slab.span.offset, slab.span.nbytes) for slab in slabs if slab.span.nbytes}:
            self._add(path, 0, 0, None, "structure", "the header and the manifest disagree")

    def _payload(self, files: Files, path: str, held: list[tuple[TensorState, Slab]], pool: ThreadPoolExecutor) -> None:
        def compare(index: int, first: int, edges: Sequence[int], found: list[str]) -> None:
            tensor, slab = held[index]
            expected = slab.digests[first : first + len(found)]
            if tuple(found) == expected:
                return
            for (low, high), one, other in zip(itertools.pairwise(edges), found, expected, strict=True):
                if one != other:
                    with self._lock:
                        self._add(path, low, high, tensor, "digest", "a digest differs")

        def advance(nbytes: int) -> None:
            with self._lock:
                self._done += nbytes
                if self._progress is not None:
                    self._progress(self._done, self._total)

        scan(files, path, [slab for _, slab in held], pool, self._jobs, compare, advance)

    def _add(self, path: str, low: int, high: int, tensor: TensorState | None, kind: str, message: str) -> None:
        name, state = tensor.key if tensor is not None else ("", "")
        self._findings.append(Finding(path, low, high, name, state, kind, message))

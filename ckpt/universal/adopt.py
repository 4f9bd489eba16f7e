"""Adopting: a manifest over somebody else's files, which stay where they are, as they are.

    ckpt-step-100/            foreign, untouched
    ckpt-step-100.holdfast/   MANIFEST.json (base: "../ckpt-step-100"), state/*.json, COMMIT

After that the checkpoint opens without its framework's reader, and with `digests` (one pass over the files)
can be verified like one of ours. Without them, each file is known by its size and its first and last bytes.
Writes no payload. Invariants: nothing below the foreign root is changed; the manifest's folder appears whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..threads import threads
from .chunks import chunk_bytes_for, digest
from .disk import Disk, explained
from .errors import CorruptError, UsageError
from .files import Files, probe
from .jsonio import canonical
from .manifest import COMMIT, MANIFEST, commit_bytes, encode
from .model import Checkpoint, FileFacts, Slab, TensorState, validate

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_Held = tuple[tuple[str, str], int, Slab]
"""A slab of a file: its tensor, and which of the tensor's slabs it is."""


def default_home(root: Path) -> Path:
    """Beside the foreign folder."""
    return root.with_name(f"{root.name}.holdfast")


def adopt(
    checkpoint: Checkpoint,
    home: Path | str | None = None,
    *,
    digests: bool = False,
    jobs: int = 2,
    progress: Callable[[int, int], None] | None = None,
    disk: Disk | None = None,
) -> Checkpoint:
    """Write a manifest over the files of a checkpoint that some reader has opened."""
    root = Path(os.path.abspath(checkpoint.root))
    target = Path(os.path.abspath(home)) if home is not None else default_home(root)
    if os.path.lexists(target):
        raise UsageError("the target is there already: choose another name, or remove it", target=str(target))
    validate(checkpoint)
    if checkpoint.copies:  # which a manifest does not list
        from .copies import agree
        from .read import Reader

        with Reader(checkpoint) as reader:
            agree(reader)
    files = Files(root, links=True)
    try:
        states, facts = _facts(checkpoint, files, digests=digests, jobs=jobs, progress=progress)
    finally:
        files.close()
    metadata: dict[str, Any] = dict(checkpoint.metadata)
    texts = {f"state/{topic}.json": canonical(value) for topic, value in metadata.items()}
    adopted = replace(
        checkpoint,
        root=root,
        states=states,
        files=facts,
        home=target,
        id=checkpoint.id or os.urandom(16).hex(),
        own_files={path: FileFacts(len(data), digest(data)) for path, data in texts.items()},
    )
    base = f"../{root.name}" if root.parent == target.parent else str(root)
    _write(disk or Disk(), target, texts, encode(adopted, base=base))
    return adopted


def _facts(
    checkpoint: Checkpoint, files: Files, *, digests: bool, jobs: int, progress: Callable[[int, int], None] | None
) -> tuple[dict[tuple[str, str], TensorState], dict[str, FileFacts]]:
    """Sizes and probes of all files, and digests if wanted; a slab beyond its file is refused."""
    held: dict[str, list[_Held]] = {}
    for key, tensor in checkpoint.states.items():
        for at, slab in enumerate(tensor.slabs):
            held.setdefault(slab.span.file, []).append((key, at, slab))
    opaque = {span.file for span in checkpoint.opaque.values()}
    facts: dict[str, FileFacts] = {}
    for path in sorted(held.keys() | opaque):
        size = files.size(path)
        for key, _, slab in held.get(path, []):
            if slab.span.stop > size:
                raise CorruptError("a slab beyond the end of its file", name=key[0], state=key[1], file=path)
        facts[path] = FileFacts(size, "", probe(files, path, size))
    if not digests:
        return dict(checkpoint.states), facts
    return _digested(checkpoint, files, held, facts, jobs, progress)


def _digested(
    checkpoint: Checkpoint,
    files: Files,
    held: Mapping[str, list[_Held]],
    facts: Mapping[str, FileFacts],
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[tuple[str, str], TensorState], dict[str, FileFacts]]:
    """The same with checksums of every byte of the files."""
    from .scan import rest_digest, scan  # and the library of threads: adopting without digests takes half as long

    total = sum(slab.span.nbytes for members in held.values() for _, _, slab in members)
    done = 0
    lock = threading.Lock()
    fresh: dict[tuple[str, str], list[Slab]] = {key: list(t.slabs) for key, t in checkpoint.states.items()}

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    def scanned(path: str, members: list[_Held], pool: ThreadPoolExecutor) -> None:
        slabs = [replace(s, chunk_bytes=s.chunk_bytes or chunk_bytes_for(s.nbytes), digests=()) for _, _, s in members]
        found = [[""] * slab.chunks for slab in slabs]

        def note(index: int, first: int, edges: Sequence[int], digests: list[str]) -> None:
            found[index][first : first + len(digests)] = digests

        scan(files, path, slabs, pool, jobs, note, advance)
        for (key, at, _), slab, values in zip(members, slabs, found, strict=True):
            fresh[key][at] = replace(slab, digests=tuple(values))

    complete: dict[str, FileFacts] = {}
    with threads(jobs, "checkpoint-adopt") as pool:
        for path, known in facts.items():
            members = held.get(path, [])
            rest = rest_digest(files, path, [slab for _, _, slab in members], known.nbytes)
            complete[path] = replace(known, rest=rest)
            scanned(path, members, pool)
    states = {key: replace(tensor, slabs=tuple(fresh[key])) for key, tensor in checkpoint.states.items()}
    return states, complete


def _write(disk: Disk, target: Path, texts: dict[str, bytes], manifest: bytes) -> None:
    """The folder under a hidden name, durable, then renamed: as a checkpoint of ours is committed."""
    folder = target.with_name(f".{target.name}.tmp-{os.urandom(4).hex()}")
    try:
        with explained(target, "writing a manifest"):
            disk.mkdir(folder)
            disk.mkdir(folder / "state")
            files = {**texts, MANIFEST: manifest, COMMIT: commit_bytes(manifest)}
            for path, data in files.items():
                disk.write_file(folder / path, data, sync=False)
            for path in files:
                disk.fsync_file(folder / path)
            disk.fsync_directory(folder / "state")
            disk.fsync_directory(folder)
            disk.rename(folder, target)
            disk.fsync_directory(target.parent)
    except BaseException:
        if folder.is_dir():
            disk.remove_tree(folder)
        raise

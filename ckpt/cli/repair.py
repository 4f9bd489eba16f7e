"""`repair`: damaged chunks rebuilt in place, from whatever copy proves by its digest to be the same.

    fault ─▶ chunk (slab, digest) ─▶ candidates: --from copies, the float32 master rounded ─▶ digest equal? ─▶ write

A chunk is rewritten only with bytes whose digest is the one in the manifest, so a repair cannot make anything
worse; files that are missing or cut are put back the same way. Cannot rebuild MANIFEST or COMMIT: they come from
a copy, whole. Ends with a full verification. Needs digests: ours, or adopted with --digest.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..dtypes import ITEM_BYTES
from ..universal.chunks import digest, stored_offsets
from ..universal.convert import NUMPY, convert
from ..universal.disk import Disk, explained
from ..universal.errors import CheckpointError, UsageError
from ..universal.files import Files
from ..universal.geometry import boxes_of_flat
from ..universal.manifest import COMMIT, MANIFEST
from ..universal.model import Box, Checkpoint, Region, Slab, TensorState
from ..universal.open import load
from ..universal.read import Reader
from ..universal.scan import gaps
from ..universal.verify import Finding, verify
from .arguments import Parser
from .console import Console
from .source import open_path, resolve
from .verify import code_of, describe

EXAMPLES: Final = {
    "repair": """\
  holdfast ckpt repair run/step-00000100
  holdfast ckpt repair run/step-00000100 --from /backup/step-00000100
  holdfast ckpt repair run/step-00000100 --from checkpoints/global_step100 --dry-run"""
}


REST_BYTES_MAX: Final = 256 << 20
"""Headers and metadata are below this."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk that does not have its digest."""

    tensor: TensorState
    slab: Slab
    chunk: int
    low: int
    high: int
    """Bytes of the span."""

    @property
    def digest(self) -> str:
        return self.slab.digests[self.chunk]


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("path", help="a checkpoint of our format, or an adopted one")
    parser.add_argument(
        "--from",
        action="append",
        default=[],
        metavar="COPY",
        dest="copies",
        help="a copy, of any format; again for more",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what could be rebuilt, and from what")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Find the faults, rebuild what can be, verify."""
    path, ours = resolve(arguments.path)
    if not ours:
        raise UsageError("no digests to repair by: adopt it with --digest while it is whole", path=str(path))
    with ExitStack() as stack:
        copies = [stack.enter_context(Reader(open_path(copy))) for copy in arguments.copies]
        made = _small_files(path, copies, dry_run=arguments.dry_run)
        problems: list[CheckpointError] = []
        checkpoint = load(path, problems.append)
        damages = list(find(checkpoint))
        mine = stack.enter_context(Reader(checkpoint))
        rebuilt, lost = 0, []
        for damage in damages:
            data = candidate(damage, mine, copies)
            if data is None:
                lost.append(damage)
                continue
            if not arguments.dry_run:
                put(checkpoint, damage, data)
            rebuilt += 1
        if not arguments.dry_run:
            made += _rests(checkpoint, copies)
    left = [] if arguments.dry_run else verify(path, "full", jobs=arguments.jobs)
    value = {
        "path": str(path),
        "damaged": len(damages),
        "rebuilt": rebuilt,
        "files": made,
        "lost": [f"{d.tensor.name}:{d.tensor.state}" for d in lost],
        "dry_run": arguments.dry_run,
        "ok": not left and not lost,
    }
    console.result(value, _lines(path, damages, rebuilt, made, lost, left, dry_run=arguments.dry_run))
    return code_of(left) or (2 if lost else 0)


def _lines(
    path: Path,
    damages: list[Damage],
    rebuilt: int,
    made: list[str],
    lost: list[Damage],
    left: list[Finding],
    *,
    dry_run: bool,
) -> list[str]:
    word = "could be rebuilt" if dry_run else "rebuilt"
    lines = [f"{name}: put back from a copy" for name in made]
    for damage in lost:
        start = damage.slab.span.offset
        where = f"{damage.slab.span.file} bytes {start + damage.low}-{start + damage.high}"
        lines.append(
            f"lost: {damage.tensor.name}:{damage.tensor.state}, {where}: no copy has it; next: --from another one"
        )
    lines += [describe(finding) for finding in left]
    state = "" if dry_run else "; now whole" if not left else f"; {len(left)} faults left"
    return [*lines, f"{path}: {len(damages)} damaged chunks, {rebuilt} {word}{state}"]


# ---- finding and filling ------------------------------------------------------------------------------------


def find(checkpoint: Checkpoint) -> Iterator[Damage]:
    """Chunks that cannot be read or have another digest."""
    files = Files(checkpoint.root, links=checkpoint.home is not None)
    try:
        for tensor in checkpoint.states.values():
            for slab in tensor.slabs:
                offsets = stored_offsets(slab) if slab.digests else [0]
                for chunk, (low, high) in enumerate(itertools.pairwise(offsets)):
                    data = bytearray(high - low)
                    try:
                        files.read_into(slab.span.file, slab.span.offset + low, data)
                        good = digest(data) == slab.digests[chunk]
                    except CheckpointError:
                        good = False
                    if not good:
                        yield Damage(tensor, slab, chunk, low, high)
    finally:
        files.close()


def candidate(damage: Damage, mine: Reader, copies: list[Reader]) -> bytes | None:
    """Bytes with the digest of the chunk: from a copy, or by rounding the master copy."""
    tensor = damage.tensor
    for reader in copies:
        found = _from_file(damage, reader) or _from_tensor(damage, reader, tensor.state, "")
        if found is not None:
            return found
    for reader in (mine, *copies):
        found = _from_tensor(damage, reader, "fp32", tensor.dtype) if tensor.state == "weight" else None
        if found is not None:
            return found
    return None


def _from_file(damage: Damage, reader: Reader) -> bytes | None:
    """The same place of the same file, if the copy has one."""
    path = reader.checkpoint.root / damage.slab.span.file
    try:
        with open(path, "rb") as file:
            file.seek(damage.slab.span.offset + damage.low)
            data = file.read(damage.high - damage.low)
    except OSError:
        return None
    return data if digest(data) == damage.digest else None


def _from_tensor(damage: Damage, reader: Reader, state: str, dtype: str) -> bytes | None:
    """The same elements of the same tensor, however the copy stores them."""
    slab, tensor = damage.slab, damage.tensor
    if slab.codec != "raw" or slab.strides is not None:
        return None
    try:
        other = reader.checkpoint.tensor(tensor.name, state)
        if other.shape != tensor.shape or (not dtype and other.dtype != tensor.dtype):
            return None
        item = ITEM_BYTES[tensor.dtype]
        parts = [
            bytes(_read(reader, other, part, dtype)) for part in regions(slab, damage.low // item, damage.high // item)
        ]
    except CheckpointError:  # the copy is damaged here, too
        return None
    data = b"".join(parts)
    return data if digest(data) == damage.digest else None


def _read(reader: Reader, tensor: TensorState, region: Region, dtype: str) -> memoryview:
    data = memoryview(reader.read(*tensor.key, region))
    if not dtype or dtype == tensor.dtype:
        return data
    if tensor.dtype not in NUMPY or dtype not in NUMPY:
        return memoryview(b"")
    return memoryview(convert(data, tensor.dtype, dtype).data.cast("B"))


def regions(slab: Slab, low: int, high: int) -> Iterator[Region]:
    """Elements [low, high) of a slab as regions of its tensor, in order."""
    if slab.flat is not None:
        yield slab.flat[0] + low, slab.flat[0] + high
        return
    assert slab.box is not None
    for box in boxes_of_flat((low, high), slab.shape):
        moved: Box = tuple((start + a, start + b) for (start, _), (a, b) in zip(slab.box, box, strict=True))
        yield moved


def put(checkpoint: Checkpoint, damage: Damage, data: bytes) -> None:
    """Write proven bytes in their place, durably."""
    disk, path = Disk(), checkpoint.root / damage.slab.span.file
    with explained(path, "repairing a checkpoint"):
        disk.mkdir(path.parent)
        fd = disk.open(path)
        try:
            disk.pwrite(fd, memoryview(data), damage.slab.span.offset + damage.low)
            disk.fsync(fd)
        finally:
            os.close(fd)


# ---- what is not in chunks ----------------------------------------------------------------------------------


def _small_files(path: Path, copies: list[Reader], *, dry_run: bool) -> list[str]:
    """MANIFEST and COMMIT from a copy of the same save, if ours cannot be read."""
    try:
        load(path, lambda error: None)
        return []
    except CheckpointError as error:
        for reader in copies:
            other = reader.checkpoint.home or reader.checkpoint.root
            if _same_save(path, other):
                if not dry_run:
                    for name in (MANIFEST, COMMIT):
                        _replace(path / name, (other / name).read_bytes())
                return [MANIFEST, COMMIT]
        raise error


def _same_save(path: Path, other: Path) -> bool:
    """One of the two files is whole and equal: the copies are of one save."""
    pairs = [(path / name, other / name) for name in (MANIFEST, COMMIT)]
    return any(a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes() for a, b in pairs)


def _rests(checkpoint: Checkpoint, copies: list[Reader]) -> list[str]:
    """Headers and metadata files: the bytes outside of all slabs, from a copy that has the listed digest."""
    made = []
    own = checkpoint.home is not None
    listed = [(checkpoint.root, name, facts) for name, facts in checkpoint.files.items()]
    listed += [(checkpoint.home or checkpoint.root, name, facts) for name, facts in checkpoint.own_files.items()]
    slabs: dict[str, list[Slab]] = {}
    for tensor in checkpoint.states.values():
        for slab in tensor.slabs:
            slabs.setdefault(slab.span.file, []).append(slab)
    for base, name, facts in listed:
        held = slabs.get(name, []) if base == checkpoint.root else []
        ranges = gaps(held, facts.nbytes)
        if not facts.rest or sum(high - low for low, high in ranges) > REST_BYTES_MAX:
            continue
        if _sized(base / name, facts.nbytes) and digest(_at(base / name, ranges)) == facts.rest:
            continue
        for reader in copies:
            theirs = reader.checkpoint.root if not own or base == checkpoint.root else reader.checkpoint.home
            data = _at(theirs / name, ranges) if theirs is not None else b""
            if data and digest(data) == facts.rest:
                _fill(base / name, ranges, data, facts.nbytes)
                made.append(name)
                break
    return made


def _sized(path: Path, nbytes: int) -> bool:
    """Whether a file is there and not shorter; what is behind its end is cut off."""
    if not path.is_file() or path.stat().st_size < nbytes:
        return False
    if path.stat().st_size > nbytes:
        with explained(path, "repairing a checkpoint"):
            os.truncate(path, nbytes)
    return True


def _at(path: Path, ranges: list[tuple[int, int]]) -> bytes:
    """The bytes of some ranges of a file, as far as it has them."""
    try:
        with open(path, "rb") as file:
            parts = []
            for low, high in ranges:
                file.seek(low)
                parts.append(file.read(high - low))
            return b"".join(parts)
    except OSError:
        return b""


def _fill(path: Path, ranges: list[tuple[int, int]], data: bytes, nbytes: int) -> None:
    disk = Disk()
    with explained(path, "repairing a checkpoint"):
        disk.mkdir(path.parent)
        fd = disk.open(path)
        try:
            os.ftruncate(fd, nbytes)
            at = 0
            for low, high in ranges:
                disk.pwrite(fd, memoryview(data)[at : at + high - low], low)
                at += high - low
            disk.fsync(fd)
        finally:
            os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    disk = Disk()
    fresh = path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")
    with explained(path, "repairing a checkpoint"):
        disk.mkdir(path.parent)
        disk.write_file(fresh, data)
        disk.rename(fresh, path)
        disk.fsync_directory(path.parent)

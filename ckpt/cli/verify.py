"""`verify`: every fault of a checkpoint, by file, tensor and byte range; an exit code by what kind they are.

    --quick    structure, sizes, completeness; no payload          0  nothing found
    --sample p quick, and about that share of the chunks           2  bytes or structure are wrong
    --full     every byte against its digest                       3  only: something is missing

Repairs nothing. Invariant: with digests, --full finds every changed byte; without them it says so.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..universal.chunks import digest, stored_offsets
from ..universal.errors import CheckpointError
from ..universal.files import Files
from ..universal.model import Checkpoint, Slab, TensorState
from ..universal.open import open_checkpoint
from ..universal.verify import Finding, digested
from ..universal.verify import verify as verify_checkpoint
from .arguments import Parser, share
from .console import Console, human
from .source import open_path, resolve

EXAMPLES: Final = {
    "verify": """\
  holdfast ckpt verify run/step-00000100
  holdfast ckpt verify run --sample 0.05
  holdfast ckpt verify --quick checkpoints/global_step100
  holdfast ckpt adopt checkpoints/global_step100 --digest && holdfast ckpt verify checkpoints/global_step100"""
}


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("path", help="checkpoint of any format, or a run's folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="structure, sizes and completeness: reads no payload")
    how.add_argument("--full", action="store_true", help="every byte (the default)")
    how.add_argument("--sample", type=share, default=0.0, metavar="P", help="quick, and about this share of chunks")
    parser.add_argument("--seed", type=int, default=0, help="which chunks --sample takes")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Verify, list, and say by the exit code what was found."""
    path, ours = resolve(arguments.path)
    mode = "quick" if arguments.quick else "sample" if arguments.sample else "full"
    target: Checkpoint | Path = path if ours else open_path(path)
    found, read, proven = _verify(target, mode, arguments, console)
    if mode != "quick" and not proven and not found:
        console.note("no digests: only the structure was verified; `holdfast ckpt adopt --digest` adds them")
    value = {
        "path": str(path),
        "mode": mode,
        "ok": not found,
        "proven": proven and mode == "full" and not found,
        "bytes": read,
        "findings": [_as_json(finding) for finding in found],
    }
    console.result(value, _lines(path, mode, found, read, proven=proven))
    return code_of(found)


def _verify(
    target: Checkpoint | Path, mode: str, arguments: argparse.Namespace, console: Console
) -> tuple[list[Finding], int, bool]:
    """Findings, payload bytes that were checked, and whether all tensors have digests."""
    try:
        checkpoint = open_checkpoint(target) if isinstance(target, Path) else target
    except CheckpointError:  # verify() says what is wrong, as a finding
        return verify_checkpoint(target, "quick" if mode != "full" else "full", jobs=arguments.jobs), 0, False
    total = stored_bytes(checkpoint)
    reached = 0

    def progress(done: int, _: int) -> None:
        nonlocal reached
        reached = done

    with console.progress("verify", total if mode == "full" else 0, lambda: reached):
        found = verify_checkpoint(target, "full" if mode == "full" else "quick", progress, jobs=arguments.jobs)
    if mode == "sample":
        sampled, reached = sample(checkpoint, arguments.sample, arguments.seed)
        found = sorted({*found, *sampled})
    return found, reached, digested(checkpoint)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Payload bytes that have digests."""
    return sum(s.span.nbytes for tensor in checkpoint.states.values() for s in tensor.slabs if s.digests)


def sample(checkpoint: Checkpoint, part: float, seed: int) -> tuple[list[Finding], int]:
    """Check about `part` of all chunks, chosen by the seed alone; the faults, and the bytes that were read."""
    chance = random.Random(seed)
    files = Files(checkpoint.root, links=checkpoint.format != "holdfast" or checkpoint.home is not None)
    found, read = [], 0
    try:
        for tensor, slab, at, low, high in _chunks(checkpoint):
            if chance.random() >= part:
                continue
            start, stop = slab.span.offset + low, slab.span.offset + high
            data = bytearray(high - low)
            try:
                files.read_into(slab.span.file, start, data)
                read += len(data)
                kind, message = "digest", "a digest differs"
                good = digest(data) == slab.digests[at]
            except CheckpointError as error:
                kind, message, good = "missing", str(error), False
            if not good:
                found.append(Finding(slab.span.file, start, stop, tensor.name, tensor.state, kind, message))
    finally:
        files.close()
    return found, read


def _chunks(checkpoint: Checkpoint) -> Iterator[tuple[TensorState, Slab, int, int, int]]:
    for key in sorted(checkpoint.states):
        tensor = checkpoint.states[key]
        for slab in tensor.slabs:
            offsets = stored_offsets(slab) if slab.digests else [0]
            for at, (low, high) in enumerate(itertools.pairwise(offsets)):
                yield tensor, slab, at, low, high


def code_of(found: list[Finding]) -> int:
    """0, or 3 if all that is wrong is that something is missing, else 2."""
    if not found:
        return 0
    return 3 if all(finding.kind == "missing" for finding in found) else 2


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "file": finding.file,
        "range": [finding.start, finding.stop],
        "name": finding.name,
        "state": finding.state,
        "message": finding.message,
    }


def describe(finding: Finding) -> str:
    """One fault, one line."""
    where = f" bytes {finding.start}-{finding.stop}" if finding.stop else ""
    whose = f" of {finding.name}:{finding.state}" if finding.name else ""
    return f"{finding.kind}: {finding.file or 'checkpoint'}{where}{whose}: {finding.message}"


def _lines(path: Path, mode: str, found: list[Finding], read: int, *, proven: bool) -> list[str]:
    if found:
        count = f"{len(found)} fault{'s' if len(found) > 1 else ''}"
        broken = any(finding.kind != "copies" for finding in found)
        hint = "; next: `holdfast ckpt repair` rebuilds chunks from copies" if code_of(found) == 2 and broken else ""
        return [*(describe(finding) for finding in found), f"{path}: {count}{hint}"]
    how = {"quick": "structure", "sample": f"structure and {human(read)}", "full": f"all {human(read)}"}[mode]
    return [f"{path}: ok ({how if proven or mode == 'quick' else 'structure; no digests'})"]

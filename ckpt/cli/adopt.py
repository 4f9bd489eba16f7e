"""`adopt`: a manifest over somebody's files: they stay where and as they are, and can be verified from then on.

global_step100/            untouched            found by every verb that is given global_step100
global_step100.holdfast/   MANIFEST, COMMIT     with --digest: checksums of every byte, in one read pass
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from ..universal.adopt import adopt
from ..universal.errors import UsageError
from .arguments import Parser
from .console import Console, human
from .source import home_of, open_path, resolve

EXAMPLES: Final = {
    "adopt": """\
  holdfast ckpt adopt checkpoints/global_step100
  holdfast ckpt adopt checkpoints/global_step100 --digest --jobs 4
  holdfast ckpt adopt /read-only/step-100 --out manifests/step-100"""
}


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("path", help="checkpoint of a foreign format: a folder")
    parser.add_argument("--out", metavar="FOLDER", help="where the manifest goes (beside it, as NAME.holdfast)")
    parser.add_argument("--digest", action="store_true", help="read everything once, and keep checksums")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and written")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Adopt."""
    path, ours = resolve(arguments.path, adopted=False)
    if ours:
        raise UsageError("already of our format: there is nothing to adopt", path=str(path))
    checkpoint = open_path(path, adopted=False)
    home = Path(arguments.out) if arguments.out else home_of(path if path.is_file() else checkpoint.root)
    total = sum({s.span: s.span.nbytes for t in checkpoint.states.values() for s in t.slabs}.values())
    pieces = sum(len(tensor.slabs) for tensor in checkpoint.states.values())
    value = {
        "path": str(home),
        "format": checkpoint.format,
        "tensors": len(checkpoint.states),
        "pieces": pieces,
        "bytes_read": total if arguments.digest else 0,
        "digests": arguments.digest,
        "dry_run": arguments.dry_run,
    }
    what = f"{checkpoint.format}, {len(checkpoint.states)} tensors in {pieces} pieces"
    how = f"{human(total)} digested" if arguments.digest else "no digests: --digest adds them"
    if arguments.dry_run:
        console.result(value, [f"would write {home}: {what}, {how}"])
        return 0
    reached = 0

    def progress(done: int, _: int) -> None:
        nonlocal reached
        reached = done

    with console.progress("adopt", total if arguments.digest else 0, lambda: reached):
        adopt(checkpoint, home, digests=arguments.digest, jobs=arguments.jobs, progress=progress)
    console.result(value, [f"{home}: {what}, {how}"])
    return 0

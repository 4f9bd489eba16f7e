"""`slice`: what one rank of a number of ranks holds, as a safetensors file or stream; nothing else is read.

    rank 1 of 4 along dim 0:   w [13, 8]  ──▶  rows [4, 8)      rows by ceil(13 / 4), as DTensor's Shard(0) cuts

The file's header has each shard's place under DCP_SHARDING_INFO, so that all ranks' files in one folder are a
Hugging Face folder of shards. States other than values are named NAME::STATE. Scalars go to every rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..dtypes import ITEM_BYTES
from ..universal.disk import Disk, explained
from ..universal.errors import UsageError
from ..universal.geometry import share, volume
from ..universal.model import Box, Checkpoint, TensorState
from ..universal.read import BLOCK_BYTES, Reader
from ..universal.stheader import build_header
from ..universal.view import is_optimizer
from .arguments import Parser, add_layout
from .console import Console, human
from .source import open_reader

EXAMPLES: Final = {
    "slice": """\
  holdfast ckpt slice run --rank 0 --world 8 --out rank0.safetensors
  holdfast ckpt slice run --rank 3 --world 8 --out - | ssh node3 'cat > rank3.safetensors'
  holdfast ckpt slice run --rank 1 --world 4 --dim 1 --states all --out part.safetensors
  holdfast ckpt slice run --rank 0 --world 2 --out shards/shard-00001-model-00001-of-00001.safetensors"""
}
VALUES: Final = ("weight", "buffer")


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds of a tensor."""

    tensor: TensorState
    name: str
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in self.box)

    @property
    def nbytes(self) -> int:
        return volume(self.box) * ITEM_BYTES[self.tensor.dtype]


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("source", help="checkpoint of any format, or a run's folder")
    parser.add_argument("--rank", type=int, required=True, help="from 0")
    parser.add_argument("--world", type=int, required=True, help="number of ranks")
    parser.add_argument("--dim", type=int, default=0, help="dimension that is cut (0)")
    parser.add_argument("--states", default="values", metavar="S,T", help="values, optimizer, all, or names of states")
    parser.add_argument("--out", required=True, metavar="FILE", help="- is stdout")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    parser.add_argument("--no-verify", action="store_true", help="do not check the digests of what is read")
    add_layout(parser)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Cut, and write."""
    rank, world = arguments.rank, arguments.world
    if world < 1 or not 0 <= rank < world or arguments.dim < 0:
        raise UsageError("a rank is from 0 on and below the world", rank=rank, world=world, dim=arguments.dim)
    if arguments.out == "-" and arguments.json:
        raise UsageError("with --out - the bytes are on stdout: leave out --json")
    with open_reader(arguments, arguments.source) as reader:
        shards = shards_of(reader.checkpoint, arguments.states, rank, world, arguments.dim)
        total = sum(shard.nbytes for shard in shards)
        value = {"path": arguments.out, "rank": rank, "world": world, "tensors": len(shards), "bytes": total}
        text = f"{arguments.out}: rank {rank} of {world}, {len(shards)} tensors, {human(total)}"
        if arguments.dry_run:
            console.result({**value, "dry_run": True}, [f"would write {text}"])
            return 0
        with console.progress("slice", total, lambda: reader.bytes_wanted):
            if arguments.out == "-":
                for piece in stream(reader, shards):
                    sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
                return 0
            write(Path(arguments.out), lambda: stream(reader, shards))
        console.result({**value, "bytes_read": reader.bytes_read}, [text])
    return 0


def shards_of(checkpoint: Checkpoint, wanted: str, rank: int, world: int, dim: int) -> list[Shard]:
    """The rank's part of every tensor that is wanted, aligned tensors first."""
    states = wanted.split(",")
    known = {tensor.state for tensor in checkpoint.states.values()} | {"values", "optimizer", "all"}
    for state in states:
        if state not in known:
            raise UsageError("no such state", state=state, known=sorted(known))
    found = []
    for tensor in checkpoint.states.values():
        kind = "optimizer" if is_optimizer(tensor) or tensor.state == "fp32" else "values"
        if tensor.role == "opaque" or tensor.state == "rng" or not {tensor.state, kind, "all"} & set(states):
            continue
        name = tensor.name if tensor.state in VALUES else f"{tensor.name}::{tensor.state}"
        found.append(Shard(tensor, name, share(tensor.shape, dim, rank, world)))
    if not found:
        raise UsageError("nothing of that is in the checkpoint", states=wanted)
    return sorted(found, key=lambda shard: -ITEM_BYTES[shard.tensor.dtype])


def stream(reader: Reader, shards: list[Shard]) -> Iterator[bytes | memoryview]:
    """A safetensors file: its header, and its tensors in pieces of a few MiB."""
    rows = [(shard.name, shard.tensor.dtype, shard.shape, shard.nbytes) for shard in shards]
    places = {shard.name: {"saved_offsets": [low for low, _ in shard.box]} for shard in shards}
    yield build_header(rows, {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})
    for shard in shards:
        for box in rows_of(shard):
            yield memoryview(reader.read(*shard.tensor.key, box))


def rows_of(shard: Shard) -> Iterator[Box]:
    """The shard's box cut along its first dimension into pieces of about a block."""
    if not shard.nbytes:
        return
    if not shard.box:
        yield ()
        return
    (first, last), rest = shard.box[0], shard.box[1:]
    rows = max(1, BLOCK_BYTES // (shard.nbytes // (last - first)))
    for low in range(first, last, rows):
        yield ((low, min(low + rows, last)), *rest)


def write(target: Path, pieces: Callable[[], Iterator[bytes | memoryview]]) -> None:
    """A file that appears whole, durable, or not at all."""
    if os.path.lexists(target):
        raise UsageError("the target is there already: choose another name, or remove it", target=str(target))
    disk = Disk()
    hidden = target.absolute().parent / f".{target.name}.tmp-{os.urandom(4).hex()}"
    try:
        with explained(target, "writing a slice"):
            fd = disk.open(hidden)
            try:
                at = 0
                for piece in pieces():
                    disk.pwrite(fd, memoryview(piece), at)
                    at += memoryview(piece).nbytes
                disk.fsync(fd)
            finally:
                os.close(fd)
            disk.rename(hidden, target)
            disk.fsync_directory(target.absolute().parent)
    except BaseException:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise

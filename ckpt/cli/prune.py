"""`prune`: a checkpoint without what is not needed any more; or a run's folder without its old checkpoints.

    prune CHECKPOINT OUT [--drop optimizer,rng]      a new, smaller checkpoint; the old one stays
    prune RUNS --keep-last 3 [--keep-best 2 --metric trainer.loss]     removes; the newest is never removed

A checkpoint that is removed becomes unreadable in one rename before its first file goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..universal.errors import CheckpointError, UsageError
from ..universal.latest import POINTER, Candidate, committed, plan_prune, prune, read_latest
from ..universal.model import Checkpoint, Region, TensorState
from ..universal.open import open_checkpoint
from ..universal.plan import Wanted
from ..universal.read import Reader
from ..universal.view import View, is_optimizer
from . import transfer
from .arguments import Parser, add_layout, add_writing
from .console import Console, human
from .merge import metric_of, step_of
from .source import open_reader

EXAMPLES: Final = {
    "prune": """\
  holdfast ckpt prune run/step-00000100 small
  holdfast ckpt prune checkpoints/global_step100 weights --drop optimizer,masters,rng
  holdfast ckpt prune run --keep-last 3 --dry-run
  holdfast ckpt prune run --keep-last 2 --keep-best 3 --metric trainer.loss --best min"""
}
DROPS: Final = ("optimizer", "masters", "rng")


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("source", help="a checkpoint; or a run's folder, with --keep-last")
    parser.add_argument("target", nargs="?", help="the smaller checkpoint to make")
    parser.add_argument("--drop", default="optimizer", metavar="A,B", help="optimizer, masters, rng (optimizer)")
    parser.add_argument("--keep-last", type=int, metavar="N", help="remove all but the newest N of a run")
    parser.add_argument("--keep-best", type=int, default=0, metavar="N", help="and the best N, by --metric")
    parser.add_argument("--metric", default="", metavar="KEY", help="a number in the metadata, like trainer.loss")
    parser.add_argument("--best", choices=("min", "max"), default="min", help="which is best (min)")
    add_layout(parser)
    add_writing(parser)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Prune a checkpoint, or a run."""
    if arguments.keep_last is not None:
        if arguments.target is not None:
            raise UsageError("--keep-last works on a run's folder, and makes nothing", target=arguments.target)
        return _run_folder(arguments, console)
    if arguments.target is None:
        raise UsageError("a target for the smaller checkpoint, or --keep-last N for a run's folder")
    drops = arguments.drop.split(",")
    if not set(drops) <= set(DROPS):
        raise UsageError("not something to drop", drop=arguments.drop, known=list(DROPS))
    with open_reader(arguments, arguments.source) as reader, Pruned(reader, drops) as pruned:
        job = transfer.Job(target=Path(arguments.target), wanted=Wanted(weights_only=True))
        return transfer.run(pruned, job, arguments, console)


class Pruned(View):
    """A checkpoint without some of its states."""

    def __init__(self, reader: Reader, drops: Sequence[str]) -> None:
        source = reader.checkpoint
        states = {key: t for key, t in source.states.items() if not _dropped(t, drops, source)}
        names = {name for name, _ in states}
        kept = dict(source.completeness)
        groups, steps = source.groups, source.steps
        if "optimizer" in drops:
            groups, steps = (), {}
            kept["optimizer"] = "absent"
        if "rng" in drops:
            kept["rng"] = "absent"
        aliases = {alias: owner for alias, owner in source.aliases.items() if owner in names}
        found = replace(source, states=states, aliases=aliases, groups=groups, steps=steps, completeness=kept)
        super().__init__(found, [reader])

    def fill(self, tensor: TensorState, region: Region, out: memoryview) -> None:
        self.sources[0].read(tensor.name, tensor.state, region, out)


def _dropped(tensor: TensorState, drops: Sequence[str], checkpoint: Checkpoint) -> bool:
    if tensor.state == "rng":
        return "rng" in drops
    if tensor.state == "fp32":  # where it is the only value, it is the weight
        return "masters" in drops and (tensor.name, "weight") in checkpoint.states
    return is_optimizer(tensor) and "optimizer" in drops


# ---- a run's folder -----------------------------------------------------------------------------------------


def _run_folder(arguments: argparse.Namespace, console: Console) -> int:
    folder = Path(arguments.source)
    if not folder.is_dir():
        raise UsageError("no such folder", path=str(folder))
    if arguments.keep_last < 1:
        raise UsageError("the newest checkpoint always stays: --keep-last 1 or more", keep_last=arguments.keep_last)
    if arguments.keep_best and not arguments.metric:
        raise UsageError("--keep-best needs a --metric")
    found, sizes = [], {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink() or not path.is_dir() or not committed(path):
            continue
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            console.note(f"{path.name} stays: it cannot be opened ({error.message})")
            continue
        step = step_of(checkpoint)
        if step is None:
            console.note(f"{path.name} stays: it does not say its step")
            continue
        sizes[path.name] = sum(facts.nbytes for facts in checkpoint.files.values())
        metric = metric_of(checkpoint, arguments.metric) if arguments.metric else None
        found.append(Candidate(path.name, int(step), metric))
    protected = {read_latest(folder).name} if (folder / POINTER).is_file() else set()
    names = plan_prune(
        found, keep_last=arguments.keep_last, keep_best=arguments.keep_best, best=arguments.best, protected=protected
    )
    if not arguments.dry_run:
        prune(folder, names)
    freed = sum(sizes[name] for name in names)
    kept = [one.name for one in found if one.name not in names]
    value = {"path": str(folder), "removed": names, "kept": kept, "bytes": freed, "dry_run": arguments.dry_run}
    word = "would remove" if arguments.dry_run else "removed"
    lines = [f"{word} {name} ({human(sizes[name])})" for name in names]
    console.result(value, [*lines, f"{folder}: {word} {len(names)}, {human(freed)}; {len(kept)} stay"])
    return 0

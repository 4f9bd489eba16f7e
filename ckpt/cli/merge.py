"""`merge`: several checkpoints of one model into one, averaged with weights of many kinds.

    a, b, c ─▶ weights (uniform, given, by loss, step, score, ...) ─▶ streaming average ─▶ any target

Steps come from the checkpoints; losses and scores from --values, or from a place in the metadata (--metric).
Optimizer moments are left out unless --moments average. The kernels are in ../universal/weights.py.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..universal import weights as kernels
from ..universal.errors import UsageError
from ..universal.merge import INT_POLICIES, MERGE_BYTES, Merged, lora_note, same_identity
from ..universal.model import Checkpoint
from ..universal.plan import Wanted
from ..universal.read import Reader
from . import transfer
from .arguments import Parser, add_layout, add_writing, floats
from .console import Console
from .source import open_reader

EXAMPLES: Final = {
    "merge": """\
  holdfast ckpt merge run/step-00000100 run/step-00000200 run/step-00000300 --out soup
  holdfast ckpt merge a b c --out soup --weights explicit --values 0.5,0.3,0.2
  holdfast ckpt merge run/step-* --out soup --weights ema --beta 0.9
  holdfast ckpt merge run/step-* --out soup --weights last-k --k 3 --to hf
  holdfast ckpt merge a b c --out soup --weights loss-exp --penalty 2 --values 1.91,1.87,1.85
  holdfast ckpt merge a b c --out soup --weights loss-power --metric trainer.loss

weights, all scaled to sum 1 (a: --penalty; 0 is uniform):
  uniform       1                                    explicit     --values
  ema           (1 - beta) beta^(number of newer)    last-k       the --k newest, uniformly
  loss-power    (1 / loss)^a                         loss-exp     exp(-a (loss - min) / (max - min))
  step-power    step^a                               step-exp     exp(a step / max)
  score-power   score^a"""
}


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("sources", nargs="+", help="two or more checkpoints of one model, of any formats")
    parser.add_argument("--out", required=True, metavar="TARGET", help="what to make; must not be there yet")
    parser.add_argument("--to", default="holdfast", metavar="TARGET", help="format, as in convert")
    parser.add_argument("--weights", choices=kernels.MODES, default="uniform", help="how much each counts")
    parser.add_argument("--values", type=floats, metavar="X,Y,..", help="weights, losses, steps or scores, in order")
    parser.add_argument("--metric", default="", metavar="KEY", help="where losses or scores are in the metadata")
    parser.add_argument("--penalty", type=float, default=1.0, metavar="A", help="of the metric kernels (1)")
    parser.add_argument("--beta", type=float, default=0.9, help="of ema (0.9)")
    parser.add_argument("--k", type=int, default=0, help="of last-k")
    parser.add_argument("--moments", choices=("drop", "average"), default="drop", help="optimizer states (drop)")
    parser.add_argument("--masters", action="store_true", help="keep averaged float32 master copies, too")
    parser.add_argument("--int-policy", choices=INT_POLICIES, default="equal", help="integers that differ (refuse)")
    add_layout(parser)
    add_writing(parser)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Merge."""
    if len(arguments.sources) < 2:
        raise UsageError("a merge takes two or more checkpoints", given=len(arguments.sources))
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(open_reader(arguments, path)) for path in arguments.sources]
        if same_identity(readers):
            console.note("one of the checkpoints is given twice: it counts twice")
        weights = weigh(arguments, [reader.checkpoint for reader in readers])
        about = {
            "weights": arguments.weights,
            "sources": sorted(
                (
                    {"id": r.checkpoint.id, "step": step_of(r.checkpoint), "weight": w}
                    for r, w in zip(readers, weights, strict=True)
                ),
                key=lambda source: (source["step"] or 0.0, str(source["id"]), source["weight"]),
            ),
        }
        merged = stack.enter_context(
            Merged(
                readers,
                weights,
                moments=arguments.moments == "average",
                masters=arguments.masters,
                int_policy=arguments.int_policy,
                about=about,
            )
        )
        _notes(merged, readers, arguments, console)
        parents = tuple(r.checkpoint.id for r in readers if r.checkpoint.id)
        wanted = Wanted(memory_extra=arguments.jobs * 6 * MERGE_BYTES, weights_only=arguments.moments == "drop")
        read = sum(_read_bytes(merged, reader) for reader in readers)
        out = Path(arguments.out)
        job = transfer.Job(target=out, spec=arguments.to, wanted=wanted, parents=parents, bytes_read=read)
        return transfer.run(merged, job, arguments, console)


def _notes(merged: Merged, readers: Sequence[Reader], arguments: argparse.Namespace, console: Console) -> None:
    note = lora_note(merged.checkpoint)
    if note:
        console.note(note)
    if arguments.moments == "average":
        console.note("averaged moments are a starting point, not the state of any optimizer")
    elif any(reader.checkpoint.groups for reader in readers):
        console.note("optimizer states are left out (--moments average keeps an average)")


def _read_bytes(merged: Merged, reader: Reader) -> int:
    have = reader.checkpoint
    masters = {name for name, state in have.states if state == "fp32"}
    total = 0
    for name, state in merged.checkpoint.states:
        source = "fp32" if state == "weight" and name in masters else state
        found = have.states.get((name, source))
        total += found.nbytes if found is not None else 0
    return total


def weigh(arguments: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> list[float]:
    """The weight of each checkpoint."""
    mode, count = arguments.weights, len(checkpoints)
    if mode == "uniform":
        return kernels.normalized([1.0] * count)
    if mode == "explicit":
        if arguments.values is None:
            raise UsageError("--weights explicit needs --values, one each")
        return kernels.explicit(arguments.values, count)
    if mode in ("ema", "last-k"):
        steps = _values(arguments, checkpoints, "step")
        return kernels.ema(steps, arguments.beta) if mode == "ema" else kernels.last(steps, arguments.k)
    return kernels.kernel(mode, _values(arguments, checkpoints, kernels.KERNELS[mode][0]), arguments.penalty)


def _values(arguments: argparse.Namespace, checkpoints: Sequence[Checkpoint], what: str) -> list[float]:
    if arguments.values is not None:
        given: list[float] = arguments.values
        if len(given) != len(checkpoints):
            raise UsageError("one value for each checkpoint", values=len(given), checkpoints=len(checkpoints))
        return given
    found = []
    for checkpoint, path in zip(checkpoints, arguments.sources, strict=True):
        value = metric_of(checkpoint, arguments.metric) if arguments.metric else None
        if value is None and what == "step" and not arguments.metric:
            value = step_of(checkpoint)
        if value is None:
            place = f"at {arguments.metric} " if arguments.metric else ""
            raise UsageError(f"no {what} {place}in the metadata: give --values or --metric", checkpoint=path)
        found.append(value)
    return found


def metric_of(checkpoint: Checkpoint, key: str) -> float | None:
    """A number in the metadata, by its dotted place."""
    value: Any = checkpoint.metadata
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def step_of(checkpoint: Checkpoint) -> float | None:
    """The step of a checkpoint: the trainer's, else the optimizer's."""
    for key in ("trainer.step", "trainer.global_step", "trainer.global_steps"):
        value = metric_of(checkpoint, key)
        if value is not None:
            return value
    return float(max(checkpoint.steps.values())) if checkpoint.steps else None

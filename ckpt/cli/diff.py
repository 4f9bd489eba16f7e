"""`diff`: what differs between two checkpoints of any formats and layouts; 0 if nothing does, else 2.

    A (--layout) ──┐
                   ├─▶ per tensor and state: bits, ulps, max |a - b|, cosine ─▶ table, worst first
    B ─────────────┘

With --ulp or --abs a tensor within that distance counts as equal. Metadata is compared unless told otherwise.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from ..universal.diff import TensorDiff, compare, details
from ..universal.errors import UsageError
from ..universal.read import Reader
from ..universal.view import is_optimizer
from .arguments import Parser, add_layout
from .console import Console, table
from .source import open_path, open_reader

EXAMPLES: Final = {
    "diff": """\
  holdfast ckpt diff run/step-00000100 run/step-00000200
  holdfast ckpt diff checkpoints/global_step100 run/step-00000100 --tensors-only
  holdfast ckpt diff hf-model megatron-run --layout llama-megatron --set kv_heads=8 --abs 1e-6
  holdfast ckpt diff a b --weights-only --json | jq .tensors"""
}
SHOWN_MAX: Final = 40


def add(parser: Parser, verb: str) -> None:
    """Arguments of the verb."""
    del verb
    parser.add_argument("a", help="a checkpoint; --layout applies to this one")
    parser.add_argument("b", help="another")
    parser.add_argument("--ulp", type=int, default=0, metavar="N", help="equal if at most this many floats apart")
    parser.add_argument("--abs", type=float, default=0.0, metavar="X", help="equal if at most this far apart")
    parser.add_argument("--weights-only", action="store_true", help="leave out optimizer states")
    parser.add_argument("--tensors-only", action="store_true", help="do not compare ties, groups, steps, metadata")
    parser.add_argument("--common", action="store_true", help="leave out what only one of them has")
    parser.add_argument("--all", action="store_true", help="list equal tensors too")
    parser.add_argument("--no-verify", action="store_true", help="do not check the digests of what is read")
    add_layout(parser)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Compare, show, and say by the exit code."""
    if arguments.ulp < 0 or not arguments.abs >= 0:
        raise UsageError("a tolerance below zero")
    with open_reader(arguments, arguments.a) as a, Reader(open_path(arguments.b), verify=not arguments.no_verify) as b:
        total = a.checkpoint.nbytes + b.checkpoint.nbytes
        with console.progress("diff", total, lambda: a.bytes_wanted + b.bytes_wanted):
            found = compare(a, b, jobs=arguments.jobs)
        if arguments.weights_only:
            states = {key: t for r in (a, b) for key, t in r.checkpoint.states.items()}
            found = [d for d in found if d.key not in states or not is_optimizer(states[d.key])]
        if arguments.common:
            found = [d for d in found if not d.kind.startswith("only_")]
        other = [] if arguments.tensors_only else list(details(a.checkpoint, b.checkpoint))
    unequal = [d for d in found if not accepted(d, arguments)]
    same = not unequal and not other
    value = {
        "a": arguments.a,
        "b": arguments.b,
        "same": same,
        "counts": dict(Counter(d.kind for d in found)),
        "tensors": [_as_json(d) for d in (found if arguments.all else unequal)],
        "other": other,
    }
    console.result(value, _lines(found, found if arguments.all else unequal, other, same=same))
    return 0 if same else 2


def accepted(diff: TensorDiff, arguments: argparse.Namespace) -> bool:
    """Whether a tensor counts as equal."""
    if diff.kind != "differs":
        # Without a tolerance bits are what counts; of two dtypes only values can.
        return diff.kind == "same" or (diff.kind == "close" and bool(diff.note or arguments.ulp or arguments.abs))
    ulp: int = arguments.ulp
    apart: float = arguments.abs
    return (ulp > 0 and diff.max_ulp is not None and diff.max_ulp <= ulp) or (apart > 0 and diff.max_abs <= apart)


def _as_json(diff: TensorDiff) -> dict[str, Any]:
    return {
        "name": diff.name,
        "state": diff.state,
        "kind": diff.kind,
        "elements": diff.elements,
        "differing": diff.differing,
        "first": diff.first,
        "max_abs": diff.max_abs,
        "max_ulp": diff.max_ulp,
        "cosine": diff.cosine,
        "note": diff.note,
    }


def _row(diff: TensorDiff) -> tuple[str, ...]:
    if diff.kind in ("only_a", "only_b", "shape"):
        return (f"{diff.name}:{diff.state}", diff.kind.replace("_", " in "), "", "", "", "", diff.note)
    return (
        f"{diff.name}:{diff.state}",
        diff.kind,
        f"{diff.differing}/{diff.elements}",
        f"{diff.max_abs:.3g}",
        "" if diff.max_ulp is None else str(diff.max_ulp),
        "" if diff.cosine is None else f"{diff.cosine:.9g}",
        diff.note,
    )


def _lines(found: Sequence[TensorDiff], listed: Sequence[TensorDiff], other: list[str], *, same: bool) -> list[str]:
    lines: list[str] = []
    if listed:
        worst = sorted(listed, key=lambda d: (not d.kind.startswith("only"), d.kind != "shape", -d.max_abs, d.key))
        head = ("tensor:state", "", "differing", "max |a-b|", "max ulp", "cosine", "")
        lines += table(head, [_row(diff) for diff in worst[:SHOWN_MAX]])
        if len(worst) > SHOWN_MAX:
            lines.append(f"... and {len(worst) - SHOWN_MAX} more; --json lists all")
    lines += other[:SHOWN_MAX]
    if len(other) > SHOWN_MAX:
        lines.append(f"... and {len(other) - SHOWN_MAX} more; --json lists all")
    counts = Counter(diff.kind for diff in found)
    text = ", ".join(f"{count} {kind.replace('_', ' in ')}" for kind, count in sorted(counts.items()))
    return [*lines, f"{'equal' if same else 'different'}: {len(found)} tensors: {text or 'none'}"]

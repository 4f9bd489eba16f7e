"""`holdfast ckpt`: look at, check, convert, compare and merge checkpoints of any framework. Imports no torch.

    app        finds the verb, turns errors into one line and an exit code
    arguments  what verbs have in common           console   what people and programs see
    source     opens any format, with a mapping    transfer  writes any format, or says what it would do
    inspect verify adopt convert slice diff merge repair prune    one verb, or a few alike, a module

Stands alone: needs neither a trainer of ours nor the framework that wrote the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run `holdfast ckpt ARGV`; the exit code."""
    from .app import run

    return run(argv)

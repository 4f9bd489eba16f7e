"""Which units of a model are its blocks, and which its edges. Pure.

    units   0  1 2 3 4 5 6  7 8        kinds: what names, shapes and types of tensors a unit has, as one word
    kinds   a  b b b b b b  c d        blocks: the longest run of one kind;  edges: what is before and after
            └┘ └── blocks ─┘ └─┘       (embedding, and final norm with head)

Blocks can take each other's place: in an order of visits, in an average, as a copy. Edges cannot. Where the kinds
come from is state.py's business. Invariant: same kinds, same blocks, on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Final

NO_STATE: Final = ""
"""Kind of a unit without parameters and buffers. It is no block, and ends no run of them."""


def longest_run(kinds: Sequence[str]) -> tuple[int, ...]:
    """Units of the longest run of one kind, the first of several; empty if no two that follow each other are alike."""
    listed = [unit for unit, kind in enumerate(kinds) if kind != NO_STATE]
    runs = [tuple(run) for _, run in groupby(listed, key=lambda unit: kinds[unit])]
    longest: tuple[int, ...] = max(runs, key=len, default=())
    return longest if len(longest) > 1 else ()

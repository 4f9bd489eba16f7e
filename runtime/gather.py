"""What the step's barrier tells: one vector per rank in, sums in microbatch order and the norm in name order out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from holdfast.proto.ids import NO_STEP

NO_GRADIENT = -1.0
"""Stands for the norm of a gradient that does not exist."""


HALVES = 2
"""A rank's vector opens with the steps that its snapshot halves hold."""


def newest_common(held: Sequence[Sequence[int]]) -> int:
    """Newest step that every rank holds; NO_STEP if there is none.

    All ranks overwrite the half that does not hold it, so all begin the same snapshot at the same time. A rank
    that decided from its own halves alone could fall into step with nobody: two ranks that each skip every
    second snapshot, in turn, protect nothing.
    """
    common = set(held[0]).intersection(*held[1:]) - {NO_STEP}
    return max(common, default=NO_STEP)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the barrier told: sums in microbatch order, the norm in name order, so equal in every layout."""

    loss: float
    count: float
    tokens: int
    norm: float
    kept: int
    """Newest step that every rank holds whole: the half that holds it must not be overwritten."""

    @staticmethod
    def of(rows: list[torch.Tensor], names: list[list[str]], microbatches: int, tied: frozenset[str]) -> Gathered:
        """Combine one vector per rank. A tied parameter counts once; a replica's norms are the first's."""
        head = merge([row[HALVES : HALVES + 3 * microbatches] for row in rows])
        losses, counts, tokens = (head[i * microbatches : (i + 1) * microbatches] for i in range(3))
        norms: dict[str, float] = {}
        for row, listed in zip(rows, names, strict=True):
            values = row[HALVES + 3 * microbatches :].tolist()
            for name, value in zip(listed, values[: len(listed)], strict=True):
                if name not in tied:
                    norms.setdefault(name, value)
        squares = [norms[name] ** 2 for name in sorted(norms) if norms[name] != NO_GRADIENT]
        kept = newest_common([[int(step) for step in row[:HALVES].tolist()] for row in rows])
        return Gathered(
            math.fsum(losses) / math.fsum(counts),
            math.fsum(counts),
            int(math.fsum(tokens)),
            math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf,
            kept,
        )


def merge(rows: list[torch.Tensor]) -> list[float]:
    """Each position's value from the rank that knows it (the others hold nan)."""
    stacked = torch.stack(rows)
    merged = stacked[0].clone()
    for row in stacked[1:]:
        merged = torch.where(torch.isnan(merged), row, merged)
    values: list[float] = merged.tolist()
    return values

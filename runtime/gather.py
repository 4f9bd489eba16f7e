"""What the step's barrier tells: one vector per rank in, sums in microbatch order and the norm in name order out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from holdfast.proto.ids import NO_STEP

NO_GRADIENT = -1.0
"""Stands for the norm of a gradient that does not exist."""


STEP_MAX = 1 << 52
"""The largest step that a float64 of the step's barrier carries exactly; stands for "no parity to keep here"."""
KEPT = 6
"""A rank's vector opens with what it keeps: the steps of its two halves; placement and step of its host's parity; the
step from which on a checkpoint is due; and the newest step that it knows to be protected under that placement."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What recovery can count on: the same numbers on every rank."""

    sealed: int = int(NO_STEP)
    """Newest step that every rank holds whole."""
    protected: int = int(NO_STEP)
    """Newest step for which every host holds its parity."""
    placement: int = 0
    """Number of the placement of that parity; 0: the job has none."""
    due: int = int(NO_STEP)
    """The first step from this one on that all hold is not to be overwritten before the saver has copied it."""

    def protected_under(self) -> int:
        """Placement under which something is protected; 0 for none."""
        return self.placement if self.protected != NO_STEP else 0

    @staticmethod
    def of(rows: Sequence[Sequence[int]], placement: int, before: Kept | None = None) -> Kept:
        """From what each rank keeps; `before`: what was told last in this generation.

        Parity counts once every host keeps it under this placement, of a step that the ranks still hold. Hosts leave
        steps out, each others: only if the newest is the same on all is it known to be on all. Until it is again, the
        one before is, which nobody overwrites.
        """
        sealed = newest_common([row[:2] for row in rows])
        known = [row[5] for row in rows if len(row) > 5]
        known += [before.protected] if before is not None and before.placement == placement else []
        protected = _protected(rows, placement, max(known, default=int(NO_STEP)))
        # Ranks look at their host's page a moment apart, and hosts have pages of their own: rank 0's counts for all.
        due = rows[0][4] if rows and len(rows[0]) > 4 else int(NO_STEP)
        return Kept(sealed, protected, placement, due)


def _protected(rows: Sequence[Sequence[int]], placement: int, known: int) -> int:
    """Newest step that all ranks hold and all hosts have parity of; NO_STEP for none.

    Hosts tell the newest step of theirs only. The smallest of these need not be one that all have: a host may leave
    steps out. So a step counts once all tell the same, and for as long as none tells an older one: its parity is
    kept until a newer step counts.
    """
    if placement == 0 or any(row[2] != placement for row in rows):
        return int(NO_STEP)
    held = set(rows[0][:2]).intersection(*(row[:2] for row in rows)) - {int(NO_STEP)}
    told = {row[3] for row in rows if row[3] < STEP_MAX} or held
    counting = {min(told)} if len(told) == 1 else set()
    if known != NO_STEP and min(told, default=int(NO_STEP)) >= known:
        counting.add(known)
    return max(counting & held, default=int(NO_STEP))


def newest_common(held: Sequence[Sequence[int]]) -> int:
    """Newest step that every rank holds; NO_STEP if there is none."""
    common = set(held[0]).intersection(*held[1:]) - {NO_STEP}
    return max(common, default=NO_STEP)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the barrier told: sums in microbatch order, the norm in name order, so equal in every layout."""

    loss: float
    count: float
    tokens: int
    norm: float
    kept: Kept

    @staticmethod
    def of(
        rows: list[torch.Tensor],
        names: list[list[str]],
        microbatches: int,
        tied: frozenset[str],
        placement: int,
        before: Kept | None = None,
    ) -> Gathered:
        """Combine one vector per rank. A tied parameter counts once; a replica's norms are the first's."""
        head = merge([row[KEPT : KEPT + 3 * microbatches] for row in rows])
        losses, counts, tokens = (head[i * microbatches : (i + 1) * microbatches] for i in range(3))
        norms: dict[str, float] = {}
        for row, listed in zip(rows, names, strict=True):
            values = row[KEPT + 3 * microbatches :].tolist()
            for name, value in zip(listed, values[: len(listed)], strict=True):
                if name not in tied:
                    norms.setdefault(name, value)
        squares = [norms[name] ** 2 for name in sorted(norms) if norms[name] != NO_GRADIENT]
        kept = Kept.of([[int(value) for value in row[:KEPT].tolist()] for row in rows], placement, before)
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

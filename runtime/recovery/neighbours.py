"""Rebuilding a lost stage from its neighbours (CheckFree): which tensor comes from where, as values. Pure.

    units    0 | 1 2 | 3 4 | 5 6 | 7        edges: 0 and 7;  blocks: 1..6, the longest run of units of one kind
    stages        S1    S2    S3            S2 lost, even:   3 = (w1*1 + w3*5)/(w1+w3),  4 = (w1*2 + w3*6)/(w1+w3)
                                            S1 lost:         1 = copy of 3,  2 = copy of 4
                                            uneven, or a neighbour is lost too: by depth, between nearest live layers
    swapped stages (CheckFree+)             S1 and S2, and the last two, are copied from each other (pipeline/swap.py)

    plan_rebuild(layout, rank, live, norms) ──▶ Copy | Average per unit ──▶ combine(recipe, fetch) ──▶ tensors

The method is that of "All is Not Lost: LLM Recovery without Checkpoints" (Blagoev et al., 2025); w is the norm of the
stage's last gradient, so more of the neighbour that is less converged. A unit that any live rank hosts is copied from
there as it is, moments too, and that is exact; everything else is an approximation. Not here: whether to do it
(ladder.py), sending (rebuild.py), the optimizer of a rebuilt stage (boost.py). Invariants:

* only live ranks are sources, and every rank that hosts a unit gets the same recipe for it;
* same arguments, same recipes; a weight is never 0, so a sum of weights is not either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Literal

from holdfast.proto.errors import ConfigError

from ..pipeline.blocks import NO_STATE, longest_run
from ..pipeline.swap import partner

FLOOR: Final = 1e-4
"""Added to every weight: a stage whose gradient is 0 counts a little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourOptions:
    """The method's numbers; defaults are the paper's, as its code has them.

    A weight is norm ** exponent, of the gradient "after" or "before" clipping. The learning rate of a rebuilt stage is
    multiplied by `lr_factor`, for good or going back to 1 over `lr_decay_steps`; it does not grow when a stage is lost
    again. `partners`: of swapped stages the second and the last but one are a "copy" of the stage that they change
    places with, or an "average" like those in the middle.
    """

    exponent: float = 1.0
    clip: Literal["after", "before"] = "after"
    lr_factor: float = 1.1
    lr_decay_steps: int | None = None
    partners: Literal["copy", "average"] = "copy"

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 2:
            raise ConfigError(f"neighbours: exponent is 0, 1 or 2, got {self.exponent}")
        if self.clip not in ("after", "before"):
            raise ConfigError(f"neighbours: clip is 'after' or 'before', got {self.clip!r}")
        if not self.lr_factor > 0:
            raise ConfigError(f"neighbours: lr_factor must be above 0, got {self.lr_factor}")
        if self.lr_decay_steps is not None and self.lr_decay_steps < 1:
            raise ConfigError(f"neighbours: lr_decay_steps must be at least 1, got {self.lr_decay_steps}")

        if self.partners not in ("copy", "average"):
            raise ConfigError(f"neighbours: partners is 'copy' or 'average', got {self.partners!r}")

    def factor(self, steps: int) -> float:
        """What multiplies the learning rate in the step after `steps` steps since the rebuild."""
        if self.lr_decay_steps is None:
            return self.lr_factor
        return 1.0 + (self.lr_factor - 1.0) * max(0.0, 1.0 - steps / self.lr_decay_steps)

    def weight(self, norm: float) -> float:
        """Of a stage whose last gradient had this norm."""
        return float(norm**self.exponent) + FLOOR


@dataclass(frozen=True, slots=True)
class Copy:
    """`unit` becomes what `from_unit` is on `from_rank`. `exact`: it is the same unit, and its moments come with it."""

    unit: int
    from_unit: int
    from_rank: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Term:
    """One addend: what `unit` is on `rank`, times `weight`."""

    unit: int
    rank: int
    weight: float


@dataclass(frozen=True, slots=True)
class Average:
    """`unit` becomes the sum of its terms, divided by the sum of their weights."""

    unit: int
    terms: tuple[Term, ...]


Recipe = Copy | Average


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How a rank gets its units; `missing` have no source among live ranks."""

    recipes: tuple[Recipe, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which kind each unit is, and which ranks host it. Units of one kind have tensors of the same names and shapes."""

    kinds: tuple[str, ...]
    holders: tuple[tuple[int, ...], ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The longest run of units of one kind."""
        return longest_run(self.kinds)

    @property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """The blocks, cut where other ranks host them: one a stage (several, where a rank hosts several chunks)."""
        return tuple(tuple(run) for _, run in groupby(self.blocks, key=lambda unit: self.holders[unit]))

    def hosted(self, rank: int) -> tuple[int, ...]:
        """Units with state that `rank` hosts."""
        return tuple(u for u, ranks in enumerate(self.holders) if rank in ranks and self.kinds[u] != NO_STATE)


def plan_rebuild(
    layout: Layout,
    rank: int,
    live: Collection[int],
    norms: Mapping[int, float],
    options: NeighbourOptions | None = None,
    *,
    swapped: bool = False,
) -> Rebuild:
    """How lost `rank` gets its units from the `live` ranks.

    `norms`: unit -> norm of its last gradient. A stage that has none yet counts as the average of the others.
    """
    planner = _Planner(layout, frozenset(live) - {rank}, norms, options or NeighbourOptions(), swapped)
    return planner.plan(layout.hosted(rank))


class _Planner:
    """One call of plan_rebuild."""

    def __init__(
        self,
        layout: Layout,
        live: frozenset[int],
        norms: Mapping[int, float],
        options: NeighbourOptions,
        swapped: bool,
    ) -> None:
        self._live = live
        self._layout = layout
        self._segments = layout.segments
        self._norms = norms
        self._options = options
        self._swapped = swapped and options.partners == "copy"
        self._depth = {unit: depth for depth, unit in enumerate(layout.blocks)}
        self._there = [self._holder(segment[0]) is not None for segment in self._segments]

    def plan(self, units: Sequence[int]) -> Rebuild:
        recipes: dict[int, Recipe] = {}
        for unit in units:
            holder = self._holder(unit)
            if holder is not None:
                recipes[unit] = Copy(unit, unit, holder, exact=True)
        for index, segment in enumerate(self._segments):
            if segment[0] in units and segment[0] not in recipes:
                recipes |= {recipe.unit: recipe for recipe in self._segment(index)}
        missing = tuple(unit for unit in units if unit not in recipes)
        return Rebuild(tuple(recipes[unit] for unit in sorted(recipes)), missing)

    def _holder(self, unit: int) -> int | None:
        return min((rank for rank in self._layout.holders[unit] if rank in self._live), default=None)

    def _source(self, unit: int) -> int:
        holder = self._holder(unit)
        assert holder is not None
        return holder

    def _segment(self, index: int) -> list[Recipe]:
        """A stage without a live holder: from the nearest live ones on its two sides."""
        mine = self._segments[index]
        other = partner(index, len(self._segments)) if self._swapped else None
        if other is not None and self._there[other]:
            return self._copies(mine, self._segments[other])
        left = max((i for i in range(index) if self._there[i]), default=None)
        right = min((i for i in range(index + 1, len(self._segments)) if self._there[i]), default=None)
        if left is None and right is None:
            return []
        if left is None or right is None:
            return self._copies(mine, self._segments[left if right is None else right])  # type: ignore[index]
        weights = self._weights(left, right)
        before, after = self._segments[left], self._segments[right]
        beside = (left, right) == (index - 1, index + 1)
        if beside and len(before) == len(mine) == len(after):
            pairs = zip(mine, before, after, strict=True)
            return [self._average(unit, ((a, weights[0]), (b, weights[1]))) for unit, a, b in pairs]
        return self._interpolated(mine, before[-1], after[0], weights)

    def _copies(self, mine: Sequence[int], theirs: Sequence[int]) -> list[Recipe]:
        """Layer j of layer j, or of the one that is as deep in its stage if that has another number of them."""
        pairs = [(unit, theirs[j * len(theirs) // len(mine)]) for j, unit in enumerate(mine)]
        return [Copy(unit, other, self._source(other), exact=False) for unit, other in pairs]

    def _interpolated(self, mine: Sequence[int], below: int, above: int, weights: tuple[float, float]) -> list[Recipe]:
        """By depth: the nearer of the two layers counts more. With one layer a stage the same as the average."""
        start, end = self._depth[below], self._depth[above]
        recipes: list[Recipe] = []
        for unit in mine:
            share = (self._depth[unit] - start) / (end - start)
            recipes.append(self._average(unit, ((below, weights[0] * (1 - share)), (above, weights[1] * share))))
        return recipes

    def _average(self, unit: int, terms: Sequence[tuple[int, float]]) -> Average:
        return Average(unit, tuple(Term(other, self._source(other), weight) for other, weight in terms))

    def _weights(self, left: int, right: int) -> tuple[float, float]:
        found = [self._norm(index) for index in (left, right)]
        known = [norm for norm in found if norm is not None]
        default = sum(known) / len(known) if known else 1.0
        first, second = (self._options.weight(default if norm is None else norm) for norm in found)
        return first, second

    def _norm(self, index: int) -> float | None:
        """Of the gradient of a stage's blocks."""
        norms = [self._norms.get(unit) for unit in self._segments[index]]
        if any(norm is None for norm in norms):
            return None
        return float(sum(norm**2 for norm in norms if norm is not None) ** 0.5)


def combine(recipe: Recipe, fetch: Callable[[int, int], Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors of recipe.unit. `fetch(unit, rank)`: name within the unit -> tensor, as a live rank has them."""
    if isinstance(recipe, Copy):
        return dict(fetch(recipe.from_unit, recipe.from_rank))
    fetched = [fetch(term.unit, term.rank) for term in recipe.terms]
    weights = [term.weight for term in recipe.terms]
    return {name: blend([tensors[name] for tensors in fetched], weights) for name in fetched[0]}


def blend(tensors: Sequence[Any], weights: Sequence[float]) -> Any:
    """Weighted average; of what is no floating-point tensor (a counter) the one with the greatest weight.

    Give tensors of 16 bits as float32: the sum is computed in the type that they have.
    """
    if not tensors[0].is_floating_point():
        return tensors[max(range(len(weights)), key=lambda i: weights[i])]
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total / sum(weights)


def describe(recipes: Sequence[Recipe]) -> str:
    """For people, in short: which ranks gave what, with the shares of an average."""
    parts: list[str] = []
    for recipe in recipes:
        if isinstance(recipe, Average):
            total = sum(term.weight for term in recipe.terms)
            shares = " and ".join(f"{term.weight / total:.3f} of rank {term.rank}" for term in recipe.terms)
            parts.append(f"averaged from {shares}")
        elif recipe.exact:
            parts.append(f"layer {recipe.unit} taken from rank {recipe.from_rank}")
        else:
            parts.append(f"copied from rank {recipe.from_rank}")
    return ", ".join(dict.fromkeys(parts))

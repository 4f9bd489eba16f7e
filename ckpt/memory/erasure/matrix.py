"""The code: its matrix, and for any set of shards at hand the recipe for the ones that are wanted.

    Code(4, 2).matrix       1 0 0 0        shard 0 … k-1: the data themselves (systematic)
                            0 1 0 0
                            0 0 1 0
                            0 0 0 1
                            1 1 1 1        shard k: XOR of the data
                            1 c c c        shard k+1 …: a Cauchy matrix, its rows and columns scaled

Entry (i, j) of a Cauchy matrix is 1 / (x_i + y_j), with all x and y distinct: every square part of it can be
inverted, and scaling a row or a column by other than 0 keeps that. Here x_i = k + i and y_j = j; columns, then
rows, are scaled until the first row and the first column are ones, so that m = 1 is XOR and k = 1 is mirroring.
Pure: numbers of shards in, coefficients out; no buffers. Invariants:

* any k rows of Code.matrix can be inverted: any k shards bring back all the others;
* the matrix depends on k and m alone, and its first parity rows on k alone: a smaller m is a prefix;
* a recipe reads at most k shards, and none that it does not need.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Final

from holdfast.proto.errors import ConfigError, SnapshotIncomplete

from .field import Matrix, combined, inverse, inverted, product, unit_row

SHARDS_MAX: Final = 64
"""The field would allow 256; no placement that we make comes near even this."""


@dataclass(frozen=True, slots=True)
class Code:
    """k shards of data and m of parity. ConfigError outside the limits."""

    k: int
    m: int
    matrix: bytes = field(init=False, repr=False, compare=False)
    """(k+m) x k coefficients, row by row: what processes may exchange to know that they mean the same code."""

    def __post_init__(self) -> None:
        if type(self.k) is not int or type(self.m) is not int or min(self.k, self.m) < 1 or self.n > SHARDS_MAX:
            raise ConfigError(
                f"an erasure code has at least 1 data and 1 parity shard, and at most {SHARDS_MAX} together",
                data_shards=self.k,
                parity_shards=self.m,
            )
        object.__setattr__(self, "matrix", b"".join(_generator(self.k, self.m)))

    @property
    def n(self) -> int:
        return self.k + self.m

    def row(self, shard: int) -> bytes:
        """The coefficients that make `shard` from the data."""
        return self.matrix[shard * self.k : (shard + 1) * self.k]


def _generator(k: int, m: int) -> Matrix:
    data = tuple(unit_row(at, k) for at in range(k))
    cauchy = [[inverse(x ^ y) for y in range(k)] for x in range(k, k + m)]
    columns = [inverse(entry) for entry in cauchy[0]]
    parity = []
    for entries in cauchy:
        entries = [product(entry, scale) for entry, scale in zip(entries, columns, strict=True)]
        scale = inverse(entries[0])
        parity.append(bytes(product(entry, scale) for entry in entries))
    return data + tuple(parity)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How wanted shards come from those at hand. Every wanted shard is in exactly one of three places."""

    zeros: tuple[int, ...]
    """Wanted shards that are nothing but zeros."""
    copies: tuple[tuple[int, int], ...]
    """(from, to): a wanted shard that equals another one."""
    targets: tuple[int, ...]
    """Wanted shards that have to be computed: one row of `matrix` each …"""
    sources: tuple[int, ...]
    """… of one coefficient for each of these."""
    matrix: bytes


# Pure, so the cache changes nothing but the time: shards are worked on block by block, all with the same recipe.
@functools.lru_cache(maxsize=512)
def recipe(code: Code, given: frozenset[int], empty: frozenset[int], wanted: tuple[int, ...]) -> Recipe:
    """Make `wanted` from the shards `given` and those known to be all zeros (`empty`).

    SnapshotIncomplete: fewer than k at hand.
    """
    used = _best(code, given, empty)
    rows = _rows(code, used, [shard for shard in wanted if shard not in given and shard not in empty])
    zeros = [shard for shard in wanted if shard in empty]
    copies = [(shard, shard) for shard in wanted if shard in given]
    computed = []
    for shard, row in rows.items():
        needed = [(source, factor) for source, factor in zip(used, row, strict=True) if factor and source in given]
        if not needed:
            zeros.append(shard)
        elif len(needed) == 1 and needed[0][1] == 1:
            copies.append((needed[0][0], shard))
        else:
            computed.append((shard, dict(needed)))
    sources = tuple(source for source in used if any(source in needed for _, needed in computed))
    return Recipe(
        zeros=tuple(zeros),
        copies=tuple(copies),
        targets=tuple(shard for shard, _ in computed),
        sources=sources,
        matrix=bytes(needed.get(source, 0) for _, needed in computed for source in sources),
    )


def _best(code: Code, given: frozenset[int], empty: frozenset[int]) -> list[int]:
    """The k shards to work from: data before parity, since fewer rows are to be solved for; then zeros, which
    need no reading."""
    at_hand = given | empty
    if len(at_hand) < code.k:
        raise SnapshotIncomplete(
            f"{len(at_hand)} shards at hand, {code.k} needed",
            data_shards=code.k,
            parity_shards=code.m,
            missing=[shard for shard in range(code.n) if shard not in at_hand],
        )
    return sorted(at_hand, key=lambda shard: (shard >= code.k, shard in given, shard))[: code.k]


def _rows(code: Code, used: list[int], wanted: list[int]) -> dict[int, bytes]:
    """For each wanted shard its coefficients over the `used` ones."""
    if not wanted:
        return {}
    from_used = inverted([code.row(shard) for shard in used])
    return {shard: combined(code.row(shard), from_used) for shard in wanted}

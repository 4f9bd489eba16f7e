"""Sums over the microbatch index by a binary tree: the same bits in every layout.

    level 2            (2,0)                 node (l, i) covers microbatches [i*2^l, (i+1)*2^l)
    level 1      (1,0)       (1,1)           and is node (l-1, 2i) + node (l-1, 2i+1)
    level 0    0     1     2     3           a node without a right half is its left half

Floating-point addition commutes but does not associate, so a sum is fixed by its tree, not by the order in
which microbatches finish nor by who computed which. Any rank that holds some microbatches keeps only the
largest complete nodes over them (at most 2 log2 M), and nodes of several ranks merge to the same root.
Measured: DP 1/2/4, PP 1-4, uneven and swapped layouts all bit-identical (reference: ADR 0002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

Node = tuple[int, int]
Values = list[torch.Tensor | None]
T = TypeVar("T")


def parent(node: Node) -> Node:
    """The node that `node` is half of."""
    return node[0] + 1, node[1] >> 1


def sibling(node: Node) -> Node:
    """The other half of `node`'s parent."""
    return node[0], node[1] ^ 1


def maximal_nodes(microbatches: Iterable[int]) -> tuple[Node, ...]:
    """Largest complete nodes that cover exactly `microbatches`, in order of what they cover."""
    nodes: set[Node] = set()
    for microbatch in microbatches:
        node = (0, microbatch)
        while sibling(node) in nodes:
            nodes.remove(sibling(node))
            node = parent(node)
        nodes.add(node)
    return tuple(sorted(nodes, key=lambda node: node[1] << node[0]))


def tree_total(nodes: Mapping[Node, T], microbatches: int, add: Callable[[T, T], T]) -> T:
    """Root of the tree over microbatches 0..microbatches-1, from nodes that cover each exactly once.

    Raises KeyError naming a microbatch that no node covers.
    """

    def at(level: int, index: int) -> T:
        if (level, index) in nodes:
            return nodes[(level, index)]
        if level == 0:
            raise KeyError(f"no node covers microbatch {index}")
        left = at(level - 1, 2 * index)
        if (2 * index + 1) << (level - 1) >= microbatches:
            return left
        return add(left, at(level - 1, 2 * index + 1))

    return at(max(0, (microbatches - 1).bit_length()), 0)


def add_values(left: Values, right: Values) -> Values:
    """left += right, tensor by tensor, in place; None counts as absent, not as zero."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    if len(both) == len(left):
        return left
    return [a if a is not None else b for a, b in zip(left, right, strict=True)]


class DyadicSum:
    """Collects one list of gradients per microbatch, in any order; keeps only maximal complete nodes."""

    def __init__(self) -> None:
        self.nodes: dict[Node, Values] = {}

    def add(self, microbatch: int, values: Values) -> None:
        """Add a microbatch. Takes ownership of the tensors."""
        node = (0, microbatch)
        while (other := self.nodes.pop(sibling(node), None)) is not None:
            values = add_values(other, values)
            node = parent(node)
        self.nodes[node] = values

    def total(self, microbatches: int) -> Values:
        """Sum over all microbatches."""
        return tree_total(self.nodes, microbatches, add_values)


class SequentialSum:
    """exact="off": adds in order of arrival, as plain gradient accumulation does. Not layout-independent."""

    def __init__(self) -> None:
        self.nodes: dict[Node, Values] = {}
        self._sum: Values | None = None

    def add(self, microbatch: int, values: Values) -> None:
        """Add a microbatch. Takes ownership of the tensors."""
        self._sum = values if self._sum is None else add_values(self._sum, values)
        self.nodes = {(0, 0): self._sum}

    def total(self, microbatches: int) -> Values:
        """Sum of what was added."""
        assert self._sum is not None
        return self._sum


def shapes_match(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors agree in number, shape and dtype."""
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(left, right, strict=True)
    )

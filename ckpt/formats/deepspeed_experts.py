"""Mixture of experts in DeepSpeed's files: which local expert of which rank is which expert of the model.

    ep = 2, 4 experts      rank 0: ...deepspeed_experts.0, .1  ──▶ experts 0, 1
                           rank 1: ...deepspeed_experts.0, .1  ──▶ experts 2, 3     same names, other tensors

Weights lie in one file for each expert, under the model's names; optimizer states under local names, in the
partition of each rank. Rank r has expert-parallel rank r % ep, and shares its experts with r + ep, r + 2 ep ...
(DeepSpeed's own order). Invariant: a parameter of the model comes from exactly one expert-parallel rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..universal.errors import CorruptError
from .building import Builder
from .deepspeed_files import Files, check_layers
from .deepspeed_modules import shapes_of
from .torchzip import Stored, is_counts, read_torch

LOCAL: Final = re.compile(r"(.*deepspeed_moe\.experts\.deepspeed_experts)\.(\d+)\.(.+)")
Rename = Callable[[str], str]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Experts:
    """For each layer of experts (the prefix of its names): experts on one rank, experts in all."""

    local: Mapping[str, int]
    total: Mapping[str, int]

    @classmethod
    def of(cls, models: Iterable[Mapping[str, Any]], files: Files) -> Experts:
        """From the parameters' names and the model's num_experts; says which experts' files are missing."""
        local: dict[str, int] = {}
        counts: list[int] = []
        for model in models:
            for group in shapes_of(model, ""):
                for name in group:
                    if match := LOCAL.fullmatch(name):
                        local[match[1]] = max(local.get(match[1], 0), int(match[2]) + 1)
            listed = model.get("num_experts") or ()
            counts = [*counts, *listed] if isinstance(listed, (list, tuple)) else counts
        if not local:
            return cls({}, {})
        # Which layer has how many is told by order alone; only equal counts leave nothing to guess.
        if not is_counts(tuple(counts)) or len(set(counts)) != 1 or len(counts) not in (1, len(local)):
            raise CorruptError("layers of experts that cannot be told apart", layers=sorted(local), counts=counts)
        total = dict.fromkeys(local, counts[0])
        for prefix, count in local.items():
            if total[prefix] % count:
                raise CorruptError("experts that do not divide over the ranks", name=prefix, total=total, local=count)
        check_layers(files, set(), dict(enumerate(counts)))
        return cls(local, total)

    def parts(self, shapes: Shapes, dp: int) -> list[tuple[Iterable[int], Rename]]:
        """For a group: which data-parallel ranks share its parameters, and what those are called in the model."""
        prefixes = {match[1] for match in map(LOCAL.fullmatch, shapes) if match}
        if not prefixes:
            return [(range(dp), str)]
        sizes = {self.total[prefix] // self.local[prefix] for prefix in prefixes}
        if len(sizes) != 1 or not all(LOCAL.fullmatch(name) for name in shapes) or dp % (ep := sizes.pop()):
            raise CorruptError("a group of experts over different expert-parallel sizes", names=sorted(prefixes))
        return [(range(rank, dp, ep), self.rename(rank)) for rank in range(ep)]

    def rename(self, rank: int) -> Rename:
        """From a local name on this expert-parallel rank to the model's name."""

        def renamed(name: str) -> str:
            match = LOCAL.fullmatch(name)
            if match is None:
                return name
            return f"{match[1]}.{int(match[2]) + rank * self.local[match[1]]}.{match[3]}"

        return renamed

    def add_weights(self, builder: Builder, root: Path, files: Files) -> None:
        """Each expert's weights, from its own file."""
        for file in files.experts.values():
            tensors = read_torch(root, file)
            if not isinstance(tensors, dict):
                raise CorruptError("not an expert's file", file=file)
            for name, tensor in tensors.items():
                if isinstance(tensor, Stored):
                    builder.whole(str(name), "weight", tensor)

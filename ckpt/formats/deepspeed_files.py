"""Which files a DeepSpeed checkpoint consists of, and whether they are all there, told from their names.

    global_step3/  mp_rank_00_model_states.pt                          model, one per model-parallel rank
                   zero_pp_rank_1_mp_rank_00_model_states.pt           model, ZeRO-3: one per rank
                   bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt      optimizer, one per rank
                   layer_03-model_states.pt                            pipeline: one per layer
                   layer_0_expert_2_mp_rank_00_model_states.pt         mixture of experts: one per expert

Opens nothing but `latest` and the folder. Invariant: what this lets pass is a full grid of ranks; a missing
file is reported with the whole grid, before anything large is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..universal.disk import explained
from ..universal.errors import IncompleteError, UsageError
from ..universal.model import safe_path

MODEL: Final = r"mp_rank_(\d+)_model_states\.pt"
MODEL3: Final = r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt"
OPTIM: Final = r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt"
LAYER: Final = r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt"
EXPERT: Final = r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt"
EXPERT_OPTIM: Final = r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt"
RANKS_MAX: Final = 1 << 20


@dataclass(slots=True)
class Files:
    """File names by what they hold. Keys of the two-dimensional ones: (data-parallel rank, model-parallel rank)."""

    model: dict[int, str] = field(default_factory=dict)
    model3: dict[tuple[int, int], str] = field(default_factory=dict)
    optim: dict[tuple[int, int], str] = field(default_factory=dict)
    layers: dict[tuple[int, int], str] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], str] = field(default_factory=dict)
    expert_optim: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def mp(self) -> int:
        ranks = [*self.model, *(mp for _, mp in [*self.model3, *self.optim])]
        return max(ranks, default=-1) + 1

    @property
    def layers_tp(self) -> int:
        """Tensor-parallel ranks that pipeline layers have files of."""
        return max((tp for _, tp in self.layers), default=-1) + 1

    @property
    def dp(self) -> int:
        return max((dp for dp, _ in [*self.model3, *self.optim]), default=-1) + 1

    def first(self) -> str:
        """The file that says how many of the others there should be."""
        found = self.model.get(min(self.model, default=0)) or self.model3.get(min(self.model3, default=(0, 0)))
        if found is None:
            raise IncompleteError("no model_states file at all", missing="mp_rank_00_model_states.pt")
        return found


def folder_of(path: Path) -> Path:
    """The tag's folder: `path` itself, or where its `latest` leads."""
    latest = path / "latest"
    if not latest.is_file():
        return path
    tag = tag_in(latest)
    if not safe_path(tag):
        raise UsageError("`latest` names no folder beside it", file=str(latest), tag=tag[:100])
    return path / tag


def tag_in(latest: Path) -> str:
    """What a `latest` says, whatever bytes it has."""
    with explained(latest, "reading which tag is the latest"), open(latest, encoding="utf-8", errors="replace") as file:
        return file.read(4096).strip()


def classify(names: Iterable[str]) -> Files:
    """Sort file names into what they hold; what is none of ours is left out."""
    files = Files()
    for name in names:
        if match := re.fullmatch(MODEL, name):
            files.model[int(match[1])] = name
        elif match := re.fullmatch(MODEL3, name):
            files.model3[int(match[1]), int(match[2])] = name
        elif match := re.fullmatch(OPTIM, name):
            files.optim[int(match[1]), int(match[2])] = name
        elif match := re.fullmatch(LAYER, name):
            files.layers[int(match[1]), int(match[2] or 0)] = name
        elif match := re.fullmatch(EXPERT, name):
            files.experts[int(match[1] or 0), int(match[2]), int(match[3])] = name
        elif match := re.fullmatch(EXPERT_OPTIM, name):
            files.expert_optim[int(match[1]), int(match[2])] = name
    return files


def listed(folder: Path) -> list[str]:
    with explained(folder, "listing a checkpoint"):
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def check_grid(files: Files, *, dp: int, mp: int, stage: int) -> None:
    """Raise IncompleteError, showing who is there and who is not, unless the grid is full."""
    dp, mp = max(dp, files.dp), max(mp, files.mp)
    if dp * mp > RANKS_MAX:
        raise UsageError("more ranks than any job has", dp=dp, mp=mp)
    ranks = [(d, m) for m in range(mp) for d in range(dp)]
    wanted: list[tuple[str, set[tuple[int, int]], list[tuple[int, int]]]] = []
    if stage == 3:
        wanted.append(("model_states", set(files.model3), ranks))
    else:
        wanted.append(("model_states", {(0, m) for m in files.model}, [(0, m) for m in range(mp)]))
    if stage:
        wanted.append(("optim_states", set(files.optim), ranks))
    for kind, have, all_ranks in wanted:
        missing = [rank for rank in all_ranks if rank not in have]
        if missing:
            raise IncompleteError(
                f"{len(missing)} of {len(all_ranks)} {kind} files are missing\n{grid(have, all_ranks)}\n",
                missing=[f"zero_pp_rank_{d}_mp_rank_{m:02d}_{kind}.pt" for d, m in missing[:8]],
            )


def grid(have: set[tuple[int, int]], ranks: list[tuple[int, int]]) -> str:
    """One line per model-parallel rank, one letter per data-parallel rank: "+" is there, "-" is not."""
    lines = []
    for mp in sorted({m for _, m in ranks})[:32]:
        row = [(d, m) for d, m in ranks if m == mp][:128]
        lines.append(f"    mp {mp:3d}  dp " + "".join("+" if rank in have else "-" for rank in row))
    return "\n".join(lines)


def check_layers(files: Files, layers: set[int], experts: dict[int, int], tp: int = 0) -> None:
    """Raise IncompleteError unless every pipeline layer and expert that the parameters speak of has its file.

    Of layers: tensor-parallel rank `tp`'s.
    """
    have = {layer for layer, rank in files.layers if rank == tp}
    rank = f"-model_{tp:02d}" if files.layers_tp > 1 else ""
    missing = [f"layer_{layer:02d}{rank}-model_states.pt" for layer in sorted(layers - have)]
    have_experts = {(layer, expert) for layer, expert, _ in files.experts}
    for layer, count in sorted(experts.items()):
        missing += [
            f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            for expert in range(count)
            if (layer, expert) not in have_experts
        ]
    if missing:
        raise IncompleteError(f"{len(missing)} files are missing", missing=missing[:8])

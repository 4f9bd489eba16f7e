"""What is trained: text, model, optimizer; the same arguments for the simulator and for the real job.

    top-level *.py of the standard library ─▶ bytes, clamped to 0..127 ─▶ [ training ............ | last 200 kB ]
    rank     0        1      2      3      4      5
    units  [E, B1]  [B2]   [B3]   [B4]   [B5]  [B6, H]

A stage is a rank; its *block* is what the recipes of CheckFree apply to, embedding and head are extra. The text
depends on the Python version: its SHA-256 goes with every result.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch
from model import DecoderConfig, build_layers, loss
from text import load_tokens

STAGES: Final = 6
UNITS: Final = STAGES + 2
SPLIT: Final = (2, 1, 1, 1, 1, 2)
VALIDATION_BYTES: Final = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of the campaign (the defaults) or of something quicker."""

    dim: int = 48
    heads: int = 4
    context: int = 32
    ffn_mult: float = 4.0
    microbatches: int = 2
    microbatch_size: int = 8
    lr: float = 2e-3
    clip_norm: float = 1.0
    iterations: int = 700
    final_windows: int | None = 2048
    """Of the validation text, for the final loss; None: all. No part of what is learnt."""

    @property
    def model(self) -> DecoderConfig:
        """The decoder: one block a stage."""
        return DecoderConfig(
            dim=self.dim,
            layers=STAGES,
            heads=self.heads,
            context=self.context,
            vocab=128,
            ffn_mult=self.ffn_mult,
        )


TINY: Final = Settings(dim=8, heads=2, context=8, ffn_mult=2.0, microbatch_size=2, iterations=40, final_windows=64)
"""For tests."""


class Windows:
    """Pieces of `context` bytes and their successors, side by side; item i is a pair of int64 [context]."""

    def __init__(self, tokens: torch.Tensor, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return self.tokens.numel() // (self.context + 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * (self.context + 1)
        window = self.tokens[start : start + self.context + 1].long()
        return window[:-1], window[1:]

    def batch(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Items [begin, end), stacked."""
        width = self.context + 1
        rows = self.tokens[begin * width : end * width].view(end - begin, width).long()
        return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=1)
def corpus() -> torch.Tensor:
    """The whole text as uint8 below 128."""
    return load_tokens(str(Path(sysconfig.get_paths()["stdlib"]) / "*.py")).clamp(max=127)


def corpus_digest() -> str:
    """SHA-256 of the clamped text."""
    return hashlib.sha256(corpus().numpy().tobytes()).hexdigest()


def training_windows(context: int) -> Windows:
    """All but the last 200 kB."""
    return Windows(corpus()[:-VALIDATION_BYTES], context)


def validation_windows(context: int) -> Windows:
    """The last 200 kB."""
    return Windows(corpus()[-VALIDATION_BYTES:], context)


def trainer_arguments(settings: Settings, seed: int) -> dict[str, Any]:
    """Arguments of Trainer for both sides, without its grid."""
    return {
        "layers": build_layers(settings.model),
        "loss": loss,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=settings.lr, betas=(0.9, 0.999)),
        "data": training_windows(settings.context),
        "microbatch_size": settings.microbatch_size,
        "microbatches": settings.microbatches,
        "clip_norm": settings.clip_norm,
        "seed": seed,
    }

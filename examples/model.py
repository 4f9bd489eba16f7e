"""A Llama-style decoder as an ordered list of layers: what a pipeline needs, and nothing else.

    tokens [batch, time] ──▶ Embedding ──▶ Block ──▶ ... ──▶ Block ──▶ Head ──▶ logits [batch, time, vocab]
             unit               0            1                n        n + 1

Each unit is given as a factory and built only on the rank that hosts it, under random generators which the
runtime seeds from (seed, unit): every layout starts from the same bits. Features: RMSNorm before each part,
rotary positions, SwiGLU, causal attention with optional grouped queries, optional tied embeddings. Left out
on purpose: KV cache, generation, tensor parallelism, biases, any global seeding, any word of distribution.

Invariants: every unit maps one tensor to one tensor; the residual stream keeps its dtype under autocast; a
unit owns its parameters, tied or not (a tie is declared, and kept by the runtime).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FFN_GRANULE: Final = 32
"""Hidden widths are rounded up to this: a whole number of vector registers and of tensor-core tiles."""
_INIT_STD: Final = 0.02
_ROPE_BASE: Final = 10_000.0

Ties = Mapping[str, tuple[int, str]]
TIED: Final[Ties] = {"linear.weight": (0, "embedding.weight")}
"""Head's parameter -> (unit index, parameter name) of the one it equals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder. Raises ValueError, in one line, for one that cannot be built."""

    dim: int
    """Width of the residual stream."""
    layers: int
    """Number of blocks; the pipeline has two units more."""
    heads: int
    kv_heads: int | None = None
    """Heads of keys and values, each shared by heads / kv_heads query heads; None for as many as heads."""
    context: int = 128
    """Longest sequence, in tokens."""
    vocab: int = 256
    """256: one token a byte."""
    ffn_mult: float = 8 / 3
    """Hidden width of the feed-forward part over dim; 8/3 costs in three matrices what 4 did in two."""
    tied: bool = False
    """Embedding and output matrix are one parameter."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "context", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} over heads {self.heads} must be an even whole number")
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.groups}")
        if not self.ffn_mult > 0:
            raise ValueError(f"ffn_mult must be above 0, got {self.ffn_mult}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def groups(self) -> int:
        """Number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward part."""
        return math.ceil(self.ffn_mult * self.dim / _FFN_GRANULE) * _FFN_GRANULE


PRESETS: Final[Mapping[str, DecoderConfig]] = {
    "tiny": DecoderConfig(dim=32, layers=6, heads=2, context=64),  # 0.10 M parameters: tests
    "demo": DecoderConfig(dim=128, layers=8, heads=4, context=128),  # 1.67 M: learns in a minute on two cores
    "small": DecoderConfig(dim=192, layers=12, heads=6, context=256),  # 5.41 M: convergence runs
    "84m": DecoderConfig(dim=768, layers=12, heads=12, context=512, ffn_mult=2.625),  # 84.5 M: benchmarks
}


class Embedding(nn.Module):
    """Unit 0. tokens int64 [batch, time] -> x [batch, time, dim]."""

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(cfg.vocab, cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        nn.init.normal_(self.embedding.weight, std=_INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the tokens up."""
        x: Tensor = self.dropout(self.embedding(tokens))
        return x


class Attention(nn.Module):
    """Causal self-attention with rotary positions. x [batch, time, dim] -> [batch, time, dim]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = cfg.heads, cfg.groups, cfg.head_dim
        self.drop = cfg.dropout
        self.wq = _linear(cfg.dim, cfg.heads * cfg.head_dim)
        self.wk = _linear(cfg.dim, cfg.groups * cfg.head_dim)
        self.wv = _linear(cfg.dim, cfg.groups * cfg.head_dim)
        self.wo = _linear(cfg.heads * cfg.head_dim, cfg.dim, std=_residual_std(cfg))
        # Not persistent: a constant of the shape is no training state, so nobody snapshots or moves it.
        angles = _rope_angles(cfg.context, cfg.head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it."""
        batch, time, _ = x.shape
        if time > self.cos.shape[0]:
            raise ValueError(f"sequence of {time} tokens, the model's context is {self.cos.shape[0]}")
        q = self.wq(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)  # [batch, heads, time, head_dim]
        k = self.wk(x).view(batch, time, self.groups, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(batch, time, self.groups, self.head_dim).transpose(1, 2)
        cos, sin = self.cos[:time], self.sin[:time]
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            dropout_p=self.drop if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.groups != self.heads,
        )
        y: Tensor = self.wo(mixed.transpose(1, 2).reshape(batch, time, -1))
        return y


class SwiGLU(nn.Module):
    """Gated feed-forward part. x [batch, time, dim] -> [batch, time, dim]."""

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.gate = _linear(cfg.dim, cfg.hidden)
        self.up = _linear(cfg.dim, cfg.hidden)
        self.down = _linear(cfg.hidden, cfg.dim, std=_residual_std(cfg))

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate x) * up x)."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    """Units 1..n. x [batch, time, dim] -> [batch, time, dim]: attention, then feed-forward, both residual."""

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(cfg.dim, eps=1e-5)
        self.attn = Attention(cfg)
        self.ffn_norm = nn.RMSNorm(cfg.dim, eps=1e-5)
        self.ffn = SwiGLU(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add both parts to the stream."""
        x = x + self.dropout(self.attn(self.attn_norm(x)))
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x


class Head(nn.Module):
    """Last unit. x [batch, time, dim] -> logits [batch, time, vocab].

    With cfg.tied the output matrix is the embedding's. The two units may live on different ranks, so each
    owns a copy, and this one declares `holdfast_ties = {"linear.weight": (0, "embedding.weight")}`: parameter
    here -> (unit, parameter there). The runtime gives both the same start and the sum of both gradients.
    """

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(cfg.dim, eps=1e-5)
        self.linear = _linear(cfg.dim, cfg.vocab)
        self.holdfast_ties: Ties = TIED if cfg.tied else {}

    def forward(self, x: Tensor) -> Tensor:
        """Score every token of the vocabulary."""
        logits: Tensor = self.linear(self.norm(x))
        return logits


@dataclass(frozen=True, slots=True)
class LayerFactory:
    """Builds one unit when called. Carries its ties, so that ranks which never build it know of them."""

    kind: Callable[[DecoderConfig], nn.Module]
    cfg: DecoderConfig
    holdfast_ties: Ties = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        return self.kind(self.cfg)


def build_layers(cfg: DecoderConfig) -> list[Callable[[], nn.Module]]:
    """Factories of the pipeline's units, in order: embedding, blocks, head."""
    head = LayerFactory(Head, cfg, TIED if cfg.tied else {})
    return [LayerFactory(Embedding, cfg), *(LayerFactory(Block, cfg) for _ in range(cfg.layers)), head]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats. logits [batch, time, vocab], targets int64 [batch, time] -> scalar.

    Always in float32: under autocast the logits come as bfloat16, too coarse for a sum over the vocabulary.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def count_parameters(cfg: DecoderConfig) -> int:
    """Trained numbers of the whole model; a tied matrix counts once. Allocates nothing."""
    with torch.device("meta"):
        total = sum(p.numel() for build in build_layers(cfg) for p in build().parameters())
    return total - cfg.vocab * cfg.dim if cfg.tied else total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (x[i], x[i + half]) by their position's angle. x [..., time, head_dim], cos [time, half].

    Computed in float32 whatever x is: at position 500 bfloat16 would have lost the angle.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def _rope_angles(context: int, head_dim: int) -> Tensor:
    """Angle of each position and pair: [context, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.outer(torch.arange(context, dtype=torch.float32), _ROPE_BASE**-exponents)


def _linear(inputs: int, outputs: int, std: float = _INIT_STD) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear


def _residual_std(cfg: DecoderConfig) -> float:
    """2n parts add to the residual stream; this keeps its variance what one part alone would give."""
    return _INIT_STD / math.sqrt(2 * cfg.layers)

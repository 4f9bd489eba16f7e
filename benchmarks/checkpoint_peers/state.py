"""The model whose state is converted, saved and loaded: a GPT of 84 M parameters at scale 1. No torch.

    scale 1   10 blocks, vocabulary 17,000    1.01 GB master copies and moments, 0.17 GB weights in bf16
    scale 4   40 blocks, vocabulary 68,000    four times the bytes, and four times the tensors

Growing by depth makes everything grow that could cost memory: bytes, and entries in tables.
"""

from __future__ import annotations

WIDTH, BLOCKS, VOCABULARY = 768, 10, 17_000


def shapes(scale: int) -> dict[str, tuple[int, ...]]:
    """Names of all parameters, in the model's order, and their shapes."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY * scale, WIDTH)}
    for block in range(BLOCKS * scale):
        at = f"blocks.{block}."
        found |= {f"{at}norm1.weight": (WIDTH,), f"{at}norm1.bias": (WIDTH,)}
        found |= {f"{at}qkv.weight": (3 * WIDTH, WIDTH), f"{at}out.weight": (WIDTH, WIDTH)}
        found |= {f"{at}norm2.weight": (WIDTH,), f"{at}norm2.bias": (WIDTH,)}
        found |= {f"{at}up.weight": (4 * WIDTH, WIDTH), f"{at}down.weight": (WIDTH, 4 * WIDTH)}
    return found | {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}

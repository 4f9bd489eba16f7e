"""Which holder of a layer updates which part of each of its parameters (ZeRO-1). Pure.

    unit 3, held by ranks 1 and 5        attn.weight   |■■■■■■■■■■■|□□□□□□□□□□□|     ■ rank 1   □ rank 5
                                         norm.weight   |■■■■■■|
                                         mlp.weight    |■■■■■■■■■|□□□□□□□□□□□□□|

Each parameter of each layer is cut, and not the sum of a stage: a layer that moves takes its own parts along, in many
small transfers between many pairs. What remains of uneven cuts goes to the holder that has least so far. Holds no
tensor. Invariants:

* the parts of a parameter are ascending by holder, disjoint, and cover it; a part may be empty;
* a cut lies at a multiple of GRAIN elements: vector units treat what is left over at an end with other instructions,
  and a fused multiply-add there gives other bits than a multiplication and an addition (measured, docs/adr/0008);
* a cut of a large parameter lies between two chunks of a checkpoint: a chunk is read whole, to be verified, and would
  be read by both;
* same arguments, same answer on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from holdfast.ckpt.universal.chunks import chunk_bytes_for

Range = tuple[int, int]

GRAIN: Final = 64
"""Elements: two vectors of the widest units (AVX-512) in the narrowest type that is trained (16 bits)."""
_ITEM_BYTES: Final = 4
_CHUNKED: Final = 16 * 4096
"""Elements from which on cuts lie between chunks; smaller parameters have too few chunks to be cut evenly there."""


def grain_of(elements: int) -> int:
    """Cuts of a parameter of so many elements lie at multiples of this."""
    return chunk_bytes_for(elements * _ITEM_BYTES) // _ITEM_BYTES if elements >= _CHUNKED else GRAIN


def cut_unit(sizes: Sequence[int], holders: int, first: int = 0) -> tuple[tuple[Range, ...], ...]:
    """For each parameter of a unit, given by its elements, the part of each holder.

    `first`: the holder to begin with where all have the same; another one for each unit, so that the small parameters
    of all layers do not come to lie on one.
    """
    loads = [0] * holders
    order = [(first + index) % holders for index in range(holders)]
    found: list[tuple[Range, ...]] = []
    for elements in sizes:
        grain = grain_of(elements)
        each, left = divmod(-(-elements // grain), holders)
        more = set(sorted(order, key=lambda holder: loads[holder])[:left])
        parts: list[Range] = []
        reached = 0
        for holder in range(holders):
            stop = min(elements, reached + (each + (holder in more)) * grain)
            parts.append((reached, stop))
            loads[holder] += stop - reached
            reached = stop
        found.append(tuple(parts))
    return tuple(found)

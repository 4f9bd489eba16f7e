"""What an engine is, and the one that every machine has: numpy, exact and slow.

    targets[r] = sum over c of matrix[r, c] * sources[c]        byte by byte, in GF(2^8)

Coefficient 1 is a plain XOR, so a code with one parity shard runs at the speed of memory here too; any other
coefficient is a table look-up a byte. Works by blocks that stay in the cache while the columns are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .field import multiples

Bytes = NDArray[np.uint8]
"""One shard: a contiguous vector."""

_BLOCK_BYTES: Final = 128 << 10
"""XOR likes longer blocks and look-ups, whose indices are widened to 8 bytes, shorter ones; this is between."""


class Engine(Protocol):
    """Multiplies a matrix with shards.

    `sources` are `cols` and `targets` `rows` vectors of one length; `rows` and `cols` are at least 1; no target
    shares memory with anything else. The codec sees to that; an engine only computes. Every byte of every target
    is written. May be called from several threads at once.
    """

    @property
    def name(self) -> str: ...

    def apply(
        self, matrix: bytes, rows: int, cols: int, sources: Sequence[Bytes], targets: Sequence[Bytes]
    ) -> None: ...


class NumpyEngine:
    """The engine without a library."""

    name: Final = "numpy"

    def apply(self, matrix: bytes, rows: int, cols: int, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        tables = {factor: np.frombuffer(multiples(factor), np.uint8) for factor in {*matrix} - {0, 1}}
        product = np.empty(min(_BLOCK_BYTES, targets[0].nbytes), np.uint8)
        for start in range(0, targets[0].nbytes, _BLOCK_BYTES):
            block = slice(start, start + _BLOCK_BYTES)
            for row in range(rows):
                total = targets[row][block]
                total[:] = 0
                for factor, source in zip(matrix[row * cols : (row + 1) * cols], sources, strict=True):
                    if factor == 1:
                        np.bitwise_xor(total, source[block], out=total)
                    elif factor:
                        # "clip" is never put to use by a byte in a table of 256; it spares the buffer of "raise".
                        scaled = np.take(tables[factor], source[block], out=product[: total.nbytes], mode="clip")
                        np.bitwise_xor(total, scaled, out=total)

"""Arithmetic in GF(2^8), the field of bytes modulo x^8 + x^4 + x^3 + x^2 + 1, and matrices over it.

    sum = XOR        product = a look-up        row = bytes        matrix = a tuple of rows

ISA-L, pyeclib, zfec and RAID-6 use the same field. Plain Python, yet quick: a row is scaled by bytes.translate
and added as one integer, so inverting 63 x 63 takes milliseconds. Does not touch shards: engines do. Nothing
here depends on the machine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

POLYNOMIAL: Final = 0x11D

Matrix = tuple[bytes, ...]
"""Rows of equal length."""


@functools.cache
def multiples(factor: int) -> bytes:
    """The 256 products of `factor`, by the other operand."""
    table = bytearray(256)
    shifted = factor
    for bit in range(8):
        half = 1 << bit
        for x in range(half):
            table[half + x] = table[x] ^ shifted
        shifted = shifted << 1 ^ (POLYNOMIAL if shifted & 0x80 else 0)
    return bytes(table)


def product(a: int, b: int) -> int:
    return multiples(a)[b]


def inverse(a: int) -> int:
    """What times `a` is 1. ArithmeticError for 0, which nothing takes to 1."""
    at = multiples(a).find(1)
    if at < 0:
        raise ArithmeticError("0 has no inverse")
    return at


def scaled(row: bytes, factor: int) -> bytes:
    return row.translate(multiples(factor))


def added(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")


def combined(coefficients: bytes, rows: Sequence[bytes]) -> bytes:
    """Row vector times matrix: the sum of `rows`, each times its coefficient."""
    total = bytes(len(rows[0]))
    for factor, row in zip(coefficients, rows, strict=True):
        if factor:
            total = added(total, scaled(row, factor))
    return total


def unit_row(at: int, width: int) -> bytes:
    return bytes(column == at for column in range(width))


def inverted(matrix: Sequence[bytes]) -> Matrix:
    """The inverse of a square matrix, by Gauss and Jordan. ArithmeticError if there is none."""
    width = len(matrix)
    rows = [row + unit_row(at, width) for at, row in enumerate(matrix)]
    for at in range(width):
        pivot = next((below for below in range(at, width) if rows[below][at]), None)
        if pivot is None:
            raise ArithmeticError(f"singular matrix: no pivot in column {at} of {width}")
        rows[at], rows[pivot] = rows[pivot], rows[at]
        rows[at] = scaled(rows[at], inverse(rows[at][at]))
        for other, row in enumerate(rows):
            if other != at and row[at]:
                rows[other] = added(row, scaled(rows[at], row[at]))
    return tuple(row[width:] for row in rows)

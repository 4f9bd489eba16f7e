"""Numbers from one stored dtype to another, when somebody asks for it. Rounds to nearest even, as torch does.

    BF16 ─ bits << 16 ─▶ F32 ─ numpy ─▶ F64, F16, integers        F32 ─ round to nearest even ─▶ BF16

Never called by a plain read: bytes come back as they were stored. 8-bit floats are not converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np

NUMPY: Final[Mapping[str, str]] = MappingProxyType(
    {
        "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4",
        "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<c8",
    }
)  # fmt: skip
"""numpy's dtype for the stored one; BF16 as its bits."""

_EXACT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "BF16": "F32 F64", "F16": "F32 F64", "F32": "F64", "I8": "I16 I32 I64 F16 F32 F64", "I16": "I32 I64 F32 F64",
        "I32": "I64 F64", "U8": "I16 U16 I32 U32 I64 U64 F16 F32 F64", "U16": "I32 U32 I64 U64 F32 F64",
        "U32": "I64 U64 F64", "BOOL": "U8 I8 I16 U16 I32 U32 I64 U64 F16 BF16 F32 F64",
    }
)  # fmt: skip


def lossless(source: str, target: str) -> bool:
    """Whether every value of `source` exists in `target`."""
    return source == target or target in _EXACT.get(source, "").split()


def convert(data: Any, source: str, target: str) -> np.ndarray[Any, Any]:
    """The numbers in a byte buffer as an array of the target dtype (BF16: as its bits)."""
    import numpy as np

    for dtype in (source, target):
        if dtype not in NUMPY:
            raise UsageError("no conversion from or to this dtype", dtype=dtype)
    values = np.frombuffer(data, NUMPY[source])
    if source == target:
        return values
    if source == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    if target != "BF16":
        return values.astype(NUMPY[target])
    with np.errstate(over="ignore"):
        return _to_bf16(values)


def _to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round once: float64 first goes to float32 by rounding to odd, so that the second rounding is the only one."""
    import numpy as np

    single = values.astype("<f4")
    bits = single.view("<u4")
    if values.dtype == np.dtype("<f8") or values.dtype.kind in "iu":
        wide = values.astype("<f8")
        inexact = (single.astype("<f8") != wide) & np.isfinite(single)
        over = np.abs(single.astype("<f8")) > np.abs(wide)
        bits = np.where(inexact, (bits - (over & True)) | 1, bits).astype("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(single), ((bits >> 16) | 0x40).astype("<u2"), rounded)

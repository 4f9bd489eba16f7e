"""Dtypes by the names that they go by: safetensors' in our files, torch's in frameworks' files. Pure; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

TORCH_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
    }
)
"""safetensors' name -> torch's."""
ITEM_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
        **dict.fromkeys(("F32", "I32", "U32"), 4),
        **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    }
)
"""Bytes of one element, by safetensors' names."""
FROM_TORCH: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{name: kind for kind, name in TORCH_NAMES.items()},
        **{"double": "F64", "float": "F32", "half": "F16", "long": "I64", "int": "I32", "short": "I16"},
    }
)
"""torch's name, also of those that have two -> safetensors'."""

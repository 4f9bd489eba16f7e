"""The metadata blob: everything of a snapshot that is not a tensor, as JSON that comes back exactly.

    {"lr": 0.1, "betas": (0.9, 0.95), "seen": tensor}
    encode ──▶ ["d", "lr", ["f", "0x1.99...p-4"], "betas", ["t", ...], "seen", ["T", 0]] + [("seen", tensor)]
    decode ◀── the same types, the same bits

None, bool, int and str are JSON's own; everything else is a list that opens with a tag. A type that is not
in the list below is refused by its path, when the job starts and not when it recovers. No pickle: nothing
in a blob can name code. What a tensor is, only the caller knows: they come back as references by index.
Invariants:

* decode(encode(x)) has x's types and bits: a nan's payload, -0.0, tuple or list, the order of keys;
* exact types only: a subclass would come back as something else, so it is refused;
* one tensor met twice is one tensor again after decoding. (Other shared objects come back as equal copies.)
"""

from __future__ import annotations

import binascii
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

from holdfast.proto.errors import ConfigError, SnapshotCorrupt

DEPTH_MAX: Final = 100
_INT_BITS_MAX: Final = 63
_DICTS: Final = {dict: "d", OrderedDict: "o", Counter: "c"}
_DICT_TYPES: Final[dict[str, Callable[[], dict[Any, Any]]]] = {"d": dict, "o": OrderedDict, "c": Counter}


def encode(
    value: object, path: str = "", *, is_tensor: Callable[[object], bool] = lambda value: False
) -> tuple[Any, list[tuple[str, Any]]]:
    """`value` as JSON, and the tensors in it as (path, tensor) in the order of their index.

    Raises ConfigError with the path and type of the first thing that cannot be captured.
    """
    encoder = _Encoder(is_tensor)
    return encoder.encode(value, path, 0), encoder.tensors


def unmarked(metadata: Any) -> Any:
    """The blob in a table's metadata, which replicated state wraps once more (runtime/replica.py)."""
    return metadata["blob"] if isinstance(metadata, dict) and metadata.get("replicated") is True else metadata


def decode(json_value: Any, tensors: Sequence[Any] = ()) -> Any:
    """The value that encode() was given; `tensors` in the order that it returned them.

    Raises SnapshotCorrupt for anything that encode() does not write.
    """
    return _decode(json_value, tensors, "", 0)


class _Encoder:
    """One call of encode()."""

    def __init__(self, is_tensor: Callable[[object], bool]) -> None:
        self._is_tensor = is_tensor
        self._indexes: dict[int, int] = {}
        self.tensors: list[tuple[str, Any]] = []

    def encode(self, value: object, path: str, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise ConfigError(f"nested deeper than {DEPTH_MAX} levels, or contains itself", path=path)
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if value.bit_length() <= _INT_BITS_MAX else ["i", hex(value)]
        if type(value) is float:
            return ["f", _float_text(value)]
        if type(value) is bytes:
            return ["b", binascii.b2a_base64(value, newline=False).decode()]
        if type(value) in (list, tuple):
            assert isinstance(value, (list, tuple))
            tag = "l" if type(value) is list else "t"
            return [tag, *(self.encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value))]
        if type(value) in _DICTS:
            assert isinstance(value, dict)
            return self._dict(value, path, depth)
        if self._is_tensor(value):
            return ["T", self._tensor(value, path)]
        kind = type(value)
        raise ConfigError(
            f"cannot capture {path or 'this value'}", path=path, type=f"{kind.__module__}.{kind.__qualname__}"
        )

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> list[Any]:
        coded: list[Any] = [_DICTS[type(value)]]
        for key, item in value.items():
            if type(key) not in (str, int):
                kind = type(key)
                named = f"{kind.__module__}.{kind.__qualname__}"
                raise ConfigError(
                    f"cannot capture a key of {path or 'this dict'}",
                    path=path,
                    key=repr(key)[:80],
                    type=named,
                )
            inner = f"{path}[{key}]" if type(key) is int else f"{path}.{key}" if path else key
            coded += (self.encode(key, inner, depth + 1), self.encode(item, inner, depth + 1))
        return coded

    def _tensor(self, value: object, path: str) -> int:
        index = self._indexes.setdefault(id(value), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append((path, value))
        return index


def _float_text(value: float) -> str:
    """float.hex(), or the bits of a nan, whose sign and payload float.hex() drops."""
    return f"nan:{struct.pack('>d', value).hex()}" if math.isnan(value) else value.hex()


def _float_value(text: str) -> float:
    if text.startswith("nan:"):
        (value,) = struct.unpack(">d", bytes.fromhex(text[4:]))
        return float(value)
    return float.fromhex(text)


def _decode(coded: Any, tensors: Sequence[Any], path: str, depth: int) -> Any:
    if coded is None or type(coded) in (bool, int, str):
        return coded
    if type(coded) is not list or not coded or type(coded[0]) is not str or depth > DEPTH_MAX:
        raise SnapshotCorrupt("not a metadata blob", path=path, found=type(coded).__name__)
    tag, items = coded[0], coded[1:]
    try:
        if tag in ("l", "t"):
            decoded = [_decode(item, tensors, f"{path}[{i}]", depth + 1) for i, item in enumerate(items)]
            return decoded if tag == "l" else tuple(decoded)
        if tag in _DICT_TYPES:
            return _decode_dict(tag, items, tensors, path, depth)
        (item,) = items
        if tag == "f":
            return _float_value(item)
        if tag == "i":
            return int(item, 16)
        if tag == "b":
            return binascii.a2b_base64(item, strict_mode=True)
        if tag == "T" and type(item) is int and 0 <= item < len(tensors):
            return tensors[item]
    except (ValueError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise SnapshotCorrupt("not a metadata blob", path=path, tag=tag, reason=str(error)) from error
    raise SnapshotCorrupt("not a metadata blob", path=path, tag=tag, tensors=len(tensors))


def _decode_dict(tag: str, items: list[Any], tensors: Sequence[Any], path: str, depth: int) -> dict[Any, Any]:
    decoded = _DICT_TYPES[tag]()
    for coded_key, coded_item in zip(items[::2], items[1::2], strict=True):
        key = _decode(coded_key, tensors, path, depth + 1)
        if type(key) not in (str, int):
            raise SnapshotCorrupt("a key that is neither text nor a number", path=path)
        inner = f"{path}[{key}]" if type(key) is int else f"{path}.{key}" if path else key
        decoded[key] = _decode(coded_item, tensors, inner, depth + 1)
    if 2 * len(decoded) != len(items):
        raise SnapshotCorrupt("a key twice", path=path)
    return decoded

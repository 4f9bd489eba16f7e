"""A pickle writer for plain values: protocol 2, as torch.save writes it. Imports nothing, asks no object how.

    dumps({"module": Ordered({"w": ...}), "step": 3})  ──▶  bytes that torch.load(weights_only=True) accepts

The other direction of unpickle.py. What is not a plain value is spelled out by the caller: Construct names a
class and its arguments, Ordered an OrderedDict; `tensor` turns the caller's own objects into Construct and
Persistent. Invariants:

* equal values give equal bytes;
* a value of a type that is not listed is an error, never a guess.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ..universal.errors import UsageError
from .inert import Global

BATCH: Final = 1000
"""Items between two marks, as Python's own pickler does it."""

ORDERED: Final = Global("collections", "OrderedDict")
SIZE: Final = Global("torch", "Size")


class Ordered(dict[Any, Any]):
    """A dict that becomes a collections.OrderedDict."""


@dataclass(frozen=True, slots=True, eq=False)
class Construct:
    """cls(*args), then its state. `new` spells cls.__new__(cls, *args), as Python pickles most objects."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    new: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """Something that the reader looks up by this id."""

    pid: tuple[Any, ...]


def size(shape: tuple[int, ...]) -> Construct:
    """A torch.Size."""
    return Construct(SIZE, (tuple(shape),))


def dumps(value: Any, *, convert: Callable[[Any], Any] | None = None) -> bytes:
    """`value` as a pickle of protocol 2; `convert` turns what this module does not know into what it knows."""
    writer = _Writer(convert)
    writer.write(value)
    return b"\x80\x02" + b"".join(writer.parts) + b"."


class _Writer:
    """Collects opcodes; the memo holds only names and text, which repeat most."""

    def __init__(self, convert: Callable[[Any], Any] | None) -> None:
        self.parts: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.convert = convert

    def write(self, value: Any) -> None:
        emit = self.parts.append
        if value is None:
            emit(b"N")
        elif isinstance(value, bool):
            emit(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            emit(_integer(value))
        elif isinstance(value, float):
            emit(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            self.remember(value, _text(value))
        elif isinstance(value, bytes):
            self.write(Construct(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")))
        elif isinstance(value, Ordered):
            self.write(Construct(ORDERED))
            self.items(value)
        elif isinstance(value, dict):
            emit(b"}")
            self.items(value)
        elif isinstance(value, list):
            emit(b"]")
            self.batches(value, b"e")
        elif isinstance(value, tuple):
            self.tuple(value)
        else:
            self.other(value)

    def other(self, value: Any) -> None:
        if isinstance(value, Global):
            self.remember(value, b"c" + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Persistent):
            self.write(value.pid)
            self.parts.append(b"Q")
        elif isinstance(value, Construct):
            self.write(value.cls)
            self.write(value.args)
            self.parts.append(b"\x81" if value.new else b"R")
            if value.state is not None:
                self.write(value.state)
                self.parts.append(b"b")
        elif self.convert is not None:
            self.write(self.convert(value))
        else:
            raise UsageError("a value that cannot be pickled here", kind=type(value).__name__)

    def remember(self, key: Any, opcodes: bytes) -> None:
        index = self.memo.get((type(key), key))
        if index is None:
            index = self.memo[type(key), key] = len(self.memo)
            self.parts.append(opcodes + (b"q%c" % index if index < 256 else b"r" + struct.pack("<I", index)))
        else:
            self.parts.append(b"h%c" % index if index < 256 else b"j" + struct.pack("<I", index))

    def tuple(self, value: tuple[Any, ...]) -> None:
        if len(value) > 3:
            self.parts.append(b"(")
        for item in value:
            self.write(item)
        self.parts.append((b")", b"\x85", b"\x86", b"\x87")[len(value)] if len(value) < 4 else b"t")

    def items(self, value: dict[Any, Any]) -> None:
        self.batches([part for pair in value.items() for part in pair], b"u", 2 * BATCH)

    def batches(self, flat: list[Any], end: bytes, batch: int = BATCH) -> None:
        for start in range(0, len(flat), batch):
            self.parts.append(b"(")
            for item in flat[start : start + batch]:
                self.write(item)
            self.parts.append(end)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(raw) > 255:
        raise UsageError("an integer too long to be pickled here", nbytes=len(raw))
    return b"\x8a%c" % len(raw) + raw

"""Files that torch.load(weights_only=True) reads, written as a stream: one buffer, whatever the tensors' size.

    value with Tensor(dtype, shape, fill) inside ──▶ | data.pkl | byteorder | data/0 | data/1 | ... | directory |

`fill` is asked for a tensor's bytes when their turn comes, and yields them in order, in pieces. Sizes are known
before, so the layout is: every member's place is fixed when writing starts, and its checksum is put into its
header after it has passed through. Invariants:

* data begins at multiples of 64 bytes, so that the file can be mapped;
* a fill that yields more or fewer bytes than its tensor has is an error, and the file is not to be used;
* the same Tensor object at two places is one storage: tied stays tied.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..dtypes import ITEM_BYTES
from ..universal.disk import Disk, explained
from ..universal.errors import CorruptError, UsageError
from ..universal.geometry import row_major
from .inert import Global
from .pickling import Construct, Ordered, Persistent, dumps

Bytes = bytes | bytearray | memoryview
Fill = Callable[[], Iterable[Bytes]]

ALIGNMENT: Final = 64
CENTRAL: Final = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
END: Final = struct.Struct("<4sHHHHIIH")
END64: Final = struct.Struct("<4sQHHIIQQQQ")
LOCATOR64: Final = struct.Struct("<4sIQI")
FULL16: Final = 0xFFFF
FULL32: Final = 0xFFFFFFFF
TYPED: Final = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
    "C64": "ComplexFloatStorage",
}
UNTYPED: Final = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A contiguous tensor whose bytes come when they are asked for. Identity is storage."""

    dtype: str
    shape: tuple[int, ...]
    fill: Fill

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def scalar(value: float, dtype: str = "F32") -> Tensor:
    """A 0-dimensional tensor, as torch's optimizers keep their step."""
    packed = struct.pack({"F32": "<f", "F64": "<d", "I64": "<q"}[dtype], int(value) if dtype == "I64" else value)
    return Tensor(dtype, (), lambda: (packed,))


def write_torch(path: Path, value: Any, *, disk: Disk | None = None) -> int:
    """Write `value` to a new file and make it durable; returns its size."""
    target = _File(disk or Disk(), path)
    with explained(path, "writing a checkpoint"):
        try:
            return target.write(value)
        finally:
            target.close()


def archive_into(disk: Disk, fd: int, path: Path, offset: int, value: Any) -> int:
    """Write an archive into an open file from `offset` on; returns its length. Nothing is synced."""
    target = _File(disk, path, fd, offset)
    target.members(value)
    return target.at - offset


@dataclass(slots=True)
class _Written:
    name: bytes
    header: int
    nbytes: int
    crc32: int = 0


class _File:
    """An archive in the making."""

    def __init__(self, disk: Disk, path: Path, fd: int | None = None, base: int = 0) -> None:
        self.disk = disk
        self.path = path
        self.fd = disk.open(path) if fd is None else fd
        self.base = base
        self.at = base
        self.written: list[_Written] = []
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def close(self) -> None:
        os.close(self.fd)

    def write(self, value: Any) -> int:
        self.members(value)
        os.ftruncate(self.fd, self.at)
        self.disk.fsync(self.fd)
        return self.at

    def members(self, value: Any) -> None:
        data = dumps(value, convert=self.convert)
        self.member("data.pkl", len(data), (data,))
        self.member("byteorder", 6, (b"little",))
        for key, tensor in self.tensors.values():
            self.member(f"data/{key}", tensor.nbytes, tensor.fill())
        self.member("version", 2, (b"3\n",))
        self.directory()

    def convert(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            raise UsageError("a value that cannot be saved", kind=type(value).__name__)
        key, _ = self.tensors.setdefault(id(value), (len(self.tensors), value))
        elements = math.prod(value.shape)
        strides = row_major(value.shape)
        if value.dtype in TYPED:
            storage = Persistent(("storage", Global("torch", TYPED[value.dtype]), str(key), "cpu", elements))
            args: tuple[Any, ...] = (storage, 0, value.shape, strides, False, Ordered())
            return Construct(Global("torch._utils", "_rebuild_tensor_v2"), args)
        untyped = Global("torch.storage", "UntypedStorage")
        storage = Persistent(("storage", untyped, str(key), "cpu", value.nbytes))
        args = (storage, 0, value.shape, strides, False, Ordered(), Global("torch", UNTYPED[value.dtype]))
        return Construct(Global("torch._utils", "_rebuild_tensor_v3"), args)

    def put(self, data: Bytes) -> int:
        view = memoryview(data).cast("B")
        self.disk.pwrite(self.fd, view, self.at)
        self.at += view.nbytes
        return view.nbytes

    def member(self, short: str, nbytes: int, pieces: Iterable[Bytes]) -> None:
        name = f"archive/{short}".encode()
        member = _Written(name, self.at, nbytes)
        head = LOCAL.size + len(name)
        padding = -(self.at - self.base + head + 24) % ALIGNMENT
        start = self.at
        self.put(self.local(member, padding))
        expected = self.at + nbytes
        for piece in pieces:
            member.crc32 = zlib.crc32(piece, member.crc32)
            self.put(piece)
            if self.at > expected:
                break
        if self.at != expected:
            raise CorruptError("a tensor with more or fewer bytes than it has", file=str(self.path), member=short)
        end, self.at = self.at, start
        self.put(self.local(member, padding))
        self.at = end
        self.written.append(member)

    def local(self, member: _Written, padding: int) -> bytes:
        """The local header: zip64 sizes always, then padding in a field of its own, as torch does ("FB")."""
        extra = struct.pack("<HHQQ", 1, 16, member.nbytes, member.nbytes)
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        large = FULL32
        header = LOCAL.pack(b"PK\3\4", 45, 0, 0, 0, 0, member.crc32, large, large, len(member.name), len(extra))
        return header + member.name + extra

    def directory(self) -> None:
        start = self.at
        for member in self.written:
            extra = struct.pack("<HHQQQ", 1, 24, member.nbytes, member.nbytes, member.header - self.base)
            fields = (b"PK\1\2", 45, 45, 0, 0, 0, 0, member.crc32, FULL32, FULL32, len(member.name), len(extra))
            self.put(CENTRAL.pack(*fields, 0, 0, 0, 0, FULL32) + member.name + extra)
        nbytes, count = self.at - start, len(self.written)
        end64 = self.at - self.base
        self.put(END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, nbytes, start - self.base))
        self.put(LOCATOR64.pack(b"PK\6\7", 0, end64, 1))
        few = min(count, FULL16)
        self.put(END.pack(b"PK\5\6", 0, 0, few, few, min(nbytes, FULL32), FULL32, 0))

"""torch.save archives, read as a tree of plain values whose tensors are byte ranges of the file.

    {"module": {"w": Stored(file, offset=1088, nbytes=2600, "BF16", (13, 10), (10, 1), key="0")}, "step": 3}

Neither torch nor the framework that saved is needed: pickle goes through unpickle.py, storages stay where they
are. Two tensors of one storage (tied parameters, views) have the same `key`. Invariants:

* a Stored lies inside its storage, its storage inside its zip member, and that inside the file;
* strides are never negative, and a tensor's last element is inside its storage;
* nothing of the data is read here.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

from ..dtypes import FROM_TORCH, ITEM_BYTES
from ..universal.disk import explained
from ..universal.errors import CorruptError
from ..universal.model import ELEMENTS_MAX, RANK_MAX, Slab, Span
from .inert import Global, Instance, Make
from .unpickle import BYTES_MAX, loads, named
from .zipfiles import Archive

STORAGES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "DoubleStorage": "F64",
        "FloatStorage": "F32",
        "HalfStorage": "F16",
        "BFloat16Storage": "BF16",
        "LongStorage": "I64",
        "IntStorage": "I32",
        "ShortStorage": "I16",
        "CharStorage": "I8",
        "ByteStorage": "U8",
        "BoolStorage": "BOOL",
        "ComplexFloatStorage": "C64",
        "UntypedStorage": "U8",
    }
)
TORCH_GLOBALS: Final = frozenset(
    [
        *(("torch", name) for name in STORAGES),
        *(("torch", name) for name in FROM_TORCH),
        ("torch.storage", "UntypedStorage"),
        ("torch.storage", "TypedStorage"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._tensor", "_rebuild_from_type_v2"),
    ]
)


INERT_NAMES: Final = frozenset(
    [
        ("collections", "Counter"),
        ("argparse", "Namespace"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
    ]
)
"""What jobs keep beside their tensors (schedulers, numpy's generator): stand-ins, kept as metadata."""


_COUNT: Final = rb"(?:K.|M..|J.{4})"
_ONE_TENSOR: Final = (
    rb"\x80\x02ctorch\._utils\n_rebuild_tensor_v2\nq\x00\(\(X\x07\x00\x00\x00storageq\x01ctorch\n(\w+)\nq\x02"
    rb"X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04(%b)tq\x05QK\x00(%b{1,3}[\x85-\x87])q\x06(%b{1,3}[\x85-\x87])q\x07"
    rb"[\x88\x89]ccollections\nOrderedDict\nq\x08\)Rq\ttq\nRq\x0b\." % ((_COUNT,) * 3)
)
"""The pickle of one tensor of one to three dims and nothing else, byte for byte as torch.save writes it. DCP's
checkpoints have one for each part of each tensor; what does not match goes through unpickle.py, and gives the same.
Compiled when one is met: that takes as long as to open a small file."""
_ONE_TENSOR_MAX: Final = 512


def _counts(code: bytes) -> list[int]:
    """The integers of such opcodes, and the code of the tuple that holds them as its length."""
    found, at = [], 0
    while at < len(code):
        form = code[at]
        if form == 0x4B:  # K: a byte, M: two, J: four with a sign
            found.append(code[at + 1])
            at += 2
        elif form == 0x4D:
            found.append(int.from_bytes(code[at + 1 : at + 3], "little"))
            at += 3
        elif form == 0x4A:
            found.append(int.from_bytes(code[at + 1 : at + 5], "little", signed=True))
            at += 5
        else:
            found.append(form - 0x84)
            break
    return found


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in a file; `dtype` is what the storage was typed as."""

    dtype: str
    key: str
    offset: int
    elements: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies in a file. `offset` is from the start of the file; strides are in elements."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    key: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= max(length, 1)
        return True

    @property
    def nbytes(self) -> int:
        """From the first element to the end of the last."""
        return extent(self.shape, self.strides) * ITEM_BYTES[self.dtype]

    def slab(self) -> Slab:
        """The whole tensor as one slab."""
        box = tuple((0, length) for length in self.shape)
        strides = None if self.contiguous or not self.elements else self.strides
        return Slab(Span(self.file, self.offset, self.nbytes), self.dtype, box=box, strides=strides)

    def flat_slab(self, start: int, stop: int, at: int) -> Slab:
        """Elements [at, ...) of this contiguous tensor as elements [start, stop) of a logical one."""
        if not self.contiguous or not 0 <= at <= at + stop - start <= self.elements:
            raise CorruptError(
                "a piece outside of the tensor that holds it", file=self.file, start=at, of=self.elements
            )
        item = ITEM_BYTES[self.dtype]
        return Slab(Span(self.file, self.offset + at * item, (stop - start) * item), self.dtype, flat=(start, stop))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last, both included."""
    last = 0
    for length, step in zip(shape, strides, strict=True):
        if not length:
            return 0
        last += (length - 1) * step
    return last + 1


_INT: Final = frozenset((int,))


def is_counts(value: object) -> bool:
    if not isinstance(value, tuple) or not _INT.issuperset(map(type, value)):
        return False
    return not value or (min(value) >= 0 and max(value) <= ELEMENTS_MAX)


def read_torch(
    root: Path,
    file: str,
    *,
    names: frozenset[tuple[str, str]] = frozenset(),
    make: Mapping[tuple[str, str], Make] | None = None,
    region: tuple[int, int] | None = None,
) -> Any:
    """What torch.save wrote to `root/file` (or to a region of it); tensors are Stored.

    `names` are further globals that may appear, as inert stand-ins.
    """
    with opened(root / file) as fd:
        return read_region(fd, file, region, names=names, make=make)


def read_region(
    fd: int,
    file: str,
    region: tuple[int, int] | None = None,
    *,
    names: frozenset[tuple[str, str]] = frozenset(),
    make: Mapping[tuple[str, str], Make] | None = None,
) -> Any:
    """As read_torch(), from an open file; `file` is what Stored and errors call it."""
    start, stop = region if region is not None else (0, None)
    return _Reader(Archive(fd, file, start, stop), file).value(names, make or {})


def globals_of(path: Path) -> tuple[str, ...]:
    """Every global that the file's pickle names; nothing is judged, nothing executed."""
    with opened(path) as fd:
        return named(_Reader(Archive(fd, path.name), path.name).pickled(), where=path.name)


def is_torch(path: Path) -> bool:
    """Whether the file begins like a zip; torch.save has written zips since 1.6."""
    with opened(path) as fd:
        return os.pread(fd, 4, 0) == b"PK\3\4"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    with explained(path, "reading a checkpoint"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class _Reader:
    """One archive: finds its members, and turns persistent ids and rebuild calls into Stored."""

    def __init__(self, archive: Archive, file: str) -> None:
        self.archive = archive
        self.file = file
        pickles = [name for name in archive.members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CorruptError("a zip that torch.save did not write: not one data.pkl", file=file, found=len(pickles))
        self.prefix = pickles[0].removesuffix("data.pkl")
        order = archive.members.get(self.prefix + "byteorder")
        if order is not None and archive.read(order, 16) != b"little":
            raise CorruptError("a checkpoint of a big-endian machine", file=file)
        self.storages: dict[str, Storage] = {}

    def pickled(self) -> bytes:
        return self.archive.read(self.archive.members[self.prefix + "data.pkl"], BYTES_MAX)

    def value(self, names: frozenset[tuple[str, str]], make: Mapping[tuple[str, str], Make]) -> Any:
        data = self.pickled()
        value = self._single(data) if not make else None
        if value is None:
            ours: dict[tuple[str, str], Make] = {
                ("torch._utils", "_rebuild_tensor"): self._tensor,
                ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
                ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
                ("torch._utils", "_rebuild_parameter"): self._first,
                ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
            }
            allowed = TORCH_GLOBALS | INERT_NAMES | names
            value = loads(data, allowed=allowed, persistent=self._storage, make={**ours, **make}, where=self.file)
        members = self.archive.members
        used = [members[f"{self.prefix}data/{key}"] for key in self.storages]
        self.archive.check_room(sorted(used, key=lambda m: m.header))
        return value

    def _single(self, data: bytes) -> Stored | None:
        """The one tensor that the pickle is, if it is the most usual one."""
        found = re.fullmatch(_ONE_TENSOR, data, re.DOTALL) if len(data) < _ONE_TENSOR_MAX else None
        if found is None:
            return None
        kind, count, *dims = found.groups()
        shape, strides = (_counts(code) for code in dims)
        name = kind.decode()
        if shape.pop() != len(shape) or strides.pop() != len(strides) or name not in STORAGES:
            return None  # the machine says what is wrong with it
        storage = self._storage(("storage", Global("torch", name), "0", "cpu", *_counts(count)))
        return self._stored(storage, storage.dtype, 0, tuple(shape), tuple(strides))

    def _storage(self, pid: object) -> Storage:
        """("storage", Global FloatStorage, key, location, elements): where its bytes lie."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], Global)):
            raise CorruptError("a persistent id that is no storage", file=self.file)
        dtype = STORAGES.get(pid[1].name)
        key, elements = pid[2], pid[4]
        if dtype is None or not isinstance(key, str) or not is_counts((elements,)):
            raise CorruptError("a storage of an unknown kind", file=self.file, kind=str(pid[1]))
        known = self.storages.get(key)
        if known is not None:
            if (known.dtype, known.elements) != (dtype, elements):
                raise CorruptError("one storage with two descriptions", file=self.file, storage=key)
            return known
        member = self.archive.members.get(f"{self.prefix}data/{key}")
        if member is None:
            raise CorruptError("a storage that is not in the file", file=self.file, storage=key)
        if elements * ITEM_BYTES[dtype] > member.nbytes:
            raise CorruptError("a storage larger than its bytes", file=self.file, storage=key, nbytes=member.nbytes)
        self.storages[key] = Storage(dtype, key, self.archive.data_offset(member), elements)
        return self.storages[key]

    def _tensor(self, args: tuple[Any, ...]) -> Stored:
        """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)."""
        if len(args) < 4 or not isinstance(args[0], Storage):
            raise CorruptError("a tensor without a storage", file=self.file)
        return self._stored(args[0], args[0].dtype, args[1], args[2], args[3])

    def _tensor_v3(self, args: tuple[Any, ...]) -> Stored:
        """_rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata)."""
        if len(args) < 7 or not isinstance(args[0], Storage) or not isinstance(args[6], Global):
            raise CorruptError("a tensor without a storage or a dtype", file=self.file)
        dtype = FROM_TORCH.get(args[6].name)
        if dtype is None:
            raise CorruptError("a tensor of an unknown dtype", file=self.file, dtype=str(args[6]))
        return self._stored(args[0], dtype, args[1], args[2], args[3])

    def _stored(self, storage: Storage, dtype: str, start: Any, shape: Any, strides: Any) -> Stored:
        if not is_counts((start,)) or not is_counts(shape) or not is_counts(strides) or len(shape) != len(strides):
            raise CorruptError("a tensor of an impossible shape", file=self.file, storage=storage.key)
        item = ITEM_BYTES[dtype]
        room = storage.elements * ITEM_BYTES[storage.dtype]
        if len(shape) > RANK_MAX or (start + extent(shape, strides)) * item > room:
            raise CorruptError("a tensor that leaves its storage", file=self.file, storage=storage.key, shape=shape)
        return Stored(self.file, storage.offset + start * item, dtype, shape, strides, storage.key)

    def _first(self, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Stored):
            raise CorruptError("a parameter without a tensor", file=self.file)
        return args[0]

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        """_rebuild_from_type_v2(function, type, arguments, state): the tensor, without its type and state."""
        if len(args) < 3 or not isinstance(args[0], Global) or not isinstance(args[2], tuple):
            raise CorruptError("a tensor subclass that cannot be understood", file=self.file)
        rebuild = {"_rebuild_tensor_v2": self._tensor, "_rebuild_parameter": self._first}.get(args[0].name)
        if rebuild is None:
            raise CorruptError("a tensor subclass that cannot be understood", file=self.file, by=str(args[0]))
        return rebuild(args[2])


def number(root: Path, value: Any) -> int | float | None:
    """A number, or what a tensor of one element holds; None for anything else."""
    if isinstance(value, Stored) and value.elements == 1:
        form = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}.get(value.dtype)
        if form is None:
            return None
        with opened(root / value.file) as fd:
            return cast(float, struct.unpack(form, os.pread(fd, value.nbytes, value.offset))[0])
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def plain(value: Any) -> Any:
    """`value` as JSON values; a Stored and other stand-ins become {"$...": what it was}."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {key if isinstance(key, str) else f"$key:{key!r}": plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, Stored):
        return {"$tensor": [value.file, value.offset, value.dtype, list(value.shape), list(value.strides)]}
    if isinstance(value, Instance):
        return {"$object": str(value.cls), "args": plain(value.args), "state": plain(value.state)}
    return {"$global": str(value)}

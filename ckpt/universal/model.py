"""What a checkpoint is, whoever wrote it: pure values that point at bytes and hold none.

    Checkpoint ─ states[("layers.0.w", "exp_avg")] = TensorState(F32, [4, 6], slabs)
                                                        │
         ┌──── Slab(box=((0, 4), (0, 3))) ──────────────┤        Span("optim/exp_avg-1.safetensors", 4096, 48)
         └──── Slab(flat=(12, 24)) of another ──────────┘        Span("zero_pp_rank_0...pt", 812, 48)

Every reader of a format produces these, every writer consumes them: converting, slicing, comparing and
verifying know nothing else. A value here may have come from a hostile file, so construction checks what can
be checked locally, and validate() the rest; neither opens a file. Invariants:

* a span's file is a relative path that stays below the root, lexically;
* a slab's span has exactly the bytes that its geometry, dtype, strides and codec say;
* digests, where there are any, cover all of the span's stored bytes, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from ..dtypes import ITEM_BYTES
from .errors import CorruptError, IncompleteError

RANK_MAX: Final = 16
"""Dimensions of a tensor: beyond what any framework stores; a cap against hostile shapes."""
ELEMENTS_MAX: Final = 1 << 60
CHUNK_BYTES_CAP: Final = 64 << 20
"""A reader holds a chunk in memory, so nobody may ask it to hold more than this."""

Box = tuple[tuple[int, int], ...]
"""For each dim [start, stop), in elements of the logical tensor."""
Flat = tuple[int, int]
"""Elements [start, stop) of the logical tensor in row-major order."""
Region = Box | Flat

Role = Literal["param", "buffer", "frozen", "optim", "opaque"]
Kept = Literal["exact", "remapped", "absent"]
Codec = Literal["raw", "zstd-planes"]
ROLES: Final = ("param", "buffer", "frozen", "optim", "opaque")
KEPT: Final = ("exact", "remapped", "absent")
CODECS: Final = ("raw", "zstd-planes")


@lru_cache(maxsize=4096)  # a checkpoint names each of its files as often as it has tensors there
def safe_path(path: str) -> bool:
    """Whether `path` is relative, normal and stays below where it starts. Purely by its letters."""
    if not path or len(path) > 4096 or "\0" in path or "\\" in path or path.startswith("/"):
        return False
    return all(part not in ("", ".", "..") and _storable(part) for part in path.split("/"))


def _storable(part: str) -> bool:
    """Whether a file system takes it; what is not refused here would be an error of the system later."""
    try:
        return len(part) <= 255 and len(part.encode()) <= 255
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [offset, offset + nbytes) of a file; the path is relative to the checkpoint's root."""

    file: str
    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if not safe_path(self.file):
            raise CorruptError("a path that leaves the checkpoint", file=repr(self.file))
        if self.offset < 0 or self.nbytes < 0:
            raise CorruptError("a negative byte range", file=self.file, offset=self.offset, nbytes=self.nbytes)

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Slab:
    """One stored piece of a tensor: a box or a flat range of it, and where its bytes lie.

    Exactly one of `box` and `flat` is given. Elements are stored row-major, in the order of the box (or flat
    range); or a box is stored with `strides` (in elements, one per dim, >= 0; element [0, ...] at the span's
    start), as a transposed or sliced tensor in somebody's file is.
    """

    span: Span
    dtype: str
    box: Box | None = None
    flat: Flat | None = None
    codec: Codec = "raw"
    chunk_bytes: int = 0
    """Bytes before compression in each chunk but the last; 0: no chunks, so no digests and no codec."""
    digests: tuple[str, ...] = ()
    """xxh3-128 of each chunk's stored bytes, as 32 lower-case hexadecimal digits."""
    strides: tuple[int, ...] | None = None
    stored: tuple[int, ...] = ()
    """With a codec: stored bytes of each chunk. As many as before compression: that chunk is kept raw."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise CorruptError("an unknown dtype", file=self.span.file, dtype=self.dtype)
        if (self.box is None) == (self.flat is None):
            raise CorruptError("a slab is a box or a flat range, not both or neither", file=self.span.file)
        ranges = self.box if self.box is not None else (self.flat or (0, 0),)
        possible = len(ranges) <= RANK_MAX
        for start, stop in ranges:
            possible = possible and 0 <= start <= stop
        if not possible:
            raise CorruptError("a slab with an impossible range", file=self.span.file, range=ranges)
        self._check_strides()
        self._check_chunks()

    def _check_strides(self) -> None:
        if self.strides is None:
            return
        if self.box is None or len(self.strides) != len(self.box) or any(step < 0 for step in self.strides):
            raise CorruptError("strides that do not fit the box", file=self.span.file, strides=self.strides)

    def _check_chunks(self) -> None:
        expected = self.nbytes
        if not 0 <= self.chunk_bytes <= CHUNK_BYTES_CAP or self.chunk_bytes % ITEM_BYTES[self.dtype]:
            raise CorruptError("an impossible chunk size", file=self.span.file, chunk=self.chunk_bytes)
        if self.codec not in CODECS or (self.chunk_bytes == 0 and self.digests):
            raise CorruptError("an unknown codec or chunk size", file=self.span.file, codec=self.codec)
        if self.codec != "raw":
            if len(self.stored) != self.chunks or not self.chunk_bytes or self.strides is not None:
                raise CorruptError("compressed chunks that are not all listed", file=self.span.file)
            if any(not 0 < n <= size for n, size in zip(self.stored, self._sizes(), strict=True)):
                raise CorruptError("a compressed chunk of an impossible size", file=self.span.file)
            expected = sum(self.stored)
        elif self.stored:
            raise CorruptError("stored sizes belong to a codec", file=self.span.file)
        if self.span.nbytes != expected:
            raise CorruptError(
                "a span whose size is not that of its elements",
                file=self.span.file,
                nbytes=self.span.nbytes,
                expected=expected,
            )
        if self.digests and len(self.digests) != self.chunks:
            raise CorruptError("digests that do not cover the span", file=self.span.file, digests=len(self.digests))

    def _sizes(self) -> Iterator[int]:
        whole, rest = divmod(self.nbytes, self.chunk_bytes)
        yield from [self.chunk_bytes] * whole
        if rest:
            yield rest

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the box, or the length of the flat range."""
        if self.box is not None:
            return tuple(stop - start for start, stop in self.box)
        assert self.flat is not None
        return (self.flat[1] - self.flat[0],)

    @property
    def elements(self) -> int:
        count = 1
        for start, stop in self.box if self.box is not None else (self.flat or (0, 0),):
            count *= stop - start
        return count

    @property
    def nbytes(self) -> int:
        """Bytes before compression; with strides, from the first element to the end of the last."""
        item = ITEM_BYTES[self.dtype]
        if self.strides is None or not self.elements:
            return self.elements * item
        return (sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)) + 1) * item

    @property
    def chunks(self) -> int:
        """How many chunks; 0 without chunks."""
        return -(-self.nbytes // self.chunk_bytes) if self.chunk_bytes else 0


@dataclass(frozen=True, slots=True)
class TensorState:
    """One state of one parameter: the logical tensor and the slabs that hold it.

    `state`: "weight" is the model's own value in its compute dtype, "fp32" the master copy, "buffer" a buffer;
    anything else is the optimizer's word for it: "exp_avg", "momentum_buffer", ...
    """

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    slabs: tuple[Slab, ...]
    role: Role = "param"

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise CorruptError("an unknown dtype", name=self.name, state=self.state, dtype=self.dtype)
        if self.role not in ROLES:
            raise CorruptError("an unknown role", name=self.name, state=self.state, role=self.role)
        if len(self.shape) > RANK_MAX or any(n < 0 for n in self.shape) or math.prod(self.shape) > ELEMENTS_MAX:
            raise CorruptError("an impossible shape", name=self.name, state=self.state, shape=self.shape)

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.state

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the logical tensor, whatever is stored."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Group:
    """One parameter group of the optimizer."""

    index: int
    hyper: Mapping[str, Any]
    """Hyper-parameters as JSON values; "params" is not among them."""
    params: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a manifest says about a file, beyond the slabs in it."""

    nbytes: int
    rest: str = ""
    """xxh3-128 of all bytes that no slab covers, in ascending order (for a file without slabs: of the file)."""
    probe: str = ""
    """xxh3-128 of the first and the last 4 KiB: tells files apart before a full read. Adopted files only."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that can be read, in whatever format its bytes are."""

    root: Path
    """Spans are relative to this."""
    format: str
    """"holdfast", "deepspeed:zero3", "dcp", "safetensors", "torch", ... For people and for messages."""
    states: Mapping[tuple[str, str], TensorState]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tied parameters: another name of a parameter -> the name that holds its states."""
    groups: tuple[Group, ...] = ()
    steps: Mapping[str, int | float] = field(default_factory=dict)
    """The optimizer's step of each parameter: frozen or late parameters differ from the others."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: trainer, scheduler, scaler, data, rng, source {framework, version, mesh}, ..."""
    completeness: Mapping[str, Kept] = field(default_factory=dict)
    """For "rng", "data", "scheduler", "optimizer": whether it came over exactly, remapped, or not at all."""
    copies: Mapping[tuple[str, str], tuple[Slab, ...]] = field(default_factory=dict)
    """Slabs beside those of `states`, of what these hold too: replicas that tensor-parallel ranks keep. Theirs is the
    say only if they agree: copies.py compares them."""
    opaque: Mapping[str, Span] = field(default_factory=dict)
    """What could not be understood, kept as bytes and never executed."""
    id: str = ""
    """Tells two saves apart, even of the same step. Ours only."""
    home: Path | None = None
    """Where MANIFEST.json is, if it is not in `root` (adopted)."""
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    """Files below `root`, if the format lists them."""
    own_files: Mapping[str, FileFacts] = field(default_factory=dict)
    """Files below `home`, if that is not `root`."""

    def __post_init__(self) -> None:
        for key, tensor in self.states.items():
            if key != tensor.key:
                raise CorruptError("a tensor under another's key", key=key, name=tensor.name, state=tensor.state)
        for index, group in enumerate(self.groups):
            if group.index != index:
                raise CorruptError("groups are not numbered in their order", group=group.index, expected=index)
        for topic, kept in self.completeness.items():
            if kept not in KEPT:
                raise CorruptError("an unknown completeness", topic=topic, value=kept)

    def tensor(self, name: str, state: str) -> TensorState:
        """The state of a parameter; an alias stands for its owner."""
        found = self.states.get((name, state)) or self.states.get((self.aliases.get(name, name), state))
        if found is None:
            raise IncompleteError("no such tensor", name=name, state=state, format=self.format)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all logical tensors."""
        return sum(tensor.nbytes for tensor in self.states.values())


def validate(checkpoint: Checkpoint) -> None:
    """Raise unless every tensor is covered exactly once and every reference leads somewhere.

    By volume and disjointness of the slabs: the cost grows with their number, never with that of elements.
    """
    from .geometry import check_cover  # geometry needs the values above

    for tensor in checkpoint.states.values():
        check_cover(tensor)
    names = {name for name, _ in checkpoint.states}
    for alias, owner in checkpoint.aliases.items():
        if owner not in names:
            raise IncompleteError("a tied parameter whose owner is not there", name=alias, owner=owner)
        if alias in names:
            raise CorruptError("a tied parameter that has states of its own", name=alias, owner=owner)
    grouped: set[str] = set()
    for group in checkpoint.groups:
        for name in group.params:
            if name in grouped:
                raise CorruptError("a parameter in two groups", name=name, group=group.index)
            grouped.add(name)
            if name not in names and name not in checkpoint.aliases:
                raise IncompleteError("a group names a parameter that is not there", name=name, group=group.index)


def normal_path(path: str | PurePosixPath) -> str:
    """`path` with forward slashes and no "." parts; CorruptError if it leaves where it starts."""
    text = str(PurePosixPath(path))
    if not safe_path(text):
        raise CorruptError("a path that leaves the checkpoint", file=repr(str(path)))
    return text

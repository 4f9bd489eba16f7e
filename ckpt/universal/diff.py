"""What differs between two checkpoints, tensor by tensor, whatever layout each of them has.

    a ──▶ block ──┐
                  ├─▶ bits? values? ulps? ──▶ TensorDiff(differing, max_abs, max_ulp, cosine, first)
    b ──▶ block ──┘

Equal names and states are compared; equal bits are equal, NaN or not. Of different dtypes only values can be
compared. Decides nothing about what is close enough: that is the caller's. Invariants:

* max_ulp counts representable numbers between two of one dtype; -0.0 and 0.0 are 0 apart, and differ in bits;
* memory is a few blocks per job.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ..dtypes import ITEM_BYTES
from .convert import NUMPY, convert
from .model import Checkpoint, TensorState
from .read import Reader
from .view import blocks

Array = np.ndarray[Any, Any]
FLOATS: Final = ("BF16", "F16", "F32", "F64")
COMPARE_BYTES: Final = 1 << 20
"""Compared at once: the float64 copies that it takes stay in the cache."""


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor of both, or of one."""

    name: str
    state: str
    kind: str
    """same; differs (in bits); close (bits differ, values do not: -0.0, or another dtype); only_a; only_b; shape."""
    elements: int = 0
    differing: int = 0
    """Elements whose bits (for different dtypes: values) differ."""
    max_abs: float = 0.0
    """Largest distance of two values; infinite if one of them is NaN or infinite and the other is not."""
    max_ulp: int | None = None
    """None: of different dtypes, or no floats."""
    cosine: float | None = None
    """Of the tensors as vectors; None: not numbers, or one of them is zero or not finite."""
    first: int | None = None
    """Flat index of the first element that differs."""
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.state


def compare(a: Reader, b: Reader, *, jobs: int = 1) -> list[TensorDiff]:
    """All tensors of both, sorted by name. A name that only one of them ties is compared as its owner."""
    shared = a.checkpoint.aliases.items() & b.checkpoint.aliases.items()
    one, other = (states_of(reader.checkpoint, skip={alias for alias, _ in shared}) for reader in (a, b))
    keys = sorted(one.keys() | other.keys())
    with ThreadPoolExecutor(jobs, thread_name_prefix="checkpoint-diff") as pool:
        futures = [pool.submit(_compare, a, b, one.get(key), other.get(key), key) for key in keys]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def states_of(checkpoint: Checkpoint, skip: Collection[str]) -> dict[tuple[str, str], TensorState]:
    """Tensors by the names that a model would ask for: aliases too, but for those to skip."""
    found = dict(checkpoint.states)
    for alias, owner in checkpoint.aliases.items():
        if alias in skip:
            continue
        for (name, state), tensor in checkpoint.states.items():
            if name == owner:
                found[alias, state] = tensor
    return found


def _compare(
    a: Reader, b: Reader, one: TensorState | None, other: TensorState | None, key: tuple[str, str]
) -> TensorDiff:
    if one is None or other is None:
        found = other if one is None else one
        assert found is not None
        return TensorDiff(*key, "only_b" if one is None else "only_a", found.elements)
    if one.shape != other.shape:
        note = f"{list(one.shape)} and {list(other.shape)}"
        return TensorDiff(*key, "shape", max(one.elements, other.elements), note=note)
    alike = one.dtype == other.dtype
    if not alike and not (one.dtype in NUMPY and other.dtype in NUMPY):
        return TensorDiff(*key, "differs", one.elements, one.elements, note=f"{one.dtype} and {other.dtype}")
    total = _Sums(one.dtype, other.dtype)
    for low, high in blocks(one, nbytes=COMPARE_BYTES):
        total.add(low, a.read(*one.key, (low, high)), b.read(*other.key, (low, high)))
    return total.result(key, one.elements)


class _Sums:
    """What is known after some blocks."""

    def __init__(self, one: str, other: str) -> None:
        self._one, self._other = one, other
        self._alike = one == other
        self._values = one in NUMPY and other in NUMPY and one != "C64" and other != "C64"
        self._differing = self._unequal = 0
        self._first: int | None = None
        self._max_abs = 0.0
        self._max_ulp = 0
        self._dot = self._square_a = self._square_b = 0.0

    def add(self, low: int, a: Any, b: Any) -> None:
        """Compare one block, whose first element is `low`."""
        if self._alike:
            same = self._bits(a) == self._bits(b)
            if not self._values:
                self._note(low, ~same)
                self._unequal = self._differing
                return
        with np.errstate(invalid="ignore", over="ignore"):
            x, y = (np.asarray(convert(d, t, "F64")) for d, t in ((a, self._one), (b, self._other)))
            self._dot += float(x @ y)
            self._square_a += float(x @ x)
            self._square_b += float(y @ y)
        if not self._alike:
            same = (x == y) | (np.isnan(x) & np.isnan(y))
        if same.all():
            return
        self._note(low, ~same)
        self._distances(x[~same], y[~same], a, b, ~same)

    def _bits(self, data: Any) -> Array:
        return np.frombuffer(data, f"u{ITEM_BYTES[self._one]}")

    def _note(self, low: int, different: Array) -> None:
        count = int(np.count_nonzero(different))
        self._differing += count
        if self._first is None and count:
            self._first = low + int(np.argmax(different))

    def _distances(self, x: Array, y: Array, a: Any, b: Any, where: Array) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(x - y)
        apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
        apart[np.isnan(apart)] = math.inf
        self._unequal += int(np.count_nonzero(apart)) + int(np.count_nonzero(np.isnan(x) & np.isnan(y)))
        if self._alike and self._one in ("I64", "U64"):  # float64 cannot tell large neighbours apart
            values = (np.frombuffer(data, NUMPY[self._one])[where] for data in (a, b))
            self._max_abs = max(self._max_abs, float(_apart(*values)))
            self._unequal = self._differing
        else:
            self._max_abs = max(self._max_abs, float(apart.max()))
        if self._alike and self._one in FLOATS:
            self._max_ulp = max(self._max_ulp, ulps(self._bits(a)[where], self._bits(b)[where]))

    def result(self, key: tuple[str, str], elements: int) -> TensorDiff:
        """What the blocks say together."""
        kind = "same" if not self._differing else "close" if not self._unequal else "differs"
        if kind == "same" and not self._alike:
            kind = "close"
        length = math.sqrt(self._square_a) * math.sqrt(self._square_b)
        numbers = self._values and math.isfinite(length) and length > 0 and math.isfinite(self._dot)
        found = TensorDiff(*key, kind, elements, self._differing, self._max_abs, first=self._first)
        if self._alike and self._one in FLOATS:
            found = replace(found, max_ulp=self._max_ulp)
        if numbers:
            exact = 1.0 if not self._differing else max(-1.0, min(1.0, self._dot / length))
            found = replace(found, cosine=exact)
        return found if self._alike else replace(found, note=f"{self._one} and {self._other}")


def ulps(one: Array, other: Array) -> int:
    """Largest number of representable steps between the floats with these bits."""
    width = one.dtype.itemsize * 8

    def order(bits: Array) -> Array:
        # Two's complement of the magnitude: neighbours in value are neighbours in number, and -0 is 0.
        magnitude = (bits & bits.dtype.type((1 << (width - 1)) - 1)).astype(np.int64)
        signed: Array = np.where(bits >> bits.dtype.type(width - 1), -magnitude, magnitude)
        return signed

    x, y = order(one), order(other)
    if width < 64:
        return int(np.abs(x - y).max(initial=0))
    return _apart(x, y)


def _apart(x: Array, y: Array) -> int:
    """Largest distance of two 64-bit integers; it fits unsigned ones only."""
    high, low = np.maximum(x, y).view(np.uint64), np.minimum(x, y).view(np.uint64)
    return int((high - low).max(initial=0))


def details(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """What differs besides tensors, a line each: ties, groups, steps, metadata."""
    for topic, one, other in (("tied", a.aliases, b.aliases), ("step", a.steps, b.steps)):
        for name in sorted({*one, *other}):
            if one.get(name) != other.get(name):
                yield f"{topic} {name}: {one.get(name)} and {other.get(name)}"
    yield from _groups(a, b)
    for topic in sorted({*a.metadata, *b.metadata} - {"source"}):
        if a.metadata.get(topic) != b.metadata.get(topic):
            yield f"metadata {topic}: {_where(a.metadata.get(topic), b.metadata.get(topic))}"


def _groups(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Hyper-parameters are compared by parameter: groups may be cut differently."""
    one, other = ({name: g.hyper for g in c.groups for name in g.params} for c in (a, b))
    told: set[str] = set()
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            text = _where(one.get(name), other.get(name))
            if text not in told:
                told.add(text)
                yield f"hyper-parameters of {name}: {text}"


def _where(one: Any, other: Any, path: str = "") -> str:
    """The first place at which two values differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}, key=str):
            if one.get(key) != other.get(key):
                return _where(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    return f"{path}{': ' if path else ''}{str(one)[:60]} and {str(other)[:60]}"

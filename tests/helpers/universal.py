"""Small universal checkpoints for tests: known tensors, and a disk that counts, fails or dies at a chosen call."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.ckpt.universal.disk import Disk
from holdfast.ckpt.universal.model import Checkpoint, Group
from holdfast.ckpt.universal.write import Details, StatePlan, WriteOptions, Writer

DTYPES = {"F32": np.float32, "BF16": np.uint16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}

DETAILS = Details(
    metadata={
        "trainer": {"step": 7, "lr": 0.1, "best": float("inf")},
        "rng": {"seed": 3},
        "source": {"mesh": {"pp": 2}},
    },
    groups=(Group(0, {"lr": 0.1, "betas": [0.9, 0.95]}, ("embed", "layer.0")), Group(1, {"lr": 0.2}, ("bias",))),
    steps={"embed": 7, "layer.0": 7, "bias": 5},
    aliases={"head": "embed"},
    completeness={"rng": "exact", "data": "absent"},
)


def tensors(seed: int = 0, scale: int = 1) -> dict[tuple[str, str], tuple[str, np.ndarray[Any, Any]]]:
    """(name, state) -> (dtype, array): large and small, scalars, empty ones, several dtypes."""
    chance = np.random.default_rng(seed)
    found: dict[tuple[str, str], tuple[str, np.ndarray[Any, Any]]] = {}
    shapes = {"embed": (96 * scale, 256), "layer.0": (64 * scale, 96), "bias": (33,)}
    for name, shape in shapes.items():
        found[name, "weight"] = ("BF16", chance.integers(0, 1 << 15, shape, np.uint16))
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            found[name, state] = ("F32", chance.standard_normal(shape, np.float32))
    found["rope", "buffer"] = ("I64", chance.integers(0, 1 << 40, (5, 3)))
    found["mask", "buffer"] = ("BOOL", chance.integers(0, 2, (7,)).astype(np.bool_))
    found["count", "buffer"] = ("I64", np.array(41))
    found["none", "fp32"] = ("F32", np.zeros((0, 4), np.float32))
    found["cpu", "rng"] = ("U8", chance.integers(0, 255, 5056, np.uint8))
    return found


def plans(found: dict[tuple[str, str], tuple[str, np.ndarray[Any, Any]]]) -> list[StatePlan]:
    return [StatePlan(name, state, dtype, array.shape) for (name, state), (dtype, array) in found.items()]


def save(
    target: Path,
    *,
    seed: int = 0,
    scale: int = 1,
    options: WriteOptions | None = None,
    disk: Disk | None = None,
    piece: int = 50_000,
) -> Checkpoint:
    """Write tensors(seed) in pieces of `piece` elements, skipping what a resumed write has."""
    found = tensors(seed, scale)
    with Writer(target, options or WriteOptions(fsync=False), disk) as writer:
        writer.begin(plans(found))
        for (name, state), (_, array) in found.items():
            flat = array.reshape(-1)
            for start, stop in writer.missing(name, state):
                for low in range(start, stop, piece):
                    high = min(low + piece, stop)
                    writer.put(name, state, flat[low:high].data.cast("B"), (low, high))
        writer.put_opaque("odd.bin", b"somebody's bytes")
        return writer.commit(DETAILS)


class FaultyDisk(Disk):
    """Counts the calls that change something; at call `at` it dies, or fails as a full disk does from then on."""

    def __init__(self, at: int = -1, *, die: bool = False) -> None:
        self.calls = 0
        self._at = at
        self._die = die

    def _count(self, fd: int = -1, data: Any = None, offset: int = 0) -> None:
        self.calls += 1
        if self._at < 0 or self.calls < self._at:
            return
        if self._die:
            if data is not None:  # torn: half of it got there
                os.pwrite(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")

    def allocate(self, fd: int, nbytes: int) -> None:
        self._count()
        super().allocate(fd, nbytes)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> None:
        self._count(fd, data, offset)
        super().pwrite(fd, data, offset)

    def append(self, fd: int, data: bytes) -> None:
        self._count()
        super().append(fd, data)

    def fsync(self, fd: int) -> None:
        self._count()
        super().fsync(fd)

    def mkdir(self, path: Path) -> None:
        self._count()
        super().mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)

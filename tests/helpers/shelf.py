"""A snapshot manager's shelf without a manager: real arenas, filled by hand, behind the calls that the saver makes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from holdfast.ckpt.memory import metadata as blob
from holdfast.ckpt.memory.arena import ArenaEntry, State, arena_bytes
from holdfast.ckpt.memory.client import HalfInfo
from holdfast.ckpt.memory.memfd import MappedHalf, create, read_only
from holdfast.proto.errors import PeerLost

JOB = "job"
DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8"}
Array = np.ndarray[Any, Any]
Tensors = Mapping[tuple[str, str], Array]
Parts = Mapping[tuple[str, str], tuple[tuple[int, ...], int]]


def origin(**changed: Any) -> dict[str, Any]:
    """Where a state comes from: one rank with two units, unless said otherwise."""
    return {
        "generation": 1,
        "world_size": 2,
        "units": 2,
        "hosted": [0],
        "replica": 0,
        "replicas": 1,
        "ties": [],
        "optimizer": "torch.optim.AdamW",
        "seed": 0,
        "shuffle": True,
        "microbatch_size": 2,
        "microbatches": 4,
        "exact": True,
        "compute": "cpu",
        "validates": False,
        "validation_due": False,
        **changed,
    }


class Shelf:
    """Stands for SmpClient. `lost`: every call raises PeerLost."""

    def __init__(self) -> None:
        self.lost = False
        self.opened = 0
        self.accused: list[tuple[int, int, int]] = []
        self._held: dict[tuple[int, int], MappedHalf] = {}

    def fill(self, slot: int, half: int, step: int, tensors: Tensors, parts: Parts | None = None, **meta: Any) -> None:
        """As a rank and its manager would: begun, copied, sealed. `parts`: shape, first element of what is one."""
        self.copy(slot, half, step, tensors, parts, **meta)
        arena = self._held[slot, half].half
        judged = arena.judge()
        assert judged is not None
        assert isinstance(judged[1], bytes)
        arena.seal(judged[0], judged[1])

    def copy(self, slot: int, half: int, step: int, tensors: Tensors, parts: Parts | None = None, **meta: Any) -> None:
        """As a rank does, before its manager has looked."""
        generators = np.arange(4, dtype=np.uint8) + slot
        value = {
            "step": step,
            "origin": origin(hosted=[slot]),
            "report": {"loss": 1.0 / (step + 1)},
            "scaler": {"scale": 1.0, "finite_steps": 0},
            "data": None,
            "user": {},
            "rng": {"torch": generators},
            **meta,
        }
        encoded, extra = blob.encode(value, is_tensor=lambda one: isinstance(one, np.ndarray))
        listed = [*tensors.items(), *(((path, "extra"), array) for path, array in extra)]
        entries = []
        for (name, state), array in listed:
            shape, start = (parts or {}).get((name, state), (array.shape, 0))
            entries.append(ArenaEntry(name, state, DTYPES[array.dtype.name], shape, start, start + array.size))
        mapped = self._held.get((slot, half))
        if mapped is None:
            mapped = MappedHalf(create(arena_bytes(entries, encoded) + (1 << 16)), JOB, slot=slot, index=half)
            mapped.half.format()
            self._held[slot, half] = mapped
        for entry, (_, array) in zip(mapped.half.begin(step, bytes(32), 0, entries, encoded), listed, strict=True):
            mapped.half.view(entry)[:] = array.tobytes()
        mapped.half.finish()

    def half(self, slot: int, half: int) -> MappedHalf:
        return self._held[slot, half]

    # ---- what the saver calls -------------------------------------------------------------------------

    def connect(self) -> Shelf:
        if self.lost:
            raise PeerLost("no snapshot manager")
        return self

    def list(self) -> tuple[HalfInfo, ...]:
        if self.lost:
            raise PeerLost("lost the snapshot manager")
        rows = []
        for (slot, half), mapped in sorted(self._held.items()):
            state, step, fill = mapped.half.peek()
            rows.append(HalfInfo(slot, half, step, State(state).name, mapped.nbytes, fill))
        return tuple(rows)

    def watch(self, since: int, wait_s: float) -> tuple[int, tuple[HalfInfo, ...]]:
        return since + 1, self.list()

    def open(self, slot: int, half: int) -> MappedHalf:
        self.opened += 1
        fd = read_only(self._held[slot, half].fd)
        return MappedHalf(fd, JOB, slot=slot, index=half, writable=False)

    def corrupt(self, slot: int, half: int, step: int) -> bool:
        self.accused.append((slot, half, step))
        return True

    def close(self) -> None:
        """Nothing is held open."""

    def free(self) -> None:
        for mapped in self._held.values():
            os.fstat(mapped.fd)
            mapped.close()

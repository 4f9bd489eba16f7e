"""Random numbers keyed by where they are used, not by which process uses them.

Before each layer of each microbatch the device's generator is seeded from (seed, step, microbatch, unit), so
dropout is the same in every layout, after every recovery, and in a recomputed forward. The user's own
generators, between steps, are left as they were and are captured with the state.

torch reads a generator's state with the generator's mutex held, and allocates a Python object meanwhile: a garbage
collection then may hand the GIL to a thread that waits for that mutex with the GIL held, and the process stands still
for good. So whatever here touches a generator does it one thread at a time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_MASK = (1 << 64) - 1
_one_at_a_time = threading.RLock()


def key(*parts: int) -> int:
    """Mix integers into one 63-bit seed (splitmix64 finaliser over a running sum)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_device(device: torch.device, value: int) -> None:
    """Seed the generator that modules on `device` draw from."""
    with _one_at_a_time:
        torch.default_generator.manual_seed(value)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(value)


def _states(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's generators: "torch", and "cuda" if `device` is one."""
    with _one_at_a_time:
        states = {"torch": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_states(states: Mapping[str, Any], device: torch.device) -> None:
    with _one_at_a_time:
        torch.set_rng_state(states["torch"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were found."""
    states = _states(device)
    try:
        yield
    finally:
        _set_states(states, device)


@contextmanager
def seeded(device: torch.device, value: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators seeded by `value`; afterwards as they were found."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with preserved(device):
        random.seed(value)
        np.random.seed(value & 0xFFFF_FFFF)
        seed_device(device, value)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def capture(device: torch.device) -> dict[str, Any]:
    """State of Python's, numpy's, torch's and the device's generators, as capturable values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {
            "version": version,
            "internal": torch.tensor(internal, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        **_states(device),
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Undo `capture`."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (
            numpy_state["name"],
            keys,
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached"],
        )
    )
    _set_states(state, device)

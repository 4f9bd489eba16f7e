"""Several checkpoints as one: weighted averages, computed block by block while they are read.

    w1 * a ─┐
    w2 * b ─┼─▶ float64 sum, in an order that the contents decide ─▶ rounded once to the stored dtype
    w3 * c ─┘

The result is the same for any order of the arguments, any block size, any layout of the sources. Weights are
averaged from float32 master copies where all sources have them. Averages of moments are no moments: left out
unless asked for. Not done here: products of low-rank factors (see lora_note). Invariants:

* memory is a few blocks for each job, and does not grow with the model; it grows with N by one block;
* what cannot be averaged (integers, unknown dtypes) is equal in all sources, or a policy was named.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import xxhash

from ..dtypes import ITEM_BYTES
from .convert import NUMPY, convert
from .errors import IncompleteError, LossyError, MappingError, UsageError
from .model import Checkpoint, Group, Region, TensorState
from .read import Reader
from .view import View, blocks, is_optimizer

IntPolicy = Literal["equal", "max", "min", "heaviest"]
INT_POLICIES: Final = ("equal", "max", "min", "heaviest")
FLOATS: Final = ("BF16", "F16", "F32", "F64")
SAMPLE_BYTES: Final = 64 << 10
MERGE_BYTES: Final = 1 << 20
"""Added up at once: small enough that the float64 sum stays in the cache."""

Key = tuple[str, str]


class Merged(View):
    """The weighted sum of several checkpoints of one model. `weights` sum to 1, one each."""

    def __init__(
        self,
        sources: Sequence[Reader],
        weights: Sequence[float],
        *,
        moments: bool = False,
        masters: bool = False,
        int_policy: IntPolicy = "equal",
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if len(sources) < 2 or len(weights) != len(sources):
            raise UsageError("a merge takes two or more checkpoints, and a weight for each", weights=len(weights))
        self._weights = tuple(weights)
        self._int_policy = int_policy
        self._from: dict[Key, str] = {}
        """Which state of the sources a tensor of ours is averaged from."""
        self._order: dict[Key, list[int]] = {}
        self._order_lock = threading.Lock()
        states = self._states([reader.checkpoint for reader in sources], moments=moments, masters=masters)
        super().__init__(merged_checkpoint(sources, states, moments=moments, about=about), sources)

    def _states(self, all_of: list[Checkpoint], *, moments: bool, masters: bool) -> dict[Key, TensorState]:
        first = all_of[0]
        states: dict[Key, TensorState] = {}
        for key, tensor in first.states.items():
            if tensor.role == "opaque" or tensor.state == "rng" or (is_optimizer(tensor) and not moments):
                continue
            if tensor.state == "fp32" and not masters and (tensor.name, "weight") in first.states:
                continue
            others = [_same(first, other, tensor) for other in all_of[1:]]
            source = tensor.state
            if source == "weight" and all(_master(one, tensor) for one in all_of):
                source = "fp32"
            elif any(other.dtype != tensor.dtype for other in others):
                tensor = _widest([tensor, *others])
            self._from[key] = source
            states[key] = replace(tensor, slabs=())
        known = {key for key in first.states if not _left_out(first.states[key], moments)}
        for index, other in enumerate(all_of[1:], 1):
            more = {key for key, t in other.states.items() if not _left_out(t, moments)} - known
            if more:
                name, state = min(more)
                raise MappingError("a tensor that the first checkpoint lacks", name=name, state=state, checkpoint=index)
        return states

    # ---- one region -----------------------------------------------------------------------------------------

    def fill(self, tensor: TensorState, region: Region, out: memoryview) -> None:
        """The sum of one region. Large ones are done by flat blocks."""
        item = ITEM_BYTES[tensor.dtype]
        if len(region) == 2 and isinstance(region[0], int):
            low, high = region
            assert isinstance(low, int)
            assert isinstance(high, int)
            for start, stop in blocks(tensor, low, high, nbytes=MERGE_BYTES):
                part = out[(start - low) * item : (stop - low) * item]
                self._fill(tensor, (start, stop), part)
        else:
            self._fill(tensor, region, out)

    def _fill(self, tensor: TensorState, region: Region, out: memoryview) -> None:
        state = self._from[tensor.key]
        if tensor.dtype not in FLOATS:
            out[:] = self._whole(tensor, state, region)
            return
        total: np.ndarray[Any, Any] | None = None
        with np.errstate(invalid="ignore", over="ignore"):
            for index in self._ordered(tensor, state):
                weight = self._weights[index]
                if weight == 0.0:  # what does not count must not bring its infinities along
                    continue
                reader = self.sources[index]
                stored = reader.checkpoint.tensor(tensor.name, state).dtype
                term = convert(reader.read(tensor.name, state, region), stored, "F64")
                if total is None:
                    total = np.multiply(term, weight)
                else:
                    total += term * weight
            assert total is not None  # weights sum to 1
            out[:] = convert(np.ascontiguousarray(total).data, "F64", tensor.dtype).data.cast("B")

    def _ordered(self, tensor: TensorState, state: str) -> list[int]:
        """Sources in an order that depends on their weights and contents only, so that the sum does, too.

        A sample of each tensor tells them apart; tensors that agree in it are told apart by all their bytes, and
        tensors that agree in those add up to the same in any order.
        """
        with self._order_lock:
            known = self._order.get(tensor.key)
        if known is not None:
            return known
        keys = [(w, self._digest(i, tensor.name, state, whole=False)) for i, w in enumerate(self._weights)]
        order = sorted(range(len(keys)), key=lambda i: keys[i])
        if len(set(keys)) < len(keys):
            same = {key for key in keys if keys.count(key) > 1}
            told = {i: self._digest(i, tensor.name, state, whole=True) for i in order if keys[i] in same}
            order.sort(key=lambda i: (keys[i], told.get(i, "")))
        with self._order_lock:
            return self._order.setdefault(tensor.key, order)

    def _digest(self, index: int, name: str, state: str, *, whole: bool) -> str:
        reader = self.sources[index]
        tensor = reader.checkpoint.tensor(name, state)
        found = xxhash.xxh3_128(tensor.dtype.encode())
        size = tensor.elements
        part = SAMPLE_BYTES // ITEM_BYTES[tensor.dtype] // 4
        starts = [size * at // 4 for at in range(4)]
        for low, high in blocks(tensor) if whole else [(low, min(low + part, size)) for low in starts]:
            found.update(reader.read(name, state, (low, high)))
        return found.hexdigest()

    def _whole(self, tensor: TensorState, state: str, region: Region) -> memoryview:
        """What is not averaged: equal everywhere, or chosen by the policy."""
        data = [reader.read(tensor.name, state, region) for reader in self.sources]
        if all(one == data[0] for one in data[1:]):
            return memoryview(data[0])
        if self._int_policy == "equal":
            raise LossyError(
                "integers that differ cannot be averaged",
                name=tensor.name,
                state=tensor.state,
                dtype=tensor.dtype,
                next="--int-policy max, min or heaviest",
            )
        if self._int_policy == "heaviest":
            best = max(self._weights)
            if self._weights.count(best) > 1:
                raise UsageError("no checkpoint weighs more than the others", name=tensor.name, policy="heaviest")
            return memoryview(data[self._weights.index(best)])
        if tensor.dtype not in NUMPY or tensor.dtype == "C64":
            raise UsageError("a dtype that has no order", name=tensor.name, dtype=tensor.dtype, policy=self._int_policy)
        values = [np.frombuffer(one, NUMPY[tensor.dtype]) for one in data]
        choose = np.maximum if self._int_policy == "max" else np.minimum
        chosen = values[0]
        for other in values[1:]:
            chosen = choose(chosen, other)
        return memoryview(np.ascontiguousarray(chosen).data.cast("B"))


def _left_out(tensor: TensorState, moments: bool) -> bool:
    return tensor.role == "opaque" or tensor.state in ("rng", "fp32") or (is_optimizer(tensor) and not moments)


def _master(checkpoint: Checkpoint, tensor: TensorState) -> bool:
    found = checkpoint.states.get((checkpoint.aliases.get(tensor.name, tensor.name), "fp32"))
    return found is not None and found.shape == tensor.shape


def _same(first: Checkpoint, other: Checkpoint, tensor: TensorState) -> TensorState:
    """The tensor in another checkpoint; it must be there and have the same shape."""
    owner = other.aliases.get(tensor.name, tensor.name)
    found = other.states.get((owner, tensor.state))
    where = {"name": tensor.name, "state": tensor.state, "checkpoint": str(other.home or other.root)}
    if found is None:
        raise IncompleteError("a tensor that another checkpoint of the merge lacks", **where)
    if found.shape != tensor.shape:
        raise MappingError("one tensor with two shapes", **where, expected=tensor.shape, found=found.shape)
    if found.dtype != tensor.dtype and not (found.dtype in FLOATS and tensor.dtype in FLOATS):
        raise MappingError("one tensor with two dtypes", **where, expected=tensor.dtype, found=found.dtype)
    return found


def _widest(tensors: list[TensorState]) -> TensorState:
    """Of several float dtypes the one with the most bits; of bfloat16 and float16, float32, which holds both."""
    dtypes = {tensor.dtype for tensor in tensors}
    dtype = "F32" if dtypes == {"BF16", "F16"} else max(dtypes, key=lambda dtype: (ITEM_BYTES[dtype], dtype))
    return replace(tensors[0], dtype=dtype)


def merged_checkpoint(
    sources: Sequence[Reader], states: dict[Key, TensorState], *, moments: bool, about: Mapping[str, Any]
) -> Checkpoint:
    """What a merge is besides its tensors: not a state to train on from, unless moments were asked for."""
    first = sources[0].checkpoint
    names = {name for name, _ in states}
    ties = [set(reader.checkpoint.aliases.items()) for reader in sources]
    if any(tied != ties[0] for tied in ties[1:]):
        differing = min(pair for tied in ties for pair in tied if any(pair not in other for other in ties))
        raise MappingError("a parameter that is tied in some of the checkpoints only", name=differing[0])
    every = [reader.checkpoint for reader in sources]
    metadata = {
        key: first.metadata[key]
        for key in ("model_config", "source")
        if key in first.metadata and all(one.metadata.get(key) == first.metadata[key] for one in every)
    }
    metadata["merge"] = dict(about)
    groups, steps = _optimizer(every) if moments else ((), {})
    return Checkpoint(
        root=first.root,
        format="merged",
        states=states,
        aliases={alias: owner for alias, owner in first.aliases.items() if owner in names},
        groups=groups,
        steps=steps,
        metadata=metadata,
        completeness={
            "rng": "absent",
            "data": "absent",
            "scheduler": "absent",
            "optimizer": "remapped" if moments else "absent",
        },
    )


def _optimizer(every: Sequence[Checkpoint]) -> tuple[tuple[Group, ...], dict[str, int | float]]:
    """Groups, which are the same in all but for learning rates; and each parameter's latest step."""
    newest = max(every, key=lambda one: (max(one.steps.values(), default=0), one.id))
    for one in every:
        if [group.params for group in one.groups] != [group.params for group in newest.groups]:
            raise MappingError("optimizer groups that hold different parameters", checkpoint=str(one.root))
    steps: dict[str, int | float] = {}
    for one in every:
        for name, step in one.steps.items():
            steps[name] = max(steps.get(name, step), step)
    return newest.groups, steps


def lora_note(checkpoint: Checkpoint) -> str:
    """What to know if the tensors are low-rank factors; "" if they are not."""
    names = {name.lower() for name, _ in checkpoint.states}
    if any("lora_a" in name for name in names) and any("lora_b" in name for name in names):
        return (
            "low-rank factors: the average of A and of B is not the average of B times A; "
            "for that, merge checkpoints into which the factors were folded"
        )
    return ""


def same_identity(sources: Sequence[Reader]) -> bool:
    """Whether two sources are one checkpoint."""
    all_of = [reader.checkpoint for reader in sources]
    ids = [one.id or str((one.home or one.root).resolve()) for one in all_of]
    return any(one == other for one, other in itertools.combinations(ids, 2))

"""What a conversion will do, before it does anything: bytes, memory, time, and what would be lost.

    checkpoint + target ──▶ Estimate(bytes_read, bytes_written, memory, seconds, losses, free) ──▶ refuse, or go

Computed from headers alone. The time is an expectation from stated rates, not a promise; the losses are exact.
Invariants: nothing that a writer leaves out goes unlisted; a refusal comes before the first byte is written.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..dtypes import ITEM_BYTES
from .convert import NUMPY, lossless
from .errors import LossyError, StorageError, UsageError
from .model import Checkpoint, TensorState
from .read import BLOCK_BYTES
from .view import is_optimizer

READ_BYTES_S: Final = 1.0e9
WRITE_BYTES_S: Final = 0.3e9
"""A buffered read, and a durable write, of an ordinary disk (docs/CHECKPOINTS.md). Yours may differ."""
FIXED_BYTES: Final = 48 << 20
"""The interpreter with numpy."""
PER_TENSOR_BYTES: Final = 2048
"""A tensor's entries in memory: names, slabs, digests."""
BLOCKS_PER_JOB: Final = 3
"""The block that is read, what becomes of it, and what the writer gathers."""


@dataclass(frozen=True, slots=True)
class Keeps:
    """What a target has room for."""

    optimizer: bool = True
    masters: bool = True
    weights: bool = True
    """The rounded ones, beside their masters."""
    metadata: bool = True
    """All of it: trainer, scheduler, RNG, data position."""
    about: str = ""


TARGETS: Final[Mapping[str, Keeps]] = MappingProxyType(
    {
        "holdfast": Keeps(),
        "deepspeed": Keeps(metadata=False),
        "deepspeed:zero3": Keeps(metadata=False, weights=False, about="weights are the masters, rounded when loaded"),
        "deepspeed-universal": Keeps(metadata=False),
        "dcp": Keeps(metadata=False, weights=False, about="parameters are the float32 masters"),
        "fsdp2": Keeps(metadata=False, weights=False, about="parameters are the float32 masters"),
        "torch": Keeps(metadata=False, masters=False, about="model, optimizer and scheduler in one file"),
        "hf": Keeps(optimizer=False, masters=False, metadata=False, about="weights and buffers"),
    }
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What will be read, written and held."""

    target: str
    bytes_read: int
    bytes_written: int
    memory: int
    seconds: float
    free: int
    """Bytes free where the target goes."""
    tensors: int
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "tensors": self.tensors,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "memory_bytes": self.memory,
            "seconds": round(self.seconds, 2),
            "free_bytes": self.free,
            "losses": list(self.losses),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the conversion is to do, as far as its cost and losses depend on it."""

    kind: str = "holdfast"
    dtype: str = ""
    """Convert floating-point weights to this."""
    weights_only: bool = False
    """That the optimizer is left out is what was asked for, and no loss to agree to."""
    memory_extra: int = 0
    """Held besides the blocks: by a mapping, by the sources of a merge."""
    losses: tuple[str, ...] = field(default=())
    """Losses of steps before this one."""


def estimate(checkpoint: Checkpoint, target: Path, wanted: Wanted, *, jobs: int, bytes_read: int = -1) -> Estimate:
    """The cost of writing all that the target keeps."""
    keeps = TARGETS.get(wanted.kind, Keeps())
    kept = [tensor for tensor in checkpoint.states.values() if _kept(tensor, keeps, checkpoint)]
    written = sum(tensor.elements * ITEM_BYTES[_dtype(tensor, wanted)] for tensor in kept)
    read = sum(tensor.nbytes for tensor in kept) if bytes_read < 0 else bytes_read
    memory = FIXED_BYTES + len(checkpoint.states) * PER_TENSOR_BYTES + jobs * BLOCKS_PER_JOB * BLOCK_BYTES
    return Estimate(
        target=wanted.kind,
        bytes_read=read,
        bytes_written=written,
        memory=memory + wanted.memory_extra,
        seconds=max(read / READ_BYTES_S, written / WRITE_BYTES_S),
        free=free_bytes(target),
        tensors=len(kept),
        losses=(*wanted.losses, *_losses(checkpoint, wanted, keeps, kept)),
        notes=(keeps.about,) if keeps.about else (),
    )


def _dtype(tensor: TensorState, wanted: Wanted) -> str:
    floats = tensor.dtype in ("BF16", "F16", "F32", "F64") and tensor.state in ("weight", "fp32")
    return wanted.dtype if wanted.dtype and floats and tensor.role != "buffer" else tensor.dtype


def _kept(tensor: TensorState, keeps: Keeps, checkpoint: Checkpoint) -> bool:
    if is_optimizer(tensor):
        return keeps.optimizer
    if tensor.state == "fp32" and not keeps.masters:
        # Where there is no other value, the master is the value.
        return not ({(tensor.name, "weight"), (tensor.name, "buffer")} & checkpoint.states.keys())
    if tensor.state == "weight" and not keeps.weights:
        return (tensor.name, "fp32") not in checkpoint.states
    if tensor.state == "rng" or tensor.role == "opaque":
        return keeps.metadata
    return True


def _losses(checkpoint: Checkpoint, wanted: Wanted, keeps: Keeps, kept: list[TensorState]) -> list[str]:
    losses = []
    if not keeps.optimizer and not wanted.weights_only:
        left = Counter(tensor.state for tensor in checkpoint.states.values() if is_optimizer(tensor))
        if left:
            text = ", ".join(f"{state} ({count})" for state, count in sorted(left.items()))
            losses.append(f"optimizer states are left out: {text}")
        if checkpoint.completeness.get("scheduler", "absent") != "absent":
            losses.append("the scheduler is left out")
    if not keeps.masters and not wanted.weights_only:
        left_out = sum(t.state == "fp32" for t in checkpoint.states.values()) - sum(t.state == "fp32" for t in kept)
        if left_out:
            losses.append(f"float32 master copies are left out: {left_out}")
    if not keeps.metadata and not wanted.weights_only:
        rng = [t.name for t in checkpoint.states.values() if t.state == "rng"]
        if rng or checkpoint.completeness.get("rng", "absent") != "absent":
            losses.append("the states of the random generators are left out")
        if checkpoint.completeness.get("data", "absent") != "absent":
            losses.append("the position in the data is left out")
    if wanted.dtype:
        rounded = [t for t in kept if _dtype(t, wanted) != t.dtype and not lossless(t.dtype, wanted.dtype)]
        if rounded:
            losses.append(f"{len(rounded)} tensors are rounded to {wanted.dtype}, such as {rounded[0].name}")
    return losses


def check(found: Estimate, target: Path, *, allow_lossy: bool, max_memory: int) -> None:
    """Refuse what cannot work, before anything is written."""
    if os.path.lexists(target):
        raise UsageError("the target is there already: choose another name, or remove it", target=str(target))
    if not target.absolute().parent.is_dir():
        raise UsageError("the folder to write to is not there", folder=str(target.absolute().parent))
    if found.losses and not allow_lossy:
        raise LossyError("; ".join(found.losses), target=found.target)
    if max_memory and found.memory > max_memory:
        raise UsageError(
            "needs more memory than --max-memory allows", expected=found.memory, max_memory=max_memory, try_="--jobs 1"
        )
    if found.bytes_written > found.free:
        raise StorageError(
            "no space for the output", folder=str(target.absolute().parent), free=found.free, needed=found.bytes_written
        )


def jobs_within(jobs: int, max_memory: int, cost: Callable[[int], int]) -> int:
    """As many jobs as fit: fewer than were asked for, if memory is short; at least one."""
    while jobs > 1 and max_memory and cost(jobs) > max_memory:
        jobs -= 1
    return jobs


def free_bytes(target: Path) -> int:
    """Bytes free on the file system that the target would be on."""
    for folder in target.absolute().parents:
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return 0


def check_dtype(dtype: str) -> str:
    """A dtype to convert weights to, by safetensors' name or torch's."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "bf16": "BF16", "fp16": "F16"}
    names |= {"fp32": "F32", "half": "F16", "float": "F32"}
    found = names.get(dtype.lower(), dtype.upper())
    if found not in NUMPY or found not in ("BF16", "F16", "F32", "F64"):
        raise UsageError("not a dtype that weights can be converted to", dtype=dtype, known="BF16 F16 F32 F64")
    return found

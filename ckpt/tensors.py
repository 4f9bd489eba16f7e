"""A checkpoint as torch tensors, in one call, whatever its format.

    from holdfast.ckpt.tensors import load

    weights = load("runs/a/step-00000100")             {name: tensor}
    model.load_state_dict(load("global_step100"))      DeepSpeed, DCP, safetensors, torch.save: the same call
    moments = load("runs/a/step-00000100", state="exp_avg")
    load("runs/a/step-00000100", into=dict(model.named_parameters()))

Bytes are checked against their digests while they are warm, where the format has digests. New memory is asked for in
huge pages: 4 KiB at a time, the kernel would take longer to give it than the file to be read. Not here: regions, one
rank's part, conversions (universal/read.py). torch is imported when a tensor is wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dtypes import TORCH_NAMES
from .formats.registry import open_any
from .universal.errors import IncompleteError, UsageError
from .universal.model import TensorState
from .universal.read import Reader

if TYPE_CHECKING:
    import torch


def load(
    path: Path | str,
    *,
    state: str = "weight",
    names: Collection[str] | None = None,
    into: Mapping[str, torch.Tensor] | None = None,
    verify: bool = True,
    jobs: int = 2,
) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, by name.

    Args:
      path: a checkpoint of any format that `holdfast ckpt` reads; for a folder of ours the latest checkpoint in it.
      state: what of each parameter: "fp32" (the master copy), "exp_avg", ...; "weight" is the whole model: buffers too,
        and the master copy of a parameter that was saved without its weight.
      names: only these; default: all that have the state.
      into: tensors to fill instead of new ones: contiguous, on the CPU, of the same dtype and shape. Its names are
        those that are read.
      verify: compare with the digests. jobs: threads that read and verify.

    Returns name -> tensor: new ones, or those of `into`.

    Raises UsageError (what is asked for does not fit), IncompleteError (it is not there, or not whole), CorruptError
    (a digest differs, naming file, tensor and byte range; nothing is returned).
    """
    import torch

    checkpoint = open_any(path)
    held: dict[str, TensorState] = {}
    for of in ("fp32", "buffer", "weight") if state == "weight" else (state,):
        held |= {name: tensor for (name, kept), tensor in checkpoint.states.items() if kept == of}
    wanted = list(into if into is not None else held if names is None else names)
    missing = [name for name in wanted if name not in held]
    if missing or not wanted:
        known = sorted({of for _, of in checkpoint.states})
        raise IncompleteError("no such tensor", name=missing[0] if missing else "", state=state, states=known)
    found = {name: _room(held[name], into[name] if into is not None else None) for name in wanted}
    with Reader(checkpoint, verify=verify, jobs=jobs) as reader, torch.no_grad():
        reader.read_many((name, held[name].state, None, _bytes(tensor)) for name, tensor in found.items())
    return found


def _room(tensor: TensorState, given: torch.Tensor | None) -> torch.Tensor:
    import numpy
    import torch

    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    if given is None:
        # numpy asks for huge pages where an array is large, torch does not.
        memory = numpy.empty(max(tensor.nbytes, 1), numpy.uint8)
        return torch.from_numpy(memory)[: tensor.nbytes].view(dtype).view(tensor.shape)
    shape = tuple(given.shape)
    if (given.dtype, shape) != (dtype, tensor.shape) or given.device.type != "cpu" or not given.is_contiguous():
        what = f"{TORCH_NAMES[tensor.dtype]}{list(tensor.shape)}"
        raise UsageError(
            f"cannot be read into this: wanted a contiguous {what} on the CPU",
            name=tensor.name,
            given=f"{str(given.dtype).removeprefix('torch.')}{list(shape)} on {given.device}",
        )
    return given


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else bytearray()

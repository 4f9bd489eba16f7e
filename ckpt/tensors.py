"""A checkpoint as torch tensors, or one rank's part of them, in one call, whatever its format.

    from holdfast.ckpt.tensors import load

    weights = load("runs/a/step-00000100")             {name: tensor}
    model.load_state_dict(load("global_step100"))      DeepSpeed, DCP, safetensors, torch.save: the same call
    moments = load("runs/a/step-00000100", state="exp_avg")
    load("runs/a/step-00000100", into=dict(model.named_parameters()))
    load("runs/a/step-00000100", rank=3, world=8)      rows [3 n / 8, 4 n / 8) of each; little else is read

Bytes are checked against their digests while they are warm, where the format has digests. New memory is asked for in
huge pages: 4 KiB at a time, the kernel would take longer to give it than the file to be read. Not here: any other
region, conversions (universal/read.py). torch is imported when a tensor is wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dtypes import ITEM_BYTES, TORCH_NAMES
from .formats.registry import open_any
from .universal.errors import IncompleteError, UsageError
from .universal.geometry import intersect, share, volume
from .universal.model import Box, TensorState
from .universal.read import Reader

if TYPE_CHECKING:
    import torch


def load(
    path: Path | str,
    *,
    state: str = "weight",
    names: Collection[str] | None = None,
    into: Mapping[str, torch.Tensor] | None = None,
    rank: int = 0,
    world: int = 1,
    dim: int | Mapping[str, int] = 0,
    verify: bool = True,
    jobs: int = 2,
) -> dict[str, torch.Tensor]:
    """Tensors on the CPU, by name: whole, or what one rank of several has of them.

    Args:
      path: a checkpoint of any format that `holdfast ckpt` reads; for a folder of ours the latest checkpoint in it.
      state: what of each parameter: "fp32" (the master copy), "exp_avg", ...; "weight" is the whole model: buffers too,
        and the master copy of a parameter that was saved without its weight.
      names: only these; default: all that have the state.
      into: tensors to fill instead of new ones: contiguous, on the CPU, of the same dtype and shape. Its names are
        those that are read.
      rank, world: of each tensor only what this rank of so many has; default: all.
      dim: which dim is cut into `world` parts, of ceil(n / world) each, as DTensor's Shard(dim) cuts; or name -> dim,
        and who is not named is not cut. A tensor without that dim is whole on every rank.
      verify: compare with the digests, of the chunks in which the part lies. jobs: threads that read and verify.

    Returns name -> tensor: new ones, or those of `into`; with a shape of 0 along `dim` where a rank has nothing.

    Raises UsageError (what is asked for does not fit), IncompleteError (it is not there, or not whole), CorruptError
    (a digest differs, naming file, tensor and byte range; nothing is returned).
    """
    import torch

    if world < 1 or not 0 <= rank < world or min([dim] if isinstance(dim, int) else dim.values(), default=0) < 0:
        raise UsageError("a rank is from 0 on and below the world, a dim from 0 on", rank=rank, world=world, dim=dim)
    states = ("fp32", "buffer", "weight") if state == "weight" else (state,)
    selected = None if into is None and names is None else frozenset(into if into is not None else names or ())

    def mine(name: str, shape: tuple[int, ...]) -> Box:
        cut = dim if isinstance(dim, int) else dim.get(name, len(shape))
        return share(shape, cut, rank, world)

    def wanted_part(name: str, of: str, shape: tuple[int, ...], box: Box) -> bool:
        chosen = of in states and (selected is None or name in selected)
        return chosen and intersect(mine(name, shape), box) is not None

    checkpoint = open_any(path, wanted_part)
    held: dict[str, TensorState] = {}
    for of in states:
        held |= {name: tensor for (name, kept), tensor in checkpoint.states.items() if kept == of}
    wanted = list(into if into is not None else held if names is None else names)
    missing = [name for name in wanted if name not in held]
    if missing or not wanted:
        known = sorted({of for _, of in checkpoint.states})
        raise IncompleteError("no such tensor", name=missing[0] if missing else "", state=state, states=known)
    boxes = {name: mine(name, held[name].shape) for name in wanted}
    found = {name: _room(held[name], boxes[name], into[name] if into is not None else None) for name in wanted}
    with Reader(checkpoint, verify=verify, jobs=jobs) as reader, torch.no_grad():
        reader.read_many((name, held[name].state, boxes[name], _bytes(tensor)) for name, tensor in found.items())
    return found


def _room(tensor: TensorState, box: Box, given: torch.Tensor | None) -> torch.Tensor:
    import numpy
    import torch

    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    part = tuple(stop - start for start, stop in box)
    if given is None:
        nbytes = volume(box) * ITEM_BYTES[tensor.dtype]
        # numpy asks for huge pages where an array is large, torch does not.
        memory = numpy.empty(max(nbytes, 1), numpy.uint8)
        return torch.from_numpy(memory)[:nbytes].view(dtype).view(part)
    shape = tuple(given.shape)
    if (given.dtype, shape) != (dtype, part) or given.device.type != "cpu" or not given.is_contiguous():
        what = f"{TORCH_NAMES[tensor.dtype]}{list(part)}"
        raise UsageError(
            f"cannot be read into this: wanted a contiguous {what} on the CPU",
            name=tensor.name,
            given=f"{str(given.dtype).removeprefix('torch.')}{list(shape)} on {given.device}",
        )
    return given


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else bytearray()

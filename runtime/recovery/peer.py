"""The "peer" rung: a rank without state gets it from the memory of a live replica, over the new group.

    send_parcel(metadata, tensors) ══ header: names, shapes, metadata ══ one message per tensor ══▶ receive_parcel

Who sends to whom is in the Form, so both sides know. The sender's state is that of the resume step and does not change
meanwhile. Parcels are also what stages rebuilt from their neighbours are made of (rebuild.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from holdfast.ckpt.memory import metadata as blob

from ..comm.group import Group
from ..joining import Formed

if TYPE_CHECKING:
    from ..engine import Engine

_TAG = (1 << 29) + (1 << 24)


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one rank sent to another."""

    metadata: Any
    tensors: dict[tuple[str, str], torch.Tensor]
    """By (name, state)."""
    nbytes: int


def transfer_state(engine: Engine, group: Group, formed: Formed) -> list[tuple[str, int, int]]:
    """Send to and receive from whom the Form says; what was received as (rung, bytes, pieces).

    Raises Fenced or PeerLost.
    """
    source = formed.sources[group.rank]
    for rank, other in sorted(formed.sources.items()):
        if other.rung == "peer" and other.peer == group.rank:
            entries = [(entry.name, entry.state, entry.tensor) for entry in engine.state.entries()]
            send_parcel(group, rank, engine.metadata(), entries)
    if source.rung != "peer":
        return []
    parcel = receive_parcel(group, source.peer)
    engine.load(formed.resume_step, parcel.tensors, parcel.metadata)
    return [("peer", parcel.nbytes, len(parcel.tensors))]


def send_parcel(group: Group, dst: int, metadata: Any, tensors: Sequence[tuple[str, str, torch.Tensor]]) -> None:
    """Send them; returns when they are on their way. Raises Fenced or PeerLost."""
    meta, extra = blob.encode(metadata, is_tensor=lambda value: isinstance(value, torch.Tensor))
    listed = [*tensors, *((path, "extra", tensor) for path, tensor in extra)]
    kinds = [(name, state, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, state, t in listed]
    header = json.dumps({"metadata": meta, "tensors": kinds}).encode()
    _send_tensor(group, torch.tensor([len(header)]), dst, 0)
    _send_tensor(group, torch.frombuffer(bytearray(header), dtype=torch.uint8), dst, 1)
    for index, (_, _, tensor) in enumerate(listed):
        if tensor.numel():
            _send_tensor(group, tensor.contiguous(), dst, 2 + index)


def _send_tensor(group: Group, tensor: torch.Tensor, dst: int, index: int) -> None:
    group.wait(group.isend(tensor, dst, _TAG + index))


def receive_parcel(group: Group, src: int) -> Parcel:
    """What `src` sends. Raises Fenced or PeerLost."""
    length = torch.zeros(1, dtype=torch.int64)
    group.wait(group.irecv(length, src, _TAG))
    message = torch.empty(int(length.item()), dtype=torch.uint8)
    group.wait(group.irecv(message, src, _TAG + 1))
    header = json.loads(message.numpy().tobytes())
    received: dict[tuple[str, str], torch.Tensor] = {}
    extra: list[Any] = []
    size = 0
    for index, (name, state, dtype, shape) in enumerate(header["tensors"]):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.numel():
            group.wait(group.irecv(tensor, src, _TAG + 2 + index))
        size += tensor.numel() * tensor.element_size()
        if state == "extra":
            extra.append(tensor)
        else:
            received[(name, state)] = tensor
    return Parcel(blob.decode(header["metadata"], extra), received, size)

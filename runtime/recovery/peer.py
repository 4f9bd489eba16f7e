"""The "peer" rung: a rank without state gets it from the memory of a live replica, over the new group.

Who sends to whom is in the Form, so both sides know; a header (names, shapes, metadata) goes first, then one
message per tensor. The sender's state is that of the resume step and does not change meanwhile.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from holdfast.ckpt.memory import metadata as blob

from ..comm.group import Group
from ..member import Formed

if TYPE_CHECKING:
    from ..engine import Engine

_TAG = (1 << 29) + (1 << 24)


def transfer_state(engine: Engine, group: Group, formed: Formed) -> list[tuple[str, int, int]]:
    """Send to and receive from whom the Form says; what was received as (rung, bytes, pieces).

    Raises Fenced or PeerLost.
    """
    source = formed.sources[group.rank]
    for rank, other in sorted(formed.sources.items()):
        if other.rung == "peer" and other.peer == group.rank:
            _send(engine, group, rank)
    if source.rung != "peer":
        return []
    return [_receive(engine, group, source.peer, formed.resume_step)]


def _send(engine: Engine, group: Group, dst: int) -> None:
    entries = engine.state.entries()
    meta, extra = blob.encode(engine.metadata(), is_tensor=lambda value: isinstance(value, torch.Tensor))
    tensors = [(e.name, e.state, e.tensor) for e in entries] + [(path, "extra", t) for path, t in extra]
    listed = [(name, state, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, state, t in tensors]
    header = json.dumps({"metadata": meta, "tensors": listed}).encode()
    _send_tensor(group, torch.tensor([len(header)]), dst, 0)
    _send_tensor(group, torch.frombuffer(bytearray(header), dtype=torch.uint8), dst, 1)
    for index, (_, _, tensor) in enumerate(tensors):
        if tensor.numel():
            _send_tensor(group, tensor.contiguous(), dst, 2 + index)


def _send_tensor(group: Group, tensor: torch.Tensor, dst: int, index: int) -> None:
    group.wait(group.isend(tensor, dst, _TAG + index))


def _receive(engine: Engine, group: Group, src: int, step: int) -> tuple[str, int, int]:
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
    engine.load(step, received, blob.decode(header["metadata"], extra))
    return "peer", size, len(received)

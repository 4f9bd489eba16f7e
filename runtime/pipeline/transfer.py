"""Activations and gradients between the ranks of a path: what is sent, under which tag, in which shape.

    tag = ((step parity, microbatch, hop), direction, tensor index)     gloo matches by it
    the first activation of a (path, hop) in a generation is preceded by its spec (shapes, dtypes); later ones
    must match it, and the sender checks: gloo accepts a short message silently. Per path, since two of them may hand
    on other things at one hop: one an embedding's output, the other a block's.

Gradients need no spec: both ends know the activation. A receive is posted into fresh memory, one action
ahead, so at most look-ahead + 1 buffers exist per direction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Path, Plan

from ..comm.group import Group, Work

SPEC_BYTES = 2048
TENSORS_MAX = 8
_FORWARD, _BACKWARD, _SPEC = 0, 1, 2
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape, dtype and whether gradients flow, of each tensor that crosses a boundary."""

    tensors: tuple[tuple[tuple[int, ...], str, bool], ...]

    @staticmethod
    def of(tensors: Tensors) -> Spec:
        """Spec of actual tensors."""
        return Spec(tuple((tuple(t.shape), str(t.dtype), t.requires_grad) for t in tensors))

    def __str__(self) -> str:
        return ", ".join(f"{dtype.removeprefix('torch.')}{list(shape)}" for shape, dtype, _ in self.tensors)

    def empty(self, device: torch.device) -> Tensors:
        """Fresh receive buffers."""
        return tuple(
            torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
            for shape, dtype, _ in self.tensors
        )

    def pack(self) -> torch.Tensor:
        """As a fixed-size message."""
        data = json.dumps(self.tensors).encode()
        if len(self.tensors) > TENSORS_MAX or len(data) > SPEC_BYTES:
            raise ConfigError(f"a layer may hand on at most {TENSORS_MAX} tensors, got {len(self.tensors)}")
        return torch.frombuffer(bytearray(data.ljust(SPEC_BYTES)), dtype=torch.uint8)

    @staticmethod
    def unpack(message: torch.Tensor) -> Spec:
        """Undo `pack`."""
        value = json.loads(bytes(message.tolist()).decode())
        return Spec(tuple((tuple(shape), str(dtype), bool(grad)) for shape, dtype, grad in value))


@dataclass(slots=True)
class Pending:
    """Operations under way and the tensors that they use."""

    works: list[Work]
    tensors: Tensors


class Wire:
    """Transfers of one generation. Specs are per path and hop; dropped with the generation."""

    def __init__(self, group: Group, plan: Plan, device: torch.device) -> None:
        self._group = group
        self._microbatches = plan.microbatches
        self._hops = max(len(path.hops) for path in plan.paths)
        first: dict[Path, int] = {}
        self._ways = [first.setdefault(path, microbatch) for microbatch, path in enumerate(plan.paths)]
        """By microbatch, the first one that has the same path: it stands for the path."""
        self._device = device
        self._sent: dict[tuple[int, int], Spec] = {}
        self._received: dict[tuple[int, int], Spec] = {}

    def _tag(self, step: int, microbatch: int, hop: int, direction: int, index: int = 0) -> int:
        position = ((step & 1) * self._microbatches + microbatch) * self._hops + hop
        return (position * 4 + direction) * TENSORS_MAX + index

    def send_forward(self, tensors: Tensors, dst: int, step: int, microbatch: int, hop: int) -> Pending:
        """Send the outputs of `hop` to the rank of the next hop."""
        spec, way = Spec.of(tensors), self._ways[microbatch]
        known = self._sent.setdefault((way, hop), spec)
        payload = tuple(t.detach().contiguous() for t in tensors)
        works = []
        if known is spec:
            packed = spec.pack()
            works.append(self._group.isend(packed, dst, self._tag(0, way, hop, _SPEC)))
            payload = (*payload, packed)
        elif known != spec:
            raise ConfigError(
                f"microbatch {microbatch} of step {step} leaves hop {hop} as {spec}, earlier ones as {known}; "
                "all microbatches must have the same shapes"
            )
        works += self._send(payload[: len(tensors)], dst, step, microbatch, hop, _FORWARD)
        return Pending(works, payload)

    def send_backward(self, gradients: Tensors, dst: int, step: int, microbatch: int, hop: int) -> Pending:
        """Send the gradients of the inputs of `hop` to the rank of the previous hop."""
        payload = tuple(g.contiguous() for g in gradients)
        return Pending(self._send(payload, dst, step, microbatch, hop, _BACKWARD), payload)

    def forward_spec(self, src: int, microbatch: int, hop: int, *, wait: bool) -> Spec | None:
        """What the previous hop (`hop`) on `src` hands on; received once per generation."""
        way = self._ways[microbatch]
        spec = self._received.get((way, hop))
        if spec is None and wait:
            message = torch.empty(SPEC_BYTES, dtype=torch.uint8)
            self._group.wait(self._group.irecv(message, src, self._tag(0, way, hop, _SPEC)))
            spec = self._received[(way, hop)] = Spec.unpack(message)
        return spec

    def receive_forward(self, spec: Spec, src: int, step: int, microbatch: int, hop: int) -> Pending:
        """Post the receive of the outputs of `hop` on `src`."""
        return self._receive(spec.empty(self._device), src, step, microbatch, hop, _FORWARD)

    def receive_backward(self, like: Tensors, src: int, step: int, microbatch: int, hop: int) -> Pending:
        """Post the receive of the gradients of our outputs, from the rank of `hop`."""
        buffers = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)
        return self._receive(buffers, src, step, microbatch, hop, _BACKWARD)

    def wait(self, pending: Pending) -> Tensors:
        """Wait until all of `pending` is done; its tensors."""
        for work in pending.works:
            self._group.wait(work)
        return pending.tensors

    def _send(
        self, payload: Sequence[torch.Tensor], dst: int, step: int, microbatch: int, hop: int, direction: int
    ) -> list[Work]:
        return [
            self._group.isend(t, dst, self._tag(step, microbatch, hop, direction, i)) for i, t in enumerate(payload)
        ]

    def _receive(self, buffers: Tensors, src: int, step: int, microbatch: int, hop: int, direction: int) -> Pending:
        works = [
            self._group.irecv(t, src, self._tag(step, microbatch, hop, direction, i)) for i, t in enumerate(buffers)
        ]
        return Pending(works, buffers)

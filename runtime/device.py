"""The one seam for devices: which device a rank uses, its communication backend, its copies to host memory.

CPU and gloo are run and tested. The CUDA half (side stream, page-locked arenas, NCCL) is written against the
same interface and not yet run: docs/FAULTS.md says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from holdfast.proto.errors import ConfigError

from .comm.group import Backend, GlooBackend, NcclBackend


class CpuDevice:
    """Host memory: copies are memcpy in the calling thread (the GIL is released)."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def backend(self, address: str) -> Backend:
        """gloo."""
        return GlooBackend(address)

    def register(self, view: torch.Tensor) -> None:
        """Arenas need no registration."""

    def mark(self) -> Any:
        """State up to here is what a copy must see; nothing to record on a CPU."""
        return None

    def copy_to_host(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], mark: Any) -> None:
        """Copy and return when done."""
        torch._foreach_copy_(list(destinations), list(sources))


class CudaDevice:
    """One GPU: copies run on a low-priority side stream into page-locked arenas. Not yet run."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self._stream = torch.cuda.Stream(self.device, priority=0)

    def backend(self, address: str) -> Backend:
        """NCCL."""
        return NcclBackend()

    def register(self, view: torch.Tensor) -> None:
        """Page-lock an arena; a runtime that refuses leaves it pageable (slower, still right)."""
        runtime = torch.cuda.cudart()
        runtime.cudaHostRegister(view.data_ptr(), view.numel(), 0)

    def mark(self) -> Any:
        """An event after the optimizer step; the copy stream waits for it."""
        event = torch.cuda.Event()
        event.record()
        return event

    def copy_to_host(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], mark: Any) -> None:
        """Copy on the side stream after `mark`; returns when the bytes are in host memory."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            for destination, source in zip(destinations, sources, strict=True):
                destination.copy_(source, non_blocking=True)
        self._stream.synchronize()


Device = CpuDevice | CudaDevice


def choose_device(name: str | None, local_rank: int) -> Device:
    """ "cpu", "cuda" or None: a GPU if there is one for this local rank. Raises ConfigError."""
    if name not in (None, "cpu", "cuda"):
        raise ConfigError(f"device is 'cpu' or 'cuda', got {name!r}")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and local_rank >= available:
        raise ConfigError(f"local rank {local_rank} has no GPU: {available} visible")
    if name == "cuda" or (name is None and local_rank < available):
        return CudaDevice(local_rank)
    return CpuDevice()


def numerics_identity(autocast: torch.dtype | None, device: torch.device) -> str:
    """What bits depend on besides the plan: build, threads, instruction set, device. Compared between ranks."""
    parts = [
        f"torch {torch.__version__}",
        f"threads {torch.get_num_threads()}",
        f"cpu {torch.backends.cpu.get_cpu_capability()}",
        f"autocast {autocast}",
        device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
    ]
    if mkl := os.environ.get("MKL_CBWR"):
        parts.append(f"mkl {mkl}")
    return ", ".join(parts)

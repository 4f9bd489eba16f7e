"""Replicated state: who of its holders snapshots what, and what another owner's image is, read from live tensors.

    entries ── shares() ──▶ {owner: its entries}     an owner's image:  | w0 | 0… | exp_avg0 | 0… | … |   64-byte steps
                                 each owner copies its own; TensorImage reads any of them from this rank's replica

All replicas compute the same shares, and so the same layouts: bytes of an image that its owner has sealed are here
already, and parity of them needs no network (ckpt/memory/protect/deliver.py). What differs between replicas (random
number generators, data position) lies behind the image. Copies nothing but what is asked for. Invariant: an image
read here is that of the owner's snapshot, gaps included, as long as both hold the same state.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from holdfast.ckpt.memory.arena import ArenaEntry, Half
from holdfast.ckpt.memory.table import ALIGN_BYTES, HEADER_BYTES, aligned, layout
from holdfast.ckpt.pieces import assign_owners

from .arenas import arena_entry
from .device import Device
from .state import Entry


def shares(entries: Sequence[Entry], holders: Sequence[int]) -> dict[int, list[Entry]]:
    """Each holder's share of `entries`, all of which every holder has; whole parameters, in the given order."""
    if len(holders) == 1:
        return {holders[0]: list(entries)}
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.name] = sizes.get(entry.name, 0) + entry.tensor.numel() * entry.tensor.element_size()
    owners = assign_owners(sizes, holders)
    split: dict[int, list[Entry]] = {holder: [] for holder in holders}
    for entry in entries:
        split[owners[entry.name]].append(entry)
    return split


def marked(metadata: Any, *, replicated: bool) -> Any:
    """What a snapshot's table says beside its entries; with the mark, its image ends before what is not replicated."""
    return {"replicated": True, "blob": metadata} if replicated else metadata


def clear_gaps(half: Half, placed: Sequence[ArenaEntry]) -> None:
    """Zeros behind each entry, up to the next: what another layout left there (a step without moments, before) is no
    part of the state, but would be of the image."""
    memory = half.memory
    for entry in placed:
        end = entry.offset + entry.nbytes
        if gap := -end % ALIGN_BYTES:
            memory[end : end + gap] = bytes(gap)


class TensorImage:
    """The image of one owner's share, over this rank's tensors. One thread."""

    def __init__(self, entries: Sequence[Entry], device: Device, mark: Any) -> None:
        """`mark`: of the device, after the step that the image is of."""
        offsets, end = layout([arena_entry(entry) for entry in entries])
        there = [(offset, e.tensor) for offset, e in zip(offsets, entries, strict=True) if e.tensor.numel()]
        self._starts = [offset - HEADER_BYTES for offset, _ in there]
        self._tensors = [tensor.detach() for _, tensor in there]
        self._device = device
        self._mark = mark
        self._nbytes = aligned(end, ALIGN_BYTES) - HEADER_BYTES
        self._straight: tuple[int, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._nbytes

    def read(self, start: int, into: memoryview) -> None:
        """Bytes from `start` on, as many as `into` takes."""
        target = torch.frombuffer(into, dtype=torch.uint8)
        stop, reached = start + len(into), start
        targets, sources = [], []
        for index in range(max(0, bisect_right(self._starts, start) - 1), len(self._starts)):
            first = self._starts[index]
            if first >= stop:
                break
            data = self._bytes(index)
            low, high = max(start, first), min(stop, first + data.numel())
            if low < high:
                target[reached - start : low - start] = 0
                targets.append(target[low - start : high - start])
                sources.append(data[low - first : high - first])
                reached = high
        target[reached - start :] = 0
        if sources:
            self._device.copy_to_host(targets, sources, self._mark)

    def _bytes(self, index: int) -> torch.Tensor:
        """A tensor as its bytes in row-major order, where it lies if it lies so."""
        tensor = self._tensors[index]
        if not tensor.is_contiguous():
            if self._straight is None or self._straight[0] != index:
                self._straight = None
                copy = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._device.copy_to_host([copy], [tensor], self._mark)
                self._straight = index, copy
            tensor = self._straight[1]
        return tensor.reshape(-1).view(torch.uint8)


def images_of(
    split: Mapping[int, Sequence[Entry]], slots: Iterable[int], device: Device, mark: Any
) -> dict[int, TensorImage]:
    """The images of these slots, of those that are replicated here."""
    return {slot: TensorImage(split[slot], device, mark) for slot in slots if slot in split}

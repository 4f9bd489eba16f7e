"""Which tensor lies in which file, and where: computed before the first byte is written. Pure.

    weights/model-00001-of-00002.safetensors      "weight" and "buffer": what Hugging Face loads
    optim/exp_avg-00001-of-00001.safetensors      one family of files for each other state
    state/rng.safetensors                         "rng"

Within a file tensors are ordered by the size of their elements, so that all of them are aligned without
padding. Invariants: the layout depends only on its arguments; every byte of a file is header or slab.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..dtypes import ITEM_BYTES
from .chunks import chunk_bytes_for, digest
from .errors import UsageError
from .geometry import full_box
from .jsonio import canonical
from .model import Box, Role, Slab, Span, TensorState
from .stheader import HEADER_BYTES_MAX, build_header

STATE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}\Z")
WEIGHT_STATES: Final = ("weight", "buffer")
FILE_BYTES_MAX: Final = 4 << 30
TILE_BYTES_MIN: Final = 1 << 20
TILES_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class StatePlan:
    """A tensor that will be written."""

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    role: Role = "param"


@dataclass(frozen=True, slots=True)
class PlannedFile:
    path: str
    header: bytes
    nbytes: int
    keys: tuple[tuple[str, str], ...]
    """Tensors in it."""


@dataclass(frozen=True, slots=True)
class Layout:
    files: tuple[PlannedFile, ...]
    states: Mapping[tuple[str, str], TensorState]
    """With slabs that have no digests yet."""

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def plan_digest(states: Sequence[StatePlan], *, tile: bool, archive: bool, file_bytes_max: int) -> str:
    """Tells plans apart: an interrupted write is taken up only by the same plan."""
    listed = [[plan.name, plan.state, plan.dtype, list(plan.shape), plan.role] for plan in states]
    return digest(canonical({"states": listed, "tile": tile, "archive": archive, "file_bytes_max": file_bytes_max}))


def make_layout(states: Iterable[StatePlan], *, tile: bool, file_bytes_max: int, checkpoint_id: str) -> Layout:
    """Place the tensors. `tile`: large optimizer tensors are stored as tiles along dim 1."""
    families: dict[str, list[StatePlan]] = {}
    seen: set[tuple[str, str]] = set()
    for plan in states:
        if not STATE_NAME.match(plan.state) or not plan.name or "\0" in plan.name:
            raise UsageError("a name that cannot be stored", name=repr(plan.name), state=repr(plan.state))
        if (plan.name, plan.state) in seen:
            raise UsageError("a tensor planned twice", name=plan.name, state=plan.state)
        seen.add((plan.name, plan.state))
        families.setdefault(_family(plan.state), []).append(plan)
    files: list[PlannedFile] = []
    placed: dict[tuple[str, str], TensorState] = {}
    for family, members in sorted(families.items()):
        bins = _bins(members, file_bytes_max)
        for number, content in enumerate(bins, 1):
            single = family == "state/rng" and len(bins) == 1
            path = f"{family}.safetensors" if single else f"{family}-{number:05}-of-{len(bins):05}.safetensors"
            content.sort(key=lambda plan: -ITEM_BYTES[plan.dtype])
            file, found = _place(path, content, tile and family.startswith("optim/"), checkpoint_id)
            files.append(file)
            placed.update(found)
    return Layout(tuple(files), {key: placed[key] for key in sorted(placed)})


def _family(state: str) -> str:
    if state in WEIGHT_STATES:
        return "weights/model"
    return "state/rng" if state == "rng" else f"optim/{state}"


def _nbytes(plan: StatePlan) -> int:
    return TensorState(plan.name, plan.state, plan.dtype, plan.shape, (), plan.role).nbytes


def _bins(plans: list[StatePlan], file_bytes_max: int) -> list[list[StatePlan]]:
    """In the order given, so that a layer's tensors stay together; a tensor is never split over files."""
    bins: list[list[StatePlan]] = []
    size = file_bytes_max + 1
    for plan in plans:
        nbytes = _nbytes(plan)
        if size + nbytes > file_bytes_max:
            bins.append([])
            size = 0
        bins[-1].append(plan)
        size += nbytes
    return bins


def _tiles(plan: StatePlan, tile: bool) -> list[Box]:
    """The boxes that a tensor is stored as: one, or 2, 4, 8, 16 along dim 1, none below 1 MiB."""
    whole = full_box(plan.shape)
    count = 1
    while (
        tile
        and len(plan.shape) > 1
        and count < TILES_MAX
        and _nbytes(plan) // (2 * count) >= TILE_BYTES_MIN
        and plan.shape[1] % (2 * count) == 0
    ):
        count *= 2
    if count == 1:
        return [whole]
    width = plan.shape[1] // count
    return [(whole[0], (at * width, (at + 1) * width), *whole[2:]) for at in range(count)]


def _place(
    path: str, plans: Sequence[StatePlan], tile: bool, checkpoint_id: str
) -> tuple[PlannedFile, dict[tuple[str, str], TensorState]]:
    names = {plan.name for plan in plans if plan.state == "weight"}
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    boxes: list[tuple[StatePlan, Box]] = []
    for plan in plans:
        for box in _tiles(plan, tile):
            shape = tuple(stop - start for start, stop in box)
            part = "" if shape == plan.shape else f"[:,{box[1][0]}:{box[1][1]}]"
            twice = plan.state == "buffer" and plan.name in names
            name = f"{plan.name}{'::buffer' if twice else ''}{part}"
            rows.append((name, plan.dtype, shape, _nbytes(StatePlan("", "", plan.dtype, shape))))
            boxes.append((plan, box))
    if len({row[0] for row in rows} - {"__metadata__"}) != len(rows):
        raise UsageError("two tensors whose names collide in a file", file=path)
    header = build_header(rows, {"format": "pt", "holdfast_id": checkpoint_id})
    if len(header) > HEADER_BYTES_MAX:
        raise UsageError("too many tensors for one file: choose smaller files", file=path, tensors=len(rows))
    reached = len(header)
    slabs: dict[StatePlan, list[Slab]] = {}
    for (plan, box), (_, dtype, _, nbytes) in zip(boxes, rows, strict=True):
        span = Span(path, reached, nbytes)
        slabs.setdefault(plan, []).append(Slab(span, dtype, box=box, chunk_bytes=chunk_bytes_for(nbytes)))
        reached += nbytes
    found = {
        (plan.name, plan.state): TensorState(plan.name, plan.state, plan.dtype, plan.shape, tuple(parts), plan.role)
        for plan, parts in slabs.items()
    }
    return PlannedFile(path, header, reached, tuple(found)), found


def weight_index(layout: Layout) -> bytes:
    """model.safetensors.index.json, as Hugging Face's loaders want it."""
    weight_map = {
        tensor.name: tensor.slabs[0].span.file.removeprefix("weights/")
        for tensor in layout.states.values()
        if tensor.state in WEIGHT_STATES
    }
    total = sum(tensor.nbytes for tensor in layout.states.values() if tensor.state in WEIGHT_STATES)
    listed = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(listed, indent=2, ensure_ascii=False).encode() + b"\n"

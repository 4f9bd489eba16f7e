"""Regions of tensors, however they are cut and stored, against numpy doing the same on the whole tensor."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.ckpt.universal import geometry
from holdfast.ckpt.universal.errors import CheckpointError
from holdfast.ckpt.universal.geometry import boxes_of_flat, check_cover, copies, region_tiles, slab_tiles, volume
from holdfast.ckpt.universal.model import Checkpoint, Slab, Span, TensorState, validate
from holdfast.ckpt.universal.read import Reader, clip, needed
from holdfast.ckpt.universal.strided import copy as strided_copy
from holdfast.ckpt.universal.strided import dense
from holdfast.ckpt.universal.write import StatePlan, WriteOptions, Writer

SIZES = {"U8": 1, "BF16": 2, "F32": 4, "F64": 8}
COMMON = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def shapes(draw: st.DrawFn, least: int = 0) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 7), min_size=least, max_size=4)))


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    low = draw(st.integers(0, size))
    return low, draw(st.integers(low, size))


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> object:
    kind = draw(st.sampled_from(["all", "flat", "box"]))
    if kind == "flat":
        return draw(ranges(int(np.prod(shape))))
    return None if kind == "all" else tuple(draw(ranges(n)) for n in shape)


def taken(array: np.ndarray, region: object) -> bytes:
    """What numpy says the region is."""
    if region is None:
        return array.tobytes()
    if len(region) == 2 and isinstance(region[0], int):  # type: ignore[arg-type,index]
        return array.reshape(-1)[slice(*region)].tobytes()  # type: ignore[misc]
    return array[tuple(slice(a, b) for a, b in region)].tobytes()  # type: ignore[attr-defined]


@st.composite
def cut(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Disjoint boxes that cover the shape."""
    boxes = [tuple((0, n) for n in shape)]
    for _ in range(draw(st.integers(0, 5))) if shape else ():
        at = draw(st.integers(0, len(boxes) - 1))
        dim = draw(st.integers(0, len(shape) - 1))
        low, high = boxes[at][dim]
        if high - low > 1:
            middle = draw(st.integers(low + 1, high - 1))
            box = boxes.pop(at)
            boxes += [(*box[:dim], part, *box[dim + 1 :]) for part in ((low, middle), (middle, high))]
    return boxes


def stored(array: np.ndarray, draw: st.DataObject, path: Path) -> TensorState:
    """The array in a file as boxes, transposed boxes or flat ranges, with gaps between them."""
    dtype = draw.draw(st.sampled_from(sorted(SIZES)), label="dtype")
    array = array.astype(f"u{SIZES[dtype]}")
    data = bytearray()
    slabs = []

    def add(piece: np.ndarray, **where: object) -> None:
        data.extend(b"\xee" * draw.draw(st.integers(0, 9)))
        raw = piece.tobytes()
        slabs.append(Slab(Span("payload", len(data), len(raw)), dtype, **where))  # type: ignore[arg-type]
        data.extend(raw)

    if draw.draw(st.booleans(), label="flat"):
        edges = sorted({0, array.size, *draw.draw(st.lists(st.integers(0, array.size), max_size=4))})
        for low, high in itertools.pairwise(edges):
            add(array.reshape(-1)[low:high], flat=(low, high))
    else:
        for box in draw.draw(cut(array.shape)):
            piece = array[tuple(slice(a, b) for a, b in box)]
            order = draw.draw(st.permutations(range(piece.ndim)))
            mixed = np.array(piece.transpose(order), order="C")
            steps = [0] * piece.ndim
            for at, step in zip(order, mixed.strides, strict=True):
                steps[at] = step // piece.itemsize
            add(mixed, box=box, strides=tuple(steps))
    path.write_bytes(data)
    return TensorState("w", "fp32", dtype, array.shape, tuple(slabs))


@COMMON
@given(st.data())
def test_any_region_of_any_cut_reads_as_numpy_slices_it(draw: st.DataObject) -> None:
    shape = draw.draw(shapes())
    array = np.arange(1, int(np.prod(shape)) + 1).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        tensor = stored(array, draw, Path(folder, "payload"))
        checkpoint = Checkpoint(Path(folder), "test", {tensor.key: tensor})
        validate(checkpoint)
        with Reader(checkpoint, jobs=draw.draw(st.sampled_from([1, 3]))) as reader:
            for _ in range(4):
                region = draw.draw(regions(shape))
                got = reader.read("w", "fp32", region)  # type: ignore[arg-type]
                assert bytes(got) == taken(array.astype(f"u{SIZES[tensor.dtype]}"), region)


@COMMON
@given(st.data())
def test_what_is_written_in_any_pieces_and_order_reads_back(draw: st.DataObject) -> None:
    shape = draw.draw(shapes(least=1))
    array = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint32).reshape(shape)
    boxes = draw.draw(st.permutations(draw.draw(cut(shape))))
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder, "c"), WriteOptions(fsync=False))
        writer.begin([StatePlan("w", "exp_avg", "U32", shape, "optim")])
        for box in boxes:
            writer.put("w", "exp_avg", taken(array, box), box)
        with Reader(writer.commit()) as reader:
            for _ in range(3):
                region = draw.draw(regions(shape))
                assert bytes(reader.read("w", "exp_avg", region)) == taken(array, region)  # type: ignore[arg-type]


@COMMON
@given(st.data())
def test_a_flat_range_is_boxes_of_its_elements_in_order(draw: st.DataObject) -> None:
    shape = draw.draw(shapes())
    low, high = draw.draw(ranges(int(np.prod(shape))))
    boxes = boxes_of_flat((low, high), shape)
    indices = np.arange(int(np.prod(shape))).reshape(shape)
    walked = np.concatenate([indices[tuple(slice(*pair) for pair in box)].reshape(-1) for box in boxes] or [[]])
    assert walked.tolist() == list(range(low, high))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@COMMON
@given(st.data())
def test_a_cover_is_accepted_and_one_box_less_or_twice_is_not(draw: st.DataObject) -> None:
    shape = draw.draw(shapes(least=1))
    boxes = draw.draw(cut(shape))
    flat = draw.draw(st.booleans()) and len(boxes[0]) > 0

    def tensor(parts: list[object]) -> TensorState:
        slabs = tuple(
            Slab(Span("f", 0, volume(box) * 4), "F32", box=box) if not isinstance(box[0], int)  # type: ignore
            else Slab(Span("f", 0, (box[1] - box[0]) * 4), "F32", flat=box)  # type: ignore
            for box in parts
        )  # fmt: skip
        return TensorState("w", "fp32", "F32", shape, slabs)

    parts: list[object] = list(boxes)
    first = boxes[0]
    if flat and all(pair == (0, n) for pair, n in zip(first[1:], shape[1:], strict=True)):
        row = int(np.prod(shape[1:]))
        parts[0] = (first[0][0] * row, first[0][1] * row)  # whole rows are a flat range
    check_cover(tensor(parts))
    with pytest.raises(CheckpointError, match="missing"):
        check_cover(tensor(parts[1:]))
    with pytest.raises(CheckpointError, match="same elements"):
        check_cover(tensor([*parts, parts[-1]]))


@COMMON
@given(st.data())
def test_slab_and_region_share_what_numpy_says_both_ways(draw: st.DataObject) -> None:
    shape = draw.draw(shapes())
    array = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint16).reshape(shape)
    one, other = draw.draw(regions(shape)), draw.draw(regions(shape))
    flat = one is not None and len(one) == 2 and isinstance(one[0], int)  # type: ignore[arg-type,index]
    held = taken(array, one)
    box = None if flat else tuple((0, n) for n in shape) if one is None else one
    slab = Slab(Span("f", 0, len(held)), "BF16", box=box, flat=one if flat else None)  # type: ignore[arg-type]
    inside = np.isin(np.frombuffer(taken(array, other), np.uint16), np.frombuffer(held, np.uint16))
    out = np.zeros(len(inside), np.uint16)
    for copy in geometry.taken(slab, other, shape):  # type: ignore[arg-type]
        strided_copy(held, copy.source, out.data.cast("B"), copy.target, copy.dims, 2)
    assert (out == np.where(inside, np.frombuffer(taken(array, other), np.uint16), 0)).all()
    back = np.zeros(len(held) // 2, np.uint16)
    for copy in geometry.given(other, slab, shape):  # type: ignore[arg-type]
        strided_copy(taken(array, other), copy.source, back.data.cast("B"), copy.target, copy.dims, 2)
    inside = np.isin(np.frombuffer(held, np.uint16), np.frombuffer(taken(array, other), np.uint16))
    assert (back == np.where(inside, np.frombuffer(held, np.uint16), 0)).all()
    if flat and other is None:
        assert len(geometry.taken(slab, other, shape)) <= 1, "what lies side by side is one run"


@COMMON
@given(st.data())
def test_a_copy_clipped_at_any_cuts_is_the_copy(draw: st.DataObject) -> None:
    shape = draw.draw(shapes(least=1))
    array = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint16).reshape(shape)
    slab = Slab(Span("f", 0, array.size * 2), "BF16", box=tuple((0, n) for n in shape))
    region = draw.draw(regions(shape))
    targets, size = region_tiles(region, shape)  # type: ignore[arg-type]
    found = list(copies(slab_tiles(slab, shape), targets))
    edges = sorted({0, array.size, *draw.draw(st.lists(st.integers(0, array.size), max_size=5))})
    out = bytearray(size * 2)
    for low, high in itertools.pairwise(edges):
        for one in found:
            for part in clip(one, low, high):
                assert low <= part.source
                assert part.source + part.extent <= high
                strided_copy(array.tobytes(), part.source, out, part.target, part.dims, 2)
    assert bytes(out) == taken(array, region)
    read = needed(found, 2, 0)
    assert all(low < high for low, high in read)
    assert sum(high - low for low, high in read) == size * 2, "without a gap exactly the wanted bytes are read"


def test_a_box_is_a_flat_range_exactly_if_its_elements_follow_one_another() -> None:
    for shape in [(3, 4, 2), (2, 1, 3), (5,), (1, 3)]:
        array = np.arange(np.prod(shape)).reshape(shape)
        sides = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
        for box in itertools.product(*sides):
            inside = array[tuple(slice(*pair) for pair in box)].reshape(-1)
            follow = bool((np.diff(inside) == 1).all())
            expected = (int(inside[0]), int(inside[-1]) + 1) if follow else None
            assert geometry.flat_of(box, shape) == expected, (shape, box)


def test_every_box_of_a_small_tensor_clipped_at_every_cut_is_exactly_its_part() -> None:
    shape = (3, 4, 2)
    array = np.arange(24, dtype=np.uint16)
    slab = Slab(Span("f", 0, 48), "BF16", box=((0, 3), (0, 4), (0, 2)))
    sides = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    for box in itertools.product(*sides):
        targets, size = region_tiles(box, shape)
        wanted = array.reshape(shape)[tuple(slice(*pair) for pair in box)].reshape(-1)
        (one,) = copies(slab_tiles(slab, shape), targets)
        for low, high in itertools.combinations(range(0, 25, 2), 2):
            out = np.full(size, 99, np.uint16)
            for part in clip(one, low, high):
                assert low <= part.source
                assert part.source + part.extent <= high
                strided_copy(array.data.cast("B"), part.source, out.data.cast("B"), part.target, part.dims, 2)
            assert (out == np.where((wanted >= low) & (wanted < high), wanted, 99)).all(), (box, low, high)


def test_dense_knows_a_transposed_block_from_one_with_holes() -> None:
    assert dense(((4, 1, 3), (3, 4, 1)), 2)
    assert not dense(((4, 1, 4), (3, 4, 1)), 2)

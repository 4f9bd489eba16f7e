"""DeepSpeed's partitions by numbers: sizes seen in its own files, and the two ways to find a parameter in them."""

from __future__ import annotations

import pytest

from holdfast.ckpt.formats.building import Builder
from holdfast.ckpt.formats.deepspeed_layout import flat_group, shard_group
from holdfast.ckpt.formats.deepspeed_zero import Partition, original_order, recomputed, scattered, sliced
from holdfast.ckpt.formats.inert import Global, Instance
from holdfast.ckpt.formats.torchzip import Stored
from holdfast.ckpt.universal.errors import CorruptError, IncompleteError
from holdfast.ckpt.universal.geometry import check_cover
from holdfast.ckpt.universal.model import TensorState

ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")


@pytest.mark.parametrize(
    ("total", "world", "size", "last_padding"),
    # Written by DeepSpeed 0.19.8: ZeRO-2 on 2 ranks, a pipeline stage on 2, ZeRO-1 on 4, experts on 2.
    [
        (1500, 2, 750, 0),
        (102, 2, 52, 2),
        (750, 2, 376, 2),
        (51, 2, 26, 1),
        (1540, 4, 386, 4),
        (102, 4, 26, 2),
        (34, 2, 18, 2),
    ],
)
def test_a_flat_group_is_cut_and_padded_as_deepspeed_does(total: int, world: int, size: int, last_padding: int) -> None:
    parts = [flat_group(["w"], [total], world, rank) for rank in range(world)]
    assert [part.elements + part.padding for part in parts] == [size] * world
    assert [part.padding for part in parts] == [0] * (world - 1) + [last_padding]


def test_more_ranks_than_elements_leave_ranks_that_hold_only_padding() -> None:
    parts = [flat_group(["w"], [3], 4, rank) for rank in range(4)]
    assert [(part.elements, part.padding) for part in parts] == [(2, 0), (1, 1), (0, 2), (0, 2)]
    assert [part.fragments for part in parts] == [(("w", 2, 0),), (("w", 1, 0),), (), ()]


def test_a_sharded_group_pads_each_parameter_by_itself() -> None:
    parts = [shard_group(["a", "b"], [7, 1], 3, rank) for rank in range(3)]
    assert [[(run.start, run.stop, run.pad) for run in part.runs] for part in parts] == [
        [(0, 3, 0), (0, 1, 0)],
        [(3, 6, 0), (1, 1, 1)],
        [(6, 7, 2), (1, 1, 1)],
    ]
    assert [part.elements for part in parts] == [4, 4, 4]


def part(rank: int, elements: int) -> Partition:
    fp32 = Stored(f"rank{rank}.pt", 1000, "F32", (elements,), (1,))
    moment = Stored(f"rank{rank}.pt", 9000, "F32", (elements + 2 * (rank == 1),), (1,))
    return Partition(f"rank{rank}.pt", fp32, {"exp_avg": moment}, 3)


def address(count: int, start: int) -> Instance:
    return Instance(ADDRESS, (), {"numel": count, "start": start})


SHAPES = {"a": (2, 3), "b": (5,), "c": (7,)}


def test_mappings_and_arithmetic_find_the_same_bytes() -> None:
    # 18 elements on 2 ranks: 10 and 8, and the last rank's master copy is saved without its padding.
    ranks = [part(0, 10), part(1, 8)]
    by_mapping, by_arithmetic = Builder(), Builder()
    mappings = [{"a": address(6, 0), "b": address(4, 6)}, {"b": address(1, 0), "c": address(7, 1)}]
    sliced(by_mapping, SHAPES, list(zip(ranks, mappings, strict=True)), str)
    recomputed(by_arithmetic, SHAPES, ranks, str)
    assert by_mapping.slabs == by_arithmetic.slabs
    assert by_mapping.steps == {"a": 3, "b": 3, "c": 3}
    b = list(by_mapping.slabs["b", "fp32"].values())
    assert [(slab.flat, slab.span.file, slab.span.offset) for slab in b] == [
        ((0, 4), "rank0.pt", 1000 + 6 * 4),
        ((4, 5), "rank1.pt", 1000),
    ]


def test_a_mapping_that_claims_too_much_or_points_outside_is_refused() -> None:
    for mapping, why in (
        ({"a": address(7, 0)}, "more of a parameter"),
        ({"a": address(6, 5)}, "outside of the tensor"),
        ({"z": address(1, 0)}, "does not list"),
        ({"a": Instance(ADDRESS, (), {"numel": -1, "start": 0})}, "cannot be understood"),
    ):
        with pytest.raises(CorruptError, match=why):
            sliced(Builder(), SHAPES, [(part(0, 10), mapping)], str)


def test_a_missing_slice_is_found_when_the_tensor_is_put_together() -> None:
    builder = Builder()
    sliced(builder, SHAPES, [(part(0, 10), {"a": address(4, 0)})], str)
    dtype, shape, role = builder.facts["a", "fp32"]
    with pytest.raises(IncompleteError):
        check_cover(TensorState("a", "fp32", dtype, shape, tuple(builder.slabs["a", "fp32"].values()), role))


def test_sub_groups_are_left_where_they_are_full_and_not_inside_of_a_parameter() -> None:
    builder = Builder()
    end = scattered(builder, {"a": (2, 3), "b": (5,)}, 0, 2, [part(0, 3), part(0, 3)], (0, 0))
    assert end == (1, 3)
    assert {slab.flat for slab in builder.slabs["b", "fp32"].values()} == {(0, 3)}
    with pytest.raises(CorruptError, match="ends inside"):
        scattered(Builder(), {"a": (2, 3)}, 0, 2, [part(0, 2)], (0, 0))
    with pytest.raises(CorruptError, match="fewer elements"):
        scattered(Builder(), {"a": (2, 3), "b": (5,)}, 0, 2, [part(0, 3)], (0, 0))


def test_round_robin_is_undone() -> None:
    # Of six parameters two ranks lay out 0 2 4 1 3 5.
    assert original_order(["p0", "p2", "p4", "p1", "p3", "p5"], 2) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert original_order(["p0", "p3", "p1", "p4", "p2"], 3) == ["p0", "p1", "p2", "p3", "p4"]

"""Replicated state: an owner's image is read from another's tensors, byte for byte; who does it, and what differs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from holdfast.ckpt.memory.arena import Half, Word, arena_bytes
from holdfast.ckpt.memory.metadata import unmarked
from holdfast.ckpt.memory.placement import HostInfo, Redundancy, SlotInfo, place
from holdfast.ckpt.memory.protect import pen
from holdfast.ckpt.memory.protect.deliver import Work
from holdfast.ckpt.memory.protect.peers import Sealed
from holdfast.ckpt.memory.protect.record import Record, cut, image_end_of, measure
from holdfast.ckpt.memory.protect.replicas import differences, work_of
from holdfast.ckpt.memory.table import HEADER_BYTES
from holdfast.launcher.actions import Announce
from holdfast.launcher.actions import Record as EventRecord
from holdfast.launcher.job import Job
from holdfast.proto.errors import ProtocolViolation
from holdfast.runtime.arenas import arena_entry, tensor_of, whole_sizes
from holdfast.runtime.device import CpuDevice
from holdfast.runtime.replica import TensorImage, clear_gaps, images_of, marked, shares
from holdfast.runtime.state import Entry

JOB = "job"


def state(seed: int) -> list[Entry]:
    """Odd shapes, narrow types, nothing at all, and tensors that do not lie in row-major order."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Entry("0.embed", "weight", made(7, 13)),
        Entry("0.embed", "step", torch.tensor(3.0)),
        Entry("0.embed", "exp_avg", made(13, 7).t()),
        Entry("1.empty", "weight", torch.empty(0, 5)),
        Entry("2.conv", "weight", made(4, 3, 5, 5).to(memory_format=torch.channels_last)),
        Entry("2.conv", "exp_avg", made(4, 3, 5, 5)),
        Entry("3.norm", "weight", made(129).bfloat16()),
        Entry("3.norm", "mask", torch.tensor([True, False, True])),
        Entry("4.big", "weight", made(301, 1001)),
        Entry("4.big", "count", torch.arange(5)),
        Entry("5.last", "weight", made(3).half()),
    ]


def snapshot(entries: list[Entry], extra: torch.Tensor, *, clear: bool = True) -> tuple[Half, bytes]:
    """A half that its owner filled over another step's layout, and its image."""
    entries = [*entries, Entry("rng", "extra", extra)]
    listed = [arena_entry(entry) for entry in entries]
    memory = bytearray(arena_bytes(listed, None))
    half = Half(memory, JOB)
    half.format()
    half.memory[HEADER_BYTES:] = b"\xee" * (half.nbytes - HEADER_BYTES)
    placed = half.begin(7, bytes(32), 0, listed, marked([1], replicated=True))
    if clear:
        clear_gaps(half, placed)
    for one, entry in zip(placed, entries, strict=True):
        if entry.tensor.numel():
            tensor_of(half.view(one), one.dtype, one.shape).copy_(entry.tensor)
    half.finish()
    end = image_end_of(half.read(7), pen.words_of(half)[Word.TABLE_OFFSET])
    return half, bytes(memory[HEADER_BYTES:end])


def whole(image: TensorImage, seed: int) -> bytes:
    """An image, read in pieces of any length."""
    rng, at, found = random.Random(seed), 0, bytearray()
    while at < image.nbytes:
        room = bytearray(b"\x55" * min(image.nbytes - at, rng.choice((1, 63, 64, 65, 5000, 70_001, 1 << 20))))
        image.read(at, memoryview(room))
        found += room
        at += len(room)
    return bytes(found)


@pytest.mark.parametrize("holders", [(0, 1), (2, 5, 7), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_the_image_of_every_owner_is_read_from_any_replica_byte_for_byte(holders: tuple[int, ...]) -> None:
    """With eight holders of six parameters some own nothing."""
    mine, theirs = shares(state(1), holders), shares(state(1), holders)
    images = images_of(mine, (*holders, 99), CpuDevice(), None)
    assert images.keys() == set(holders)
    for slot in holders:
        _, expected = snapshot(theirs[slot], torch.arange(slot + 1))
        assert images[slot].nbytes == len(expected)
        assert whole(images[slot], slot) == expected
    assert sum(image.nbytes for image in images.values()) > 1_200_000
    if len(holders) == 8:
        assert min(image.nbytes for image in images.values()) == 0, "the test would prove less"


def test_what_an_older_layout_left_between_entries_is_no_part_of_an_image() -> None:
    _, dirty = snapshot(state(1), torch.zeros(1), clear=False)
    _, clean = snapshot(state(1), torch.zeros(1))
    assert b"\xee" in dirty, "the test would prove nothing"
    assert whole(TensorImage(state(1), CpuDevice(), None), 0) == clean != dirty


def test_one_flipped_bit_of_a_replica_changes_its_image() -> None:
    entries = state(1)
    before = whole(TensorImage(entries, CpuDevice(), None), 0)
    entries[8].tensor.view(torch.int32)[300, 1000] ^= 1
    after = whole(TensorImage(entries, CpuDevice(), None), 0)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_state_that_is_not_shared_is_kept_whole_and_without_the_mark() -> None:
    kept = shares(state(1), (3,))
    assert list(kept) == [3]
    assert [(e.name, e.state) for e in kept[3]] == [(e.name, e.state) for e in state(1)]
    assert marked(["d"], replicated=False) == ["d"]
    assert unmarked(["d"]) == ["d"]
    assert unmarked(marked(["d"], replicated=True)) == ["d"]


def test_a_replicated_image_ends_before_the_extra_tensors_and_counts_a_page_at_least() -> None:
    entries = [Entry("w", "weight", torch.zeros(1000)), Entry("rng", "extra", torch.zeros(5000))]
    future = [Entry("w", "exp_avg", torch.zeros(1000))]
    assert whole_sizes(entries, future, None, replicated=False)[0] == 28672
    assert whole_sizes(entries, future, None, replicated=True)[0] == 8192
    assert whole_sizes(entries[1:], [], None, replicated=True)[0] == 4096
    sizes = [whole_sizes(entries, future, None, replicated=shared)[1] for shared in (False, True)]
    assert sizes[0] == sizes[1], "the arena holds the extra tensors all the same"


def placement(replicas: list[int], homes: list[int], code: tuple[int, int]) -> Any:
    slots = [SlotInfo(s, homes[s], 5_000_000, replicas[s]) for s in range(len(homes))]
    hosts = [HostInfo(host, f"host-{host}") for host in sorted(set(homes))]
    return place(slots, hosts, Redundancy(*code), 1)


def test_every_local_parity_chunk_is_the_work_of_exactly_one_rank_of_its_host_that_has_the_data() -> None:
    # Two stages, a replica on each of three hosts; host 0 has two replicas of the first stage.
    homes, replicas = [0, 0, 1, 1, 2, 2, 0], [0, 1, 0, 1, 0, 1, 0]
    laid = placement(replicas, homes, (2, 1))
    assert any(stripe.local for stripe in laid.stripes), "the test would prove nothing"
    for host in (0, 1, 2):
        work = work_of(laid, host)
        rows = sorted(row for rows in work.values() for row in rows)
        assert rows == sorted(row for row in laid.parity_on(host) if laid.stripes[row[0]].local)
        for slot, listed in work.items():
            assert homes[slot] == host
            assert {replicas[c.slot] for stripe, _ in listed for c in laid.stripes[stripe].data} == {replicas[slot]}
    assert 6 not in work_of(laid, 0)


def test_state_that_nobody_shares_is_nobodys_work() -> None:
    laid = placement([-1, -1, -1], [0, 1, 2], (2, 1))
    assert [work_of(laid, host) for host in (0, 1, 2)] == [{}, {}, {}]


def test_differences_name_the_slot_its_host_and_the_first_block() -> None:
    laid = placement([0, 0], [0, 1], (1, 1))
    stripe = next(s for s in laid.stripes if s.data[0].slot == 1)
    chunk = stripe.data[0]
    data = memoryview(random.Random(1).randbytes(4096 + 5_000_000))
    ranges = cut([(c.start, c.stop) for s in laid.stripes for c in s.data if c.slot == 1], 5_000_000)
    chunks, digest = measure(data, ranges, first=4096, data_bytes=5_000_000)
    ints = {"slot": 1, "step": 7, "fill": 1, "incarnation": 0, "placement": 1}
    ends = {"table_offset": 5_004_096, "table_bytes": 0, "data_bytes": 5_000_000, "image_end": 5_004_096}
    record = Record(**ints, **ends, plan="00" * 32, data_digest=digest, table_digest="00" * 16, chunks=chunks)
    records = {1: (1, 0, Sealed(record, b""))}
    right = record.chunk(chunk.start).digests
    assert differences(stripe, [right], records) == []
    wrong = bytearray(right)
    wrong[8] ^= 1
    (said,) = differences(stripe, [wrong], records)
    assert "slot 1 on host 1, first at block 1 " in said
    assert differences(stripe, [right[:-8]], records), "a block that a replica does not have"
    assert differences(stripe, [right + right[:8]], records), "a block too many"


def test_work_that_fits_no_code_is_refused() -> None:
    good: dict[str, Any] = {"order": 1, "k": 2, "m": 1, "chunk": 4096, "rows": [[0, 0, [[0, 0, 10], [1, 0, 10]]]]}
    assert Work.of(3, good).rows[0].data == ((0, 0, 10), (1, 0, 10))
    for bad in ({"k": 1}, {"rows": [[0, 1, []]]}, {"chunk": 0}, {"rows": [[0]]}, {"rows": None}, {"order": "x"}):
        with pytest.raises(ProtocolViolation):
            Work.of(3, {**good, **bad})


def test_the_operator_hears_once_of_a_difference_that_every_rank_of_a_host_tells() -> None:
    job = Job(2)
    found = job.on_mismatch(0, 9, "replicas differ after step 8: …")
    assert [type(action) for action in found] == [EventRecord, Announce]
    assert isinstance(found[0], EventRecord)
    assert (found[0].event["event"], found[0].event["step"]) == ("replica_mismatch", 9)
    assert job.on_mismatch(1, 9, "replicas differ after step 8: …") == []
    assert job.on_mismatch(1, 10, "replicas differ after step 9: …") != []

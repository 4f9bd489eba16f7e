"""Parity of replicated state: made by each host's own ranks, compared with what the owners sealed, fetched if need be.

Protectors and managers are processes; this one plays the ranks. Bytes between protectors are counted outside of them.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.ckpt.memory.protect.client import PARITY_SLOT
from holdfast.ckpt.memory.protect.options import BLOCK_BYTES, Options
from holdfast.proto.errors import SnapshotIncomplete

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from protected import DEADLINE_S, Cluster, Host, wait_for
from replicated import Replicated

KIB = 1024


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts clusters, and ends them."""
    opened: list[Cluster] = []

    def begin(sizes: dict[int, int], hosts: int, code: tuple[int, int]) -> Replicated:
        made = Replicated(sizes, hosts)
        opened.append(made)
        made.start()
        made.tell(made.place(code))
        assert made.placement is not None
        assert all(stripe.local for stripe in made.placement.stripes), "the test would prove nothing"
        return made

    yield begin
    for made in opened:
        made.close()


def total(made: Cluster, counter: str) -> int:
    return sum(host.status()["counters"][counter] for host in made.live())


def parity_of(host: Host, step: int) -> dict[str, bytes]:
    """Every parity chunk that a host holds of a step."""
    assert host.writer is not None
    for (slot, half), (state, at) in host.states().items():
        if slot == PARITY_SLOT and (state, at) == ("SEALED", step):
            with host.writer.open(slot, half) as mapped:
                table = mapped.half.read(step)
                return {e.name: bytes(mapped.half.view(e)) for e in table.entries if e.state == "parity"}
    raise AssertionError(f"no parity of step {step}: {host.states()}")


@pytest.mark.parametrize("code", [(1, 1), (2, 1), (2, 2), (1, 2)], ids=lambda code: f"{code[0]}+{code[1]}")
def test_replicas_make_parity_with_only_records_on_the_wire_and_the_bytes_of_the_network_path(
    start: Any, code: tuple[int, int]
) -> None:
    k, m = code
    sizes = {slot: 5_000_001 + 300_007 * slot for slot in range(k + m)}
    made = start(sizes, k + m, code)
    assert made.placement is not None
    assert made.train(1) == m * made.placement.chunk * len(made.placement.stripes)
    made.wait_protected(1)
    assert total(made, "delivered_rows") == m * len(made.placement.stripes)
    assert [total(made, name) for name in ("encoded_bytes", "read_bytes", "written_bytes", "not_delivered")] == [0] * 4
    crossed = made.crossed()
    assert crossed < 100 * KIB * (k + m), "more than records and tails"
    here = {host.number: parity_of(host, 1) for host in made.hosts}

    other = start(sizes, k + m, code)
    other.write(1)  # ranks that announce nothing: the network brings it, at once
    other.wait_protected(1)
    assert total(other, "delivered_rows") == 0
    assert other.crossed() > 4_000_000 * k, "nothing crossed: the comparison would prove nothing"
    assert {host.number: parity_of(host, 1) for host in other.hosts} == here


@pytest.mark.parametrize("code", [(1, 1), (2, 1), (2, 2)], ids=lambda code: f"{code[0]}+{code[1]}")
def test_what_replicas_made_rebuilds_every_lost_host(start: Any, code: tuple[int, int]) -> None:
    k, m = code
    # An image without any data, one that is short, one that ends within its last block.
    sizes = {slot: size for slot, size in zip(range(k + m), (0, 700, 3_145_729, 2_000_003), strict=False)}
    made = start(sizes, k + m, code)
    for step in (1, 2, 3):
        made.train(step)
        made.wait_protected(step)
        for host in made.hosts:
            with host.client() as client:
                client.keep(step)
    assert total(made, "not_delivered") == total(made, "encoded_bytes") == 0
    for lost in itertools.combinations(range(k + m), m):
        survivor = made.hosts[next(i for i in range(k + m) if i not in lost)]
        made.number += 1
        with survivor.client() as client:
            hosts = {host.number: host.address for host in made.live() if host.number not in lost}
            assert client.topology(made.number, survivor.number, hosts, made.placement)
        for slot in lost:
            with survivor.client() as client:
                rebuilt = client.rebuild(slot, 3, deadline_s=DEADLINE_S)
            assert rebuilt.source == "parity"
            made.check(survivor, slot, rebuilt.half, 3)
            assert survivor.writer is not None
            with survivor.writer.arena(slot, rebuilt.half, 1) as mapped:
                mapped.half.begin(0, bytes(32), 0, (), None)


def test_a_replica_that_differs_in_one_bit_is_reported_and_its_step_is_never_protected(start: Any) -> None:
    made = start({0: 3_000_001, 1: 3_000_001, 2: 3_000_001}, 3, (2, 1))
    assert made.placement is not None
    made.train(1)
    made.wait_protected(1)
    for host in made.hosts:
        with host.client() as client:
            client.keep(1)
    # Host 2 has a byte of slot 0 wrong that lies in a chunk whose parity it keeps.
    stripe = next(s for s in made.placement.stripes if s.parity == (2,) and any(c.slot == 0 for c in s.data))
    chunk = next(c for c in stripe.data if c.slot == 0)
    wrong = chunk.stop - 70
    works = {slot: made.announce(slot, 2) for slot in made.sizes}
    made.write(2)
    for slot, work in works.items():
        made.deliver(slot, work, {0: wrong} if slot == 2 else None)
    with made.hosts[2].client() as client, client.page() as page:
        wait_for(lambda: page.alarms() == 1, "the difference is not found")
    status = made.hosts[2].status()
    assert status["counters"]["replica_mismatches"] == 1
    for words in ("step 2", "host 2", "slot 0 on host 0", f"stripe {stripe.number}", "silent corruption"):
        assert words in status["error"], status["error"]
    block = (wrong - chunk.start) // BLOCK_BYTES
    assert f"block {block} of its chunk" in status["error"]
    assert "slot 1" not in status["error"]
    assert f"image byte {chunk.start + block * BLOCK_BYTES}" in status["error"]
    # Nothing that happens later protects that step here: not the network path either.
    made.tell(made.placement)
    with pytest.raises(AssertionError):
        made.wait_protected(2, deadline_s=1.0)
    assert made.hosts[2].status()["protected"] == 1
    assert made.hosts[0].status()["counters"]["replica_mismatches"] == 0
    # What was protected before still rebuilds, and a step at which replicas agree again is protected.
    made.train(3)
    made.wait_protected(3)
    assert made.hosts[2].status()["error"] == ""


def test_a_rank_that_stops_delivering_is_replaced_by_the_network(start: Any) -> None:
    made = start({0: 9_000_001, 1: 9_000_001}, 2, (1, 1))
    works = {slot: made.announce(slot, 1) for slot in (0, 1)}
    made.write(1)
    made.deliver(0, works[0])
    made.wait_protected(1, deadline_s=Options().secondary_s + DEADLINE_S)  # the rank of slot 1 says nothing more
    counters = made.hosts[1].status()["counters"]
    assert counters["not_delivered"] > 0
    assert counters["delivered_rows"] == 0
    with pytest.raises(SnapshotIncomplete):
        made.deliver(1, works[1])  # late: it must not touch what is there
    made.hosts[0].kill()
    with made.hosts[1].client() as client:
        rebuilt = client.rebuild(0, 1, deadline_s=DEADLINE_S)
    assert rebuilt.source == "parity"
    made.check(made.hosts[1], 0, rebuilt.half, 1)


def test_a_delivery_does_not_take_the_half_of_the_parity_that_is_kept(start: Any) -> None:
    made = start({0: 2_000_001, 1: 2_000_001}, 2, (1, 1))
    for step in (1, 2):
        made.train(step)
        made.wait_protected(step)
        for host in made.hosts:
            with host.client() as client:
                client.keep(step)
    # Steps that nobody else ever keeps: deliveries begin, and never end.
    for step in (3, 4, 5):
        work = made.announce(0, step)
        made.deliver(0, work)
    made.hosts[1].kill()
    with made.hosts[0].client() as client:
        assert client.rebuild(1, 2, deadline_s=DEADLINE_S).source == "parity"


def test_records_may_come_before_during_and_after_a_delivery(start: Any) -> None:
    made = start({0: 6_000_001, 1: 6_000_001}, 2, (1, 1))
    for step, late in enumerate((0.0, 0.05, 0.3), start=1):
        works = {slot: made.announce(slot, step) for slot in (0, 1)}
        made.write(step)
        threading.Event().wait(late)
        for slot, work in works.items():
            made.deliver(slot, work)
        made.wait_protected(step)
        for host in made.hosts:
            with host.client() as client:
                client.keep(step)
    assert total(made, "not_delivered") == total(made, "encoded_bytes") == 0

"""Memory by contract: what snapshots and their parity take together, and that too little is refused before training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from protected import cluster

from holdfast.proto.errors import SnapshotError

MIB = 1 << 20


@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2)])
def test_snapshots_and_parity_take_at_most_the_promised_memory(k: int, m: int) -> None:
    nbytes, hosts = 24 * MIB, k + m  # tables and tails take some 0.3 MB a host, whatever the size
    with cluster({slot: nbytes for slot in range(hosts)}, hosts) as made:
        made.tell(made.place((k, m)))
        for step in range(1, 4):
            made.write(step)
            made.wait_protected(step)
        taken = 0
        for host in made.hosts:
            assert host.writer is not None
            taken += int(host.writer.stats()["nbytes"])
    unique = nbytes * hosts
    assert taken <= 2.05 * (1 + m / k) * unique, f"{taken / unique:.3f} of the unique bytes"
    assert taken >= 2 * (1 + m / k) * unique, "both halves and both parities were written"


def test_parity_for_which_there_is_no_room_is_refused_with_the_numbers() -> None:
    with cluster({slot: MIB for slot in range(3)}, 3) as made:
        huge = made.place((2, 1))
        slots = tuple(type(slot)(slot.slot, slot.host, 1 << 46, -1) for slot in huge.slots)
        from holdfast.ckpt.memory.placement import Redundancy, place

        placement = place(slots, huge.hosts, Redundancy(2, 1), 7)
        with made.hosts[0].client("agent") as client, pytest.raises(SnapshotError, match="memory") as refused:
            client.reserve(placement, me=0)
        assert int(refused.value.fields["needed_bytes"]) > 1 << 44
        assert int(refused.value.fields["available_bytes"]) > 0

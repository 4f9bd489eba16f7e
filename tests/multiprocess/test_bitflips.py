"""A thousand changed bits, in data, tables, headers and parity: each is found, and put right while that is possible.

Flips are made through a mapping of the memory itself, as a fault of the memory would be, behind the back of the
manager and of the protector. The protector is told of none: its scrubber has to find them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.ckpt.memory.arena import Word
from holdfast.ckpt.memory.client import MappedHalf
from holdfast.ckpt.memory.protect.client import PARITY_SLOT
from holdfast.proto.errors import SnapshotCorrupt, SnapshotError

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from protected import Cluster, Host, cluster, image_bytes, wait_for

FLIPS = 1000
SIZES = {0: 700_001, 1: 1_300_007, 2: 200_003, 3: 1_048_576}


@contextmanager
def memory(host: Host, slot: int, half: int) -> Iterator[MappedHalf]:
    assert host.writer is not None
    with host.writer.arena(slot, half, 1) as mapped:
        yield mapped


def regions(mapped: MappedHalf) -> dict[str, tuple[int, int]]:
    """Byte ranges of one half, by kind."""
    words = mapped.half.memory[:4096].cast("Q")
    table, length, data = words[Word.TABLE_OFFSET], words[Word.TABLE_BYTES], words[Word.DATA_BYTES]
    return {
        "header": (0, (Word.PEN + 1) * 8),
        "data": (4096, 4096 + data),
        "table": (table, table + length),
    }


def halves_of(made: Cluster) -> list[tuple[Host, int, int]]:
    """Every sealed half of the cluster."""
    return [
        (host, slot, half)
        for host in made.hosts
        for (slot, half), (state, _) in sorted(host.states().items())
        if state == "SEALED"
    ]


def contents(made: Cluster) -> list[tuple[int, int, int, bytes]]:
    """What is used of every half: header, data and table."""
    found = []
    for host, slot, half in halves_of(made):
        with memory(host, slot, half) as mapped:
            whole = b"".join(bytes(mapped.half.memory[start:stop]) for start, stop in regions(mapped).values())
            found.append((host.number, slot, half, whole))
    return found


def repaired(made: Cluster, before: list[tuple[int, int, int, bytes]]) -> bool:
    """Whether everything is again what it was. Parity may have been encoded anew: then its fill is another."""
    now = contents(made)
    skip = (Word.PEN + 1) * 8
    if [one[:3] for one in now] != [one[:3] for one in before]:
        return False
    for (_, slot, _, whole), (_, _, _, once) in zip(now, before, strict=True):
        data = memoryview(once)[:skip].cast("Q")[Word.DATA_BYTES]
        same = whole[skip : skip + data] == once[skip : skip + data] if slot == PARITY_SLOT else whole == once
        if not same:
            return False
    return True


def test_a_thousand_flips_are_found_and_put_right_while_at_most_m_shards_of_a_stripe_are_bad() -> None:
    rng = random.Random(20)
    with cluster(SIZES, 4, scrub_rate=2_000_000_000) as made:
        made.tell(made.place((2, 2)))
        made.write(1)
        made.wait_protected(1)
        before = contents(made)
        assert {slot for _, slot, _, _ in before} == {*SIZES, PARITY_SLOT}
        done = 0
        while done < FLIPS:
            # Any number of flips on two of the four hosts: at most m = 2 shards of any stripe are bad.
            bad = rng.sample(range(4), 2)
            chosen = [one for one in halves_of(made) if one[0].number in bad]
            for _ in range(min(40, FLIPS - done)):
                host, slot, half = rng.choice(chosen)
                with memory(host, slot, half) as mapped:
                    kind = rng.choice(["data", "data", "table", "header"])
                    at = rng.randrange(*where(before, host, slot, half, kind))
                    mapped.half.memory[at] ^= 1 << rng.randrange(8)
                done += 1
            try:
                wait_for(lambda: repaired(made, before), f"not repaired after {done} flips")  # noqa: B023
            except AssertionError as error:
                raise AssertionError(f"{error}: {errors(made)}") from None
            before = contents(made)
        counters = [host.status()["counters"] for host in made.hosts]
        assert sum(one["flips_found"] for one in counters) > FLIPS / 4, "many flips meet in one block, or in one word"
        for slot in SIZES:
            made.check(made.hosts[slot], slot, 0, 1)


def where(before: list[tuple[int, int, int, bytes]], host: Host, slot: int, half: int, kind: str) -> tuple[int, int]:
    """Where that kind of bytes is, by the header as it was: the one in memory may be flipped already."""
    whole = next(w for number, s, h, w in before if (number, s, h) == (host.number, slot, half))
    words = memoryview(whole)[: (Word.PEN + 1) * 8].cast("Q")
    if kind == "header":
        return 0, (Word.PEN + 1) * 8
    if kind == "data":
        return 4096, 4096 + words[Word.DATA_BYTES]
    return words[Word.TABLE_OFFSET], words[Word.TABLE_OFFSET] + words[Word.TABLE_BYTES]


def errors(made: Cluster) -> list[str]:
    return [f"host {host.number}: {host.status()['errors']['repair']}" for host in made.hosts]


def test_more_bad_shards_than_parity_covers_are_never_given_out() -> None:
    with cluster(SIZES, 4, scrub_rate=0) as made:
        made.tell(made.place((3, 1)))
        made.write(1)
        made.wait_protected(1)
        for slot in (0, 1):
            with memory(made.hosts[slot], slot, 0) as mapped:
                for at in range(4096, 4096 + image_bytes(slot, SIZES[slot]), 65536):
                    mapped.half.memory[at] ^= 1
        assert made.hosts[0].writer is not None
        with made.hosts[0].writer.open(0, 0) as mapped, pytest.raises(SnapshotCorrupt):
            mapped.half.verify()
        assert made.hosts[0].writer.corrupt(0, 0, 1)
        wait_for(lambda: made.hosts[0].status()["counters"]["unrepaired"] > 0, "no attempt")
        assert made.hosts[0].states()[0, 0] == ("CORRUPT", 1)
        with made.hosts[2].client() as client, pytest.raises(SnapshotError):
            client.rebuild(0, 1, deadline_s=10.0)
        assert made.hosts[2].states().get((0, 0), ("", 0))[0] != "SEALED"


def test_a_half_that_a_rank_reports_is_repaired_without_any_scrubber() -> None:
    with cluster(SIZES, 4, scrub_rate=0) as made:
        made.tell(made.place((3, 1)))
        made.write(1)
        made.wait_protected(1)
        host = made.hosts[1]
        assert host.writer is not None
        with memory(host, 1, 0) as mapped:
            mapped.half.memory[500_000] ^= 16
        with host.writer.open(1, 0) as reader, pytest.raises(SnapshotCorrupt):
            reader.half.verify()
        assert host.writer.corrupt(1, 0, 1)
        wait_for(lambda: host.states()[1, 0] == ("SEALED", 1), "not repaired")
        made.check(host, 1, 0, 1)
        assert host.writer.stats()["repaired"] == 1


def test_a_flip_before_the_protector_looked_is_repaired_from_the_mirrored_record() -> None:
    with cluster(SIZES, 4, scrub_rate=0) as made:
        made.tell(made.place((3, 1)))
        made.write(1)
        made.wait_protected(1)
        host = made.hosts[2]
        assert host.protector is not None
        host.protector.kill()
        host.protector.wait()
        with memory(host, 2, 0) as mapped:
            mapped.half.memory[100_000] ^= 1
        host.start_protector()
        made.tell(made.placement)
        wait_for(lambda: host.status()["counters"]["repaired"] >= 1, "not repaired")
        wait_for(lambda: host.states()[2, 0] == ("SEALED", 1), "not sealed again")
        made.check(host, 2, 0, 1)


def test_ranks_that_write_on_while_bits_flip_never_get_a_repair_into_their_step() -> None:
    rng = random.Random(3)
    with cluster({0: 300_000, 1: 300_000, 2: 300_000}, 3, scrub_rate=2_000_000_000) as made:
        made.tell(made.place((2, 1)))
        for step in range(1, 60):
            made.write(step)
            if step % 3 == 0:
                made.wait_protected(step)
            if step == 1:
                continue  # there is one half so far
            slot = rng.randrange(3)
            with memory(made.hosts[slot], slot, made.turn[slot]) as mapped:  # the half that is written next
                mapped.half.memory[rng.randrange(4096, 300_000)] ^= 1 << rng.randrange(8)
        made.wait_protected(59)
        for slot in range(3):
            made.check(made.hosts[slot], slot, 1 - made.turn[slot], 59)

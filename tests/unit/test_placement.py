"""What is asked for in words, where shards then lie, and what is refused, said or sent."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from holdfast.ckpt.memory.placement import (
    NONE,
    Chunk,
    HostInfo,
    Placement,
    Redundancy,
    SlotInfo,
    Stripe,
    decodable,
    lost_slots,
    place,
    survivable,
    tolerance,
)
from holdfast.ckpt.memory.redundancy import TEXT_MAX
from holdfast.proto.errors import ConfigError, ProtocolViolation

MB = 1 << 20
OFFERED = [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (8, 3), (12, 4)]


def machines(count: int, rack: int = 1) -> list[HostInfo]:
    return [HostInfo(h, f"host-{h}" if rack == 1 else f"rack-{h // rack}") for h in range(count)]


def ranks(hosts: int, per_host: int = 1, nbytes: int = 96 * MB) -> list[SlotInfo]:
    return [SlotInfo(i, i // per_host, nbytes) for i in range(hosts * per_host)]


def layout(hosts: int, k: int, m: int, *, per_host: int = 1, rack: int = 1, nbytes: int = 96 * MB) -> Placement:
    return place(ranks(hosts, per_host, nbytes), machines(hosts, rack), Redundancy(k, m), 1)


def shards(placement: Placement, stripe: Stripe) -> list[int]:
    host_of = {slot.slot: slot.host for slot in placement.slots}
    return [host_of[chunk.slot] for chunk in stripe.data] + list(stripe.parity)


def sharing_sets(placement: Placement) -> set[frozenset[int]]:
    return {frozenset(shards(placement, stripe)) for stripe in placement.stripes}


# ---- policy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts", "said"),
    [
        ("rs:6+2", 8, "rs:6+2"),
        ("rs:12+4", 100, "rs:12+4"),
        ("mirror", 2, "rs:1+1"),
        ("xor", 2, "rs:1+1"),
        ("xor", 8, "rs:7+1"),
        ("none", 1, "none"),
        *[("auto", n, s) for n, s in [(1, "none"), (2, "rs:1+1"), (3, "rs:1+1"), (4, "rs:3+1"), (5, "rs:4+1")]],
        *[("auto", n, s) for n, s in [(6, "rs:4+2"), (7, "rs:5+2"), (8, "rs:6+2"), (15, "rs:6+2"), (16, "rs:12+4")]],
        ("auto", 1000, "rs:12+4"),
    ],
)
def test_words_mean_what_the_table_says(text: str, hosts: int, said: str) -> None:
    redundancy = Redundancy.parse(text, hosts)
    assert str(redundancy) == said
    assert Redundancy.parse(said, hosts) == redundancy


@pytest.mark.parametrize(
    ("text", "hosts", "line"),
    [
        ("raid6", 8, "redundancy 'raid6' is not one of: auto, none, mirror, xor, or rs:K+M such as rs:6+2"),
        ("rs:6-2", 8, "'rs:6-2' is not one of"),
        ("RS:6+2", 8, "is not one of"),
        ("rs:6+2\n", 8, "is not one of"),
        ("rs:٦+2", 8, "is not one of"),
        ("rs:6+2", 4, "redundancy rs:6+2 needs 8 hosts and there are 4: ask for rs:2+2 or rs:3+1 or auto"),
        ("rs:6+2", 1, "one host has nobody to keep its parity: ask for none or auto"),
        ("rs:0+2", 8, "K and M must be at least 1"),
        ("rs:6+0", 8, "K and M must be at least 1"),
        ("rs:60+5", 80, "K+M at most 64"),
        ("mirror", 1, "mirror needs at least 2 hosts and there is 1: ask for none or auto"),
        ("xor", 1, "xor needs at least 2 hosts"),
        ("xor", 65, "wider than 64 shards: ask for rs:12+4 or rs:7+1"),
        ("auto", 0, "there must be at least 1"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_could(text: str, hosts: int, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        Redundancy.parse(text, hosts)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_after_losses_k_pays_before_m() -> None:
    asked = Redundancy(6, 2)
    assert [str(asked.fitted(n)) for n in range(9, 0, -1)] == [
        "rs:6+2", "rs:6+2", "rs:5+2", "rs:4+2", "rs:3+2", "rs:2+2", "rs:1+2", "rs:1+1", "none",
    ]  # fmt: skip
    assert NONE.fitted(5) == NONE
    with pytest.raises(ConfigError, match="at least 1"):
        asked.fitted(0)


# ---- where shards lie -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), OFFERED)
def test_k_plus_m_equal_hosts_hold_m_parity_chunks_and_encode_once_each_and_share_every_stripe(k: int, m: int) -> None:
    n = k + m
    placement = layout(n, k, m)
    assert len(placement.stripes) == n
    assert all(sorted(shards(placement, stripe)) == list(range(n)) for stripe in placement.stripes)
    for host in range(n):
        assert len(placement.parity_on(host)) == m
        assert placement.parity_bytes(host) == m * placement.chunk
        assert all(placement.stripes[stripe].parity[index] == host for stripe, index in placement.parity_on(host))
    assert sorted(placement.encoder(stripe.number) for stripe in placement.stripes) == list(range(n))


@pytest.mark.parametrize(("k", "m"), OFFERED)
@pytest.mark.parametrize("per_host", [1, 3])
def test_equal_images_cost_m_over_k_and_load_every_host_alike(k: int, m: int, per_host: int) -> None:
    for hosts in range(k + m, 2 * (k + m) + 3):
        placement = layout(hosts, k, m, per_host=per_host)
        images = sum(slot.nbytes for slot in placement.slots)
        parity = [placement.parity_bytes(host) for host in range(hosts)]
        encoded = Counter(stripe.parity[0] for stripe in placement.stripes)
        assert sum(parity) <= m / k * images * 1.02
        assert max(parity) - min(parity) <= placement.chunk
        assert max(encoded.values()) - min(encoded[host] for host in range(hosts)) <= 1


def test_many_hosts_are_cut_into_groups_and_leftover_hosts_join_the_last() -> None:
    assert sharing_sets(layout(16, 6, 2)) == {frozenset(range(0, 16, 2)), frozenset(range(1, 16, 2))}
    groups: list[set[int]] = []
    for shared in sharing_sets(layout(27, 6, 2)):
        touching = [group for group in groups if group & shared]
        groups = [group for group in groups if group not in touching] + [set(shared).union(*touching)]
    assert sorted(len(group) for group in groups) == [9, 9, 9]
    assert len(sharing_sets(layout(128, 1, 1))) == 64


@pytest.mark.parametrize(("hosts", "rack", "k", "m"), [(16, 4, 6, 2), (16, 4, 12, 4), (128, 8, 8, 3), (128, 8, 1, 1)])
def test_any_whole_rack_may_go(hosts: int, rack: int, k: int, m: int) -> None:
    placement = layout(hosts, k, m, rack=rack)
    assert placement.warnings == ()
    for first in range(0, hosts, rack):
        assert lost_slots(placement, range(first, first + rack)) == ()


def test_a_domain_that_must_hold_more_than_m_is_named_and_strict_refuses_it() -> None:
    line = (
        "failure domain rack-0 holds 4 shards of a stripe and rs:6+2 survives the loss of 2: losing rack-0 loses "
        "state; rs:2+2 would hold over these 2 domains"
    )
    placement = layout(8, 6, 2, rack=4)
    assert placement.warnings == (line,)
    assert lost_slots(placement, range(4)) == (0, 1, 2, 3)
    with pytest.raises(ConfigError) as error:
        place(ranks(8), machines(8, 4), Redundancy(6, 2), 1, strict=True)
    assert str(error.value) == line
    assert place(ranks(8), machines(8, 4), Redundancy(2, 2), 1, strict=True).warnings == ()
    one_rack = place(ranks(4), machines(4, 4), Redundancy(3, 1), 1)
    assert one_rack.warnings[0].endswith("more domains would help")


def test_groups_are_merged_where_only_that_keeps_a_domain_at_m() -> None:
    racks = "aaaaaaa" + "bbb" + "ccc" + "ddd"
    hosts = [HostInfo(i, rack) for i, rack in enumerate(racks)]
    placement = place(ranks(16), hosts, Redundancy(6, 2), 1, strict=True)
    for rack in "abcd":
        assert lost_slots(placement, [host.host for host in hosts if host.domain == rack]) == ()


def test_hosts_without_slots_keep_parity() -> None:
    placement = place(ranks(6), machines(8), Redundancy(6, 2), 1)
    assert all(sorted(stripe.parity) == [6, 7] for stripe in placement.stripes)
    assert placement.warnings == ()
    spares = place(ranks(8), machines(16), Redundancy(6, 2), 1)
    assert sum(spares.parity_bytes(host) for host in range(16)) <= 8 * 96 * MB / 3 * 1.02
    assert max(spares.parity_bytes(host) for host in range(16)) <= spares.chunk


def test_replicas_keep_their_own_parity_where_they_are_enough_hosts() -> None:
    slots = [SlotInfo(i, i // 2, 64 * MB, replicas=i % 2) for i in range(16)]
    placement = place(slots, machines(8), Redundancy(6, 2), 1)
    assert all(stripe.local for stripe in placement.stripes)
    assert all(len({chunk.slot % 2 for chunk in stripe.data}) == 1 for stripe in placement.stripes)
    parity = {placement.parity_bytes(host) for host in range(8)}
    assert max(parity) - min(parity) <= placement.chunk
    # Sets of four hosts are too narrow for 6+2; a stripe of unlike slots is computed from what travels.
    narrow = [SlotInfo(i, i, 64 * MB, replicas=i // 4) for i in range(8)]
    assert not any(stripe.local for stripe in place(narrow, machines(8), Redundancy(6, 2), 1).stripes)
    alone = [SlotInfo(i, i, 64 * MB) for i in range(8)]
    assert not any(stripe.local for stripe in place(alone, machines(8), Redundancy(6, 2), 1).stripes)


def test_the_domain_rule_comes_before_local_parity() -> None:
    # Each set fills one rack: alone it could not outlive the rack, mixed it can.
    slots = [SlotInfo(i, i, 64 * MB, replicas=i // 4) for i in range(8)]
    placement = place(slots, machines(8, 4), Redundancy(2, 2), 1, strict=True)
    assert not any(stripe.local for stripe in placement.stripes)
    assert tolerance(placement) == 2


def test_fewer_hosts_than_k_plus_m_shorten_stripes_and_say_what_it_costs() -> None:
    placement = layout(5, 6, 2)
    assert all(len(stripe.data) == 3 and len(set(shards(placement, stripe))) == 5 for stripe in placement.stripes)
    assert tolerance(placement) == 2
    assert placement.warnings == (
        "rs:6+2 has 3.0 data chunks a stripe on these 5 hosts, so parity costs about 67 % of the snapshots, not 33 %",
    )


def test_with_two_hosts_and_with_one_parity_is_where_it_can_be() -> None:
    two = layout(2, 1, 3)
    assert lost_slots(two, [0]) == lost_slots(two, [1]) == ()
    assert survivable(two, []) == {stripe.number: 1 for stripe in two.stripes}
    one = layout(1, 1, 1)
    assert one.warnings[0].startswith("failure domain host-0 holds 2 shards")
    assert tolerance(one) == 0
    assert lost_slots(one, [0]) == (0,)


def test_an_idle_host_is_not_given_two_shards_of_a_stripe_to_catch_up() -> None:
    slots = [SlotInfo(0, 0, 40 * MB), SlotInfo(1, 1, 1 * MB)]
    placement = place(slots, machines(4, 4), Redundancy(1, 2), 1)
    assert all(len(set(shards(placement, stripe))) == 3 for stripe in placement.stripes)


def test_chunks_are_cut_so_that_unequal_images_waste_little() -> None:
    pair = place([SlotInfo(0, 0, 100 * MB), SlotInfo(1, 1, 30 * MB)], machines(2), Redundancy(1, 1), 1)
    assert pair.parity_bytes(0) + pair.parity_bytes(1) <= 1.05 * 130 * MB
    # Where a finer cut wins nothing, chunks are as large as they can be: fewer stripes, longer reads.
    assert len(layout(8, 6, 2).stripes) == 8


def test_an_empty_image_has_a_stripe_so_that_somebody_knows_of_its_slot() -> None:
    slots = [SlotInfo(0, 0, 0), SlotInfo(1, 1, 5 * MB), SlotInfo(2, 2, 5 * MB)]
    placement = place(slots, machines(3), Redundancy(2, 1), 1)
    chunks = [chunk for stripe in placement.stripes for chunk in stripe.data if chunk.slot == 0]
    assert chunks == [Chunk(0, 0, 0)]
    assert lost_slots(placement, [0]) == ()


def test_without_redundancy_nothing_is_placed_and_any_loss_is_a_loss() -> None:
    placement = place(ranks(4), machines(4), NONE, 1)
    assert placement.stripes == ()
    assert tolerance(placement) == 0
    assert tolerance(placement, [2]) == -1
    assert lost_slots(placement, [2]) == (2,)
    assert decodable(placement, {1: frozenset({4})}, {}) == {0: set(), 1: {4}, 2: set(), 3: set()}
    assert place([], machines(4), Redundancy(2, 1), 1).stripes == ()


@pytest.mark.parametrize(
    ("slots", "hosts", "line"),
    [
        ([SlotInfo(0, 0, 1), SlotInfo(0, 1, 1)], machines(2), "slot 0 is there twice"),
        ([SlotInfo(0, 7, 1)], machines(2), "slot 0 is on host 7"),
        ([SlotInfo(0, 0, -1)], machines(2), "-1 bytes"),
        ([SlotInfo((1 << 20) - 1, 0, 1)], machines(2), "not below 1048575"),
        ([], [HostInfo(0, "a"), HostInfo(0, "a")], "2 hosts, 1 of them different"),
        ([], [], "0 hosts"),
        ([], [HostInfo(0, "")], "failure domain"),
        ([], [HostInfo(0, "a\nb")], "failure domain"),
    ],
)
def test_contradictory_input_is_refused(slots: list[SlotInfo], hosts: list[HostInfo], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        place(slots, hosts, Redundancy(1, 1), 1)


def test_the_largest_layout_is_quick_and_small() -> None:
    """Beside a loop that does nothing but count, in turns: machines differ, and one is not the same all day."""
    spent, counted = [], []
    for _ in range(5):
        start = time.thread_time()
        placement = layout(128, 12, 4, per_host=8)
        between = time.thread_time()
        sum(i * i % 7 for i in range(200_000))
        spent.append(between - start)
        counted.append(time.thread_time() - between)
    assert min(spent) < 25 * min(counted), "5 times as long where it was written: this finds what got slower by far"
    assert len(placement.to_json()) < 256 << 10


# ---- what a loss leaves -----------------------------------------------------------------------------------


def test_a_decodable_step_needs_shards_of_that_very_step() -> None:
    placement = layout(3, 2, 1)
    assert len(placement.stripes) == 3
    both, old, new = frozenset({8, 9}), frozenset({8}), frozenset({9})
    parity = {(stripe.number, 0): old for stripe in placement.stripes}
    assert decodable(placement, {1: both, 2: both}, parity)[0] == {8}
    assert decodable(placement, {1: both, 2: new}, parity)[0] == set()
    assert decodable(placement, {0: new, 1: both, 2: both}, parity) == {0: both, 1: both, 2: both}


def test_survivable_counts_down_and_below_zero() -> None:
    placement = layout(8, 6, 2)
    for lost, left in [((), 2), ((3,), 1), ((3, 5), 0), ((3, 5, 0), -1), ((3, 5, 0, 1), -2)]:
        assert set(survivable(placement, lost).values()) == {left}
        assert tolerance(placement, lost) == left


# ---- as text ----------------------------------------------------------------------------------------------


def test_a_placement_survives_its_text_and_its_digest_tells_it_from_others() -> None:
    placement = place(ranks(9, 2, 5 * MB + 13), machines(9, 3), Redundancy(6, 2), 7)
    assert Placement.from_json(placement.to_json()) == placement
    assert len(placement.digest()) == 32
    assert placement.digest() == Placement.from_json(placement.to_json()).digest()
    moved = replace(placement.stripes[0], parity=tuple(reversed(placement.stripes[0].parity)))
    others = [replace(placement, number=8), replace(placement, stripes=(moved, *placement.stripes[1:]))]
    assert len({p.digest() for p in (placement, *others)}) == 3


def test_input_in_any_order_gives_the_same_placement() -> None:
    slots = [SlotInfo(i, i // 3, (1 + i % 5) * MB, replicas=i % 4 - 1) for i in range(60)]
    hosts = machines(20, 3)
    expected = place(slots, hosts, Redundancy(4, 2), 1)
    for seed in range(5):
        rng = random.Random(seed)
        shuffled = place(rng.sample(slots, 60), rng.sample(hosts, 20), Redundancy(4, 2), 1)
        assert shuffled.digest() == expected.digest()


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("chunk"),
        lambda v: v.update(more=1),
        lambda v: v.update(format=2),
        lambda v: v.update(format=True),
        lambda v: v.update(number=-1),
        lambda v: v.update(number=1.0),
        lambda v: v.update(number=1 << 60),
        lambda v: v.update(chunk=0),
        lambda v: v.update(chunk=v["chunk"] * 2),
        lambda v: v.update(k=0),
        lambda v: v.update(m=3),
        lambda v: v.update(k=True),
        lambda v: v.update(k=64),
        lambda v: v["slots"][2].__setitem__(1, 0),
        lambda v: v.update(hosts=[]),
        lambda v: v["hosts"].reverse(),
        lambda v: v["hosts"].pop(),
        lambda v: v["hosts"][0].append(1),
        lambda v: v["hosts"][0].__setitem__(1, "x" * 1000),
        lambda v: v["hosts"][0].__setitem__(1, "a\nb"),
        lambda v: v["slots"].append(v["slots"][0]),
        lambda v: v["slots"].pop(),
        lambda v: v["slots"][0].__setitem__(1, 99),
        lambda v: v["slots"][0].__setitem__(2, 1 << 50),
        lambda v: v["slots"][0].__setitem__(3, -2),
        lambda v: v["slots"].__setitem__(0, "slot"),
        lambda v: v["stripes"].pop(),
        lambda v: v["stripes"].append(v["stripes"][0]),
        lambda v: v["stripes"][0].pop(),
        lambda v: v["stripes"][0][0].pop(),
        lambda v: v["stripes"][0][0].__setitem__(0, 99),
        lambda v: v["stripes"][0][0].__setitem__(1, -1),
        lambda v: v["stripes"][0][0].__setitem__(1, "0"),
        lambda v: v["stripes"][0][0].__setitem__(0, []),
        lambda v: v["stripes"][0][1].append(0),
        lambda v: v["stripes"][0][1].__setitem__(0, 99),
        lambda v: v["stripes"][0][1].__setitem__(0, False),
        lambda v: v["stripes"][0][1].__setitem__(0, [0]),
        lambda v: v.update(stripes={}),
        lambda v: v.update(warnings=["x"] * 100),
        lambda v: v.update(warnings=["x" * 10_000]),
    ],
)
def test_a_placement_that_was_tampered_with_is_refused(change: Change) -> None:
    value = json.loads(layout(4, 2, 1).to_json())
    assert Placement.from_json(json.dumps(value)) == layout(4, 2, 1)
    change(value)
    with pytest.raises(ProtocolViolation):
        Placement.from_json(json.dumps(value))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "1" * 10_000, " " * (TEXT_MAX + 1)])
def test_what_is_no_placement_at_all_is_refused(text: str) -> None:
    with pytest.raises(ProtocolViolation):
        Placement.from_json(text)


def test_every_pair_of_losses_under_two_parities_leaves_all_and_every_triple_does_not() -> None:
    placement = layout(8, 6, 2)
    assert not any(lost_slots(placement, lost) for lost in itertools.combinations(range(8), 2))
    assert all(lost_slots(placement, lost) == lost for lost in itertools.combinations(range(8), 3))


# ---- stages that are neighbours ---------------------------------------------------------------------------


def keepers(placement: Placement) -> set[tuple[int, int]]:
    """(host, host that keeps a copy of its data) of a mirror."""
    host_of = {slot.slot: slot.host for slot in placement.slots}
    return {
        (host_of[chunk.slot], keeper)
        for stripe in placement.stripes
        for chunk in stripe.data
        for keeper in stripe.parity
    }


def staged(order: Sequence[int], domains: Sequence[str], per_host: int = 1) -> Placement:
    """A mirror over hosts; order[i] has the stages i * per_host and on."""
    hosts = [HostInfo(host, domain) for host, domain in enumerate(domains)]
    slots = [SlotInfo(i, host, 100_000) for i, host in enumerate(h for h in order for _ in range(per_host))]
    return place(slots, hosts, Redundancy(1, 1), 1, stages={slot.slot: slot.slot for slot in slots})


@pytest.mark.parametrize("per_host", [1, 3])
@pytest.mark.parametrize("hosts", range(4, 14))
def test_no_copy_lies_beside_its_stage_where_hosts_have_domains_of_their_own(hosts: int, per_host: int) -> None:
    for seed in range(20):
        order = random.Random(seed).sample(range(hosts), hosts)
        placement = staged(order, [f"host-{host}" for host in range(hosts)], per_host)
        assert all(abs(order.index(a) - order.index(b)) > 1 for a, b in keepers(placement)), order
        assert placement.warnings == ()


def test_stages_next_to_each_other_in_racks_of_two_are_kept_in_the_other_rack_and_apart() -> None:
    placement = staged([0, 1, 2, 3], ["a", "a", "b", "b"])
    assert keepers(placement) == {(0, 2), (2, 0), (1, 3), (3, 1)}
    # Stages 0 2 | 1 3: each of the other rack's hosts is beside one of them, but for 0 and 3.
    placement = staged([0, 2, 1, 3], ["a", "a", "b", "b"])
    assert {(0, 3), (3, 0)} < keepers(placement)
    assert all({a, b} & {0, 1} and {a, b} & {2, 3} for a, b in keepers(placement))


def test_domains_come_before_stages_and_what_cannot_be_kept_apart_is_said() -> None:
    placement = staged([0, 1], ["host-0", "host-1"])
    assert placement.warnings == (
        "hosts 0 and 1 have adjacent stages and one keeps the other's copy: losing both loses a stage and its "
        "neighbour; four or more hosts, in domains of their own, would keep them apart",
    )
    one_apart = staged([0, 1, 2, 3, 4, 5], ["a", "b", "b", "b", "b", "b"])
    assert "a" in {("a", "b", "b", "b", "b", "b")[host] for pair in keepers(one_apart) for host in pair}
    assert all(0 in pair for pair in keepers(one_apart)), "a copy in its own rack"
    assert any("have adjacent stages" in line for line in one_apart.warnings)


def test_stages_cost_no_memory_and_change_nothing_where_they_are_not_known() -> None:
    for hosts, (k, m) in [(9, (1, 1)), (12, (2, 1)), (16, (6, 2))]:
        infos = [HostInfo(host, f"rack-{host % 4}") for host in range(hosts)]
        slots = [SlotInfo(i, i, 100_000 + 5000 * (i % 3)) for i in range(hosts)]
        plain = place(slots, infos, Redundancy(k, m), 1)
        assert place(slots, infos, Redundancy(k, m), 1, stages={}) == plain
        known = place(slots, infos, Redundancy(k, m), 1, stages={i: (i * 5) % hosts for i in range(hosts)})
        assert tolerance(known) == tolerance(plain) == m
        memory = [sum(one.parity_bytes(host) for host in range(hosts)) for one in (known, plain)]
        # A mirror may be cut into other chunks, whose sizes are rounded up to pages.
        assert memory[0] <= memory[1] * (1.02 if k == 1 else 1), (k, m, memory)

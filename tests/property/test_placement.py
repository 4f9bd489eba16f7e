"""Placement rules hold for any hosts, racks, images and replica sets; the answers agree with brute force."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from holdfast.ckpt.memory.placement import (
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
from holdfast.proto.errors import ConfigError

ALIGN = 4096
CODES = [Redundancy(*pair) for pair in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (4, 2), (6, 2), (3, 3)]]
exactly = settings(derandomize=True, deadline=None, max_examples=150)


@dataclass(frozen=True)
class Case:
    slots: list[SlotInfo]
    hosts: list[HostInfo]
    redundancy: Redundancy

    def place(self) -> Placement:
        return place(self.slots, self.hosts, self.redundancy, 3)


@st.composite
def cases(draw: st.DrawFn, *, racks: bool = True, most: int = 24, one_group: bool = False) -> Case:
    """Anything: several slots a host or none, unequal and empty images, racks of all sizes, too few hosts.

    `one_group`: hosts enough for one group of k + m, and not for two.
    """
    redundancy = draw(st.sampled_from(CODES))
    width = redundancy.k + redundancy.m
    count = draw(st.integers(width, 2 * width - 1) if one_group else st.integers(1, most))
    kinds = draw(st.integers(0, count - 1))
    hosts = [HostInfo(10 * h, f"rack-{draw(st.integers(0, kinds))}" if racks else f"host-{h}") for h in range(count)]
    sizes = st.one_of(st.just(300_000), st.integers(0, 3_000_000), st.sampled_from([0, 1, 4095, 4096, 4097]))
    slots, number = [], 0
    for host in hosts:
        for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
            slots.append(SlotInfo(number, host.host, draw(sizes), draw(st.integers(-1, 2))))
            number += draw(st.integers(1, 3))
    return Case(slots, hosts, redundancy)


@st.composite
def one_slot_each(draw: st.DrawFn) -> Case:
    """One slot a host, every host its own domain, hosts enough: where m losses must be survived."""
    redundancy = draw(st.sampled_from(CODES))
    count = draw(st.integers(redundancy.k + redundancy.m, 3 * (redundancy.k + redundancy.m)))
    equal = draw(st.booleans())
    nbytes = st.just(500_000) if equal else st.integers(1, 1_000_000)
    slots = [SlotInfo(h, h, draw(nbytes)) for h in range(count)]
    return Case(slots, [HostInfo(h, f"host-{h}") for h in range(count)], redundancy)


def shards(placement: Placement, stripe: Stripe) -> list[int]:
    host_of = {slot.slot: slot.host for slot in placement.slots}
    return [host_of[chunk.slot] for chunk in stripe.data] + list(stripe.parity)


# ---- the rules --------------------------------------------------------------------------------------------


@exactly
@given(cases())
def test_every_byte_lies_in_one_data_chunk_and_chunks_begin_aligned(case: Case) -> None:
    placement = case.place()
    ranges: dict[int, list[tuple[int, int]]] = {slot.slot: [] for slot in case.slots}
    for number, stripe in enumerate(placement.stripes):
        assert stripe.number == number
        assert 1 <= len(stripe.data) <= placement.k
        assert len(stripe.parity) == placement.m
        for chunk in stripe.data:
            ranges[chunk.slot].append((chunk.start, chunk.stop))
            assert chunk.start % ALIGN == 0
            assert chunk.stop - chunk.start <= placement.chunk
    for slot in case.slots:
        end = 0
        for start, stop in sorted(ranges[slot.slot]):
            assert start == end
            end = stop
        assert end == slot.nbytes
    assert Placement.from_json(placement.to_json()) == placement


@exactly
@given(cases())
def test_a_host_has_two_shards_of_a_stripe_only_where_there_are_too_few_hosts(case: Case) -> None:
    placement = case.place()
    host_of = {slot.slot: slot.host for slot in case.slots}
    for stripe in placement.stripes:
        data = [host_of[chunk.slot] for chunk in stripe.data]
        assert len(set(data)) == len(data)
        every = Counter(shards(placement, stripe))
        if len(case.hosts) > case.redundancy.m:
            assert max(every.values()) == 1
        elif len(case.hosts) > 1:
            assert not set(data) & set(stripe.parity)


@exactly
@given(cases())
def test_no_domain_holds_more_than_m_where_the_domains_have_room_and_a_warning_says_so_elsewhere(case: Case) -> None:
    placement = case.place()
    m = case.redundancy.m
    domain_of = {host.host: host.domain for host in case.hosts}
    held = [Counter(domain_of[host] for host in shards(placement, stripe)) for stripe in placement.stripes]
    worst = max((max(count.values()) for count in held), default=0)
    width = max(1, min(case.redundancy.k, len({slot.host for slot in case.slots}), len(case.hosts) - m))
    if sum(min(m, size) for size in Counter(domain_of.values()).values()) >= width + m:
        assert worst <= m
    told = [line for line in placement.warnings if line.startswith("failure domain")]
    if worst > m:
        names = {name for count in held for name, n in count.items() if n == worst}
        assert any(told[0].startswith(f"failure domain {name} holds {worst} shards") for name in names)
        assert f"the loss of {m}:" in told[0]
        with pytest.raises(ConfigError, match="failure domain"):
            place(case.slots, case.hosts, case.redundancy, 3, strict=True)
    else:
        assert told == []
        assert place(case.slots, case.hosts, case.redundancy, 3, strict=True) == placement


@exactly
@given(cases(racks=False, most=20))
def test_parity_costs_no_more_than_the_fullest_host_and_rounding_force_it_to(case: Case) -> None:
    """The bound for a single group: m (max(fullest host, all / width) + rounding up by at most a chunk a slot)."""
    slots = [SlotInfo(slot.slot, slot.host, slot.nbytes) for slot in case.slots]
    k, m = case.redundancy.k, case.redundancy.m
    assume(slots and len(case.hosts) < 2 * (k + m))
    placement = place(slots, case.hosts, case.redundancy, 3)
    width = max(1, min(k, len({slot.host for slot in slots}), len(case.hosts) - m))
    by_host: Counter[int] = Counter()
    for slot in slots:
        by_host[slot.host] += slot.nbytes + placement.chunk
    bound = m * max(max(by_host.values()), by_host.total() / width + placement.chunk)
    assert sum(placement.parity_bytes(host.host) for host in case.hosts) <= bound
    assert placement.chunk <= math.ceil(max(slot.nbytes for slot in slots) / k) + ALIGN


@exactly
@given(st.sampled_from(CODES), st.integers(1, 4), st.data())
def test_images_within_a_quarter_of_their_mean_cost_within_a_third_of_m_over_k(
    redundancy: Redundancy, groups: int, data: st.DataObject
) -> None:
    count = groups * (redundancy.k + redundancy.m)
    sizes = data.draw(st.lists(st.integers(75_000_000, 125_000_000), min_size=count, max_size=count))
    slots = [SlotInfo(h, h, size) for h, size in enumerate(sizes)]
    placement = place(slots, [HostInfo(h, f"host-{h}") for h in range(count)], redundancy, 1)
    parity = sum(placement.parity_bytes(h) for h in range(count))
    assert parity <= 1.34 * redundancy.m / redundancy.k * sum(sizes)


@exactly
@given(cases(one_group=True))
def test_no_parity_chunk_could_move_to_a_host_with_two_less(case: Case) -> None:
    """In a single group without replica sets every move that keeps the rules is known here too."""
    slots = [SlotInfo(slot.slot, slot.host, slot.nbytes) for slot in case.slots]
    placement = place(slots, case.hosts, case.redundancy, 3)
    domain_of = {host.host: host.domain for host in case.hosts}
    load = Counter({host.host: len(placement.parity_on(host.host)) for host in case.hosts})
    encodes = Counter(stripe.parity[0] for stripe in placement.stripes)
    # Spreading a stripe thinner than m a domain is the placement's own wish: a move must not undo it.
    held = {s.number: Counter(domain_of[host] for host in shards(placement, s)) for s in placement.stripes}
    widest = max((max(count.values()) for count in held.values()), default=0)
    for stripe in placement.stripes:
        for a, b in itertools.product(stripe.parity, domain_of):
            moved = held[stripe.number] - Counter([domain_of[a]]) + Counter([domain_of[b]])
            if b not in shards(placement, stripe) and max(moved.values()) <= widest:
                assert load[b] > load[a] - 2
        assert all(encodes[b] > encodes[stripe.parity[0]] - 2 for b in stripe.parity[1:])


@exactly
@given(cases(racks=False))
def test_a_wide_replica_set_keeps_its_parity_to_itself(case: Case) -> None:
    placement = case.place()
    spans: dict[int, set[int]] = {}
    for slot in case.slots:
        spans.setdefault(slot.replicas, set()).add(slot.host)
    set_of = {slot.slot: slot.replicas for slot in case.slots}
    wide = {r for r, hosts in spans.items() if r >= 0 and len(hosts) >= case.redundancy.k + case.redundancy.m}
    for stripe in placement.stripes:
        sets = {set_of[chunk.slot] for chunk in stripe.data}
        if sets & wide:
            assert len(sets) == 1
            assert stripe.local
        shared = sets.pop() if len(sets) == 1 else -1
        assert stripe.local == (shared >= 0 and set(stripe.parity) <= spans[shared])


@exactly
@given(cases(), st.randoms(use_true_random=False))
def test_order_of_the_input_does_not_matter(case: Case, rng: object) -> None:
    slots, hosts = list(case.slots), list(case.hosts)
    rng.shuffle(slots)  # type: ignore[attr-defined]
    rng.shuffle(hosts)  # type: ignore[attr-defined]
    assert place(slots, hosts, case.redundancy, 3).digest() == case.place().digest()


# ---- what a loss leaves -----------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(one_slot_each(), st.randoms(use_true_random=False))
def test_any_m_hosts_may_be_lost_and_some_m_plus_1_may_not(case: Case, rng: object) -> None:
    placement = case.place()
    numbers, m = [host.host for host in case.hosts], case.redundancy.m
    subsets = list(itertools.combinations(numbers, m))
    if len(subsets) > 300:
        subsets = rng.sample(subsets, 300)  # type: ignore[attr-defined]
    for lost in subsets:
        assert lost_slots(placement, lost) == ()
        assert tolerance(placement, lost) >= 0
    assert tolerance(placement) == m
    for stripe in placement.stripes:
        lost = shards(placement, stripe)[: m + 1]
        assert set(lost_slots(placement, lost)) >= {c.slot for c in stripe.data} & set(lost)
        assert lost_slots(placement, lost) != ()
        assert survivable(placement, lost)[stripe.number] < 0


@settings(derandomize=True, deadline=None, max_examples=80)
@given(cases(most=9), st.sets(st.integers(0, 8).map(lambda h: 10 * h), max_size=4))
def test_survivable_is_the_most_losses_of_which_none_loses_the_stripe(case: Case, lost: set[int]) -> None:
    placement = case.place()
    alive = [host.host for host in case.hosts if host.host not in lost]
    for stripe in placement.stripes[:4]:
        every = shards(placement, stripe)

        def readable(gone: set[int], every: list[int] = every, stripe: Stripe = stripe) -> bool:
            return sum(host not in gone for host in every) >= len(stripe.data)

        said = survivable(placement, lost)[stripe.number]
        if not readable(lost):
            assert said == sum(host not in lost for host in every) - len(stripe.data) < 0
            continue
        most = 0
        while most < len(alive) and all(readable(lost | set(more)) for more in itertools.combinations(alive, most + 1)):
            most += 1
        assert said == most


@exactly
@given(cases(most=12), st.data())
def test_decodable_agrees_with_a_count_byte_by_byte(case: Case, data: st.DataObject) -> None:
    placement = case.place()
    steps = st.frozensets(st.integers(5, 7))
    held = {slot.slot: data.draw(steps) for slot in case.slots if data.draw(st.booleans())}
    parity = {
        (stripe.number, index): data.draw(steps)
        for stripe in placement.stripes
        for index in range(len(stripe.parity))
        if data.draw(st.booleans())
    }
    said = decodable(placement, held, parity)
    assert set(said) == {slot.slot for slot in case.slots}
    for slot in case.slots:
        for step in (5, 6, 7):
            possible = True
            for stripe in placement.stripes:
                if slot.slot in [chunk.slot for chunk in stripe.data] and step not in held.get(slot.slot, ()):
                    found = [c for c in stripe.data if c.slot != slot.slot and step in held.get(c.slot, ())]
                    rows = [i for i in range(placement.m) if step in parity.get((stripe.number, i), ())]
                    possible &= len(found) + len(rows) >= len(stripe.data)
            assert (step in said[slot.slot]) == possible


@exactly
@given(cases(), st.data())
def test_slots_are_lost_exactly_when_what_survives_does_not_decode_them(case: Case, data: st.DataObject) -> None:
    placement = case.place()
    lost = data.draw(st.sets(st.sampled_from([host.host for host in case.hosts]), max_size=5))
    now = frozenset({1})
    held = {slot.slot: now for slot in case.slots if slot.host not in lost}
    parity = {
        (stripe.number, index): now
        for stripe in placement.stripes
        for index, host in enumerate(stripe.parity)
        if host not in lost
    }
    possible = decodable(placement, held, parity)
    assert lost_slots(placement, lost) == tuple(slot for slot in sorted(possible) if not possible[slot])

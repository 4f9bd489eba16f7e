"""Hosts by themselves: who takes over ranks, leases and doors by a clock that the test moves, the roster as text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.launcher.hosts import BEAT_NS, PROBE_NS, SILENT_NS, Host, HostBook, Roster, assign, newest
from holdfast.proto.errors import ProtocolViolation

LEASE_NS = 6_000_000_000


def hosts(*capacities: int) -> dict[int, Host]:
    return {index: Host(index, capacity=capacity) for index, capacity in enumerate(capacities)}


# ---- who takes over -------------------------------------------------------------------------------------------


def test_a_spare_takes_all_ranks_of_a_lost_host() -> None:
    assert assign({2, 3}, {0: 0, 1: 0}, hosts(2, 2, 2), spread=True) == {2: 1, 3: 1}


def test_of_several_spares_the_one_that_fits_best_is_taken() -> None:
    assert assign({4}, {0: 0, 1: 0}, hosts(2, 4, 1), spread=True) == {4: 2}
    assert assign({4, 5}, {0: 0, 1: 0}, hosts(2, 4, 2), spread=True) == {4: 2, 5: 2}


def test_without_a_host_that_takes_all_of_them_the_room_there_is_gets_used_first() -> None:
    placed = assign({4, 5, 6}, {0: 0}, hosts(2, 2, 0), spread=True)
    assert sorted(placed.values()) == [0, 1, 1]


def test_without_room_ranks_go_where_the_least_work_is_for_what_a_host_is_meant_for() -> None:
    assert assign({6}, {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 1}, hosts(2, 4), spread=True) == {6: 0}
    assert assign({6, 7}, {0: 0, 1: 0, 2: 1, 3: 1}, hosts(2, 2), spread=True) == {6: 0, 7: 1}


def test_ranks_without_room_wait_where_they_are_not_to_be_spread() -> None:
    assert assign({2, 3}, {0: 0, 1: 0}, hosts(2), spread=False) == {}
    assert assign({2, 3}, {0: 0, 1: 0}, hosts(2, 1), spread=False) == {2: 1}


def test_without_any_host_nobody_is_placed() -> None:
    assert assign({0, 1}, {}, {}, spread=True) == {}


@given(
    st.dictionaries(st.integers(0, 6), st.integers(0, 4), min_size=1, max_size=5),
    st.sets(st.integers(0, 9), min_size=1),
    st.data(),
)
def test_spread_leaves_nobody_out_and_waiting_fills_no_host_beyond_its_room(
    capacities: dict[int, int], lost: set[int], data: st.DataObject
) -> None:
    able = {index: Host(index, capacity=capacity) for index, capacity in capacities.items()}
    holders = data.draw(st.dictionaries(st.integers(10, 20), st.sampled_from([*able, 99])))
    assert assign(lost, holders, able, spread=True).keys() == lost
    waiting = assign(lost, holders, able, spread=False)
    room = {index: max(0, host.capacity - list(holders.values()).count(index)) for index, host in able.items()}
    for index in able:
        assert list(waiting.values()).count(index) <= room[index]
    assert len(waiting) == min(len(lost), sum(room.values())), "room that is there gets used"


@given(st.dictionaries(st.integers(0, 6), st.integers(0, 4), min_size=1), st.sets(st.integers(0, 9)), st.randoms())
def test_the_order_in_which_hosts_and_ranks_are_named_does_not_matter(
    capacities: dict[int, int], lost: set[int], chance: object
) -> None:
    able = {index: Host(index, capacity=capacity) for index, capacity in capacities.items()}
    shuffled = list(able.items())
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert assign(lost, {}, able, spread=True) == assign(sorted(lost, reverse=True), {}, dict(shuffled), spread=True)


# ---- leases and doors -------------------------------------------------------------------------------------------


def book(count: int = 2) -> HostBook:
    found = HostBook(LEASE_NS)
    for index in range(count):
        assert found.hello(0, Host(index, door=f"door-{index}")) is not None
    return found


def test_a_new_host_gets_a_number_that_nobody_ever_had() -> None:
    found = book()
    found.all[1].lost = "silent"
    new = found.hello(1, Host(-1, door="new"))
    assert new is not None
    assert new.index == 2


def test_a_host_that_was_given_up_is_refused_under_its_number() -> None:
    found = book()
    found.all[1].lost = "silent"
    assert found.hello(1, Host(1, door="door-1")) is None
    assert found.all[1].lost == "silent"


def test_a_number_that_another_host_has_is_refused() -> None:
    """Two coordinators, one of them cut off, may have given the same number to two hosts."""
    found = book()
    assert found.hello(1, Host(1, door="another")) is None
    assert found.all[1].door == "door-1"
    assert found.hello(1, Host(1, door="door-1", coordinator="restarted elsewhere")) is not None


def test_a_host_counts_as_heard_while_it_is_connected_and_speaks() -> None:
    found = book()
    found.beat(BEAT_NS, 0)
    assert found.heard(BEAT_NS) == {0, 1}
    found.all[1].connected = False
    assert found.heard(BEAT_NS) == {0}
    assert found.heard(LEASE_NS) == set(), "long before its lease has run out nobody counts on it"


def test_hosts_that_fell_silent_together_do_not_vote_for_giving_up_one_another() -> None:
    """Their leases end a beat apart: the last of them to be heard is no voter when the first one's ends."""
    found = book(4)
    for index, last_ns in enumerate((LEASE_NS, LEASE_NS, 0, BEAT_NS)):
        found.beat(last_ns, index)
    now_ns = LEASE_NS + 1
    assert [host.index for host in found.expired(now_ns)] == [2]
    assert found.heard(now_ns) == {0, 1}


def test_a_lease_ends_after_it_and_not_at_it() -> None:
    found = book(1)
    assert found.expired(LEASE_NS) == []
    assert [host.index for host in found.expired(LEASE_NS + 1)] == [0]


def test_a_silent_host_is_asked_again_and_again_but_not_all_the_time() -> None:
    found = book(1)
    assert found.to_ask(SILENT_NS) == []
    assert len(found.to_ask(SILENT_NS + 1)) == 1
    assert found.to_ask(SILENT_NS + 2) == []
    assert len(found.to_ask(SILENT_NS + 1 + PROBE_NS)) == 1


def test_a_host_whose_stream_ended_is_asked_at_once() -> None:
    found = book(1)
    found.all[0].connected = False
    assert len(found.to_ask(PROBE_NS)) == 1


def test_a_host_that_was_given_up_is_neither_asked_nor_expired() -> None:
    found = book(1)
    found.all[0].lost = "gone"
    assert found.to_ask(10 * LEASE_NS) == found.expired(10 * LEASE_NS) == []
    assert found.next_tick_ns() is None


def test_only_a_proven_death_is_called_one() -> None:
    found = book()
    found.all[0].lost = "silent"
    found.all[1].lost, found.all[1].proven = "its agent is gone", True
    assert found.dead() == {1}


def test_the_next_tick_is_never_after_the_time_at_which_something_is_due() -> None:
    found = book(2)
    now_ns = ticks = asked = 0
    while now_ns <= LEASE_NS:
        due = found.next_tick_ns()
        assert due is not None
        now_ns, ticks = max(due, now_ns + 1_000_000), ticks + 1
        asked += len(found.to_ask(now_ns))
    assert found.expired(now_ns), "the lease's end is not slept through"
    assert asked >= 2 * ((LEASE_NS - SILENT_NS) // PROBE_NS - 1)
    assert ticks < 100, "a timer that rests in between"


# ---- the roster -------------------------------------------------------------------------------------------------

FULL = Roster(
    number=7,
    generation=3,
    step=41,
    members={0: (2, 0), 1: (0, 1)},
    incarnations={0: 2, 1: 1},
    hosts=(Host(0, "a", "10.0.0.1", "10.0.0.1:1"), Host(1, "b", lost="silent", proven=True)),
    placements=("{}", "x"),
)


def test_a_roster_survives_being_written_and_read() -> None:
    assert Roster.decoded(FULL.encoded()) == FULL
    assert Roster.decoded("") == Roster()


def test_the_roster_with_the_newer_generation_counts_and_then_the_later_one() -> None:
    old, later, newer = Roster(9, 2), Roster(8, 3), Roster(9, 3)
    assert newest([old, later]) is later
    assert newest([later, newer, old]) is newer
    assert newest([]) == Roster()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "7",
        '"roster"',
        "{}",
        json.dumps({**json.loads(FULL.encoded()), "members": {"0": 5}}),
        json.dumps({**json.loads(FULL.encoded()), "members": {"zero": [0, 0]}}),
        json.dumps({**json.loads(FULL.encoded()), "members": [[0, 0]]}),
        json.dumps({**json.loads(FULL.encoded()), "hosts": [{"index": 0, "rack": "x"}]}),
        json.dumps({**json.loads(FULL.encoded()), "hosts": [3]}),
        json.dumps({**json.loads(FULL.encoded()), "number": "many"}),
        json.dumps({**json.loads(FULL.encoded()), "number": None}),
        json.dumps({**json.loads(FULL.encoded()), "placements": 5}),
        json.dumps({key: value for key, value in json.loads(FULL.encoded()).items() if key != "incarnations"}),
        "[" * 100_000,
    ],
)
def test_a_roster_that_cannot_be_read_is_a_violation_and_nothing_else(text: str) -> None:
    with pytest.raises(ProtocolViolation, match="roster"):
        Roster.decoded(text)

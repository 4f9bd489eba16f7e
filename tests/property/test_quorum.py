"""Two sides that cannot hear each other never both decide; a majority that lives and hears itself always can.

`dead` is what a side has proof of. Proof is always true (a kernel refused a connection to a door), so each side's
set is drawn from those who really are dead; silence proves nothing, so those who are only cut off are in neither.
"""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from holdfast.launcher.hosts import has_quorum

HOSTS = st.integers(0, 7)
VOTERS = st.dictionaries(st.integers(0, 15), HOSTS, min_size=1, max_size=12)


@st.composite
def divisions(draw: st.DrawFn) -> tuple[dict[int, int], set[int], set[int], set[int]]:
    """Voters; two sides of living hosts that hear each other; the dead."""
    voters = draw(VOTERS)
    hosts = sorted({*voters.values(), *draw(st.sets(HOSTS))})
    where = {host: draw(st.sampled_from(("left", "right", "dead"))) for host in hosts}
    left, right, dead = ({host for host in hosts if where[host] == side} for side in ("left", "right", "dead"))
    return voters, left, right, dead


@given(divisions(), st.data())
def test_two_sides_never_both_have_a_quorum(
    division: tuple[dict[int, int], set[int], set[int], set[int]], data: st.DataObject
) -> None:
    voters, left, right, dead = division
    if set(voters.values()) <= dead:
        return  # nobody is left who could go on: whoever comes next may
    some = st.sets(st.sampled_from(sorted(dead))) if dead else st.just(set())
    hears = [data.draw(st.sets(st.sampled_from(sorted(side)))) if side else set() for side in (left, right)]
    proofs = [data.draw(some), data.draw(some)]
    both = [has_quorum(voters, heard, proof) for heard, proof in zip(hears, proofs, strict=True)]
    assert not all(both), f"{voters}: {hears} with proof of {proofs} both decide"


@given(divisions())
def test_a_majority_that_lives_and_hears_itself_has_a_quorum(
    division: tuple[dict[int, int], set[int], set[int], set[int]],
) -> None:
    voters, left, _, dead = division
    votes = [rank for rank, host in voters.items() if host in left]
    if 2 * len(votes) > len(voters):
        assert has_quorum(voters, left, set())
        assert has_quorum(voters, left, dead)


@given(divisions())
def test_proof_of_a_death_never_takes_a_quorum_away(
    division: tuple[dict[int, int], set[int], set[int], set[int]],
) -> None:
    voters, left, _, dead = division
    if has_quorum(voters, left, set()) and voters[min(voters)] not in dead:
        assert has_quorum(voters, left, dead)


@given(VOTERS, st.sets(HOSTS))
def test_hosts_without_ranks_have_no_say(voters: dict[int, int], heard: set[int]) -> None:
    strangers = {8, 9}
    assert has_quorum(voters, heard | strangers, strangers) == has_quorum(voters, heard, set())


def test_of_two_halves_the_one_with_the_lowest_rank_goes_on() -> None:
    voters = {0: 0, 1: 0, 2: 1, 3: 1}
    assert has_quorum(voters, {0}, set())
    assert not has_quorum(voters, {1}, set())
    assert has_quorum(voters, {1}, {0}), "the other half is proven dead"


def test_against_every_small_job_by_counting() -> None:
    """A slow reference: votes by hand, over all placements of four ranks on three hosts."""
    for hosts in itertools.product(range(3), repeat=4):
        voters = dict(enumerate(hosts))
        for heard in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
            for dead in itertools.chain.from_iterable(
                itertools.combinations(set(range(3)) - set(heard), n) for n in range(3)
            ):
                ayes = [rank for rank, host in voters.items() if host in heard]
                all_votes = [rank for rank, host in voters.items() if host not in dead]
                tie = 2 * len(ayes) == len(all_votes)
                expected = all_votes == [] or (min(all_votes) in ayes if tie else 2 * len(ayes) > len(all_votes))
                assert has_quorum(voters, heard, dead) == expected, (voters, heard, dead)

"""Whose say counts: rules of elections and of what may stand, one by one; whole histories are in sim/test_hosts.py."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from holdfast.launcher.council import Ask, Council, Elected, Election, Try, councils, may_elect
from holdfast.launcher.hosts import FIRST, Host, Roster, Term, has_quorum

THREE = {0: 0, 1: 1, 2: 2}


@dataclass
class Agent:
    """One that asks."""

    told: Host
    roster: Roster
    promised: Term = FIRST
    asked: Term = FIRST


def hosts(count: int, *, proven: tuple[int, ...] = ()) -> tuple[Host, ...]:
    return tuple(Host(index, door=f"door-{index}", proven=index in proven) for index in range(count))


def roster(count: int = 3, **more: object) -> Roster:
    members = {rank: (0, rank) for rank in range(count)}
    given = {"number": 5, "generation": 2, "members": members, "hosts": hosts(count), **more}
    return Roster(**given)  # type: ignore[arg-type]


def agents(*indices: int, known: Roster | None = None, fenced: tuple[int, ...] = ()) -> list[Agent]:
    """`fenced`: they ended their ranks, and have no number any more."""
    known = known or roster()
    return [Agent(Host(-1 if index in fenced else index, door=f"door-{index}"), known) for index in indices]


# ---- who may be put in charge -----------------------------------------------------------------------------------


def test_hosts_that_ended_their_ranks_vote_under_the_numbers_that_they_had() -> None:
    assert may_elect(THREE, {0}, {1}, ())
    assert may_elect(THREE, (), {1, 2}, ()), "all of them: a network that was gone everywhere"


def test_hosts_that_ended_their_ranks_cannot_speak_for_the_dead() -> None:
    """{0, 1} may have given up 2, gone on, and died: what they did nobody here would know."""
    assert has_quorum(THREE, {2}, {0, 1})
    assert may_elect(THREE, {2}, (), {0, 1}), "that one never missed a thing"
    assert not may_elect(THREE, (), {2}, {0, 1})
    assert may_elect(THREE, (), {1, 2}, {0}), "of all three most are here, and one of them would know"


@given(
    st.dictionaries(st.integers(0, 7), st.integers(0, 5), min_size=1),
    st.sets(st.integers(0, 5)),
    st.sets(st.integers(0, 5)),
    st.data(),
)
def test_whoever_learnt_of_new_members_is_asked_by_everybody_who_may_elect(
    voters: dict[int, int], learnt: set[int], asking: set[int], data: st.DataObject
) -> None:
    """`learnt`: all that lived and were not given up then; who was given up had ended its ranks by then."""
    dead_then = data.draw(st.sets(st.integers(0, 5))) - learnt - asking
    given_up = set(voters.values()) - learnt - dead_then
    if not has_quorum(voters, learnt, dead_then):
        return
    dead_now = dead_then | data.draw(st.sets(st.sampled_from(sorted(learnt)))) if learnt else dead_then
    here = asking - dead_now
    former = here & given_up
    if may_elect(voters, here - former, former, dead_now) and set(voters.values()) - dead_now:
        assert here & learnt, f"{here} (ended their ranks: {former}) elect and know nothing of what {learnt} learnt"


def test_before_the_first_generation_nobody_is_elected() -> None:
    assert Election("c").next(agents(0, 1, 2, known=Roster(number=1, hosts=hosts(3)))) == Try()
    assert councils(Roster()) == ()


def test_who_is_missing_is_asked_for_at_its_door_and_refusal_makes_up_for_it() -> None:
    election = Election("c")
    wanted = election.next(agents(2))
    assert isinstance(wanted, Try)
    assert [host.index for host in wanted.hosts] == [0, 1]
    election.dead = {0, 1}
    assert isinstance(election.next(agents(2)), Ask)


def test_a_quorum_is_not_enough_until_it_has_promised() -> None:
    election, asking = Election("c"), agents(1, 2)
    assert election.next(asking) == Ask(Term(1, "c"), (0, 1))
    asking[0].promised = asking[0].asked = asking[1].asked = Term(1, "c")
    assert election.next(asking) == Ask(Term(1, "c"), ()), "asked already"
    asking[1].promised = Term(1, "c")
    assert election.next(asking) == Elected(Term(1, "c"), asking[0].roster)


def test_a_term_is_later_than_all_that_were_promised_to_others() -> None:
    election, asking = Election("a"), agents(1, 2)
    asking[0].promised = Term(7, "b")
    assert election.next(asking) == Ask(Term(8, "a"), (0, 1))
    asking[1].promised = Term(8, "z")  # it came here from z meanwhile: who promised us may count for z too
    assert election.next(asking) == Ask(Term(9, "a"), (0, 1))
    assert Election("a").next(agents(1, 2, known=roster(term=Term(4, "x")))) == Ask(Term(5, "a"), (0, 1))


def test_the_newest_roster_of_those_who_ask_counts_and_its_members_must_agree() -> None:
    moved = roster(number=9, generation=3, members={0: (1, 2), 1: (0, 1), 2: (0, 2)})
    asking = [*agents(1), *agents(0, known=moved)]
    assert isinstance(Election("c").next(asking[:1] + agents(0)), Ask)
    wanted = Election("c").next(asking)
    assert isinstance(wanted, Try), "host 2 has two ranks now, 0 none"
    assert [host.index for host in wanted.hosts] == [2]


def test_while_new_members_may_not_stand_yet_those_before_them_must_agree_too() -> None:
    """{0, 6, 7} is half of the new members, with the lowest rank; {1, 2, 3} are most of those before them."""
    before = {rank: rank for rank in range(6)}
    members = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (0, 3), 4: (1, 6), 5: (1, 7)}
    new = roster(8, members=members, hosts=hosts(8, proven=(4, 5)), before=(before,))
    old = roster(6, hosts=hosts(8, proven=(4, 5)))
    assert isinstance(Election("c").next(agents(0, 6, 7, known=new)), Try)
    assert isinstance(Election("c").next(agents(1, 2, 3, known=old)), Ask)
    assert isinstance(Election("c").next(agents(0, 1, 2, 6, known=new)), Ask)


def test_an_agent_is_known_by_its_door_whatever_number_another_coordinator_gave_it() -> None:
    """Two coordinators gave the number 1 to two hosts: who stands behind it here says the roster."""
    stranger = Agent(Host(1, door="another"), roster())
    assert isinstance(Election("c").next([*agents(0), stranger]), Try)
    assert isinstance(Election("c").next([*agents(0), *agents(1, fenced=(1,))]), Ask)


# ---- when new members stand -------------------------------------------------------------------------------------


def proposal() -> Council:
    council = Council(standing=(THREE,))
    council.propose({0: 0, 1: 1, 2: 4}, 7)
    return council


def test_new_members_stand_when_all_that_live_know_of_them_those_before_included() -> None:
    council = proposal()
    council.learnt = {0: 7, 1: 6, 4: 8}
    assert council.missing({0, 1, 2, 4}) == {1, 2}
    council.learnt[1] = 9
    assert council.missing({0, 1, 4}) == set(), "host 2 was given up"
    assert council.is_learnt({0, 1, 4}, council.knowing(), ())
    council.settle()
    assert (council.standing, council.proposed, council.before) == (({0: 0, 1: 1, 2: 4},), None, ())


def test_what_a_minority_knows_does_not_stand_whoever_was_given_up() -> None:
    council = proposal()
    council.learnt = {0: 7, 4: 7}
    assert council.missing({0, 4}) == set()
    assert not council.is_learnt({0, 4}, {0, 4}, ())
    assert council.is_learnt({0, 4}, {0, 4}, {1, 2})


def test_what_was_proposed_and_given_up_has_no_say() -> None:
    council = proposal()
    assert council.newest == {0: 0, 1: 1, 2: 4}
    assert council.before == (THREE,)
    council.withdraw()
    assert (council.newest, council.before) == (THREE, ())
    assert council.decides({0, 1}, ())
    assert not council.decides({0, 4}, ())


def test_the_first_members_have_a_say_from_the_moment_they_are_told() -> None:
    council = Council()
    assert council.decides((), ()), "nobody else may"
    council.propose(THREE, 1)
    assert not council.decides({2}, ())
    assert council.before == ()

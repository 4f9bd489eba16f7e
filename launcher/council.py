"""Whose say counts: who may be put in charge, and when what was decided stands. Pure.

    agents ask a standby ─▶ Election: a quorum ─▶ promise(term)? ─▶ a quorum promised ─▶ in charge, from their roster
    in charge: new members ─▶ Council: roster told ─▶ learnt by all that live, a quorum ─▶ Form

The roster is the only record of the job that outlives a coordinator, and agents are the only ones who keep it. So a
coordinator is elected by hosts of the newest roster that any of them knows, and ranks act on other members (hosts,
placement) only once whoever could elect the next coordinator knows of them; until then both the memberships before
and the new one must agree to anything. Memory is all that an agent has: with it dies what it learnt and promised.
That is why all who live must learn a roster, not just most, and why a host that ended its ranks (it may have missed
something, and those who could tell may be dead) has a full vote but cannot speak for the dead. Invariants:

* an agent that promised a term follows no coordinator of an older one, so two of them cannot both be learnt from;
* every quorum that can elect knows the members that ranks act on, or is one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from .hosts import Host, Roster, Term, has_quorum, newest

Voters = Mapping[int, int]
"""Rank -> number of its host."""


def may_elect(voters: Voters, here: Collection[int], former: Collection[int], dead: Collection[int]) -> bool:
    """Whether a coordinator may begin with those who ask for one.

    `here`: hosts under the numbers that they have; `former`: under numbers that they gave up with their ranks.
    """
    heard = {*here, *former}
    if not has_quorum(voters, heard, dead):
        return False
    # Others may have given up whoever ended its ranks, and gone on, and died: then only most of all know of it.
    return not set(voters.values()).isdisjoint(here) or has_quorum(voters, heard, ())


def councils(roster: Roster) -> tuple[Voters, ...]:
    """Memberships of which each must agree, the newest last."""
    members = {rank: host for rank, (_, host) in roster.members.items()}
    return (*roster.before, members) if members else ()


@dataclass(slots=True)
class Council:
    """The memberships that have a say in a job that is led."""

    standing: tuple[Voters, ...] = ()
    proposed: Voters | None = None
    since: int = 0  # number of the roster that proposed it
    learnt: dict[int, int] = field(default_factory=dict)  # host -> number of the newest roster that its agent has

    @property
    def newest(self) -> Voters:
        """Rank -> host, of the members as they are told."""
        if self.proposed is not None:
            return self.proposed
        return self.standing[-1] if self.standing else {}

    @property
    def before(self) -> tuple[Voters, ...]:
        """What is told beside it."""
        return tuple(voters for voters in self.standing if voters != self.newest)

    def propose(self, voters: Voters, number: int) -> None:
        """The roster `number` is the first to tell of these members."""
        self.proposed, self.since = voters, number
        # The first of all: whoever is told may elect by it from then on, so it has a say from then on.
        self.standing = self.standing or (voters,)

    def withdraw(self) -> None:
        """Nobody acted on what was proposed, and nobody will."""
        self.proposed = None

    def decides(self, heard: Collection[int], dead: Collection[int]) -> bool:
        """Whether those who are heard may decide anything for the job."""
        return all(has_quorum(voters, heard, dead) for voters in self.standing)

    def missing(self, live: Collection[int]) -> set[int]:
        """Hosts, of those not given up, whose agents do not know yet of what is proposed."""
        assert self.proposed is not None
        concerned = {host for voters in (*self.standing, self.proposed) for host in voters.values()}
        return {host for host in concerned.intersection(live) if self.learnt.get(host, -1) < self.since}

    def is_learnt(self, live: Collection[int], know: Collection[int], dead: Collection[int]) -> bool:
        """Whether what is proposed may stand. `know`: all numbers of the agents that have learnt it."""
        assert self.proposed is not None
        sides = (*self.standing, self.proposed)
        return not self.missing(live) and all(has_quorum(voters, know, dead) for voters in sides)

    def knowing(self) -> set[int]:
        """Hosts whose agents have learnt what is proposed."""
        return {host for host, number in self.learnt.items() if number >= self.since}

    def settle(self) -> None:
        """It stands, alone."""
        assert self.proposed is not None
        self.standing, self.proposed = (self.proposed,), None


class Asking(Protocol):
    """An agent that asks a coordinator which is not in charge."""

    told: Host
    roster: Roster
    promised: Term
    asked: Term


Who = TypeVar("Who", bound=Asking)


@dataclass(frozen=True, slots=True)
class Try:
    """Somebody is missing: the doors of these hosts may refuse."""

    hosts: tuple[Host, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """These may decide: have them promise that they follow no older coordinator."""

    term: Term
    indices: tuple[int, ...]  # in the order of those who ask


@dataclass(frozen=True, slots=True)
class Elected:
    """They did."""

    term: Term
    roster: Roster


class Election:
    """Of a coordinator at `leader`, until it is in charge."""

    def __init__(self, leader: str = "") -> None:
        self.leader = leader
        self.term: Term | None = None  # what is asked for
        self.dead: set[int] = set()  # numbers whose door refused

    def next(self, asking: Sequence[Asking]) -> Try | Ask | Elected:
        """What to do with those who ask now."""
        roster = newest(one.roster for one in asking)
        if not roster.members:
            return Try()  # before the first generation only the first coordinator may decide
        if not self._may(roster, asking):
            known = self._known(roster, asking)
            return Try(tuple(host for host in roster.hosts if host.index not in known))
        highest = max(roster.term, *(one.promised for one in asking))
        if self.term is None or highest > self.term:
            self.term = Term(highest.number + 1, self.leader)
        if self._may(roster, [one for one in asking if one.promised == self.term]):
            return Elected(self.term, roster)
        return Ask(self.term, tuple(i for i, one in enumerate(asking) if one.asked < self.term))

    def _may(self, roster: Roster, asking: Iterable[Asking]) -> bool:
        here, former = _numbers(roster, asking)
        dead = self._dead(roster) - here - former
        return all(may_elect(voters, here, former, dead) for voters in councils(roster))

    def _known(self, roster: Roster, asking: Iterable[Asking]) -> set[int]:
        here, former = _numbers(roster, asking)
        return here | former | self._dead(roster)

    def _dead(self, roster: Roster) -> set[int]:
        doors = {host.door for host in roster.hosts if host.proven or host.index in self.dead} - {""}
        return self.dead | {host.index for host in roster.hosts if host.proven or host.door in doors}


def _numbers(roster: Roster, asking: Iterable[Asking]) -> tuple[set[int], set[int]]:
    """Numbers that these agents have, and those that they had before, as far as the roster knows their doors."""
    asking = list(asking)
    now = {(one.told.index, one.told.door) for one in asking}
    doors = {one.told.door for one in asking} - {""}
    here = {host.index for host in roster.hosts if (host.index, host.door) in now}
    return here, {host.index for host in roster.hosts if host.door in doors} - here

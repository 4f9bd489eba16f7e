"""Hosts of a job: who is reachable, who is given up, who takes over the ranks of a lost one. Pure.

    hello, beat ──▶ heard          stream ends or falls silent ──▶ Probe its door ──▶ refused: its agent is dead
                                                                                 └──▶ else: lost when its lease ends

A *door* is a listening socket that the agent keeps open as long as it lives. If the kernel of a host refuses a
connection to it, the agent is dead, and its ranks with it (they hold its lifeline): that is proof. Silence is
none: the host may be cut off and still computing. It is given up when its lease has run out, which it counts
itself from the last word of a coordinator, and ends its ranks by then. Invariants:

* a number is never given to a second host, and a host that was given up has no ranks under it any more;
* a door is an agent's own as long as it lives: by it an agent is known again, whatever number it has now;
* of two sides that cannot hear each other at most one has a quorum.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from holdfast.proto.errors import ProtocolViolation

BEAT_NS = 250_000_000
"""How often agent and coordinator say that they are there."""
SILENT_NS = 4 * BEAT_NS
"""A host that said nothing for so long is asked."""
PROBE_NS = 250_000_000


class Term(NamedTuple):
    """One coordinator's time in charge. Later ones are larger; the first coordinator's is the smallest."""

    number: int = 0
    leader: str = ""


FIRST: Final = Term()


@dataclass(slots=True)
class Host:
    """One host of the job, as its agent described it."""

    index: int
    name: str = ""
    address: str = ""
    door: str = ""
    coordinator: str = ""
    protector: str = ""
    capacity: int = 1
    domain: str = ""
    connected: bool = False
    heard_ns: int = 0
    asked_ns: int = 0
    lost: str = ""  # why it was given up
    proven: bool = False  # its agent's death is certain


@dataclass(frozen=True, slots=True)
class Roster:
    """What every agent knows, so that any of them can start the next coordinator."""

    number: int = 0
    generation: int = 0
    step: int = -1
    members: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # rank -> incarnation, host
    incarnations: Mapping[int, int] = field(default_factory=dict)
    holders: Mapping[int, int] = field(default_factory=dict)  # rank -> host that has it, or was given it
    hosts: tuple[Host, ...] = ()
    placements: tuple[str, ...] = ()  # JSON, oldest first
    before: tuple[Mapping[int, int], ...] = ()  # rank -> host: memberships that may be in force instead of `members`
    term: Term = FIRST  # of the coordinator that tells it

    def encoded(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def decoded(text: str) -> Roster:
        """From JSON; an empty text is the empty roster. Raises ProtocolViolation."""
        if not text:
            return Roster()
        try:
            value: dict[str, Any] = json.loads(text)
            members = {int(rank): (int(pair[0]), int(pair[1])) for rank, pair in value["members"].items()}
            incarnations = {int(rank): int(number) for rank, number in value["incarnations"].items()}
            holders = {int(rank): int(host) for rank, host in value["holders"].items()}
            hosts = tuple(Host(**host) for host in value["hosts"])
            numbers = int(value["number"]), int(value["generation"]), int(value["step"])
            placements = tuple(map(str, value["placements"]))
            before = tuple({int(rank): int(host) for rank, host in one.items()} for one in value["before"])
            term = Term(int(value["term"][0]), str(value["term"][1]))
            return Roster(*numbers, members, incarnations, holders, hosts, placements, before, term)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ProtocolViolation(f"a roster that cannot be read: {error}") from None


def newest(rosters: Iterable[Roster]) -> Roster:
    """The one that counts: of the latest coordinator, and of that one's the last."""
    return max(rosters, key=lambda roster: (roster.term, roster.generation, roster.number), default=Roster())


def has_quorum(voters: Mapping[int, int], heard: Collection[int], dead: Collection[int]) -> bool:
    """Whether those who are heard may decide for the job.

    `voters`: rank -> host of the last generation's members. Hosts that are proven dead cannot decide anything
    elsewhere and do not count. Of the others more than half must be heard; exactly half is enough for the
    side that has the lowest rank.
    """
    counted = {rank: host for rank, host in voters.items() if host not in dead}
    heard_ranks = {rank for rank, host in counted.items() if host in heard}
    if 2 * len(heard_ranks) == len(counted):
        return not counted or min(counted) in heard_ranks
    return 2 * len(heard_ranks) > len(counted)


def assign(
    lost: Collection[int], holders: Mapping[int, int], hosts: Mapping[int, Host], *, spread: bool
) -> dict[int, int]:
    """Rank -> host for the ranks of lost hosts; ranks without a place are left out.

    `holders`: rank -> host of all other ranks. A host with room for all of them comes first (a spare, or one that
    came back), then hosts with any room; then, if `spread`, whoever has the least work for its capacity.
    """
    load = {index: 0 for index in hosts}
    for host in holders.values():
        if host in load:
            load[host] += 1
    placed: dict[int, int] = {}
    for rank in sorted(lost):
        room = {index: host.capacity - load[index] for index, host in hosts.items()}
        left = len(lost) - len(placed)
        free = [index for index in sorted(hosts) if room[index] > 0]
        fitting = [index for index in free if room[index] >= left]
        if fitting:
            chosen = min(fitting, key=lambda index: (room[index], index))
        elif free:
            chosen = max(free, key=lambda index: (room[index], -index))
        elif spread and hosts:
            chosen = min(hosts, key=lambda index: (load[index] / max(1, hosts[index].capacity), index))
        else:
            continue
        placed[rank] = chosen
        load[chosen] += 1
    return placed


class HostBook:
    """All hosts that ever said hello, and their leases."""

    def __init__(self, lease_ns: int, hosts: Iterable[Host] = ()) -> None:
        self.lease_ns = lease_ns
        self.all: dict[int, Host] = {host.index: host for host in hosts}

    def live(self) -> dict[int, Host]:
        """Hosts that are not given up."""
        return {index: host for index, host in self.all.items() if not host.lost}

    def same(self, indices: Collection[int]) -> set[int]:
        """These numbers, and all that their agents had before or have now."""
        doors = {self.all[index].door for index in indices if index in self.all} - {""}
        return {*indices, *(index for index, host in self.all.items() if host.door in doors)}

    def heard(self, now_ns: int) -> set[int]:
        """Numbers of agents that are connected and spoke lately: well before a lease would run out."""
        here = {i for i, h in self.live().items() if h.connected and now_ns - h.heard_ns <= self.lease_ns // 2}
        return self.same(here)

    def dead(self) -> set[int]:
        """Numbers of agents whose death is certain."""
        return self.same({index for index, host in self.all.items() if host.proven})

    def gone(self) -> dict[int, str]:
        """Hosts that can be given up at once, and why: their ranks have ended for certain."""
        newest = {host.door: index for index, host in sorted(self.all.items()) if host.connected and host.door}
        found = {index: "its agent is gone" for index, host in self.live().items() if host.proven}
        for index, host in self.live().items():
            if index < newest.get(host.door, -1):
                found[index] = "it ended its ranks itself"
        return found

    def protectors(self) -> dict[int, str]:
        """Where to ask for what a host keeps, by every number that it is known under."""
        doors = {host.door: host.protector for host in self.live().values() if host.door and host.protector}
        now = {index: host.protector for index, host in self.live().items() if host.protector}
        return {index: doors[host.door] for index, host in self.all.items() if host.door in doors} | now

    def hello(self, now_ns: int, told: Host) -> Host | None:
        """An agent introduces itself; None if that number was given up, or is another's. A new one gets the next."""
        index = told.index if told.index >= 0 else max(self.all, default=-1) + 1
        known = self.all.get(index)
        if known is not None and (known.lost or known.door != told.door):
            return None  # a door is an agent's own as long as it lives
        told.index, told.connected, told.heard_ns = index, True, now_ns
        self.all[index] = told
        return told

    def beat(self, now_ns: int, index: int) -> None:
        """Its agent said something."""
        if index in self.all:
            self.all[index].heard_ns = now_ns

    def to_ask(self, now_ns: int) -> list[Host]:
        """Hosts whose door should be tried now."""
        due = []
        for host in self.live().values():
            silent = not host.connected or now_ns - host.heard_ns > SILENT_NS
            if silent and now_ns - host.asked_ns >= PROBE_NS:
                host.asked_ns = now_ns
                due.append(host)
        return due

    def expired(self, now_ns: int) -> list[Host]:
        """Hosts whose lease has run out."""
        return [host for host in self.live().values() if now_ns - host.heard_ns > self.lease_ns]

    def next_tick_ns(self) -> int | None:
        """When something may be due by itself."""
        dues = []
        for host in self.live().values():
            since = host.heard_ns + SILENT_NS if host.connected else host.heard_ns
            dues.append(min(max(since, host.asked_ns + PROBE_NS), host.heard_ns + self.lease_ns + 1))
        return min(dues, default=None)

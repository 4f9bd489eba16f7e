"""Hosts cut into groups, among which stripes are then placed. Pure.

    hosts 0..11, 4+2  ──▶  {0, 2, 4, 6, 8, 10}, {1, 3, 5, 7, 9, 11}      each with the slots there whose data they are

Groups are about as small as the code allows: each set of hosts that share a stripe is one more set whose loss loses
state. What is told here of stages keeps hosts of adjacent ones in different groups (placement.py says what for).
Invariants: a group has k+m hosts and k holders of data while there are so many; each domain is spread evenly over
groups; the same inputs in any order give the same groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .redundancy import HostInfo, Redundancy, SlotInfo, chunk_count, replica_sets


@dataclass(frozen=True)
class Group:
    """Hosts among which stripes are placed, and the slots there whose data they are."""

    hosts: tuple[HostInfo, ...]
    slots: tuple[SlotInfo, ...]
    k: int
    m: int
    domains: Mapping[str, int] = field(init=False)
    width: int = field(init=False)
    """Data chunks a stripe: k, or what leaves room for m more shards on hosts of their own."""
    cap_least: int = field(init=False)
    """Fewest shards a domain that leave room for width + m of them."""

    def __post_init__(self) -> None:
        domains = Counter(host.domain for host in self.hosts)
        holders = len({slot.host for slot in self.slots})
        width = max(1, min(self.k, holders, len(self.hosts) - self.m))
        fullest = max(domains.values())
        fits = (t for t in range(1, fullest) if sum(min(t, size) for size in domains.values()) >= width + self.m)
        object.__setattr__(self, "domains", domains)
        object.__setattr__(self, "width", width)
        object.__setattr__(self, "cap_least", next(fits, fullest))

    def shape(self, chunk: int) -> tuple[int, int]:
        """Stripes, and shards a domain: as few as cost no stripe more than m would; memory first, then spread."""
        domain_of = {host.host: host.domain for host in self.hosts}
        by_host: Counter[int] = Counter()
        for slot in self.slots:
            by_host[slot.host] += chunk_count(slot.nbytes, chunk)
        by_domain: Counter[str] = Counter()
        for host, count in by_host.items():
            by_domain[domain_of[host]] += count
        least = max(max(by_host.values()), -(-by_host.total() // self.width))

        def stripes(cap: int) -> int:
            return max(least, *(-(-count // min(cap, self.domains[name])) for name, count in by_domain.items()))

        most = max(self.cap_least, self.m)
        goal = stripes(most)
        return goal, next(cap for cap in range(self.cap_least, most + 1) if stripes(cap) == goal)


def parts(
    slots: Sequence[SlotInfo], hosts: Sequence[HostInfo], redundancy: Redundancy, beside: Beside
) -> Iterator[list[Group]]:
    """Replica sets wide enough to keep their own parity, each by itself; then all other slots, over all hosts.

    The domain rule comes before the saved traffic: a set that breaks it alone goes to the others.
    """
    sets = replica_sets(tuple(slots))
    rest: list[SlotInfo] = [slot for slot in slots if slot.replicas < 0]
    for replicas in sorted(sets):
        members = [slot for slot in slots if slot.replicas == replicas]
        if len(sets[replicas]) >= redundancy.k + redundancy.m:
            part = _cut(members, [host for host in hosts if host.host in sets[replicas]], redundancy, beside)
            if all(group.cap_least <= redundancy.m for group in part):
                yield part
                continue
        rest += members
    if rest:
        yield _cut(sorted(rest, key=lambda slot: slot.slot), hosts, redundancy, beside)


def _cut(slots: Sequence[SlotInfo], hosts: Sequence[HostInfo], redundancy: Redundancy, beside: Beside) -> list[Group]:
    """Groups of at least k+m hosts and k holders of data: as many as keep the domain rule, or break it least."""
    by_host: dict[int, list[SlotInfo]] = {}
    for slot in slots:
        by_host.setdefault(slot.host, []).append(slot)
    most = max(1, min(len(hosts) // (redundancy.k + redundancy.m), len(by_host) // redundancy.k))
    best: list[Group] = []
    worst = 0
    for count in range(most, 0, -1):
        part = [
            Group(
                tuple(members),
                tuple(slot for host in members for slot in by_host.get(host.host, ())),
                redundancy.k,
                redundancy.m,
            )
            for members in _apart(_deal(hosts, by_host.keys(), count, beside), by_host.keys(), beside)
        ]
        cap = max(redundancy.m, *(group.cap_least for group in part))
        if not best or cap < worst:
            best, worst = part, cap
        if cap == redundancy.m:
            break
    return best


def _deal(hosts: Sequence[HostInfo], holders: Collection[int], count: int, beside: Beside) -> list[list[HostInfo]]:
    """Hosts to `count` groups: sizes differ by one, the last are the larger; each domain is spread evenly.

    Of a domain, and of domains of one host each, hosts with neighbouring stages are dealt one after another.
    """
    sizes = Counter(host.domain for host in hosts)
    stage = {host: i for i, host in enumerate(beside)}

    def order(host: HostInfo) -> tuple[int, str, int, int]:
        alone = bool(stage) and sizes[host.domain] == 1
        return -sizes[host.domain], "" if alone else host.domain, stage.get(host.host, 0), host.host

    groups: list[list[HostInfo]] = [[] for _ in range(count)]
    with_data = [host for host in hosts if host.host in holders]
    for i, host in enumerate(sorted(with_data, key=order)):
        groups[count - 1 - i % count].append(host)
    for host in sorted(hosts, key=order):
        if host.host not in holders:
            there = [sum(other.domain == host.domain for other in group) for group in groups]
            groups[min(range(count), key=lambda g: (len(groups[g]), there[g], -g))].append(host)
    return groups


Beside = Mapping[int, frozenset[int]]
"""Host, in the order of their stages -> hosts with a stage next to one of its own."""


def stages_beside(slots: Sequence[SlotInfo], stages: Mapping[int, int]) -> Beside:
    """Which hosts have adjacent stages; `stages`: slot -> stage, of those whose stage is known."""
    hosts_of: dict[int, set[int]] = {}
    for slot in slots:
        if slot.slot in stages:
            hosts_of.setdefault(stages[slot.slot], set()).add(slot.host)
    found: dict[int, set[int]] = {}
    for stage in sorted(hosts_of):
        for host in sorted(hosts_of[stage]):
            near = hosts_of.get(stage - 1, set()) | hosts_of.get(stage + 1, set())
            found.setdefault(host, set()).update(near - {host})
    return {host: frozenset(near) for host, near in found.items()}


def _apart(groups: list[list[HostInfo]], holders: Collection[int], beside: Beside) -> list[list[HostInfo]]:
    """The same groups after trades of two hosts, as long as one leaves fewer hosts of adjacent stages together.

    Both of a trade hold data or neither does, and no group gets more of a domain for it. Each trade lowers the count of
    such pairs: this ends.
    """

    def close(group: Sequence[HostInfo], to: HostInfo) -> int:
        return sum(other.host in beside.get(to.host, ()) for other in group if other is not to)

    def same(group: Sequence[HostInfo], as_: HostInfo) -> int:
        return sum(other.domain == as_.domain for other in group if other is not as_)

    def gain(a: HostInfo, of: Sequence[HostInfo], b: HostInfo, other: Sequence[HostInfo]) -> int:
        """Pairs that the trade of `a` for `b` takes apart; 0 if it must not be."""
        left, right = [h for h in of if h is not a], [h for h in other if h is not b]
        clumps = same(left, b) - same(left, a) + same(right, a) - same(right, b)
        if clumps > 0 or (a.host in holders) != (b.host in holders):
            return 0
        return close(left, a) + close(right, b) - close(left, b) - close(right, a)

    traded = bool(beside)
    while traded:
        traded = False
        for of in groups:
            for i, a in enumerate(of):
                if not close(of, a):
                    continue
                offers = [
                    (gain(a, of, b, other), -g, -j)
                    for g, other in enumerate(groups)
                    if other is not of
                    for j, b in enumerate(other)
                ]
                most, g, j = max(offers, default=(0, 0, 0))
                if most > 0:
                    of[i], groups[-g][-j] = groups[-g][-j], a
                    traded = True
    return groups

"""Where each stripe's data and parity lie, and what a loss of hosts leaves of them. Pure.

    host      0     1     2     3        2+2, one equal slot a host: 4 stripes, each host in all of them,
    stripe 0  d     P     d     p        2 of its shards data and 2 parity, encoder (P) of one
    stripe 1  d     p     d     P
    stripe 2  P     d     p     d        hosts >= 2 (k+m): cut into groups of about k+m, each by itself
    stripe 3  p     d     P     d

Data are dealt like cards, so that no host meets itself (stripes.py); here is decided among which hosts, and in how many
stripes: as many as the fullest host has chunks, or as all chunks / k, or as a domain's chunks / m, whichever is most.
Fewer would break a rule. Groups, because each set of hosts that share a stripe is one more set whose loss loses state:
16 of them for 6+2 on 128 hosts, 128 if stripes went over hosts drawn at random, and then three losses are eight
times as often fatal (docs/REDUNDANCY.md). Does not move a byte, and does not know who is alive. Invariants:

* every byte of every image lies in one data chunk; a stripe's data are of distinct slots on distinct hosts;
* a stripe has no two shards on one host while there are k+m hosts (with fewer, stripes are shorter);
* and none of its domains holds more than m shards while the domains have room for k+m; else a warning says so;
* the same inputs in any order give the same placement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast.proto.errors import ConfigError

from .redundancy import (
    DOMAIN_CHARS_MAX,
    HOSTS_MAX,
    NONE,
    NUMBER_MAX,
    SHARDS_MAX,
    SLOTS_MAX,
    Chunk,
    HostInfo,
    Placement,
    Redundancy,
    SlotInfo,
    Stripe,
    chunk_count,
    make_stripe,
    replica_sets,
)
from .stripes import Row, fill

__all__ = [
    "NONE",
    "SHARDS_MAX",
    "Chunk",
    "HostInfo",
    "Placement",
    "Redundancy",
    "SlotInfo",
    "Stripe",
    "decodable",
    "lost_slots",
    "place",
    "survivable",
    "tolerance",
]

_CUTS_LEAST: Final = 16
"""Chunk sizes tried are max image / (k q) with k q up to about this, and q up to 4 at least."""


def place(
    slots: Iterable[SlotInfo],
    hosts: Iterable[HostInfo],
    redundancy: Redundancy,
    number: int,
    *,
    align: int = 4096,
    strict: bool = False,
    stages: Mapping[int, int] | None = None,
) -> Placement:
    """The layout of parity for these slots. `strict`: a domain with more than m shards is an error, not a warning.

    `stages` (slot -> pipeline stage): hosts of adjacent stages share no stripe where that can be had and costs neither
    memory nor domains. A lost stage can be made up for by its neighbours, but not both of two that are lost together.
    """
    ordered = tuple(sorted(slots, key=lambda slot: slot.slot))
    machines = tuple(sorted(hosts, key=lambda host: host.host))
    _check(ordered, machines, number, align)
    k, m = redundancy.k, redundancy.m
    if redundancy == NONE or not ordered:
        return Placement(number, k, m, align, (), ordered, machines, ())
    beside = _beside(ordered, stages or {})
    groups = [group for part in _parts(ordered, machines, redundancy, beside) for group in part]
    chunk = _chunk_bytes(groups, max(slot.nbytes for slot in ordered), align)
    load: Counter[int] = Counter()
    duties: Counter[int] = Counter()
    rows = [row for g in groups for row in fill(g.hosts, g.slots, redundancy, chunk, g.shape(chunk), load, duties)]
    sets = replica_sets(ordered)
    stripes = tuple([make_stripe(i, row.data, row.parity, chunk, sets) for i, row in enumerate(rows)])
    weak = _weakest(rows, machines, redundancy)
    if strict and weak:
        raise ConfigError(weak[0])
    # Images of less than k pages fill no stripe whatever one does, and cost nothing.
    narrow = _narrow(rows, machines, redundancy) if chunk > align else []
    close = _close(rows, beside) if redundancy.k == 1 else []
    return Placement(number, k, m, chunk, stripes, ordered, machines, (*weak, *narrow, *close))


# ---- groups -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
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


def _parts(
    slots: Sequence[SlotInfo], hosts: Sequence[HostInfo], redundancy: Redundancy, beside: Beside
) -> Iterator[list[_Group]]:
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


def _cut(slots: Sequence[SlotInfo], hosts: Sequence[HostInfo], redundancy: Redundancy, beside: Beside) -> list[_Group]:
    """Groups of at least k+m hosts and k holders of data: as many as keep the domain rule, or break it least."""
    by_host: dict[int, list[SlotInfo]] = {}
    for slot in slots:
        by_host.setdefault(slot.host, []).append(slot)
    most = max(1, min(len(hosts) // (redundancy.k + redundancy.m), len(by_host) // redundancy.k))
    best: list[_Group] = []
    worst = 0
    for count in range(most, 0, -1):
        part = [
            _Group(
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


def _beside(slots: Sequence[SlotInfo], stages: Mapping[int, int]) -> Beside:
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


def _chunk_bytes(groups: Sequence[_Group], longest: int, align: int) -> int:
    """The largest chunk that wastes about least: more, smaller chunks fit unequal images better but round up more."""
    k, m = groups[0].k, groups[0].m
    costs = {}
    for q in range(1, max(4, -(-_CUTS_LEAST // k)) + 1):
        chunk = max(align, -(-longest // (k * q * align)) * align)
        costs[chunk] = m * chunk * sum(group.shape(chunk)[0] for group in groups)
    least = min(costs.values())
    return max(chunk for chunk, cost in costs.items() if cost <= 1.01 * least)


# ---- what the operator is told, before the first failure ---------------------------------------------------


def _weakest(rows: Sequence[Row], hosts: Sequence[HostInfo], redundancy: Redundancy) -> list[str]:
    """The line about the domain that holds most shards of a stripe, if that is more than may be lost."""
    domain_of = {host.host: host.domain for host in hosts}
    fullest: Counter[str] = Counter()
    for row in rows:
        shards = [slot.host for slot, _ in row.data] + row.parity
        fullest |= Counter(domain_of[host] for host in shards)
    name, count = min(fullest.items(), key=lambda item: (-item[1], item[0]))
    if count <= redundancy.m:
        return []
    sizes = Counter(domain_of.values())
    fits = sum(min(size, redundancy.m) for size in sizes.values()) - redundancy.m
    offer = (
        f"rs:{fits}+{redundancy.m} would hold over these {len(sizes)} domains"
        if fits > 0
        else "more domains would help"
    )
    return [
        f"failure domain {name} holds {count} shards of a stripe and {redundancy} survives the loss of {redundancy.m}: "
        f"losing {name} loses state; {offer}"
    ]


def _narrow(rows: Sequence[Row], hosts: Sequence[HostInfo], redundancy: Redundancy) -> list[str]:
    """The line about memory, where stripes are so short that parity costs half as much again as asked for."""
    chunks, full = sum(len(row.data) for row in rows), redundancy.k
    if 2 * len(rows) * full < 3 * (chunks + full):
        return []
    return [
        f"{redundancy} has {chunks / len(rows):.1f} data chunks a stripe on these {len(hosts)} hosts, so parity costs "
        f"about {100 * redundancy.m * len(rows) / chunks:.0f} % of the snapshots, not {100 * redundancy.overhead:.0f} %"
    ]


def _close(rows: Sequence[Row], beside: Beside) -> list[str]:
    """The line about a host that keeps the copy of a stage next to its own."""
    pairs = sorted(
        (min(slot.host, keeper), max(slot.host, keeper))
        for row in rows
        for slot, _ in row.data
        for keeper in row.parity
        if keeper in beside.get(slot.host, ())
    )
    if not pairs:
        return []
    a, b = pairs[0]
    others = f" (and {len(set(pairs)) - 1} more such pairs)" if len(set(pairs)) > 1 else ""
    return [
        f"hosts {a} and {b} have adjacent stages and one keeps the other's copy{others}: losing both loses a stage and "
        f"its neighbour; four or more hosts, in domains of their own, would keep them apart"
    ]


def _check(slots: Sequence[SlotInfo], hosts: Sequence[HostInfo], number: int, align: int) -> None:
    """ConfigError for what no placement can be made of, or what a peer would refuse to read."""
    known = {host.host for host in hosts}
    if not hosts or len(known) < len(hosts) or len(hosts) > HOSTS_MAX:
        raise ConfigError(
            f"placement over {len(hosts)} hosts, {len(known)} of them different: 1..{HOSTS_MAX}, each once"
        )
    for host in hosts:
        if not 0 < len(host.domain) <= DOMAIN_CHARS_MAX or not host.domain.isprintable() or host.host < 0:
            raise ConfigError(
                f"host {host.host}: its failure domain must be 1..{DOMAIN_CHARS_MAX} printable characters"
            )
    previous = -1
    for slot in slots:
        if slot.slot == previous or not 0 <= slot.slot < SLOTS_MAX:
            raise ConfigError(f"slot {slot.slot} is there twice or not below {SLOTS_MAX}")
        if slot.host not in known:
            raise ConfigError(f"slot {slot.slot} is on host {slot.host}, which is not among the hosts")
        if not 0 <= slot.nbytes <= NUMBER_MAX or slot.replicas < -1:
            raise ConfigError(f"slot {slot.slot} has {slot.nbytes} bytes and replica set {slot.replicas}")
        previous = slot.slot
    if align < 1 or not 0 <= number <= NUMBER_MAX:
        raise ConfigError(f"placement {number} with align {align}: both must be positive")


# ---- what a loss leaves -----------------------------------------------------------------------------------


def survivable(placement: Placement, lost: Collection[int]) -> dict[int, int]:
    """Stripe -> hosts that may still be lost, whichever they are; negative: shards it is short of already.

    Losing n more hosts is survived for every n up to the value. It is m minus missing shards as long as no host
    holds two shards of the stripe; where one does, the fullest hosts are taken to go first.
    """
    host_of = {slot.slot: slot.host for slot in placement.slots}
    gone = frozenset(lost)
    return {stripe.number: _hosts_to_spare(_shards(stripe, host_of), placement.m, gone) for stripe in placement.stripes}


def tolerance(placement: Placement, lost: Collection[int] = ()) -> int:
    """Hosts that the weakest stripe can still lose; negative: it has lost too much. 0 and -1 without redundancy."""
    if placement.stripes:
        return min(survivable(placement, lost).values())
    gone = frozenset(lost)
    return -1 if any(slot.host in gone for slot in placement.slots) else 0


def lost_slots(placement: Placement, lost_hosts: Collection[int]) -> tuple[int, ...]:
    """Slots on lost hosts whose image cannot be rebuilt from parity, ascending."""
    gone = frozenset(lost_hosts)
    host_of = {slot.slot: slot.host for slot in placement.slots}
    absent = {slot for slot, host in host_of.items() if host in gone}
    if not placement.stripes:
        return tuple(sorted(absent))
    dead: set[int] = set()
    for stripe in placement.stripes:
        touched = {chunk.slot for chunk in stripe.data} & absent
        if touched and len(touched) + sum(host in gone for host in stripe.parity) > placement.m:
            dead |= touched
    return tuple(sorted(dead))


def decodable(
    placement: Placement,
    data: Mapping[int, frozenset[int]],
    parity: Mapping[tuple[int, int], frozenset[int]],
) -> dict[int, frozenset[int]]:
    """Slot -> steps of which every chunk is held by the slot itself or can be decoded from one stripe's shards.

    `data[slot]` are the steps that the slot's own memory holds, `parity[stripe, index]` those of a parity chunk.
    Shards of different steps never mix: a code over them decodes to the image of no step.
    """
    nothing: frozenset[int] = frozenset()
    held = {slot.slot: data.get(slot.slot, nothing) for slot in placement.slots}
    steps = nothing.union(*held.values(), *parity.values())
    possible = {slot: (steps if placement.stripes else held[slot]) for slot in held}
    for stripe in placement.stripes:
        shards: Counter[int] = Counter()
        for chunk in stripe.data:
            shards.update(held[chunk.slot])
        for index in range(len(stripe.parity)):
            shards.update(parity.get((stripe.number, index), nothing))
        # A slot that lacks the step adds nothing to its own count, so the count is the same for all of them.
        enough = frozenset(step for step, count in shards.items() if count >= len(stripe.data))
        for chunk in stripe.data:
            possible[chunk.slot] &= enough | held[chunk.slot]
    return possible


def _shards(stripe: Stripe, host_of: Mapping[int, int]) -> Counter[int]:
    """Host -> shards of the stripe on it."""
    return Counter([host_of[chunk.slot] for chunk in stripe.data] + list(stripe.parity))


def _hosts_to_spare(shards: Counter[int], m: int, gone: Collection[int]) -> int:
    spare = m - sum(count for host, count in shards.items() if host in gone)
    if spare < 0:
        return spare
    hosts = 0
    for count in sorted((count for host, count in shards.items() if host not in gone), reverse=True):
        spare -= count
        if spare < 0:
            break
        hosts += 1
    return hosts

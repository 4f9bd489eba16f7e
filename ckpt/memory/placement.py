"""Where each stripe's data and parity lie, and what a loss of hosts leaves of them. Pure.

    host      0     1     2     3        2+2, one equal slot a host: 4 stripes, each host in all of them,
    stripe 0  d     P     d     p        2 of its shards data and 2 parity, encoder (P) of one
    stripe 1  d     p     d     P
    stripe 2  P     d     p     d        hosts >= 2 (k+m): cut into groups of about k+m, each by itself
    stripe 3  p     d     P     d

Data are dealt like cards, so that no host meets itself (stripes.py); here is decided among which hosts, and in how many
stripes: as many as the fullest host has chunks, or as all chunks / k, or as a domain's chunks / m, whichever is most.
Fewer would break a rule. Groups (groups.py), because each set of hosts that share a stripe is one more set whose loss
loses state: 16 of them for 6+2 on 128 hosts, 128 if stripes went over hosts drawn at random, and then three losses are
eight times as often fatal (docs/REDUNDANCY.md). Does not move a byte, and does not know who is alive. Invariants:

* every byte of every image lies in one data chunk; a stripe's data are of distinct slots on distinct hosts;
* a stripe has no two shards on one host while there are k+m hosts (with fewer, stripes are shorter);
* and none of its domains holds more than m shards while the domains have room for k+m; else a warning says so;
* the same inputs in any order give the same placement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from holdfast.proto.errors import ConfigError

from .groups import Beside, Group, parts, stages_beside
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
    beside = stages_beside(ordered, stages or {})
    longest = max(slot.nbytes for slot in ordered)
    groups, chunk = _grouped(ordered, machines, redundancy, beside, longest, align)
    if any(beside.values()) and k > 1:  # a mirror costs the same whoever keeps it
        plain, coarse = _grouped(ordered, machines, redundancy, {}, longest, align)
        if _parity_bytes(groups, chunk) > _parity_bytes(plain, coarse):
            groups, chunk = plain, coarse
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


def _grouped(
    slots: Sequence[SlotInfo],
    hosts: Sequence[HostInfo],
    redundancy: Redundancy,
    beside: Beside,
    longest: int,
    align: int,
) -> tuple[list[Group], int]:
    """Groups, and the chunk size that wastes about least over them."""
    groups = [group for part in parts(slots, hosts, redundancy, beside) for group in part]
    return groups, _chunk_bytes(groups, longest, align)


def _parity_bytes(groups: Sequence[Group], chunk: int) -> int:
    """Memory that all hosts give for the parity of one step."""
    return groups[0].m * chunk * sum(group.shape(chunk)[0] for group in groups)


def _chunk_bytes(groups: Sequence[Group], longest: int, align: int) -> int:
    """The largest chunk that wastes about least: more, smaller chunks fit unequal images better but round up more."""
    k = groups[0].k
    costs = {}
    for q in range(1, max(4, -(-_CUTS_LEAST // k)) + 1):
        chunk = max(align, -(-longest // (k * q * align)) * align)
        costs[chunk] = _parity_bytes(groups, chunk)
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

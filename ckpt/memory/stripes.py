"""The stripes of one group of hosts: data dealt like cards, parity where there is least of it. Pure.

    deck   h0 h0 h0 | h1 h1 h1 | h2 h2 | h3 h3 h3     in order of (domain, host, slot, chunk)
    card i to stripe i mod L:                          L = 4 stripes, width 3
    stripe 0  h0 h1 h3       stripe 2  h0 h2 h3        A host's cards are neighbours in the deck, so with
    stripe 1  h0 h1 h3       stripe 3  h1 h2           L at least as long as they are, it never meets itself.

The same holds for a domain's cards: each stripe gets at most ceil(cards / L) of them. So L, the caller's to choose
(placement.py), is all there is to decide about data. Parity is a choice of m among the other hosts of the group, and
the encoder one of these m; both are taken greedily and then levelled. What a group is, and how many
stripes it must have, is not decided here. Invariants:

* a stripe's data are on distinct hosts, and its parity is on hosts without its data while the group has any;
* no chain of moves of parity chunks (of encodings) leads from a host to one that has two less.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .redundancy import HostInfo, Redundancy, SlotInfo, chunk_count


@dataclass(eq=False)
class Row:
    """A stripe being made."""

    data: list[tuple[SlotInfo, int]]
    """Slot and chunk index."""
    parity: list[int]


@dataclass(frozen=True)
class _Seats:
    """The group's hosts in dealing order, and how many shards a domain may hold."""

    ring: list[int]
    domain_of: Mapping[int, str]
    cap: int

    def free(self, row: Row) -> list[int]:
        """Hosts without the stripe's data; all of them if each has some."""
        holders = {slot.host for slot, _ in row.data}
        return [host for host in self.ring if host not in holders] or self.ring

    def used(self, row: Row) -> Counter[str]:
        """Domain -> shards of the stripe."""
        return Counter([self.domain_of[host] for host in (*(slot.host for slot, _ in row.data), *row.parity)])


def fill(
    hosts: Sequence[HostInfo],
    slots: Sequence[SlotInfo],
    redundancy: Redundancy,
    chunk: int,
    shape: tuple[int, int],
    load: Counter[int],
    duties: Counter[int],
) -> list[Row]:
    """As many stripes as `shape` says, with at most so many shards a domain as it says.

    `load` and `duties` count each host's parity chunks and encodings over all groups so far: where groups share hosts,
    one evens out the other.
    """
    stripes, cap = shape
    domain_of = {host.host: host.domain for host in hosts}
    seats = _Seats(sorted(domain_of, key=lambda host: (domain_of[host], host)), domain_of, cap)
    rows = _deal(slots, seats.ring, chunk, stripes)
    for i, row in enumerate(rows):
        _give_parity(row, i, redundancy.m, seats, load)
    _level_parity(rows, seats, load)
    for row in rows:
        first = min(range(redundancy.m), key=lambda i: duties[row.parity[i]])
        row.parity = row.parity[first:] + row.parity[:first]
        duties[row.parity[0]] += 1
    _level(rows, seats.ring, duties, lambda row: row.parity[:1], lambda row, _: row.parity[1:], _move_encoder)
    return rows


def _deal(slots: Sequence[SlotInfo], ring: Sequence[int], chunk: int, stripes: int) -> list[Row]:
    seat = {host: i for i, host in enumerate(ring)}
    rows = [Row([], []) for _ in range(stripes)]
    cards = 0
    for slot in sorted(slots, key=lambda slot: (seat[slot.host], slot.slot)):
        for index in range(chunk_count(slot.nbytes, chunk)):
            rows[cards % stripes].data.append((slot, index))
            cards += 1
    return rows


def _give_parity(row: Row, number: int, m: int, seats: _Seats, load: Counter[int]) -> None:
    """m hosts, the least loaded first, that hold nothing of the stripe and whose domain has room, while there are."""
    free, used, domain_of = seats.free(row), seats.used(row), seats.domain_of
    turn = number % len(free)
    free = free[turn:] + free[:turn]
    for _ in range(m):
        keeper = min(free, key=lambda h: (row.parity.count(h), used[domain_of[h]] >= seats.cap, load[h]))
        row.parity.append(keeper)
        used[domain_of[keeper]] += 1
        load[keeper] += 1


# ---- levelling --------------------------------------------------------------------------------------------


def _level_parity(rows: Sequence[Row], seats: _Seats, load: Counter[int]) -> None:
    free = {row: seats.free(row) for row in rows}
    used = {row: seats.used(row) for row in rows}
    domain_of = seats.domain_of

    def targets(row: Row, a: int) -> list[int]:
        """Hosts to which the stripe's parity chunk on `a` may move."""
        here, count = domain_of[a], used[row]
        return [
            h for h in free[row] if h not in row.parity and count[domain_of[h]] - (domain_of[h] == here) < seats.cap
        ]

    def move(row: Row, a: int, b: int) -> None:
        row.parity[row.parity.index(a)] = b
        used[row][domain_of[a]] -= 1
        used[row][domain_of[b]] += 1

    if any(len(free[row]) > len(row.parity) for row in rows):
        _level(rows, seats.ring, load, lambda row: row.parity, targets, move)


def _move_encoder(row: Row, a: int, b: int) -> None:
    row.parity.remove(b)
    row.parity.insert(0, b)


def _level(
    rows: Sequence[Row],
    hosts: Sequence[int],
    load: Counter[int],
    loads: Callable[[Row], Sequence[int]],
    targets: Callable[[Row, int], Sequence[int]],
    move: Callable[[Row, int, int], None],
) -> None:
    """Shift load along chains of moves until no chain leads from a host to one with two less.

    Chains, since a full host and an empty one may share no stripe in which they could trade. `loads` are the hosts
    that a stripe loads, `targets` where it could load instead. Each shift lowers the sum of squares: this ends.
    """
    at: dict[int, dict[Row, None]] = {}
    for row in rows:
        for host in loads(row):
            at.setdefault(host, {})[row] = None
    shifted = True
    while shifted:
        shifted = False
        enough = min(load[host] for host in hosts) + 2
        for start in sorted((host for host in at if load[host] >= enough), key=lambda host: (-load[host], host)):
            while chain := _chain(start, at, load, targets):
                for a, b, row in chain:
                    move(row, a, b)
                    del at[a][row]
                    at.setdefault(b, {})[row] = None
                load[start] -= 1
                load[chain[0][1]] += 1
                shifted = True


def _chain(
    start: int,
    at: Mapping[int, Mapping[Row, None]],
    load: Counter[int],
    targets: Callable[[Row, int], Sequence[int]],
) -> list[tuple[int, int, Row]]:
    """The shortest chain of moves (last first) from `start` to a host with two less; no two moves in one stripe."""
    came: dict[int, tuple[int, Row]] = {}
    queue = deque([start])
    while queue:
        a = queue.popleft()
        for row in at.get(a, ()):
            for b in targets(row, a):
                if b == start or b in came:
                    continue
                came[b] = (a, row)
                queue.append(b)
                if load[b] <= load[start] - 2:
                    chain = [(a, b, row)]
                    while chain[-1][0] != start:
                        b, (a, row) = chain[-1][0], came[chain[-1][0]]
                        chain.append((a, b, row))
                    if len({row for _, _, row in chain}) == len(chain):
                        return chain
    return []

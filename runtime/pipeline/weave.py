"""Two orders of the same ranks, woven into one schedule that is about as short as one order's. Pure.

    way a  0 1 2 3   microbatches 0 2 4 ..     rank 0  Fa Fb Bb··· Ba···       one turn of two microbatches, over
    way b  1 0 3 2   microbatches 1 3 5 ..     rank 1  Fb Fa Ba··· Bb···       and over: no rank ever waits
                                               rank 2  Ba··· Fa Fb Bb···
                                               rank 3  Bb··· Fb Fa Ba···

List scheduling decides one action at a time and leaves holes where the ways meet in opposite directions (measured: a
third of a step). Here whole microbatches are placed, on a grid on which a forward takes 1 and a backward 2, as in
1F1B: each gets the earliest start at which all its actions find their places free, one after the other without a
pause. Where the ways part or join, a microbatch may wait one turn of 3, as else two that are one apart at one end
would collide at the other. Hops much shorter than the rest are `brief`: they take no time here, and may hold up only
their own microbatch; an input's one goes first and an input's gradient last, since neither can be late.

Only orders come out of it: on real costs they run as soon as they can. Measured against a chain's 1F1B of the same
microbatches, in turn a b a b: 0.95 to 1.05 for 4 to 12 stages, with up to two more in flight. Not here: what the
order takes on real costs, and what to do if it is long (schedule.py). Invariants:

* the lists are parts of one order of all actions in which each follows what it needs: they cannot deadlock;
* messages from one rank to another are received in the order in which they are sent, or there is no result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

FORWARD, BACKWARD = 1, 2
TURN = FORWARD + BACKWARD
JOINTS_MAX = 2
"""Places where ways may part or join: each doubles what is tried twice over."""


@dataclass(frozen=True, slots=True)
class Stop:
    """One hop of a microbatch: where, and whether it takes next to no time."""

    rank: int
    brief: bool = False


Chain = tuple[Stop, ...]
Placed = tuple[int, bool, int, bool, int]
"""Start, long, microbatch, backward, and position among those of one microbatch that are brief: their order."""


@dataclass(frozen=True, slots=True)
class Woven:
    """Lists of (microbatch, hop, backward) by rank, and the length on the grid."""

    orders: Mapping[int, Sequence[tuple[int, int, bool]]]
    length: int


def weave(chains: Mapping[int, Chain]) -> Woven | None:
    """The order of these microbatches, placed ascending; None unless they visit the same ranks in two orders."""
    joints = _joints(list(dict.fromkeys(chains.values())))
    if joints is None:
        return None
    tried = sorted(product((0, TURN), repeat=2 * len(joints)), key=sum)
    full: dict[int, set[int]] = defaultdict(set)
    since: dict[Chain, int] = {}
    placed: dict[int, list[tuple[Placed, tuple[int, int, bool]]]] = defaultdict(list)
    length = 0
    for microbatch, chain in sorted(chains.items()):
        plans = [_steps(chain, joints, waits) for waits in tried]
        starts = [_start(plan, full, since.get(chain, 0)) for plan in plans]
        start, plan = min(zip(starts, plans, strict=True), key=lambda found: found[0])
        since[chain] = start
        for at, rank, takes, hop, backward in plan:
            full[rank].update(range(start + at, start + at + takes))
            # Nothing is before an input and nothing after its gradient: a whole step's slack, where it costs nothing.
            early = 0 if takes or hop else (1 if backward else -1)
            key = (start + at + early, takes > 0, microbatch, backward, -hop if backward else hop)
            placed[rank].append((key, (microbatch, hop, backward)))
            length = max(length, start + at + takes)
    orders = {rank: [action for _, action in sorted(items)] for rank, items in placed.items()}
    return Woven(orders, length) if _in_order(chains, orders) else None


def _joints(ways: Sequence[Chain]) -> list[int] | None:
    """Where two ways part or join, as indices among their long hops; None if they are no two orders of the same."""
    if len(ways) != 2:
        return None
    first, second = ([stop.rank for stop in way if not stop.brief] for way in ways)
    if sorted(first) != sorted(second) or len(set(first)) < len(first):
        return None
    same = [a == b for a, b in zip(first, second, strict=True)]
    joints = [i + 1 for i, (before, after) in enumerate(pairwise(same)) if before != after]
    return joints if len(joints) <= JOINTS_MAX else None


Step = tuple[int, int, int, int, bool]
"""Start after the microbatch's, rank, length, hop, backward."""


def _steps(chain: Chain, joints: Sequence[int], waits: Sequence[int]) -> list[Step]:
    """A microbatch's actions; waits[2i] is at the i-th joint on the way to the loss, waits[2i + 1] on the way back."""
    ahead = {joint: waits[2 * i] for i, joint in enumerate(joints)}
    back = {joint: waits[2 * i + 1] for i, joint in enumerate(joints)}
    steps: list[Step] = []
    now = longs = 0
    for hop, stop in enumerate(chain):
        takes = 0 if stop.brief else FORWARD
        now += 0 if stop.brief else ahead.get(longs, 0)
        longs += 0 if stop.brief else 1
        steps.append((now, stop.rank, takes, hop, False))
        now += takes
    for hop, stop in reversed(list(enumerate(chain))):
        takes = 0 if stop.brief else BACKWARD
        now += 0 if stop.brief else back.get(longs, 0)
        longs -= 0 if stop.brief else 1
        steps.append((now, stop.rank, takes, hop, True))
        now += takes
    return steps


def _start(steps: Sequence[Step], full: Mapping[int, set[int]], since: int) -> int:
    """The earliest start, from `since` on, at which all steps find their places free."""
    needed = [(at + i, full[rank]) for at, rank, takes, _, _ in steps for i in range(takes)]
    start = since
    while any(start + at in taken for at, taken in needed):
        start += 1
    return start


def _in_order(chains: Mapping[int, Chain], orders: Mapping[int, Sequence[tuple[int, int, bool]]]) -> bool:
    """Whether every rank takes what another sends it in the order of sending."""
    place = {action: index for order in orders.values() for index, action in enumerate(order)}
    taken: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, order in orders.items():
        for receiver, action in _received(chains, rank, order):
            taken[rank, receiver].append(place[action])
    return all(places == sorted(places) for places in taken.values())


def _received(
    chains: Mapping[int, Chain], rank: int, order: Sequence[tuple[int, int, bool]]
) -> Iterator[tuple[int, tuple[int, int, bool]]]:
    """(receiver, action that needs it) of everything that `rank` sends, in the order of sending."""
    for microbatch, hop, backward in order:
        chain, then = chains[microbatch], hop - 1 if backward else hop + 1
        if 0 <= then < len(chain) and chain[then].rank != rank:
            yield chain[then].rank, (microbatch, then, backward)

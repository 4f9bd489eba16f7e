"""The schedule: in which order every rank runs its forwards and backwards. Pure.

    rank 0  F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5      4 stages, 6 microbatches, "1f1b": as many forwards as
    rank 1     F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 ..      stages follow, then one forward, one backward in turn,
    rank 2        F0 F1 B0 F2 B1 F3 B2 F4 B3 ..      then the backwards that are left
    rank 3           F0 B0 F1 B1 F2 B2 F3 B3 ..

    plan ──▶ order of each rank (classical or greedy) ──▶ replayed on a clock of ticks ──▶ makespan, reap

Ranks that share microbatches, directly or through others, are ordered together; replicas by themselves:

* "1f1b", all microbatches meet the same ranks in the same rounds: the classical order, interleaved (as in
  Megatron) when there are several rounds;
* "1f1b", two orders of the same ranks in turn (swapped): woven (weave.py), if that is about as short as one order;
* "1f1b", any other paths (rerouted, ragged): event-driven list scheduling, nearest to the loss first, then the
  oldest microbatch, under a limit of forwards in flight at each rank;
* "gpipe": the same without limits, and no backward at a rank before its last forward. Backwards run in
  ascending, not in reverse order of microbatches: neighbours meet early in the gradient tree.

It runs nothing, moves nothing and measures nothing. Invariants (`check` proves them for a given schedule):

* all lists agree with one common order of all actions, so blocking receives cannot deadlock;
* messages from one rank to another are consumed in the order in which they are sent, for every plan: a
  transport that ignores tags, as NCCL does, needs that (`send_order`);
* a send in reap[i] is consumed, in that common order, before action i starts: waiting for it there cannot
  deadlock either;
* a limit in flight is exceeded only where keeping it would block; peak_in_flight is what really happens.

Long: the values, the two ways to an order and the proof share the notions above and little else does.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Path, Plan

from .planner import to_ticks
from .weave import TURN, Stop, weave

EXTRA_IN_FLIGHT = (0, 1, 2, 3, 4)
"""What the greedy planner tries on top of a rank's depth: more activations in memory for less waiting."""
WORTH_MEMORY = 1.03
"""It takes the least memory within 3 % of the fastest: the last microbatches in flight buy little."""
WOVEN_MAX = 1.1
"""A woven order that is longer than this times a chain's 1F1B is left to the greedy planner."""


@dataclass(frozen=True, slots=True)
class Action:
    """One forward ("F") or backward ("B") of a microbatch at the hop of this index in its path."""

    kind: Literal["F", "B"]
    microbatch: int
    hop: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}.{self.hop}"


@dataclass(frozen=True, slots=True)
class RankSchedule:
    """What one rank does. Before actions[i] it may wait for the sends of actions[j], j in reap[i]."""

    actions: tuple[Action, ...]
    reap: tuple[tuple[int, ...], ...]
    peak_in_flight: int
    """Most (microbatch, hop) pairs that had their forward but not their backward, at any time."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One list a rank. makespan is in the unit of the costs; communication takes no time in it."""

    ranks: tuple[RankSchedule, ...]
    makespan: float


def make_schedule(
    plan: Plan,
    *,
    forward_cost: float = 1.0,
    backward_cost: float = 2.0,
    unit_costs: Sequence[float] | None = None,
    in_flight: Mapping[int, int] | None = None,
) -> Schedule:
    """Order all actions of a step. A hop costs its kind's cost, times the sum of its units' costs if given.

    in_flight limits the forwards in flight of the ranks that it names; they and those they work with are
    then ordered by the greedy planner. Compare peak_in_flight: a limit that would block is exceeded.
    """
    work = _Work.of(plan, forward_cost, backward_cost, unit_costs)
    limits = dict(in_flight or {})
    if limits and plan.schedule == "gpipe":
        raise ConfigError("gpipe keeps every forward in flight: in_flight cannot be given")
    for rank, limit in limits.items():
        if limit < 1 or not 0 <= rank < plan.world_size:
            raise ConfigError("in_flight needs ranks of the plan and at least 1", rank=rank, limit=limit)
    orders: dict[int, list[int]] = {rank: [] for rank in range(plan.world_size)}
    for ranks, microbatches in _islands(plan):
        rounds = _rounds(plan, microbatches)
        if plan.schedule == "gpipe":
            orders.update(_Greedy(work, ranks, microbatches, None).run()[1])
        elif rounds is not None and not ranks & limits.keys():
            orders.update(_classical(work, *rounds, microbatches))
        else:
            woven = None if ranks & limits.keys() else _woven(work, len(ranks), microbatches)
            orders.update(woven or _thrifty(work, plan, ranks, microbatches, limits))
    starts, ends = _replay(work, orders)
    ranks_done = tuple(_rank_schedule(work, orders[rank], starts, ends) for rank in range(plan.world_size))
    return Schedule(ranks_done, max(ends.values(), default=0) * work.tick)


def receives(plan: Plan, rank: int, action: Action) -> int | None:
    """The rank whose message `action` needs: activations for a forward, gradients for a backward."""
    return _peer(plan, rank, action, -1 if action.kind == "F" else 1)


def sends(plan: Plan, rank: int, action: Action) -> int | None:
    """The rank that the result of `action` is sent to; None if it stays or ends here."""
    return _peer(plan, rank, action, 1 if action.kind == "F" else -1)


def _peer(plan: Plan, rank: int, action: Action, direction: int) -> int | None:
    hops = plan.paths[action.microbatch].hops
    assert hops[action.hop].rank == rank, f"{action} is not at rank {rank}"
    at = action.hop + direction
    return hops[at].rank if 0 <= at < len(hops) and hops[at].rank != rank else None


def consumer(action: Action) -> Action:
    """The action that needs what `action` sends."""
    return Action(action.kind, action.microbatch, action.hop + (1 if action.kind == "F" else -1))


def send_order(plan: Plan, schedule: Schedule, a: int, b: int) -> tuple[Action, ...]:
    """The actions whose results go from rank a to rank b, in the order of sending, and so of receiving.

    Holds for every plan and is asserted here: a transport without tags would otherwise hand an activation
    to whoever waits for a gradient of the same shape.
    """
    sent = tuple(action for action in schedule.ranks[a].actions if sends(plan, a, action) == b)
    received = [action for action in schedule.ranks[b].actions if receives(plan, b, action) == a]
    assert [consumer(action) for action in sent] == received, f"rank {b} expects other messages than {a} sends"
    return sent


def check(plan: Plan, schedule: Schedule, *, lookahead: int = 1) -> None:
    """Raise AssertionError unless the schedule is complete, ordered, and cannot deadlock.

    Deadlocks are looked for by running the lists, on no clock: once with sends that never block, and once
    where reaping waits and a send completes only when its receiver has come within `lookahead` actions.
    """
    visits = [(m, hop) for m, path in enumerate(plan.paths) for hop in range(len(path.hops))]
    every = {Action("F", *visit) for visit in visits} | {Action("B", *visit) for visit in visits}
    assert len(schedule.ranks) == plan.world_size, "one list a rank is needed"
    place = {a: (rank, i) for rank, mine in enumerate(schedule.ranks) for i, a in enumerate(mine.actions)}
    assert place.keys() == every, "not each action once"
    assert sum(len(mine.actions) for mine in schedule.ranks) == len(every), "not each action once"
    pairs: set[tuple[int, int]] = set()
    for rank, mine in enumerate(schedule.ranks):
        targets = [sends(plan, rank, action) for action in mine.actions]
        pairs |= {(rank, target) for target in targets if target is not None}
        reaped = [(i, j) for i, sent in enumerate(mine.reap) for j in sent]
        assert len(mine.reap) == len(mine.actions), f"rank {rank}: one tuple to reap for each action"
        assert len({j for _, j in reaped}) == len(reaped), f"rank {rank} reaps a send twice"
        assert all(0 <= j < i and targets[j] is not None for i, j in reaped), f"rank {rank} reaps what it did not send"
        held = accumulate(1 if action.kind == "F" else -1 for action in mine.actions)
        assert max(held, default=0) == mine.peak_in_flight, f"rank {rank}: peak_in_flight is wrong"
    for a, b in pairs:
        send_order(plan, schedule, a, b)
    _run_dry(plan, schedule, place, None)
    _run_dry(plan, schedule, place, lookahead)


def _run_dry(plan: Plan, schedule: Schedule, place: Mapping[Action, tuple[int, int]], lookahead: int | None) -> None:
    """Run the lists until nothing moves; lookahead None means that no send is ever waited for."""
    reached = [0] * plan.world_size  # actions whose reaping is over
    done = [0] * plan.world_size

    def needs(action: Action) -> Iterator[Action]:
        last = len(plan.paths[action.microbatch].hops) - 1
        if action.kind == "B":
            yield Action("F", action.microbatch, action.hop)
            if action.hop < last:
                yield Action("B", action.microbatch, action.hop + 1)
        elif action.hop:
            yield Action("F", action.microbatch, action.hop - 1)

    def posted(receiver: Action) -> bool:
        rank, index = place[receiver]
        return lookahead is None or index < reached[rank] + lookahead

    def advance(rank: int) -> bool:
        mine, index = schedule.ranks[rank], done[rank]
        if index == len(mine.actions) or not all(posted(consumer(mine.actions[j])) for j in mine.reap[index]):
            return False
        moved, reached[rank] = reached[rank] <= index, index + 1
        if all(done[at] > i for at, i in (place[need] for need in needs(mine.actions[index]))):
            done[rank] += 1
            return True
        return moved

    while any([advance(rank) for rank in range(plan.world_size)]):
        pass
    stuck = [
        f"rank {r} at {mine.actions[done[r]]}" for r, mine in enumerate(schedule.ranks) if done[r] < len(mine.actions)
    ]
    assert not stuck, "deadlock: " + ", ".join(stuck)


@dataclass(frozen=True, slots=True)
class _Work:
    """All (microbatch, hop) of a plan, numbered in that order: action 2x is the forward of the x-th, 2x + 1
    its backward. Integers, since the greedy planner touches each some ten times."""

    first: tuple[int, ...]
    """Number of a microbatch's hop 0; one more entry at the end."""
    rank: tuple[int, ...]
    microbatch: tuple[int, ...]
    hop: tuple[int, ...]
    left: tuple[int, ...]
    """Hops that follow."""
    ticks: tuple[int, ...]
    """Duration by action. Never 0, so that time orders cause and effect strictly."""
    tick: float

    @staticmethod
    def of(plan: Plan, forward: float, backward: float, units: Sequence[float] | None) -> _Work:
        """Number the visits, turn costs into ticks."""
        if units is not None and len(units) != plan.units:
            raise ConfigError(f"{len(units)} unit costs for {plan.units} units: one each is needed")
        visits = [(m, h, hop) for m, path in enumerate(plan.paths) for h, hop in enumerate(path.hops)]
        weights = [1.0 if units is None else sum(units[unit] for unit in hop.units) for _, _, hop in visits]
        costs = [weight * cost for weight in weights for cost in (forward, backward)]
        ticks = to_ticks(costs)
        dearest = max(range(len(ticks)), key=ticks.__getitem__, default=None)
        return _Work(
            first=tuple(accumulate((len(path.hops) for path in plan.paths), initial=0)),
            rank=tuple(hop.rank for _, _, hop in visits),
            microbatch=tuple(m for m, _, _ in visits),
            hop=tuple(h for _, h, _ in visits),
            left=tuple(len(plan.paths[m].hops) - 1 - h for m, h, _ in visits),
            ticks=tuple(max(1, duration) for duration in ticks),
            tick=costs[dearest] / ticks[dearest] if dearest is not None and ticks[dearest] else 0.0,
        )

    def before(self, action: int) -> int | None:
        """The action whose result this one needs; for a backward, beside its own forward."""
        visit, backward = divmod(action, 2)
        if backward:
            return action + 2 if self.left[visit] else action - 1
        return action - 2 if self.hop[visit] else None

    def after(self, action: int) -> int | None:
        """The action that needs this one's result."""
        visit, backward = divmod(action, 2)
        if backward:
            return action - 2 if self.hop[visit] else None
        return action + 2 if self.left[visit] else action + 1

    def queue(self, action: int) -> int:
        """Where an action waits at its rank: the sender of what it needs, or -1: input, -2, -3: itself."""
        before, rank = self.before(action), self.rank[action >> 1]
        if before is None:
            return -1
        sender = self.rank[before >> 1]
        return sender if sender != rank else -2 - (action & 1)

    def public(self, action: int) -> Action:
        """As the outside sees it."""
        visit, backward = divmod(action, 2)
        return Action("B" if backward else "F", self.microbatch[visit], self.hop[visit])


def _islands(plan: Plan) -> list[tuple[set[int], list[int]]]:
    """The least sets of ranks that share no microbatch, with their microbatches in ascending order."""
    islands: list[tuple[set[int], list[int]]] = []
    for path, group in groupby(range(plan.microbatches), key=lambda m: plan.paths[m]):
        ranks, microbatches = {hop.rank for hop in path.hops}, list(group)
        for island in [island for island in islands if island[0] & ranks]:
            islands.remove(island)
            ranks |= island[0]
            microbatches += island[1]
        islands.append((ranks, sorted(microbatches)))
    return islands


def _runs(path: Path) -> list[tuple[int, int]]:
    """(rank, hops) of a path, neighbouring hops on one rank taken together."""
    return [(rank, len(list(hops))) for rank, hops in groupby(path.hops, key=lambda hop: hop.rank)]


def _rounds(plan: Plan, microbatches: Sequence[int]) -> tuple[list[tuple[int, int]], int] | None:
    """(runs, stages) if all these microbatches meet the same distinct ranks, in one or more full rounds."""
    ways = {tuple(_runs(path)) for path in {plan.paths[m] for m in microbatches}}
    runs = list(ways.pop())
    stages = len({rank for rank, _ in runs})
    regular = runs and len(runs) % stages == 0 and all(run[0] == runs[i % stages][0] for i, run in enumerate(runs))
    return (runs, stages) if regular and not ways else None


def _classical(
    work: _Work, runs: Sequence[tuple[int, int]], stages: int, microbatches: Sequence[int]
) -> dict[int, list[int]]:
    """1F1B: warm up, alternate, drain; several rounds are run by groups of as many microbatches as stages.

    A last group that is not full is planned with phantoms, which are then struck from the lists. What is
    left of an order without deadlock has none, and what is left of equal orders is equal: Megatron's order
    for such a group, without them, can deadlock.
    """
    rounds = len(runs) // stages
    slots = [*microbatches, *[None] * (-len(microbatches) % stages)]
    groups = [slots[i : i + stages] for i in range(0, len(slots), stages)]
    forwards = [(m, turn) for group in groups for turn in range(rounds) for m in group]
    backwards = [(m, turn) for group in groups for turn in reversed(range(rounds)) for m in group]
    offsets = list(accumulate((hops for _, hops in runs), initial=0))

    def actions(stage: int, microbatch: int | None, turn: int, backward: int) -> list[int]:
        if microbatch is None:
            return []
        begin, end = offsets[turn * stages + stage], offsets[turn * stages + stage + 1]
        visits = range(work.first[microbatch] + begin, work.first[microbatch] + end)
        return [2 * visit + backward for visit in (reversed(visits) if backward else visits)]

    orders: dict[int, list[int]] = {}
    for stage in range(stages):
        follow = stages - 1 - stage
        warm_up = min(len(forwards), follow if rounds == 1 else 2 * follow + (rounds - 1) * stages)
        order = orders[runs[stage][0]] = []
        for turn in range(len(forwards) + warm_up):
            if turn < len(forwards):
                order += actions(stage, *forwards[turn], 0)
            if turn >= warm_up:
                order += actions(stage, *backwards[turn - warm_up], 1)
    return orders


def _woven(work: _Work, ranks: int, microbatches: Sequence[int]) -> dict[int, list[int]] | None:
    """The woven order, if these paths have one that is worth it."""
    spans = {m: range(work.first[m], work.first[m + 1]) for m in microbatches}
    forwards = sorted(work.ticks[2 * visit] for visits in spans.values() for visit in visits)
    if not forwards:
        return None
    # Half of the usual: a stage of fewer layers is none that fits anywhere.
    brief = forwards[len(forwards) // 2] / 2
    chains = {m: tuple(Stop(work.rank[v], work.ticks[2 * v] < brief) for v in visits) for m, visits in spans.items()}
    woven = weave(chains)
    if woven is None or woven.length > WOVEN_MAX * TURN * (len(microbatches) + ranks - 1):
        return None
    return {
        rank: [2 * (work.first[m] + hop) + backward for m, hop, backward in order]
        for rank, order in woven.orders.items()
    }


def _thrifty(
    work: _Work, plan: Plan, ranks: Iterable[int], microbatches: Sequence[int], limits: dict[int, int]
) -> dict[int, list[int]]:
    """The greedy order with the least memory among those that are about the fastest."""
    depths: dict[int, int] = dict.fromkeys(ranks, 0)
    for path in {plan.paths[m] for m in microbatches}:
        for at, hop in enumerate(path.hops):
            # One for each hop up to the loss, as in 1F1B: that many start before the first one is back.
            depths[hop.rank] = max(depths[hop.rank], len(path.hops) - at)
    tried = [
        _Greedy(work, depths, microbatches, {r: d + extra for r, d in depths.items()} | limits).run()
        for extra in (EXTRA_IN_FLIGHT if depths.keys() - limits.keys() else (0,))
    ]
    fastest = min(end for end, _ in tried)
    return next(orders for end, orders in tried if end <= fastest * WORTH_MEMORY)


class _Greedy:
    """List scheduling of one island: a rank that is free takes the best action at the head of its queues.

    Every action waits in the queue of the rank that sends what it needs, and only heads may start: so the
    order of receiving is that of sending. The head of a queue has all it needs, and only a limit can hold
    it back; if limits hold everything back, the forward nearest to its loss starts regardless. So the
    simulation always ends, and the order in which it completes actions is the proof that its lists do not
    deadlock.
    """

    def __init__(
        self, work: _Work, ranks: Iterable[int], microbatches: Sequence[int], limits: Mapping[int, int] | None
    ) -> None:
        """limits None is gpipe: no limit, and backwards wait for all forwards of their rank."""
        self._work = work
        self._limits = limits
        self._orders: dict[int, list[int]] = {rank: [] for rank in sorted(ranks)}
        self._queues: dict[int, dict[int, deque[int]]] = {rank: defaultdict(deque) for rank in self._orders}
        self._in_flight = dict.fromkeys(self._orders, 0)
        self._forwards_left = dict.fromkeys(self._orders, 0)
        self._running: list[tuple[int, int]] = []
        self._busy: set[int] = set()
        for microbatch in microbatches:
            visits = range(work.first[microbatch], work.first[microbatch + 1])
            for visit in visits:
                self._forwards_left[work.rank[visit]] += 1
            if visits:
                self._enqueue(2 * visits[0])

    def run(self) -> tuple[int, dict[int, list[int]]]:
        """Simulate; the time of the end and the order of each rank."""
        now, changed = 0, set(self._orders)
        while True:
            for rank in sorted(changed - self._busy):
                self._start(self._best([rank], limited=True), now)
            if not self._running and not self._start(self._best(self._orders, limited=False), now):
                return now, self._orders
            now, changed = self._running[0][0], set()
            while self._running and self._running[0][0] == now:
                changed |= self._finish(heapq.heappop(self._running)[1])

    def _best(self, ranks: Iterable[int], *, limited: bool) -> int | None:
        """Of the heads of these ranks' queues that may start: nearest to the loss, then oldest.

        Nearest first, backwards and forwards alike: what is near the loss has the longest way back to go.
        """
        work, best = self._work, None
        for rank in ranks:
            full = limited and self._limits is not None and self._in_flight[rank] >= self._limits[rank]
            early = self._limits is None and self._forwards_left[rank] > 0
            for queue in self._queues[rank].values():
                if not queue:
                    continue
                visit, backward = divmod(queue[0], 2)
                if early if backward else full:
                    continue
                key = (work.left[visit], work.microbatch[visit], queue[0])
                if best is None or key < best:
                    best = key
        return None if best is None else best[2]

    def _start(self, action: int | None, now: int) -> bool:
        if action is None:
            return False
        rank = self._work.rank[action >> 1]
        self._queues[rank][self._work.queue(action)].popleft()
        self._in_flight[rank] += -1 if action & 1 else 1
        self._forwards_left[rank] -= 0 if action & 1 else 1
        self._orders[rank].append(action)
        self._busy.add(rank)
        heapq.heappush(self._running, (now + self._work.ticks[action], action))
        return True

    def _finish(self, action: int) -> set[int]:
        """Free the rank, hand on its result; the ranks that may have something to start now."""
        rank, after = self._work.rank[action >> 1], self._work.after(action)
        self._busy.remove(rank)
        if after is None:
            return {rank}
        self._enqueue(after)
        return {rank, self._work.rank[after >> 1]}

    def _enqueue(self, action: int) -> None:
        self._queues[self._work.rank[action >> 1]][self._work.queue(action)].append(action)


def _replay(work: _Work, orders: Mapping[int, Sequence[int]]) -> tuple[dict[int, int], dict[int, int]]:
    """(starts, ends) in ticks when every list runs as soon as it can: the common order of all actions."""
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    done = dict.fromkeys(orders, 0)
    free = dict.fromkeys(orders, 0)
    ready = deque(orders)
    while ready:
        rank = ready.popleft()
        order = orders[rank]
        while done[rank] < len(order):
            action = order[done[rank]]
            before, after = work.before(action), work.after(action)
            if before is not None and before not in ends:
                break
            starts[action] = max(free[rank], 0 if before is None else ends[before])
            ends[action] = free[rank] = starts[action] + work.ticks[action]
            done[rank] += 1
            if after is not None and work.rank[after >> 1] != rank:
                ready.append(work.rank[after >> 1])
    assert all(done[rank] == len(order) for rank, order in orders.items()), "the order deadlocks"
    return starts, ends


def _rank_schedule(
    work: _Work, order: Sequence[int], starts: Mapping[int, int], ends: Mapping[int, int]
) -> RankSchedule:
    """The list of one rank, with what it may reap when and its peak in flight."""
    sent: list[tuple[int, int]] = []
    reap: list[tuple[int, ...]] = []
    for index, action in enumerate(order):
        reaped: list[int] = []
        while sent and sent[0][0] <= starts[action]:
            reaped.append(heapq.heappop(sent)[1])
        reap.append(tuple(sorted(reaped)))
        after = work.after(action)
        if after is not None and work.rank[after >> 1] != work.rank[action >> 1]:
            heapq.heappush(sent, (ends[after], index))
    held = accumulate(-1 if action & 1 else 1 for action in order)
    return RankSchedule(tuple(work.public(action) for action in order), tuple(reap), max(held, default=0))

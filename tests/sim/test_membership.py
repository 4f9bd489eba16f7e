"""The coordinator's mind under simulated failures: virtual clock, delayed messages, deaths at any moment.

Ranks, agents and snapshot managers are small models around the real Membership and the real resume
decision. A failing seed is replayed with:  pytest tests/sim -k seeds --sim-seed N   (or SIM_SEED=N)
"""

from __future__ import annotations

import heapq
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from holdfast.launcher.actions import Fence, Form, StopJob
from holdfast.launcher.membership import Membership, State
from holdfast.launcher.slots import Joined
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.gather import newest_common
from holdfast.runtime.keep import choose_half
from holdfast.runtime.recovery.decide import Report

MS = 1_000_000
UNTIL = 12


@dataclass
class Process:
    """One incarnation of a rank, as the protocol sees it."""

    incarnation: int
    alive: bool = True
    generation: int = 0
    live: int = 0
    waiting_for: int = 0  # generation joined, not formed yet
    target: int = 0
    copying: int = NO_STEP
    done: bool = False


@dataclass
class World:
    """Event queue, ranks and their arenas."""

    seed: int
    size: int
    kills: int
    chance: random.Random = field(init=False)
    now_ns: int = 0
    queue: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.coordinator = Membership(self.size)
        self.processes = {rank: Process(0) for rank in range(self.size)}
        self.halves: dict[int, list[int]] = {rank: [NO_STEP, NO_STEP] for rank in range(self.size)}
        self.arrived: dict[tuple[int, int], dict[int, list[int]]] = {}
        self.forms: list[Form] = []
        self.stopped: StopJob | None = None
        for rank in range(self.size):
            self.start(rank)
        for _ in range(self.kills):
            self.after(self.chance.randrange(5 * MS, 400 * MS), self.kill)

    # ---- machinery

    def after(self, delay_ns: int, call: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.now_ns + delay_ns, self.count, call))

    def soon(self, call: Callable[[], None], most_ms: float = 3.0) -> None:
        self.after(self.chance.randrange(int(most_ms * MS)) + 1, call)

    def run(self) -> None:
        for _ in range(200_000):
            if not self.queue or self.stopped:
                return
            self.now_ns, _, call = heapq.heappop(self.queue)
            call()
        raise AssertionError(f"seed {self.seed}: no end after 200000 events; {self.coordinator.status()}")

    def tell(self, actions: list[object]) -> None:
        for action in actions:
            if isinstance(action, Fence):
                for rank in action.ranks:
                    self.to_rank(rank, lambda p, r, a=action: self.fenced(p, r, a))
            elif isinstance(action, Form):
                self.forms.append(action)
                self.check_form(action)
                for rank in action.ranks:
                    self.to_rank(rank, lambda p, r, a=action: self.formed(p, r, a))
            elif isinstance(action, StopJob):
                self.stopped = action

    def to_rank(self, rank: int, call: Callable[[Process, int], None]) -> None:
        process = self.processes[rank]
        self.soon(lambda: call(process, rank) if process.alive else None)

    # ---- the model of a rank

    def start(self, rank: int) -> None:
        process = self.processes[rank]

        def hello() -> None:
            if process.alive:
                args = (rank, process.incarnation, 1, 0, 0, NO_STEP)
                self.tell(self.coordinator.on_rank_hello(self.now_ns, *args))

        self.tell(self.coordinator.on_rank_started(self.now_ns, rank, process.incarnation, 1, 0, "fresh"))
        self.soon(hello, 40.0)

    def kill(self) -> None:
        rank = self.chance.randrange(self.size)
        process = self.processes[rank]
        if not process.alive:
            return
        process.alive = False
        if process.copying != NO_STEP:  # a torn half is not whole
            process.copying = NO_STEP

        def heard() -> None:
            self.tell(
                self.coordinator.on_rank_exited(
                    self.now_ns,
                    rank,
                    process.incarnation,
                    "SIGKILL",
                    detected_ns=self.now_ns,
                    last_progress_ns=0,
                )
            )
            self.processes[rank] = Process(process.incarnation + 1)
            self.start(rank)

        self.soon(heard, 15.0)

    def fenced(self, process: Process, rank: int, fence: Fence) -> None:
        if fence.generation <= process.target or process.done:
            return
        process.target = fence.generation
        self.soon(lambda: self.join(process, rank, fence.generation), 5.0)

    def join(self, process: Process, rank: int, generation: int) -> None:
        if not process.alive or process.target != generation or process.done:
            return
        if process.copying != NO_STEP:  # join only after the copy under way is whole
            self.soon(lambda: self.join(process, rank, generation))
            return
        process.waiting_for, process.generation = generation, 0
        held = {slot: frozenset(s for s in steps if s != NO_STEP) for slot, steps in self.halves.items()}
        joined = Joined(process.incarnation, Report(rank, process.live, (rank,), held), "p", "c", UNTIL)
        self.soon(
            lambda: (
                self.tell(self.coordinator.on_join(self.now_ns, rank, generation, joined)) if process.alive else None
            )
        )

    def check_form(self, form: Form) -> None:
        for rank in form.ranks:
            source = {r: s for r, _, _, s in form.members}[rank]
            live = source.rung == "live" and self.processes[rank].live == form.resume_step
            assert live or form.resume_step in self.halves[rank] or not self.processes[rank].alive, (
                f"seed {self.seed}: rank {rank} cannot reach step {form.resume_step}"
            )
        if len(self.forms) > 1:
            assert form.generation > self.forms[-2].generation, f"seed {self.seed}: generations must rise"

    def formed(self, process: Process, rank: int, form: Form) -> None:
        if process.target != form.generation or process.waiting_for != form.generation:
            return
        if process.live != form.resume_step:
            assert form.resume_step in self.halves[rank], f"seed {self.seed}: restore of rank {rank} found nothing"
        process.live, process.generation, process.waiting_for = form.resume_step, form.generation, 0
        if form.solo:
            process.done = True
            self.tell(self.coordinator.on_goodbye(self.now_ns, rank, process.incarnation, process.live))
            return
        self.gate(process, rank, form.generation)

    def gate(self, process: Process, rank: int, generation: int) -> None:
        """The barrier of a new generation: all learn what all hold, forget what is newer, keep what is missing."""
        at = self.arrived.setdefault((generation, NO_STEP), {})
        at[rank] = list(self.halves[rank])
        if len(at) < self.size:
            return

        def passed(process: Process, rank: int) -> None:
            if process.generation != generation or process.target != generation:
                return
            self.halves[rank] = [s if s <= process.live else NO_STEP for s in self.halves[rank]]
            if process.live not in self.halves[rank]:
                self.snapshot(process, rank, newest_common(list(at.values())))
            self.step(process, rank, generation)

        for other in at:
            self.to_rank(other, passed)

    def step(self, process: Process, rank: int, generation: int) -> None:
        def arrive() -> None:
            if not process.alive or process.generation != generation or process.target != generation:
                return
            if process.copying != NO_STEP:
                self.soon(arrive)  # the fence before the barrier
                return
            at = self.arrived.setdefault((generation, process.live), {})
            at[rank] = list(self.halves[rank])
            if len(at) == self.size:
                for other in at:
                    self.to_rank(other, lambda p, r: self.commit(p, r, generation, newest_common(list(at.values()))))

        self.soon(arrive, 8.0)

    def commit(self, process: Process, rank: int, generation: int, keep: int) -> None:
        if process.generation != generation or process.target != generation:
            return  # fenced before it saw the barrier: this rank did not apply
        if process.live == UNTIL and keep != UNTIL:
            if UNTIL not in self.halves[rank]:
                self.snapshot(process, rank, keep)  # nobody leaves before the last state is kept everywhere
            self.step(process, rank, generation)
            return
        if process.live == UNTIL:
            process.done = True
            self.tell(self.coordinator.on_goodbye(self.now_ns, rank, process.incarnation, UNTIL))
            return
        process.live += 1
        self.snapshot(process, rank, keep)
        self.step(process, rank, generation)

    def snapshot(self, process: Process, rank: int, keep: int) -> None:
        halves = self.halves[rank]
        half = choose_half(halves, keep)
        step, halves[half] = process.live, NO_STEP
        process.copying = step

        def whole() -> None:
            if process.alive:
                halves[half], process.copying = step, NO_STEP

        if keep != NO_STEP and self.chance.random() < 0.03:
            process.copying = NO_STEP  # the manager is away: this snapshot is skipped
        else:
            self.soon(whole, 6.0)


def simulate(seed: int, size: int = 4, kills: int = 6) -> World:
    world = World(seed, size, kills)
    world.run()
    return world


SEEDS = [int(os.environ["SIM_SEED"])] if "SIM_SEED" in os.environ else range(1000)


def test_seeds_all_end_at_the_last_step_whatever_dies_when() -> None:
    survived = 0
    for seed in SEEDS:
        world = simulate(seed, size=2 + seed % 4, kills=seed % 9)
        assert world.stopped is None, f"SIM_SEED={seed}: {world.stopped}"
        for rank, process in world.processes.items():
            assert process.done, f"SIM_SEED={seed}: rank {rank} hangs at {process}; {world.coordinator.status()}"
            assert process.live == UNTIL, f"SIM_SEED={seed}: rank {rank} ended at step {process.live}"
        survived += len(world.forms) - 1
    if len(SEEDS) > 1:
        assert survived > 1000, "the kills must have happened"


def _fails(seed: int) -> bool:
    try:
        return simulate(seed, size=4, kills=8).stopped is not None
    except AssertionError:
        return True


@pytest.mark.parametrize(
    "rule",
    [
        lambda halves, keep: 0,  # one buffer, overwritten in place
        lambda halves, keep: halves.index(min(halves)),  # the older one, whatever the others hold
        lambda halves, keep: halves.index(max(halves)),
    ],
)
def test_the_simulation_notices_a_wrong_rule_for_the_half_to_overwrite(
    rule: Callable[[list[int], int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "choose_half", rule)
    assert any(_fails(seed) for seed in range(400))


def test_a_connection_that_breaks_without_a_death_forms_the_same_members_again() -> None:
    world = simulate(1, kills=0)
    membership = world.coordinator
    membership.slots[0].finished = False
    before = membership.generation
    assert membership.state is State.RUNNING
    membership.on_suspect(5, 0, before, "connection broke")
    assert membership.on_tick(6) == []
    due = membership.next_tick_ns()
    assert due is not None
    assert any(isinstance(action, Fence) for action in membership.on_tick(due))
    assert membership.generation == before + 1

"""Which half a snapshot may overwrite: the rule by itself, and in a model of ranks and parity that lags.

The model: every rank has two halves, every host two halves of parity. A barrier tells all ranks what all keep; each
begins a snapshot if the rule lets it; parity of a step is complete on a host some time after all ranks hold the step,
or never, because they did not hold it long enough. What must hold at all times is said in the properties.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from holdfast.ckpt.memory.protect.parity import Kept as ParityHalf
from holdfast.ckpt.memory.protect.parity import choose_half as choose_parity_half
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.gather import Kept, newest_common
from holdfast.runtime.keep import PATIENCE, choose_half, choose_protected_half

NO = int(NO_STEP)


# ---- the rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "sealed", "protected", "half"),
    [
        ([NO, NO], NO, NO, 0),  # nothing yet
        ([0, NO], 0, NO, 1),  # the first has no parity yet: the other half is empty
        ([0, 1], 1, NO, None),  # whichever of them parity is being computed for
        ([0, 1], 1, 0, None),  # 1 is what a lost process resumes from, 0 what a lost host does
        ([0, 1], 1, 1, 0),  # parity has caught up
        ([2, 1], 2, 2, 1),
        ([2, 1], 2, 1, None),
        ([5, NO], 5, 5, 1),
        ([NO, 5], 5, 5, 0),
        ([4, NO], 4, NO, 1),
        ([6, 5], 5, 5, 0),  # 6 is not whole on every rank: nobody can resume from it
    ],
)
def test_a_half_that_recovery_may_need_is_not_overwritten(
    steps: list[int], sealed: int, protected: int, half: int | None
) -> None:
    assert choose_protected_half(steps, max(steps) + 1, sealed=sealed, protected=protected) == half


def test_after_its_patience_fresh_snapshots_come_before_those_that_wait_for_parity() -> None:
    late = 5 + PATIENCE
    assert choose_protected_half([3, 5], late, sealed=5, protected=3) is None
    assert choose_protected_half([3, 5], late + 1, sealed=5, protected=3) == 1, "never the one that is protected"
    assert choose_protected_half([3, 5], late + 1, sealed=5, protected=NO) == 0, "never the newest that all hold"


def test_the_resume_step_and_the_last_step_are_kept_at_once() -> None:
    assert choose_protected_half([3, 5], 6, sealed=5, protected=3, must=True) == 1
    assert choose_protected_half([3, 5], 6, sealed=5, protected=NO, must=True) == 0


@given(st.lists(st.integers(NO, 30), min_size=2, max_size=2), st.integers(0, 40), st.booleans(), st.data())
def test_what_is_protected_is_never_overwritten_nor_what_all_hold_unless_it_is_late(
    steps: list[int], ahead: int, must: bool, data: st.DataObject
) -> None:
    sealed, protected = data.draw(st.sampled_from([*steps, NO])), data.draw(st.sampled_from([*steps, NO]))
    step = max(*steps, 0) + ahead
    half = choose_protected_half(steps, step, sealed=sealed, protected=protected, must=must)
    if half is None:
        assert not must or {sealed, protected} >= set(steps), "what must be kept is left out only if there is no room"
        return
    overwritten = steps[half]
    assert overwritten in (NO, sealed) or overwritten != protected
    assert overwritten == NO or overwritten != protected
    late = must or (sealed != NO and step - sealed > PATIENCE)
    if not late or protected == NO:
        assert overwritten == NO or overwritten != sealed


@given(st.lists(st.integers(NO, 30), min_size=2, max_size=2, unique=True), st.data())
def test_without_parity_the_newest_step_that_all_hold_stays(steps: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.sampled_from([*steps, NO]))
    assert steps[choose_half(steps, keep)] in (NO, *(step for step in steps if step != keep))


# ---- what is told at the barrier ---------------------------------------------------------------------------


def test_a_step_is_protected_once_every_host_has_its_parity_under_this_placement() -> None:
    assert Kept.of([[4, 5, 7, 5], [4, 5, 7, 5]], 7) == Kept(5, 5, 7)
    assert Kept.of([[4, 5, 7, 5], [4, 5, 6, 5]], 7).protected == NO, "one host's is of another placement"
    assert Kept.of([[4, 5, 7, 5], [4, 5, 7, NO]], 7).protected == NO
    assert Kept.of([[4, 5, 0, 5], [4, 5, 0, 5]], 0).protected == NO, "a job without parity"
    assert Kept.of([[4, 5, 7, 5], [3, 4, 7, 4]], 7).sealed == 4


def test_a_step_that_one_host_left_out_is_not_protected() -> None:
    """Host 0 has parity of 0 and 10, host 1 of 0 and 1: no step newer than 0 is protected, least of all 1."""
    assert Kept.of([[1, 10, 1, 10], [1, 10, 1, 1]], 1, Kept(10, 0, 1)).protected == NO, "nor is 0: no rank holds it"
    assert Kept.of([[0, 10, 1, 10], [0, 10, 1, 1]], 1, Kept(10, 0, 1)).protected == 0


def test_parity_of_a_step_that_no_rank_holds_any_more_protects_nothing() -> None:
    assert Kept.of([[10, 1, 1, 0], [10, 1, 1, 0]], 1).protected == NO


# ---- the model ------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """`ranks` hosts of one rank each, training without end."""

    ranks: int
    step: int = 0
    halves: list[list[int]] = field(default_factory=list)
    parity: list[list[int]] = field(default_factory=list)
    filling: list[tuple[int, int] | None] = field(default_factory=list)
    keep: int = NO
    kept: Kept = field(default_factory=Kept)
    late: int = 0

    def __post_init__(self) -> None:
        self.halves = [[NO, NO] for _ in range(self.ranks)]
        self.parity = [[NO, NO] for _ in range(self.ranks)]
        self.filling = [None] * self.ranks

    def held(self) -> set[int]:
        """Steps that every rank holds whole."""
        return set(self.halves[0]).intersection(*self.halves[1:]) - {NO}

    def protected(self) -> set[int]:
        """Steps that any loss of a host leaves recoverable: held by all, and parity of them everywhere."""
        return self.held().intersection(*self.parity)

    def barrier(self) -> None:
        """All ranks commit a step, and keep it if the rule lets them."""
        rows = [[*self.halves[rank], 1, max(self.parity[rank])] for rank in range(self.ranks)]
        self.kept = Kept.of(rows, 1, self.kept)
        self.step += 1
        half = choose_protected_half(self.halves[0], self.step, sealed=self.kept.sealed, protected=self.kept.protected)
        if half is not None:
            self.late += self.kept.sealed != NO and self.step - self.kept.sealed > PATIENCE
            for rank in range(self.ranks):
                self.halves[rank][half] = self.step
            self.keep = max(self.keep, self.kept.protected)

    def encode(self, host: int) -> None:
        """A host finishes what it was at, if the ranks still hold it, and turns to the newest step they all hold."""
        if self.filling[host] is not None:
            half, step = self.filling[host]
            self.filling[host] = None
            if step in self.held():
                self.parity[host][half] = step
        newest = newest_common(self.halves)
        if newest == NO or newest in self.parity[host] or max(self.parity[host]) > self.keep >= 0:
            return  # nothing to do; or ranks are about to be told what would be overwritten
        whole = [ParityHalf(half, 1, step) for half, step in enumerate(self.parity[host]) if step != NO]
        half = choose_parity_half(whole, self.keep, lambda _, step: all(step in p for p in self.parity))
        self.parity[host][half] = NO
        self.filling[host] = half, newest


RANKS = 3
MOVES = st.lists(st.integers(0, RANKS), min_size=1, max_size=120)
"""0: the ranks take a step; i: host i - 1 gets on with its parity."""


def _play(moves: list[int]) -> None:
    model = Model(RANKS)
    for at, move in enumerate(moves):
        before, sealed, late = model.protected(), newest_common(model.halves), model.late
        if move == 0:
            model.barrier()
        else:
            model.encode(move - 1)
        told = model.kept.protected
        if move == 0 and told != NO:
            assert told in before, f"move {at}: {told} is called protected, but only {before} is; {model}"
            assert told in model.protected(), f"move {at}: what is called protected was overwritten; {model}"
        if model.late == late and sealed != NO:
            assert newest_common(model.halves) >= sealed, f"move {at}: what all held was overwritten; {model}"


@settings(max_examples=600, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(MOVES)
def test_what_is_called_protected_is_so_and_stays_so_however_parity_lags(moves: list[int]) -> None:
    _play(moves)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.permutations(range(1, RANKS + 1)), min_size=1, max_size=40), st.integers(1, 3))
def test_parity_that_keeps_up_protects_ever_newer_steps(orders: list[list[int]], steps: int) -> None:
    """Hosts that lag by a few steps only: nothing is left out for ever."""
    model = Model(RANKS)
    for order in orders:
        for _ in range(steps):
            model.barrier()
        for _ in range(2):
            for host in order:
                model.encode(host - 1)
    for _ in range(2):
        model.barrier()
    assert model.kept.protected > NO
    assert model.kept.protected >= model.step - 2 * steps - 2

"""How long a rank may take: learnt from whole steps, by a clock that the test moves."""

from __future__ import annotations

import pytest

from holdfast.proto.lease import PAGE_BYTES, LeasePage, Phase, Word
from holdfast.runtime import lease as lease_module
from holdfast.runtime.lease import LEASE_WARMUP_S, Lease


class Clock:
    now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lease_module, "time", made)
    return made


def allowed_s(lease: Lease) -> float:
    return lease.page.get(Word.LEASE_NS) / 1e9


def step(
    lease: Lease, clock: Clock, number: int, *, forward_s: float, optimizer_s: float, microbatches: int = 64
) -> None:
    for _ in range(microbatches):
        lease.renew(Phase.FORWARD)
        clock.now_ns += int(forward_s * 1e9)
    lease.renew(Phase.OPTIMIZER)
    clock.now_ns += int(optimizer_s * 1e9)
    lease.renew(Phase.USER)
    lease.committed(number, 1.0, 1.0, 1)


def make() -> Lease:
    return Lease(LeasePage(memoryview(bytearray(PAGE_BYTES))))


def test_until_a_warm_step_was_measured_a_gap_may_take_the_warm_up(clock: Clock) -> None:
    lease = make()
    assert allowed_s(lease) == LEASE_WARMUP_S
    step(lease, clock, 1, forward_s=5.0, optimizer_s=0.1, microbatches=1)
    lease.joined(2, 1)  # a fence right after the first step: nothing is known of a warm forward
    assert allowed_s(lease) == LEASE_WARMUP_S


def test_many_short_microbatches_do_not_make_it_forget_the_slow_optimizer(clock: Clock) -> None:
    lease = make()
    for number in (1, 2, 3, 4):
        step(lease, clock, number, forward_s=0.05, optimizer_s=3.0)
    assert allowed_s(lease) > 20.0


def test_time_in_user_code_is_not_counted(clock: Clock) -> None:
    lease = make()
    for number in (1, 2, 3):
        step(lease, clock, number, forward_s=0.05, optimizer_s=0.1)
        clock.now_ns += int(100e9)
    assert allowed_s(lease) < 2.0


def test_what_is_done_for_the_first_time_may_take_its_time_and_only_that(clock: Clock) -> None:
    """The first validation, once: a rank that hung in the step after it was noticed after a minute."""
    lease = make()
    for number in (1, 2, 3):
        step(lease, clock, number, forward_s=0.05, optimizer_s=0.1)
    before = allowed_s(lease)
    lease.warm_up()
    assert allowed_s(lease) == LEASE_WARMUP_S
    lease.warmed()
    assert allowed_s(lease) == pytest.approx(before, rel=0.05)

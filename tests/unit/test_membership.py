"""Single decisions of the coordinator's mind; whole histories are in sim/test_membership.py."""

from __future__ import annotations

from holdfast.launcher.actions import Action, Announce, Fence, Form, Record, StopJob
from holdfast.launcher.eventlog import last_generation
from holdfast.launcher.membership import Membership, State
from holdfast.launcher.slots import Joined
from holdfast.runtime.recovery.decide import Report

HELD = {0: frozenset({4, 5}), 1: frozenset({4, 5})}


def joined(
    rank: int, incarnation: int = 0, live: int = 0, plan: str = "p", until: int = 9, held: object = None
) -> Joined:
    kept = HELD if held is None else {}
    return Joined(incarnation, Report(rank, live, (rank,), kept), plan, "same", until)


def of(kind: type, actions: list[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def formed(held: object = None) -> Membership:
    """Two ranks that formed generation 1 at step 5."""
    membership = Membership(2)
    for rank in (0, 1):
        membership.on_rank_started(1, rank, 0, 100 + rank, "h", "fresh")
        membership.on_rank_hello(2, rank, 0, 100 + rank, "h", 0, -1)
    for rank in (0, 1):
        membership.on_join(3, rank, 1, joined(rank, live=5, held=held))
    assert membership.state is State.RUNNING
    return membership


def lose(membership: Membership, rank: int, incarnation: int = 0) -> list[Action]:
    return membership.on_rank_exited(10, rank, incarnation, "SIGKILL", detected_ns=10, last_progress_ns=4)


def replace(membership: Membership, rank: int, incarnation: int = 1) -> list[Action]:
    membership.on_rank_started(11, rank, incarnation, 200 + rank, "h", "standby")
    return membership.on_rank_hello(12, rank, incarnation, 200 + rank, "h", 0, -1)


def test_a_lost_rank_begins_a_new_generation_and_its_replacement_is_told_to_join_it() -> None:
    membership = formed()
    (fence,) = of(Fence, lose(membership, 1))
    assert isinstance(fence, Fence)
    assert (fence.generation, fence.ranks) == (2, (0,))
    (fence,) = of(Fence, replace(membership, 1))
    assert isinstance(fence, Fence)
    assert (fence.generation, fence.ranks) == (2, (1,))
    assert of(Form, membership.on_join(13, 0, 2, joined(0, live=5))) == []
    (form,) = of(Form, membership.on_join(14, 1, 2, joined(1, 1, live=0)))
    assert isinstance(form, Form)
    assert (form.generation, form.resume_step, form.ranks) == (2, 5, (0, 1))


def test_messages_of_an_older_generation_or_incarnation_change_nothing() -> None:
    membership = formed()
    lose(membership, 1)
    replace(membership, 1)
    assert of(Form, membership.on_join(13, 1, 1, joined(1, 1))) == []
    assert lose(membership, 1, incarnation=0) == []
    assert membership.on_committed(0, 1, 7, 20, 1.0, True) == []
    assert membership.generation == 2


def test_a_goodbye_that_comes_after_the_last_join_completes_the_generation() -> None:
    membership = formed()
    lose(membership, 1)
    replace(membership, 1)
    membership.on_join(13, 1, 2, joined(1, 1, live=0, until=5))
    (form,) = of(Form, membership.on_goodbye(14, 0, 0, 5))
    assert isinstance(form, Form)
    assert form.solo
    assert form.ranks == (1,)


def test_ranks_of_different_plans_are_refused_with_their_names() -> None:
    membership = formed()
    lose(membership, 1)
    replace(membership, 1)
    membership.on_join(13, 0, 2, joined(0, live=5))
    (stop,) = of(StopJob, membership.on_join(14, 1, 2, joined(1, 1, plan="q")))
    assert isinstance(stop, StopJob)
    assert stop.exit_code == 2
    assert "disagree on the plan (rank 0: p, rank 1: q)" in stop.reason


def test_nothing_left_after_training_began_is_a_failure_and_never_a_silent_restart() -> None:
    membership = formed(held={})
    membership.on_committed(0, 1, 6, 5, 1.0, False)
    for rank in (0, 1):
        lose(membership, rank)
        replace(membership, rank)
    generation = membership.generation
    membership.on_join(13, 0, generation, joined(0, 1, live=-1, held={}))
    (stop,) = of(StopJob, membership.on_join(14, 1, generation, joined(1, 1, live=-1, held={})))
    assert isinstance(stop, StopJob)
    assert stop.exit_code == 1


def test_a_recovery_ends_with_the_first_commit_and_says_its_spans() -> None:
    membership = formed()
    lose(membership, 1)
    replace(membership, 1)
    membership.on_join(1_000_013, 0, 2, joined(0, live=5))
    membership.on_join(2_000_010, 1, 2, joined(1, 1, live=0))
    for rank, rung in ((0, "live"), (1, "snapshot")):
        membership.on_restored(rank, 2, 3_000_010, [(rung, 10, 1)])
    actions = membership.on_committed(0, 2, 6, 5_000_010, 1.0, True)
    (record,), (line,) = of(Record, actions), of(Announce, actions)
    assert isinstance(record, Record)
    assert isinstance(line, Announce)
    assert (record.event["reform_ms"], record.event["restore_ms"], record.event["resume_ms"]) == (2.0, 1.0, 2.0)
    assert record.event["exact"] is True
    assert "rank 1 SIGKILL; resumed from step 5, step 6 committed; exact" in line.line
    assert membership.on_committed(1, 2, 6, 5_000_020, 1.0, True) == [], "once"


def test_the_event_record_tells_a_restarted_coordinator_what_stood() -> None:
    lines = [
        '{"event":"fence","generation":1}',
        '{"event":"formed","generation":1,"members":{"0":0,"1":0}}',
        '{"event":"committed"}',
    ]
    assert last_generation(lines) == (1, {0: 0, 1: 0})
    assert last_generation([*lines, '{"event":"fence","generation":2}', '{"event":"for']) == (2, {})
    assert last_generation([]) == (0, {})


def test_a_rank_that_another_coordinator_put_into_this_generation_begins_a_newer_one() -> None:
    """It will not join a generation that it is in, and those who wait to join are not in it."""
    membership = formed()
    lose(membership, 1)
    assert membership.generation == 2
    (fence,) = of(Fence, membership.on_rank_hello(15, 0, 0, 1, 0, 2, 5))
    assert isinstance(fence, Fence)
    assert fence.generation == 3
    (again,) = of(Fence, membership.on_rank_hello(15, 0, 0, 1, 0, 2, 5))
    assert isinstance(again, Fence)
    assert (again.generation, again.ranks) == (3, (0,)), "of an older one it joins like everybody"

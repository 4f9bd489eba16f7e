"""Between the control plane's messages and the values that job.py decides over."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from holdfast.proto.gen import control_pb2 as pb
from holdfast.runtime.recovery.decide import Report

from .actions import Action, Form
from .hosts import FIRST, Host, Roster, Term
from .job import Job
from .slots import Joined


@dataclass(slots=True, eq=False)
class Caller:
    """An agent's stream: who it is, and the orders for it."""

    told: Host
    ranks: list[tuple[int, int, int]]
    roster: Roster
    queue: asyncio.Queue[Any]
    promised: Term = FIRST
    asked: Term = FIRST
    backlog: list[Any] = field(default_factory=list)  # what it said before anybody was in charge here


def caller_of(hello: Any) -> Caller:
    """An agent as its first message describes it. Raises ProtocolViolation for a roster that cannot be read."""
    told = Host(
        index=hello.index,
        name=hello.host,
        address=hello.address,
        door=hello.door,
        coordinator=hello.coordinator,
        protector=hello.protector,
        capacity=hello.capacity,
        domain=hello.domain,
    )
    ranks = [(r.rank, r.incarnation, r.pid) for r in hello.ranks]
    return Caller(told, ranks, Roster.decoded(hello.roster), asyncio.Queue(), term_of(hello.promised))


def term_of(term: Any) -> Term:
    """A term; that of the first coordinator if the message has none."""
    return Term(int(term.number), str(term.leader))


def term_message(term: Term) -> Any:
    """The same, to be sent."""
    return pb.Term(number=term.number, leader=term.leader)


def joined_of(rank: int, incarnation: int, join: Any) -> Joined:
    """What a rank reports when it joins."""
    held = {int(h.rank): frozenset(int(s) for s in h.steps) for h in join.held}
    parity = {(int(p.placement), int(p.stripe), int(p.index)): frozenset(int(s) for s in p.steps) for p in join.parity}
    disk = frozenset(int(step) for step in join.disk)
    report = Report(
        rank,
        int(join.live_step),
        tuple(int(p) for p in join.peers),
        held,
        disk,
        ready_step=int(join.ready_step),
        told_step=int(join.told_step),
        units={int(unit): str(kind) for unit, kind in join.units.items()},
    )
    return Joined(
        incarnation,
        report,
        join.plan,
        join.compute,
        int(join.until),
        int(join.image_bytes),
        parity,
        join.recovery or "exact",
        int(join.inexact_since),
    )


def form_order(form: Form) -> Any:
    """The order that makes a generation stand."""
    members = [
        pb.Member(rank=rank, incarnation=incarnation, host=host, rung=source.rung, peer=source.peer, step=source.step)
        for rank, incarnation, host, source in form.members
    ]
    body = pb.Form(
        members=members,
        resume_step=form.resume_step,
        fresh=form.fresh,
        solo=form.solo,
        placement=form.placement,
        inexact=form.inexact.told,
        inexact_since=form.inexact.since,
    )
    return pb.RankOrder(generation=form.generation, form=body)


def heed_rank(job: Job, rank: int, incarnation: int, message: Any, *, now_ns: int, foreign: bool) -> list[Action]:
    """What a rank said, to the job. `foreign`: the clock of its host is another than ours."""
    generation = int(message.generation)
    match message.WhichOneof("body"):
        case "join":
            return job.on_join(now_ns, rank, generation, joined_of(rank, incarnation, message.join))
        case "store_set":
            body = message.store_set
            return job.on_store_set(rank, generation, body.key, body.value, body.gather)
        case "restored":
            body = message.restored
            sources = [(s.rung, int(s.bytes), int(s.pieces)) for s in body.sources]
            restored_ns = now_ns if foreign else int(body.restored_ns)
            return job.on_restored(rank, generation, restored_ns, sources, body.note, int(body.inexact_since))
        case "committed":
            body = message.committed
            committed_ns = now_ns if foreign else int(body.committed_ns)
            first = body.first_after_resume
            actions = job.on_committed(rank, generation, int(body.step), committed_ns, body.loss, first)
            actions += job.on_protected(int(body.protected_placement), int(body.protected_step))
            if body.replica_mismatch:
                actions += job.on_mismatch(rank, int(body.step), body.replica_mismatch)
            return actions
        case "suspect":
            return job.on_suspect(now_ns, rank, generation, message.suspect.what)
        case "goodbye":
            return job.on_goodbye(now_ns, rank, incarnation, int(message.goodbye.step))
    return []


def heed_agent(job: Job, host: int, message: Any, *, now_ns: int, foreign: bool) -> list[Action]:
    """What an agent said, to the job."""
    actions = job.on_agent_beat(now_ns, host)
    match message.WhichOneof("body"):
        case "started":
            body = message.started
            return job.on_rank_started(now_ns, body.rank, body.incarnation, body.pid, host, body.source)
        case "exited":
            body = message.exited
            detected_ns, progress_ns = int(body.detected_ns), int(body.last_progress_ns)
            if foreign:
                detected_ns, progress_ns = now_ns, now_ns - (detected_ns - progress_ns) if progress_ns else 0
            return job.on_rank_exited(
                now_ns,
                body.rank,
                body.incarnation,
                body.reason,
                detected_ns=detected_ns,
                last_progress_ns=progress_ns,
                finished=body.finished,
                phase=body.phase,
            )
        case "failed":
            return job.on_agent_failed(host, message.failed.reason, waits=message.failed.waits)
        case "learnt":
            return job.on_agent_learnt(now_ns, host, term_of(message.learnt.term), int(message.learnt.number))
    return actions

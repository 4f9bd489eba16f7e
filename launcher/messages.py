"""Between the control plane's messages and the values that job.py decides over."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from holdfast.proto.gen import control_pb2 as pb
from holdfast.runtime.recovery.decide import Report

from .actions import Form
from .hosts import Host, Roster
from .slots import Joined


@dataclass(slots=True, eq=False)
class Caller:
    """An agent's stream: who it is, and the orders for it."""

    told: Host
    ranks: list[tuple[int, int, int]]
    roster: Roster
    queue: asyncio.Queue[Any]


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
    return Caller(told, ranks, Roster.decoded(hello.roster), asyncio.Queue())


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

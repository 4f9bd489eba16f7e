"""Values between a rank and its coordinator: who it is, what it tells when it joins, what it is told. No sockets."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from holdfast.proto.gen import control_pb2 as pb

from .recovery.decide import Source
from .recovery.ladder import Mode


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is, from the environment that the agent gave it."""

    rank: int
    local_rank: int
    world_size: int
    incarnation: int
    job: str
    token: str
    agent: str
    smp: str
    coordinator: str
    faults: str
    snapshots: bool
    host: int = 0
    address: str = "127.0.0.1"
    protector: str = ""
    saver: str = ""
    checkpoints: str = ""
    resume: str = ""
    zero: str = ""
    recovery: Mode = "exact"
    snapshot_every: int = 0
    """Steps between snapshots; 0: as the script says."""


@dataclass(frozen=True, slots=True)
class Formed:
    """What a new generation is: its number, the resume step, and where every member's state comes from."""

    generation: int
    resume_step: int
    fresh: bool
    solo: bool
    sources: dict[int, Source]
    placement: int = 0
    """Number of the placement of parity; 0: the job has none."""
    inexact: str = ""
    """What is not exact about it, in words; empty: nothing is new."""
    inexact_since: int = 0
    """First step of the run that was not exact; 0: all were."""


@dataclass(frozen=True, slots=True)
class JoinReport:
    """What this rank tells when it joins."""

    plan: str
    compute: str
    live_step: int
    peers: tuple[int, ...]
    held: dict[int, list[int]]
    until: int
    image_bytes: int = 0
    parity: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    """(placement, stripe, index) -> steps, of the parity that this host holds."""
    disk: list[int] = field(default_factory=list)
    recovery: str = ""
    ready_step: int = -1
    told_step: int = -1
    units: dict[int, str] = field(default_factory=dict)
    inexact_since: int = 0

    def message(self) -> Any:
        """As the coordinator takes it."""
        return pb.Join(
            plan=self.plan,
            compute=self.compute,
            live_step=self.live_step,
            peers=self.peers,
            held=[pb.Held(rank=rank, steps=steps) for rank, steps in sorted(self.held.items())],
            joined_ns=time.monotonic_ns(),
            until=self.until,
            image_bytes=self.image_bytes,
            parity=[
                pb.HeldParity(placement=placement, stripe=stripe, index=index, steps=steps)
                for (placement, stripe, index), steps in sorted(self.parity.items())
            ],
            disk=self.disk,
            recovery=self.recovery,
            ready_step=self.ready_step,
            told_step=self.told_step,
            units=self.units,
            inexact_since=self.inexact_since,
        )

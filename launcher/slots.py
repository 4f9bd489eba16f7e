"""What the coordinator knows of one rank: its place in the job, and what it reports when it joins. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.proto.ids import NO_STEP
from holdfast.runtime.recovery.decide import Report

ParityKey = tuple[int, int, int]
"""Placement number, stripe, index of a parity chunk."""


@dataclass(slots=True)
class Slot:
    """One rank's place. `incarnation` is the newest that an agent started."""

    incarnation: int = 0
    pid: int = 0
    host: int = 0
    alive: bool = False
    connected: bool = False
    finished: bool = False
    ended: bool = False  # its process is gone, with exit code 0
    step: int = int(NO_STEP)


@dataclass(frozen=True, slots=True)
class Joined:
    """A rank's join: which process, and what it reported."""

    incarnation: int
    report: Report
    plan: str
    compute: str
    until: int
    image_bytes: int = 0
    parity: Mapping[ParityKey, frozenset[int]] = field(default_factory=dict)
    recovery: str = "exact"
    """How the job makes up for lost state: a mode of runtime/recovery/ladder.py."""
    inexact_since: int = 0
    """First step of its state that was not exact; 0: all were."""

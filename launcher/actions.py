"""What the coordinator's mind orders: values that coordinator.py carries out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.runtime.recovery.decide import Source

from .exactness import Formation


@dataclass(frozen=True, slots=True)
class Fence:
    """To every rank with a session: leave what is older than `generation` and join it."""

    generation: int
    reason: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """To every rank that joined: the generation stands."""

    generation: int
    members: tuple[tuple[int, int, int, Source], ...]  # rank, incarnation, host, where its state comes from
    resume_step: int
    fresh: bool
    solo: bool
    ranks: tuple[int, ...]
    placement: int = 0  # number of the placement of parity; 0: none
    inexact: Formation = field(default_factory=Formation)


@dataclass(frozen=True, slots=True)
class StoreAll:
    """To every member: the collected addresses."""

    generation: int
    values: Mapping[str, bytes]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopJob:
    """To all agents: the job cannot go on."""

    exit_code: int
    reason: str
    but: int = -1  # the host that said it, and knows


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the event record; also the coordinator's log."""

    event: dict[str, object]


@dataclass(frozen=True, slots=True)
class Announce:
    """One line for the operator's terminal."""

    line: str


@dataclass(frozen=True, slots=True)
class JobDone:
    """To all agents: every rank has finished."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """To one agent: the number of its host; `fenced`: it was given up, and its ranks must end."""

    host: int
    fenced: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """Try the door of a host."""

    host: int
    door: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """To one agent: start a process for a rank of a lost host."""

    host: int
    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Tell:
    """To all agents: the newest roster, and what their protectors must know."""

    roster: str
    topology: Mapping[int, str]  # host -> JSON


@dataclass(frozen=True, slots=True)
class StepDown:
    """This coordinator has no quorum any more: it is in charge of nothing."""

    reason: str


Action = Fence | Form | StoreAll | StopJob | Record | Announce | JobDone | Welcome | Probe | Adopt | Tell | StepDown

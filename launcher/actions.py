"""What the coordinator's mind orders: values that coordinator.py carries out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.runtime.recovery.decide import Source


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
    members: tuple[tuple[int, int, str, Source], ...]  # rank, incarnation, host, where its state comes from
    resume_step: int
    fresh: bool
    solo: bool
    ranks: tuple[int, ...]


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


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the event record; also the coordinator's log."""

    event: dict[str, object]


@dataclass(frozen=True, slots=True)
class Announce:
    """One line for the operator's terminal."""

    line: str


Action = Fence | Form | StoreAll | StopJob | Record | Announce

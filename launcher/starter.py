"""How a slot gets its next process: from a warm standby, from a fork that is on its way, or afresh.

    launch(slot) ──▶ standby ready      ──▶ Started(handler, "standby")          under a millisecond
                 ──▶ zygote warm        ──▶ None: ask again when it has forked   tens of milliseconds
                 ──▶ else, or too late  ──▶ Started(handler, "fresh")            seconds until it is up

All calls are made by the loop's thread. Not here: whether the slot gets one (detector.py), and what it means
to torch's agent and to the others (supervisor.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from holdfast.proto import env

from .processes import RankHandler, spawn_rank
from .standby import StandbyPool
from .watcher import Slot
from .zygote import Assignment

FORK_WAIT_S: Final = 1.0  # longest wait for a fork of a warm zygote before a fresh process is started


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How one rank is started: by command, and if it is a plain Python program, what a standby must run."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    stdout: str
    stderr: str
    error_file: str
    python: tuple[tuple[str, ...], bool] | None  # argv and whether it is a module


@dataclass(frozen=True, slots=True)
class Started:
    """A process for a slot, and where it came from ("standby" or "fresh")."""

    handler: RankHandler
    source: str


class Starter:
    """See the module's docstring."""

    def __init__(self, pool: StandbyPool | None) -> None:
        self.programs: dict[int, Program] = {}
        self.coordinator = ""
        self._pool = pool
        self._asked: dict[int, float] = {}  # local rank -> until when a fork is waited for

    def launch(self, slot: Slot) -> Started | None:
        """Start the slot's next process; None means that a fork is on its way: call again."""
        program = self.programs[slot.local_rank]
        changed = {env.COORDINATOR: self.coordinator, env.INCARNATION: str(slot.incarnation + 1)}
        environment = {**program.environment, **changed}
        if self._pool is not None and program.python is not None:
            argv, is_module = program.python
            assignment = Assignment(environment, list(argv), is_module, os.getcwd())
            handler = self._pool.assign(slot.local_rank, assignment, stdout=program.stdout, stderr=program.stderr)
            if handler is not None:
                self._asked.pop(slot.local_rank, None)
                return Started(handler, "standby")
            if self._pool.warm and self._may_wait(slot.local_rank):
                self._pool.refill(at_least=len(self._asked))
                return None
        self._asked.pop(slot.local_rank, None)
        command, logs = program.command, {"stdout": program.stdout, "stderr": program.stderr}
        handler = spawn_rank(slot.local_rank, command, environment, **logs)
        return Started(handler, "fresh")

    def _may_wait(self, local_rank: int) -> bool:
        now = time.monotonic()
        return now < self._asked.setdefault(local_rank, now + FORK_WAIT_S)

    def forget(self) -> None:
        """All ranks were started anew."""
        self._asked.clear()

    def refill(self) -> None:
        """Bring the standbys up to their number."""
        if self._pool is not None and self._pool.warm:
            self._pool.refill()


def python_argv(entrypoint: str, arguments: tuple[Any, ...]) -> tuple[tuple[str, ...], bool] | None:
    """(argv, is_module) if a standby can run it: our interpreter with a script or module."""
    rest = [str(argument) for argument in arguments]
    if entrypoint != sys.executable or rest[:1] != ["-u"]:
        return None
    rest = rest[1:]
    is_module = rest[:1] == ["-m"]
    argv = tuple(rest[1:] if is_module else rest)
    return (argv, is_module) if argv else None

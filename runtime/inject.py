"""Fires injected faults inside a rank: scripted ones at named points, ordered ones at the next renewal.

A scripted fault marks its bit in the lease page before it fires, and the page outlives the process, so each
fires once per job, and the agent can prove that it did. Costs nothing when no fault is configured.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence

from holdfast.proto.faults import FaultKind, ScriptedFault
from holdfast.proto.lease import LeasePage, Word


class InjectedFault(RuntimeError):
    """What FaultKind.RAISE raises: stands for an uncaught exception in user code."""


def fire(kind: FaultKind) -> None:
    """Do it to this process. Returns only for faults that a process can outlive (STOP, once continued)."""
    match kind:
        case FaultKind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultKind.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case FaultKind.EXIT:
            os._exit(13)
        case FaultKind.RAISE:
            raise InjectedFault("injected: uncaught exception in user code")
        case FaultKind.SEGV:
            ctypes.string_at(0)
        case FaultKind.HANG:
            ctypes.PyDLL(None).pause()  # PyDLL keeps the GIL: no Python thread of this process runs again
        case FaultKind.LOOP:
            while True:
                pass


class Injector:
    """Scripted faults of one rank."""

    def __init__(self, rank: int, faults: Sequence[ScriptedFault], page: LeasePage) -> None:
        self.faults = tuple(faults)
        self._page = page
        self._faults = [(index, fault) for index, fault in enumerate(faults) if fault.rank == rank]

    def at(self, point: str, step: int = -1, microbatch: int = -1) -> None:
        """The rank came to `point`; fires what is due there."""
        for index, fault in self._faults:
            if (
                fault.at == point
                and fault.step in (-1, step)
                and fault.microbatch in (-1, microbatch)
                and not self._page.get(Word.FIRED_MASK) >> index & 1
            ):
                self._page.set(Word.FIRED_MASK, self._page.get(Word.FIRED_MASK) | 1 << index)
                fire(fault.kind)

    def ordered(self, kind: int) -> None:
        """An order came through the lease page."""
        fire(FaultKind(kind))

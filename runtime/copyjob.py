"""One job of the snapshots' copy thread, and how a half is made to hold nothing; see snapshot.py."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Final

from holdfast.ckpt.memory.arena import Half
from holdfast.proto.errors import SnapshotCorrupt

from .state import Entry

NO_PLAN: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class CopyJob:
    """What is copied into which half."""

    step: int
    half: int
    entries: list[Entry]
    metadata: Any
    mark: Any
    protected: int
    replicas: dict[int, list[Entry]]
    """What each of its holders keeps of replicated state; empty if parity of it is not computed here."""


def discard(half: Half, step: int, incarnation: int) -> None:
    """What is redone from an older step need not become the same: nobody may restore `step` from this half."""
    with contextlib.suppress(SnapshotCorrupt):  # which is not restored from either
        half.begin(step, NO_PLAN, incarnation, [], {})

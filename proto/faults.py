"""Faults that can be injected, and the small language in which a scripted fault is written.

    rank=2,step=5,at=backward:3,kind=kill          fires once, when rank 2 in step 5 comes to backward of
                                                   microbatch 3; several are separated by ';'

Points (`at=`): forward:M and backward:M (before microbatch M), exchange (gradient exchange), commit
(before the barrier), optimizer (gradients final everywhere, update about to run), applied (updated, snapshot
not begun), gather (ZeRO-1: the updated weights of a layer are here, of another one not), snapshot (first half of
the state copied), user (between steps); in a recovery: join, build, restore (there `step` is the step of the rank's
live state, so that a survivor can be hit: 0 for a replacement).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

POINTS: Final = (
    "forward",
    "backward",
    "exchange",
    "commit",
    "optimizer",
    "applied",
    "gather",
    "snapshot",
    "user",
    "join",
    "build",
    "restore",
)
RECOVERY_POINTS: Final = ("join", "build", "restore")


class FaultKind(IntEnum):
    """What is done to the process."""

    KILL = 0  # SIGKILL to itself (or from outside)
    STOP = 1  # SIGSTOP
    EXIT = 2  # os._exit(13)
    RAISE = 3  # uncaught exception in user code
    SEGV = 4  # a real segmentation fault
    HANG = 5  # C call that holds the GIL for ever
    LOOP = 6  # infinite Python loop


@dataclass(frozen=True, slots=True)
class ScriptedFault:
    """One fault. `step` is the step being computed (1-based); for recovery points it is ignored if -1."""

    rank: int
    kind: FaultKind
    at: str
    microbatch: int = -1
    step: int = -1

    def __str__(self) -> str:
        at = f"{self.at}:{self.microbatch}" if self.microbatch >= 0 else self.at
        return f"rank={self.rank},step={self.step},at={at},kind={self.kind.name.lower()}"


def parse_faults(text: str) -> tuple[ScriptedFault, ...]:
    """Parse 'rank=..,step=..,at=..,kind=..;...'. At most 64 faults (one bit each in the lease page).

    Raises ValueError with what is wrong and what would be right.
    """
    faults = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        fields: dict[str, str] = {}
        for field in part.split(","):
            key, sep, value = field.partition("=")
            if not sep or key.strip() not in ("rank", "step", "at", "kind"):
                raise ValueError(f"fault {part!r}: {field!r} is not one of rank=, step=, at=, kind=")
            fields[key.strip()] = value.strip()
        point, _, microbatch = fields.get("at", "user").partition(":")
        if point not in POINTS:
            raise ValueError(f"fault {part!r}: no point {point!r}; one of {', '.join(POINTS)}")
        kind = fields.get("kind", "kill").upper()
        if kind not in FaultKind.__members__:
            known = ", ".join(member.lower() for member in FaultKind.__members__)
            raise ValueError(f"fault {part!r}: no kind {kind.lower()!r}; one of {known}")
        try:
            faults.append(
                ScriptedFault(
                    rank=int(fields.get("rank", "0")),
                    kind=FaultKind[kind],
                    at=point,
                    microbatch=int(microbatch) if microbatch else -1,
                    step=int(fields.get("step", "-1")),
                )
            )
        except ValueError:
            raise ValueError(f"fault {part!r}: rank, step and the microbatch are integers") from None
    if len(faults) > 64:
        raise ValueError(f"{len(faults)} scripted faults; at most 64 fit in the lease page")
    return tuple(faults)

"""The error tree: who acts on it, and did anything happen.

    HoldfastError                 every error prints its fields: message [generation=7 rank=3]
    ├─ ConfigError                operator; nothing has started                   effect none     exit 2
    ├─ PeerLost                   rank: abort communication, join a new generation  effect unknown
    ├─ StaleGeneration            rank: drop the message, rejoin                  effect none
    ├─ SnapshotError
    │  ├─ SnapshotIncomplete      ckpt: names the missing pieces                  effect none
    │  ├─ SnapshotCorrupt         ckpt: digest differs; treated as missing        effect none
    │  └─ SnapshotLost            operator: beyond redundancy                     effect none
    ├─ ProtocolViolation          a peer broke the contract: end that session     effect unknown
    └─ JobFailed                  operator: the job ended, this says why          effect unknown   exit 1
    Fenced(BaseException)         not an error: this rank must leave the step and join `generation`

`Fenced` derives from BaseException so that a user's `except Exception` around a layer cannot swallow it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Effect = Literal["none", "unknown"]


class HoldfastError(Exception):
    """Base of all errors of ours. Fields are printed after the message, in the order given."""

    effect: ClassVar[Effect] = "unknown"
    handled_by: ClassVar[str] = "operator"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        if not self.fields:
            return self.message
        listed = " ".join(f"{key}={value}" for key, value in self.fields.items())
        return f"{self.message} [{listed}]"


class ConfigError(HoldfastError):
    """What the operator asked for cannot be done; nothing has started."""

    effect: ClassVar[Effect] = "none"
    exit_code: ClassVar[int] = 2


class PeerLost(HoldfastError):
    """Communication with a peer broke. Says nothing about who is to blame: the agent knows."""

    handled_by: ClassVar[str] = "rank"


class StaleGeneration(HoldfastError):
    """A message or frame of an older generation arrived; it was dropped."""

    effect: ClassVar[Effect] = "none"
    handled_by: ClassVar[str] = "rank"


class SnapshotError(HoldfastError):
    """Something about kept state."""

    effect: ClassVar[Effect] = "none"
    handled_by: ClassVar[str] = "ckpt"


class SnapshotIncomplete(SnapshotError):
    """Pieces are missing; names them."""


class SnapshotCorrupt(SnapshotError):
    """A digest differs from what was sealed; the piece counts as missing."""


class SnapshotLost(SnapshotError):
    """No source left for some state; names what would help."""

    handled_by: ClassVar[str] = "operator"


class ProtocolViolation(HoldfastError):
    """A peer sent what the protocol does not allow."""


class JobFailed(HoldfastError):
    """The job cannot go on; the message says why."""


class Fenced(BaseException):
    """This rank's generation is over: leave the step at once and join `generation`."""

    def __init__(self, generation: int, reason: str) -> None:
        super().__init__(f"fenced by generation {generation}: {reason}")
        self.generation = generation
        self.reason = reason

    def again(self) -> Fenced:
        """A copy to raise: one shared instance would keep the frames, and the tensors, of whoever raised it."""
        return Fenced(self.generation, self.reason)

"""The lease page: how a rank shows that it lives, with no RPC on the path of a healthy step.

One 4 KiB page of shared memory per rank *slot*, owned by the agent and mapped by each incarnation of
the rank. Every field is one aligned 8-byte word with one writer, so a reader sees old or new, never half.

    training thread ── renew() at each microbatch boundary ──▶ PROGRESS_NS PHASE STEP ACTION LEASE_NS
    monitor thread  ── beat()  ten times a second          ──▶ BEAT_NS
    agent           ── polls both, and writes              ──▶ FAULT_ORDER (failure injection)

The training thread renews the lease itself: a helper thread would hide a hang that holds the GIL.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

PAGE_BYTES: Final = 4096
_WORDS: Final = PAGE_BYTES // 8


class Phase(IntEnum):
    """What the training thread does; decides which lease applies."""

    STARTING = 0  # not joined yet: imports, model building
    FORWARD = 1
    BACKWARD = 2
    EXCHANGE = 3  # gradient exchange and norms, own compute
    OPTIMIZER = 4
    SNAPSHOT = 5  # waiting for the copy fence
    WAITING = 6  # blocked on a peer: not this rank's fault
    RECOVERING = 7  # joining, building groups, restoring
    USER = 8  # user code between steps
    VALIDATE = 9
    DONE = 10


COMPUTE_PHASES: Final = frozenset(
    {Phase.FORWARD, Phase.BACKWARD, Phase.EXCHANGE, Phase.OPTIMIZER, Phase.SNAPSHOT, Phase.VALIDATE}
)


class Word(IntEnum):
    """Index of each 8-byte word in the page."""

    BEAT_NS = 0  # monotonic clock, monitor thread
    PROGRESS_NS = 1  # monotonic clock, training thread
    PHASE = 2
    STEP = 3  # step of the live state (committed), +1 so that 0 means none
    ACTION = 4  # counts renewals
    LEASE_NS = 5  # longest gap the training thread allows itself in a compute phase now
    INCARNATION = 6
    GENERATION = 7
    SNAPSHOT_STEP = 8  # newest step wholly copied to the snapshot manager, +1
    FAULT_ORDER = 9  # FaultKind number + 1, written by the agent, cleared by the rank
    FIRED_MASK = 10  # bit i: scripted fault i has fired
    STEP_NS = 11  # duration of the last committed step
    COMMIT_NS = 12  # monotonic clock of the last commit
    SKIPPED = 13  # snapshots skipped
    TOKENS = 14
    LOSS_MICRO = 15  # last loss in millionths, two's complement


class LeasePage:
    """View of a lease page over any writable buffer of PAGE_BYTES bytes."""

    def __init__(self, buffer: memoryview) -> None:
        if buffer.nbytes < PAGE_BYTES:
            raise ValueError(f"a lease page has {PAGE_BYTES} bytes, got {buffer.nbytes}")
        self._words = buffer[:PAGE_BYTES].cast("B").cast("Q")

    def get(self, word: Word) -> int:
        """Value of one word."""
        return self._words[word]

    def set(self, word: Word, value: int) -> None:
        """Store one word (a single 8-byte store)."""
        self._words[word] = value & 0xFFFF_FFFF_FFFF_FFFF

    def renew(self, now_ns: int, phase: Phase) -> None:
        """The training thread made progress and is now in `phase`.

        The phase comes last, and a watcher reads it first: after a long wait for a peer, that the phase is one that may
        not take so long must never be seen without the progress that began it.
        """
        words = self._words
        words[Word.PROGRESS_NS] = now_ns
        words[Word.ACTION] = words[Word.ACTION] + 1
        words[Word.PHASE] = phase

    @property
    def phase(self) -> Phase:
        """What the training thread last said it does."""
        return Phase(self._words[Word.PHASE])

    def reset(self, incarnation: int, now_ns: int) -> None:
        """A new process takes the slot. FIRED_MASK stays: a scripted fault fires once per job."""
        fired = self._words[Word.FIRED_MASK]
        for index in range(len(Word)):
            self._words[index] = 0
        self._words[Word.FIRED_MASK] = fired
        self._words[Word.INCARNATION] = incarnation
        self._words[Word.BEAT_NS] = now_ns
        self._words[Word.PROGRESS_NS] = now_ns

    def release(self) -> None:
        """Drop the view so that the mapping under it can be closed."""
        self._words.release()

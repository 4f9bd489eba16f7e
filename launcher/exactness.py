"""Whether a run is still what an unbroken one would be, and what is said where it is not. Pure.

    a Form with rungs "stale" or "neighbours" ─▶ since: the first step made from such a state
                                              ─▶ event record, status, last line of the run

Ranks carry `since` with their state and say it whenever they join or connect: so it outlives a coordinator, and a
checkpoint from which another run goes on. Invariant: it is never taken back while the job lives, unless all ranks go
back to a state from before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from holdfast.runtime.recovery.decide import Resume
from holdfast.runtime.recovery.ladder import INEXACT, announce

WHAT_HELPS: Final = (
    "What helps: snapshots (--recovery auto), --recovery neighbours+ for the first and last layers, --checkpoint-dir"
)


@dataclass(frozen=True, slots=True)
class Lossy:
    """One rank whose state is not exact: in words, and for the record."""

    told: str
    facts: Mapping[str, object]
    """Rung, stage; for a stale one the step it went back to, and how many steps that is."""


@dataclass(frozen=True, slots=True)
class Formation:
    """What is not exact about one generation."""

    ranks: Mapping[int, Lossy] = field(default_factory=dict)
    since: int = 0
    """First step of the run that was not exact; 0: all were."""

    @property
    def told(self) -> str:
        """In words; empty if nothing is new."""
        ordered = sorted(self.ranks.values(), key=lambda lossy: str(lossy.facts["stage"]).zfill(6))
        return "; ".join(dict.fromkeys(lossy.told for lossy in ordered))


@dataclass(slots=True)
class Exactness:
    """Of one job."""

    since: int = 0
    """First step that was not exact; 0: all were."""
    count: int = 0
    """Recoveries that were not exact, as far as this coordinator saw them."""
    last: str = ""
    """What the last of them did."""

    def heard(self, since: int) -> None:
        """A rank says what its state carries."""
        if since:
            self.since = min(self.since or since, since)

    def formed(
        self, decision: Resume, carried: Mapping[int, int], stages: Mapping[int, int], before: Formation | None = None
    ) -> Formation:
        """A generation goes on like this.

        `carried`: what each rank's state, before it is restored, says of itself; `before`: the generation that this
        one follows in the same recovery. A rank that was rebuilt in that one is live now, and no more exact for it.
        """
        live = {rank for rank, source in decision.sources.items() if source.rung in ("live", "ready")}
        kept = [carried[rank] for rank in live]
        if self.since > decision.step and not any(kept):
            self.since = 0  # everybody is back at a state from before
        for since in kept:
            self.heard(since)
        earlier = before.ranks if before is not None else {}
        ranks = {rank: lossy for rank, lossy in earlier.items() if rank in live and carried[rank]}
        for rank, source in decision.sources.items():
            if source.rung in INEXACT:
                told = announce({rank: source}, stages, decision.step)
                aged = {"step": source.step, "age": decision.step - source.step} if source.rung == "stale" else {}
                ranks[rank] = Lossy(told, {"rung": source.rung, "stage": stages[rank], **aged})
        if ranks:
            self.heard(decision.step + 1)
        return Formation(dict(sorted(ranks.items())), self.since)

    def recovered(self, formation: Formation) -> None:
        """The first step after a recovery was committed; a generation that broke off before that does not count."""
        if formation.told:
            self.count += 1
            self.last = formation.told

    def status(self) -> dict[str, object]:
        """For `holdfast status`."""
        return {
            "exact": not self.since,
            "inexact_since": self.since,
            "inexact_recoveries": self.count,
            "last": self.last,
        }

    def last_line(self) -> str:
        """What is said when the job is done; empty if there is nothing to say."""
        if not self.since:
            return ""
        again = f"; {self.count} recoveries were not, the last: {self.last}" if self.count else ""
        return f"done, NOT exact since step {self.since}{again}"

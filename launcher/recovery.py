"""One recovery, from the first signal to the first step committed after it: what the record and the terminal say.

    last sign of life ─detect─▶ first signal ─reform─▶ Form sent ─restore─▶ all restored ─resume─▶ step committed

A failure during a recovery adds a cause; the spans then run from the first signal to the last generation's
commit. Pure: times are passed in (monotonic nanoseconds, one host).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.proto.ids import NO_STEP
from holdfast.runtime.recovery.decide import Resume

from .exactness import Formation


def span_ms(start_ns: int, end_ns: int) -> float:
    """Milliseconds between two times; 0 if either is unknown."""
    return round(max(0, end_ns - start_ns) / 1e6, 3) if start_ns and end_ns else 0.0


@dataclass(slots=True)
class Recovery:
    """A recovery under way."""

    causes: list[dict[str, object]] = field(default_factory=list)
    detected_ns: int = 0
    last_progress_ns: int = 0
    formed_ns: int = 0
    restored_ns: int = 0
    restored: set[int] = field(default_factory=set)
    sources: dict[str, list[int]] = field(default_factory=dict)
    resume_step: int = NO_STEP
    step_before: int = NO_STEP
    inexact: Formation = field(default_factory=Formation)
    notes: dict[int, str] = field(default_factory=dict)
    """Rank -> how its state was made that is not exact."""

    def begin_again(self, now_ns: int, cause: dict[str, object] | None) -> None:
        """A generation of this recovery begins (its first, or one that supersedes another)."""
        self.restored, self.restored_ns, self.sources = set(), 0, {}
        if cause is not None:
            self.causes.append(cause)
            if not self.detected_ns:
                detected, progress = cause.get("detected_ns"), cause.get("last_progress_ns")
                self.detected_ns = detected if isinstance(detected, int) and detected else now_ns
                self.last_progress_ns = progress if isinstance(progress, int) else 0
        self.detected_ns = self.detected_ns or now_ns

    def formed(self, now_ns: int, step: int, formation: Formation) -> None:
        """A generation stands, which goes on from `step`."""
        self.formed_ns, self.resume_step, self.inexact = now_ns, step, formation

    def ended(self, generation: int, step: int, committed_ns: int) -> tuple[dict[str, object], str]:
        """The event record and the operator's line."""
        spans = {
            "detect_ms": span_ms(self.last_progress_ns, self.detected_ns),
            "reform_ms": span_ms(self.detected_ns, self.formed_ns),
            "restore_ms": span_ms(self.formed_ns, self.restored_ns),
            "resume_ms": span_ms(self.restored_ns, committed_ns),
        }
        total_ms = span_ms(self.detected_ns, committed_ns)
        event: dict[str, object] = {
            "event": "recovery",
            "generation": generation,
            "causes": self.causes,
            "resume_step": self.resume_step,
            "step_before": self.step_before,
            "first_step": step,
            "exact": not self.inexact.told,
            "sources": {
                rung: {"ranks": ranks, "bytes": size, "pieces": pieces}
                for rung, (ranks, size, pieces) in sorted(self.sources.items())
            },
            "total_ms": total_ms,
            **spans,
        }
        if self.inexact.told:
            event["inexact"] = {
                str(rank): {**lossy.facts, "how": self.notes.get(rank, "")}
                for rank, lossy in self.inexact.ranks.items()
            }
        lost = "; ".join(f"rank {cause['rank']} {cause['reason']}" for cause in self.causes) or "unknown"
        steps = ", ".join(f"{name[:-3]} {value:.0f}" for name, value in spans.items())
        line = (
            f"recovered in {total_ms:.0f} ms ({steps} ms): {lost}; resumed from step {self.resume_step}"
            f"{' (a checkpoint on disk)' if 'disk' in self.sources else ''}, step {step} committed; "
            f"{f'NOT exact: {self.inexact.told}' if self.inexact.told else 'exact'}"
        )
        return event, line


def formed_event(
    generation: int, members: Mapping[int, int], decision: Resume, formation: Formation, *, solo: bool
) -> dict[str, object]:
    """The record of a generation that stands; a restarted coordinator reads its members (rank -> incarnation)."""
    event: dict[str, object] = {
        "event": "formed",
        "generation": generation,
        "members": {str(rank): incarnation for rank, incarnation in members.items()},
        "resume_step": decision.step,
        "fresh": decision.fresh,
        "solo": solo,
    }
    return event | ({"exact": False, "inexact": formation.told} if formation.told else {})

"""Whether the ranks that joined can train together, and from what they have. Pure; the reasons are for the operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from holdfast.runtime.recovery.decide import Impossible, Reachable, Resume
from holdfast.runtime.recovery.ladder import INEXACT, decide

from .slots import Joined

_SAME = (("way to recover", "recovery"), ("plan", "plan"), ("numerics", "compute"), ("last step", "until"))


def mismatch(joins: Mapping[int, Joined]) -> str:
    """Why these processes cannot train together, or ''."""
    for what, field_name in _SAME:
        values = {rank: getattr(joined, field_name) for rank, joined in sorted(joins.items())}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in values.items())
            return f"the ranks disagree on the {what} ({listed}); all must run the same script, arguments and build"
    return ""


def choose(joins: Mapping[int, Joined], reachable: Reachable, *, solo: bool) -> Resume | Impossible:
    """The step to resume from and everybody's source, as the ranks were started to recover. `solo`: without a group."""
    mode = next(iter(joins.values())).recovery
    return decide(mode, [joins[rank].report for rank in sorted(joins)], reachable, solo=solo)


def why_not(decision: Resume, joins: Mapping[int, Joined], finished: Collection[int], reached: int) -> str:
    """Why a generation that could resume must not, or ''. `finished`: ranks that left; `reached`: the newest step."""
    if decision.fresh and (reached > 0 or any(joined.incarnation for joined in joins.values())):
        return f"no rank has any state left, and step {max(reached, 0)} was reached: nothing to resume from"
    until = max(joined.until for joined in joins.values())
    if finished and decision.step != until:
        gone = ", ".join(map(str, sorted(finished)))
        return f"ranks {gone} left before step {until}; the state left is of step {decision.step}"
    if finished and any(source.rung in INEXACT for source in decision.sources.values()):
        return "a rank was lost after the last step, when ranks that it could be rebuilt from had left"
    return ""

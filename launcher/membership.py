"""The coordinator's mind: who is a member, when a generation ends, what the next one resumes from. Pure.

    events (hello, exited, join, restored, ...) ──▶ Membership.on_*(now_ns) ──▶ list of Action

         ┌──── every rank joined, Form sent ────┐
      FORMING(g) ◀── a member is lost ─────── RUNNING(g)        a further failure while FORMING is simply
         └──── a joined rank is lost: g+1 ──┐                   FORMING(g+1): there is no nested recovery
         └◀──────────────────────────────────┘

No socket, clock or thread: time is passed in, actions are carried out by coordinator.py. Invariants:

* `generation` only rises; a Form is sent once per generation, to exactly the ranks that joined it;
* a Form names every rank of the job once, each with the incarnation that joined, or counts it as finished;
* a message of an older generation changes nothing;
* a rank that finished (said goodbye after the final barrier) is never needed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum

from holdfast.proto.ids import NO_STEP
from holdfast.runtime.recovery.decide import Impossible, Resume, Source
from holdfast.runtime.recovery.ladder import stages

from .actions import Action, Announce, Fence, Form, JobDone, Record, StopJob, StoreAll
from .exactness import WHAT_HELPS, Exactness
from .recovery import Recovery, formed_event
from .slots import Joined, Slot
from .verdict import choose, mismatch, why_not

SUSPECT_GRACE_NS = 500_000_000
"""How long a broken connection without a known death waits for the agent to name the dead."""


class State(Enum):
    """What the coordinator waits for."""

    FORMING = "forming"  # joins
    RUNNING = "running"  # the next failure


class Membership:
    """See the module's docstring. One instance per coordinator; not thread-safe (one event loop owns it)."""

    def __init__(self, world_size: int, *, generation: int = 0, members: Mapping[int, int] | None = None) -> None:
        """`generation`, `members`: what the log of a killed coordinator says stood; members rank -> incarnation."""
        self.world_size = world_size
        self.generation = generation
        self.state = State.RUNNING if members else State.FORMING
        self.slots = {rank: Slot() for rank in range(world_size)}
        self.members: dict[int, int] = dict(members or {})
        for rank, incarnation in self.members.items():
            self.slots[rank].incarnation = incarnation
            self.slots[rank].alive = True
        self._joins: dict[int, Joined] = {}
        self._gathered: dict[str, bytes] = {}
        self._gathered_from: set[int] = set()
        self._recovery: Recovery | None = None
        self._suspected: tuple[int, int, str] | None = None  # deadline, generation, reason
        self.recoveries = 0
        self.exactness = Exactness()
        self.placement = 0  # number of the placement of parity; 0: none
        self.step = int(NO_STEP)
        self.loss = float("nan")

    # ---- agents -------------------------------------------------------------------------------------

    def on_host_ranks(self, now_ns: int, host: int, ranks: Iterable[tuple[int, int, int]]) -> list[Action]:
        """An agent (re)connected and says which process holds each of its ranks: (rank, incarnation, pid)."""
        actions: list[Action] = []
        for rank, incarnation, pid in ranks:
            actions += self.on_rank_started(now_ns, rank, incarnation, pid, host, "")
        return actions

    def on_rank_started(
        self, now_ns: int, rank: int, incarnation: int, pid: int, host: int, source: str
    ) -> list[Action]:
        """An agent started a process for `rank`."""
        slot = self.slots[rank]
        if incarnation < slot.incarnation:
            return []
        replaced = incarnation > slot.incarnation and self._counts(rank)
        if incarnation > slot.incarnation:
            slot.finished = slot.ended = False  # the one before left the last barrier, this one has nothing yet
        slot.incarnation, slot.pid, slot.host, slot.alive = incarnation, pid, host, True
        actions: list[Action] = []
        if source:
            actions.append(
                Record(
                    {
                        "event": "rank_started",
                        "rank": rank,
                        "incarnation": incarnation,
                        "pid": pid,
                        "host": host,
                        "source": source,
                    }
                )
            )
        if replaced:
            # The death itself was never heard of: the coordinator was away when the agent told it.
            actions += self._begin(now_ns, f"rank {rank} was replaced", cause={"rank": rank, "reason": "unknown"})
        return actions

    def on_rank_exited(
        self,
        now_ns: int,
        rank: int,
        incarnation: int,
        reason: str,
        *,
        detected_ns: int,
        last_progress_ns: int,
        finished: bool = False,
        phase: str = "",
    ) -> list[Action]:
        """An agent saw the end of a process (or ended it because it hung)."""
        slot = self.slots[rank]
        if incarnation < slot.incarnation:
            return []
        slot.alive = slot.connected = False
        if finished:
            slot.finished = slot.ended = True
            record: Action = Record({"event": "rank_finished", "rank": rank, "incarnation": incarnation})
            said: list[Action] = [Announce(line)] if (line := self.exactness.last_line()) else []
            done = [*said, JobDone()] if all(slot.ended for slot in self.slots.values()) else []
            return [record, *done, *self._form_if_waiting(now_ns)]
        cause: dict[str, object] = {
            "rank": rank,
            "incarnation": incarnation,
            "reason": reason,
            "phase": phase,
            "detected_ns": detected_ns,
            "last_progress_ns": last_progress_ns,
        }
        actions: list[Action] = [Record({"event": "rank_lost", **cause})]
        if slot.finished:
            return actions  # it had left the last barrier; its replacement will restore alone
        if self._counts(rank):
            actions += self._begin(now_ns, f"rank {rank} lost: {reason}", cause=cause)
        return actions

    # ---- ranks --------------------------------------------------------------------------------------

    def on_rank_hello(
        self,
        now_ns: int,
        rank: int,
        incarnation: int,
        pid: int,
        host: int,
        generation: int,
        live_step: int,
        since: int = 0,
    ) -> list[Action]:
        """A rank opened its session, perhaps again (this coordinator was restarted); `since`: as for on_restored."""
        self.exactness.heard(since)
        slot = self.slots[rank]
        if incarnation < slot.incarnation:
            return []  # a fenced process that does not know it yet
        del host
        slot.connected = slot.alive = True
        slot.pid = pid  # where it runs its agent says, whose number may be newer than the rank's
        newer = incarnation > slot.incarnation
        if newer:
            slot.finished = slot.ended = False
        slot.incarnation = incarnation
        if generation > self.generation:
            # The log lost its tail; the ranks know better.
            self.generation = generation
        if self.state is State.FORMING:
            if generation and generation == self.generation:
                # Another coordinator formed it: the rank will not join it again, and not all may be in it.
                return self._begin(now_ns, f"rank {rank} comes from a generation of another coordinator")
            return [Fence(self.generation, "joining", (rank,))] if self.generation else self._begin(now_ns, "start")
        if newer or self.members.get(rank) != incarnation or generation != self.generation:
            return self._begin(now_ns, f"rank {rank} joins")
        return []

    def on_join(self, now_ns: int, rank: int, generation: int, joined: Joined) -> list[Action]:
        """A rank left its old generation and can be part of `generation`."""
        slot = self.slots[rank]
        if joined.incarnation < slot.incarnation:
            return []
        if generation > self.generation:
            self.generation = generation  # begun by a coordinator that is gone
            return self._begin(now_ns, f"rank {rank} waits for a generation of another coordinator")
        if generation != self.generation or self.state is not State.FORMING:
            return [Fence(self.generation, "a newer generation", (rank,))] if generation < self.generation else []
        self._joins[rank] = joined
        return self._form_if_complete(now_ns)

    def on_store_set(self, rank: int, generation: int, key: str, value: bytes, gather: bool) -> list[Action]:
        """A member published an address of its group."""
        if generation != self.generation or self.state is not State.RUNNING:
            return []
        ranks = tuple(sorted(self.members))
        if not gather:
            return [StoreAll(generation, {key: value}, ranks)]
        self._gathered[key] = value
        self._gathered_from.add(rank)
        if len(self._gathered_from) < len(ranks):
            return []
        values, self._gathered, self._gathered_from = self._gathered, {}, set()
        return [StoreAll(generation, values, ranks)]

    def on_restored(
        self,
        rank: int,
        generation: int,
        restored_ns: int,
        sources: Iterable[tuple[str, int, int]],
        note: str = "",
        since: int = 0,
    ) -> list[Action]:
        """A member's state is the resume step's; `sources` are (rung, bytes, pieces).

        `note`: how, if it is not exact; `since`: the first step that was not.
        """
        self.exactness.heard(since)
        recovery = self._recovery
        if generation != self.generation or recovery is None:
            return []
        recovery.restored.add(rank)
        if note:
            recovery.notes[rank] = note
        recovery.restored_ns = max(recovery.restored_ns, restored_ns)
        for rung, size, pieces in sources:
            total = recovery.sources.setdefault(rung, [0, 0, 0])
            total[0] += 1
            total[1] += size
            total[2] += pieces
        return []

    def on_committed(
        self, rank: int, generation: int, step: int, committed_ns: int, loss: float, first: bool
    ) -> list[Action]:
        """A member committed a step: the first after a resume, or one for the display."""
        if generation != self.generation:
            return []
        self.slots[rank].step = step
        self.step, self.loss = max(self.step, step), loss
        if not first or self._recovery is None or self.state is not State.RUNNING:
            return []
        return self._recovered(self._recovery, step, committed_ns)

    def on_suspect(self, now_ns: int, rank: int, generation: int, what: str) -> list[Action]:
        """A member's communication broke. The agents usually name the dead within milliseconds."""
        if generation == self.generation and self.state is State.RUNNING and self._suspected is None:
            self._suspected = (now_ns + SUSPECT_GRACE_NS, generation, f"rank {rank}: {what}")
        return []

    def on_goodbye(self, now_ns: int, rank: int, incarnation: int, step: int) -> list[Action]:
        """A rank passed the final barrier: all state after `step` is kept, and it takes part no more."""
        slot = self.slots[rank]
        if incarnation == slot.incarnation:
            slot.finished, slot.step = True, step
        return self._form_if_waiting(now_ns)

    def on_session_lost(self, rank: int, incarnation: int) -> list[Action]:
        """A rank's stream ended. Its agent says whether it died; a live rank connects again."""
        slot = self.slots[rank]
        if incarnation == slot.incarnation:
            slot.connected = False
        return []

    def on_tick(self, now_ns: int) -> list[Action]:
        """Time passed."""
        if self._suspected is None or now_ns < self._suspected[0]:
            return []
        _, generation, reason = self._suspected
        self._suspected = None
        if generation != self.generation or self.state is not State.RUNNING:
            return []
        return self._begin(now_ns, reason, cause={"rank": None, "reason": reason, "detected_ns": now_ns})

    def next_tick_ns(self) -> int | None:
        """When on_tick wants to be called, if at all."""
        return self._suspected[0] if self._suspected is not None else None

    # ---- decisions ----------------------------------------------------------------------------------

    def _counts(self, rank: int) -> bool:
        """Whether losing `rank` ends what stands or is being formed."""
        return rank in self.members if self.state is State.RUNNING else rank in self._joins

    def _begin(self, now_ns: int, reason: str, cause: dict[str, object] | None = None) -> list[Action]:
        """Start forming the next generation."""
        self.generation += 1
        self.state = State.FORMING
        self._joins, self._gathered, self._gathered_from = {}, {}, set()
        self._suspected = None
        if self.members and self._recovery is None:
            self._recovery = Recovery(step_before=self.step)
        self.members = {}
        if self._recovery is not None:
            self._recovery.begin_again(now_ns, cause)
        connected = tuple(rank for rank, slot in self.slots.items() if slot.connected and not slot.finished)
        return [
            Record({"event": "fence", "generation": self.generation, "reason": reason}),
            Fence(self.generation, reason, connected),
        ]

    def _form_if_waiting(self, now_ns: int) -> list[Action]:
        """A rank left in good order: those that joined may have waited for it alone."""
        return self._form_if_complete(now_ns) if self.state is State.FORMING and self._joins else []

    def _form_if_complete(self, now_ns: int) -> list[Action]:
        finished = {rank for rank, slot in self.slots.items() if slot.finished and rank not in self._joins}
        if len(self._joins) + len(finished) < self.world_size:
            return []
        if different := mismatch(self._joins):
            return [StopJob(2, different)]
        decision = self._decide(self._joins, solo=bool(finished))
        if isinstance(decision, Impossible):
            return [StopJob(1, self._why_lost(decision))]
        if refused := why_not(decision, self._joins, finished, self.step):
            return [StopJob(1, refused)]
        ranks = tuple(sorted(self._joins))
        self.state = State.RUNNING
        self.members = {rank: self._joins[rank].incarnation for rank in ranks}
        members = tuple(
            (rank, self.members[rank], self.slots[rank].host, decision.sources.get(rank, Source("live")))
            for rank in ranks
        )
        numbers = stages([joined.report for _, joined in sorted(self._joins.items())])
        carried = {rank: joined.inexact_since for rank, joined in self._joins.items()}
        before = self._recovery.inexact if self._recovery is not None else None
        formation = self.exactness.formed(decision, carried, numbers, before)
        if self._recovery is not None:
            self._recovery.formed(now_ns, decision.step, formation)
        self.step = decision.step
        record = formed_event(self.generation, self.members, decision, formation, solo=bool(finished))
        joins, self._joins = self._joins, {}
        actions = [Record(record), *self._before_form(joins)]
        alone, step = bool(finished), decision.step
        form = Form(self.generation, members, step, decision.fresh, alone, ranks, self.placement, formation)
        return [*actions, *self._send(now_ns, form)]

    def _decide(self, joins: Mapping[int, Joined], *, solo: bool) -> Resume | Impossible:
        """The step to resume from, and everybody's source."""
        return choose(joins, {}, solo=solo)

    def _why_lost(self, decision: Impossible) -> str:
        """One line for a job that has nothing to resume from."""
        if decision.why:
            return f"state after step {decision.newest} is lost. {decision.why}. {WHAT_HELPS}"
        ranks = ", ".join(map(str, decision.missing))
        return (
            f"the state of rank {ranks} after step {decision.newest} is lost: no live copy, no snapshot. "
            "Keep snapshots on (--snapshots on), or run data-parallel replicas without ZeRO-1"
        )

    def _before_form(self, joins: Mapping[int, Joined]) -> list[Action]:
        """What is decided together with it."""
        del joins
        return []

    def _send(self, now_ns: int, form: Form) -> list[Action]:
        """Have the ranks go on, now or when others have heard what they must."""
        del now_ns
        return [form]

    def _recovered(self, recovery: Recovery, step: int, committed_ns: int) -> list[Action]:
        self._recovery = None
        self.recoveries += 1
        self.exactness.recovered(recovery.inexact)
        event, line = recovery.ended(self.generation, step, committed_ns)
        return [Record(event), Announce(line)]

    def status(self) -> dict[str, object]:
        """Everything `holdfast status` shows, as plain values."""
        return {
            "generation": self.generation,
            "state": self.state.value,
            "world_size": self.world_size,
            "step": self.step,
            "loss": self.loss,
            "recoveries": self.recoveries,
            "exactness": self.exactness.status(),
            "ranks": [
                {
                    "rank": rank,
                    "incarnation": slot.incarnation,
                    "pid": slot.pid,
                    "host": slot.host,
                    "alive": slot.alive,
                    "connected": slot.connected,
                    "finished": slot.finished,
                    "joined": rank in self._joins,
                }
                for rank, slot in self.slots.items()
            ],
        }

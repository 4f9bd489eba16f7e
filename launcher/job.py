"""The job over all its hosts: membership, plus hosts that are lost, and the parity that makes up for them. Pure.

    Membership (ranks, generations)  +  HostBook (leases, doors)  +  placements (who keeps whose parity)

    a host is lost ──▶ quorum? ──▶ no:  StepDown, its side of the network stops by itself
                               └─▶ yes: its ranks get other hosts (Adopt), next generation,
                                        new placement with the Form: redundancy is rebuilt while training goes on

Everything that another coordinator would need to go on is in the roster, which every agent is told whenever it
changes. Not here: sockets and clocks (coordinator.py), which step to resume from (runtime/recovery/decide.py).
Invariants:

* ranks are given away only with a quorum, and only from a host that is proven dead, ended them itself, or whose
  lease has run out;
* ranks act on new hosts or a new placement only once those who could elect the next coordinator know (council.py);
* a placement is never changed, only followed by one with a higher number; old ones stay known until their parity
  is no longer needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Final

from holdfast.ckpt.memory.placement import decodable, place
from holdfast.ckpt.memory.redundancy import HostInfo, Placement
from holdfast.runtime.recovery.decide import Impossible, Resume

from .actions import Action, Adopt, Announce, Form, Probe, Record, StepDown, StopJob, Tell, Welcome
from .council import Council, councils
from .hosts import FIRST, Host, HostBook, Roster, Term, assign
from .membership import Membership
from .placing import fitting, snapshots, stages_of
from .shown import host_rows, redundancy_row
from .slots import Joined
from .verdict import choose

PLACEMENTS_KEPT: Final = 4
TERM_BITS: Final = 32
"""Rosters of a later coordinator have larger numbers, whatever its predecessor told that it never heard of."""
REBUILDS_TRIED: Final = 8
"""Generations in a row that may fail to rebuild the same step: shards that are reported may yet be out of reach."""


class Job(Membership):
    """See the module's docstring. One instance per coordinator, on one event loop."""

    def __init__(
        self,
        world_size: int,
        *,
        generation: int = 0,
        members: Mapping[int, int] | None = None,
        lease_ns: int = 6_000_000_000,
        redundancy: str = "auto",
        spread: bool = True,
        wait_ns: int = 600_000_000_000,
    ) -> None:
        """`spread`: ranks of a lost host go to the others if no host has room; else a host is waited for, `wait_ns`."""
        super().__init__(world_size, generation=generation, members=members)
        self.book = HostBook(lease_ns)
        self._redundancy = redundancy
        self._spread = spread
        self._wait_ns = wait_ns
        self._waiting: dict[int, int] = {}  # rank without a host -> until when one is waited for
        self.term = FIRST
        self.council = Council()
        self._held: Form | None = None  # until others know of its members
        self._settled: Placement | None = None  # that they know of; before, protectors keep to the one they have
        self._number = 0
        self._placements: list[Placement] = []
        self._current: Placement | None = None
        self._protected: tuple[int, int] = (-1, -1)  # placement, step
        self._rebuilding = (-1, 0)  # step, how many generations in a row were to rebuild it
        self._warned = ""
        self._mismatch = ""

    @staticmethod
    def from_roster(world_size: int, roster: Roster, now_ns: int, *, term: Term = FIRST, **options: object) -> Job:
        """A job that another coordinator led until now; hosts that say nothing are lost when their lease ends."""
        members = {rank: incarnation for rank, (incarnation, _) in roster.members.items()}
        job = Job(world_size, generation=roster.generation, members=members, **options)  # type: ignore[arg-type]
        for host in roster.hosts:
            host.connected, host.heard_ns, host.asked_ns = False, now_ns, 0
            job.book.all[host.index] = host
        for rank, incarnation in roster.incarnations.items():
            job.slots[rank].incarnation = incarnation
        for rank, slot in job.slots.items():
            slot.host = roster.holders.get(rank, -1)
            if slot.host < 0 or (slot.host in job.book.all and job.book.all[slot.host].lost):
                slot.incarnation += 1  # whoever was given it meanwhile is not known here
                job._waiting[rank] = now_ns + job._wait_ns
        job.term, job.step = term, roster.step
        job._number = max(roster.number, term.number << TERM_BITS)
        job.council.standing = councils(roster)
        if len(job.council.standing) > 1:  # whether ranks act on the newest already, nobody here knows
            job.council.propose(job.council.standing[-1], job._number + 1)
        job._placements = [Placement.from_json(text) for text in roster.placements]
        job._current = job._placements[-1] if job._placements else None
        job.placement, job._settled = (job._current.number if job._current is not None else 0), job._current
        return job

    # ---- agents -------------------------------------------------------------------------------------

    def on_agent_hello(self, now_ns: int, told: Host, ranks: Iterable[tuple[int, int, int]]) -> list[Action]:
        """An agent (re)connected and says which process holds each of its ranks: (rank, incarnation, pid)."""
        index = told.index
        known = self.book.hello(now_ns, told)
        if known is None:
            return [Welcome(index, fenced=True)]
        actions: list[Action] = [Welcome(known.index)]
        if index != known.index or known.index not in self.council.newest.values():
            actions.append(Record({"event": "host_joined", "host": known.index, "name": known.name}))
        ranks = list(ranks)
        actions += self.on_host_ranks(now_ns, known.index, ranks)
        if self.council.newest:  # an order to start a rank may never have reached it
            there = {rank for rank, _, _ in ranks}
            given = [r for r, s in self.slots.items() if s.host == known.index and not s.finished and r not in there]
            actions += [Adopt(known.index, rank, self.slots[rank].incarnation) for rank in given]
        return [*actions, *self._give_up_gone(now_ns), *self._place_waiting(now_ns), self.tell()]

    def on_agent_learnt(self, now_ns: int, index: int, term: Term, number: int) -> list[Action]:
        """An agent has that roster, and will tell the next coordinator of it."""
        if term != self.term or index not in self.book.all:
            return []
        self.council.learnt[index] = max(number, self.council.learnt.get(index, 0))
        return self._settle()

    def on_agent_beat(self, now_ns: int, index: int) -> list[Action]:
        """Its agent lives."""
        self.book.beat(now_ns, index)
        return []

    def on_agent_gone(self, now_ns: int, index: int) -> list[Action]:
        """An agent's stream ended; its door says whether it lives."""
        host = self.book.all.get(index)
        if host is None or host.lost:
            return []
        host.connected = False
        return self._ask(now_ns)

    def on_probe(self, now_ns: int, index: int, *, refused: bool) -> list[Action]:
        """Its door was tried. Only a refusal is proof; an agent that lives connects again."""
        host = self.book.all.get(index)
        if host is None or host.connected or not refused:
            return []
        host.proven = True
        return self._give_up_gone(now_ns)

    def _give_up_gone(self, now_ns: int) -> list[Action]:
        """Hosts whose ranks are gone, all of them at once: with each alone too few others might seem to be left."""
        gone = self.book.gone()
        if not gone or not self._has_quorum(now_ns):
            return []
        hosts = [(self.book.all[index], reason) for index, reason in gone.items()]
        return [action for host, reason in hosts for action in self._host_lost(now_ns, host, reason)]

    def _has_quorum(self, now_ns: int) -> bool:
        return self.council.decides(self.book.heard(now_ns), self.book.dead())

    def on_agent_failed(self, index: int, reason: str, *, waits: bool = False) -> list[Action]:
        """A host cannot go on, and the job with it. `waits`: it is to be told so, too."""
        name = self.book.all[index].name if index in self.book.all else str(index)
        return [StopJob(1, f"host {name}: {reason}", but=-1 if waits else index)]

    def on_tick(self, now_ns: int) -> list[Action]:
        """Time passed."""
        actions = super().on_tick(now_ns)
        late = sorted(rank for rank, until in self._waiting.items() if now_ns > until)
        if late:
            actions.append(StopJob(1, f"no host came for the ranks {', '.join(map(str, late))} of lost hosts"))
        if len(self.book.live()) < 2:
            return actions
        actions += self._give_up_gone(now_ns)
        for host in self.book.expired(now_ns):
            silent_s = (now_ns - host.heard_ns) / 1e9
            actions += self._host_lost(now_ns, host, f"silent for {silent_s:.1f} s")
        actions += self._ask(now_ns)
        return actions

    def next_tick_ns(self) -> int | None:
        """When on_tick wants to be called, if at all."""
        dues = [super().next_tick_ns(), *self._waiting.values()]
        if len(self.book.live()) > 1:
            dues.append(self.book.next_tick_ns())
        return min((due for due in dues if due is not None), default=None)

    # ---- hosts that are lost --------------------------------------------------------------------------

    def _ask(self, now_ns: int) -> list[Action]:
        if len(self.book.live()) < 2:
            return []
        return [Probe(host.index, host.door) for host in self.book.to_ask(now_ns)]

    def _host_lost(self, now_ns: int, host: Host, reason: str) -> list[Action]:
        if not self._has_quorum(now_ns):
            return [StepDown(f"host {host.name} is lost ({reason}) and too few others are heard to go on")]
        host.lost, host.connected = reason, False
        if all(slot.ended for slot in self.slots.values()):
            return []  # the job is done, and its hosts leave
        ranks = [r for r, slot in self.slots.items() if slot.host == host.index and not slot.ended]
        cause: dict[str, object] = {"rank": ranks[0] if ranks else None, "host": host.index, "ranks": ranks}
        cause |= {"reason": f"host {host.name} lost: {reason}"}
        cause |= {"detected_ns": now_ns, "last_progress_ns": host.heard_ns}
        actions: list[Action] = [Record({"event": "host_lost", **cause})]
        unfinished = [rank for rank in ranks if not self.slots[rank].finished]
        for rank in ranks:
            slot = self.slots[rank]
            slot.alive = slot.connected = slot.finished = False
            slot.incarnation += 1
            slot.host = -1
            self._waiting[rank] = now_ns + self._wait_ns
        actions += self._place_waiting(now_ns)
        if unfinished:
            actions += self._begin(now_ns, f"host {host.name} lost: {reason}", cause=cause)
        return [*actions, self.tell(), *self._settle()]

    def _place_waiting(self, now_ns: int) -> list[Action]:
        """Give ranks without a host to one, if there is one for them."""
        if not self._waiting:
            return []
        holders = {rank: slot.host for rank, slot in self.slots.items() if rank not in self._waiting}
        able = {i: host for i, host in self.book.live().items() if host.connected}
        actions: list[Action] = []
        for rank, index in assign(list(self._waiting), holders, able, spread=self._spread).items():
            del self._waiting[rank]
            slot = self.slots[rank]
            slot.host = index
            actions.append(Adopt(index, rank, slot.incarnation))
            moved = {"rank": rank, "incarnation": slot.incarnation, "host": index}
            actions.append(Record({"event": "rank_moved", **moved}))
        return actions

    # ---- generations ----------------------------------------------------------------------------------

    def _begin(self, now_ns: int, reason: str, cause: dict[str, object] | None = None) -> list[Action]:
        self._held = None
        self.council.withdraw()
        return super()._begin(now_ns, reason, cause)

    def _decide(self, joins: Mapping[int, Joined], *, solo: bool) -> Resume | Impossible:
        decision = choose(joins, self._reachable(joins), solo=solo)
        if isinstance(decision, Impossible):
            return decision
        rebuilt = tuple(rank for rank, source in sorted(decision.sources.items()) if source.rung == "parity")
        before, tries = self._rebuilding
        self._rebuilding = (decision.step, tries + 1 if before == decision.step else 1) if rebuilt else (-1, 0)
        return decision if self._rebuilding[1] <= REBUILDS_TRIED else Impossible(decision.step, rebuilt)

    def _reachable(self, joins: Mapping[int, Joined]) -> dict[int, frozenset[int]]:
        """Slot -> steps that hosts hold, or can decode from what they hold."""
        data: dict[int, frozenset[int]] = {}
        parity: dict[int, dict[tuple[int, int], frozenset[int]]] = {}
        for joined in joins.values():
            for slot, steps in joined.report.held.items():
                data[slot] = data.get(slot, frozenset()) | steps
            for (number, stripe, index), steps in joined.parity.items():
                held = parity.setdefault(number, {})
                held[stripe, index] = held.get((stripe, index), frozenset()) | steps
        found = dict(data)
        if self._current is not None and any(slot.finished for slot in self.slots.values()):
            # Nobody leaves before the last state is kept everywhere, and hosts whose ranks have left report nothing.
            until = max(joined.until for joined in joins.values())
            found |= {rank: found.get(rank, frozenset()) | {until} for rank in self.slots}
        for placement in self._placements:
            for slot, steps in decodable(placement, data, parity.get(placement.number, {})).items():
                found[slot] = found.get(slot, frozenset()) | steps
        return found

    def _why_lost(self, decision: Impossible) -> str:
        if self._current is None or decision.why:
            return super()._why_lost(decision)
        lost = [host for host in self.book.all.values() if host.lost]
        ranks = ", ".join(map(str, decision.missing))
        # Not of a placement that was made when the first of them was lost, and never came to have parity.
        whole = next((one for one in self._placements if one.number == self._protected[0]), self._current)
        return (
            f"the state of rank {ranks} after step {decision.newest} is lost: {len(lost)} hosts were lost "
            f"({', '.join(host.name for host in lost)}) and redundancy rs:{whole.k}+{whole.m} makes up "
            f"for {whole.m} at a time; no live copy, no snapshot, too few shards"
        )

    def _before_form(self, joins: Mapping[int, Joined]) -> list[Action]:
        if len(joins) < self.world_size:
            return []
        return self._protect(joins)

    def _send(self, now_ns: int, form: Form) -> list[Action]:
        """The same hosts as before go on at once; others wait until whoever counts has heard of it."""
        voters = {rank: host for rank, _, host, _ in form.members}
        known = self.council.standing == (voters,) and self._current == self._settled
        self.council.propose(voters, self._number + 1)
        if known or len(self.book.all) < 2:
            self._stands()
            return [self.tell(), form]
        self._held = form
        return [self.tell()]

    def _settle(self) -> list[Action]:
        """What was proposed stands, if it is known to all that it must be known to."""
        council, book = self.council, self.book
        if council.proposed is None or not council.is_learnt(book.live(), book.same(council.knowing()), book.dead()):
            return []
        self._stands()
        form, self._held = self._held, None
        return [self.tell(), *([form] if form is not None else [])]

    def _stands(self) -> None:
        self.council.settle()
        self._settled = self._current

    def _protect(self, joins: Mapping[int, Joined]) -> list[Action]:
        """A new placement, if hosts or sizes are not those of the current one."""
        indices = sorted({self.slots[rank].host for rank in joins})
        redundancy = fitting(self._redundancy, len(indices), next(iter(joins.values())).recovery)
        if redundancy.m == 0 or not all(joined.image_bytes for joined in joins.values()):
            self._current, self.placement = None, 0
            return []
        slots = snapshots(joins, {rank: self.slots[rank].host for rank in joins})
        hosts = tuple(HostInfo(index, self.book.all[index].domain or f"host-{index}") for index in indices)
        old = self._current
        if old is not None and (old.slots, old.hosts) == (slots, hosts):
            return []
        placement = place(slots, hosts, redundancy, self.generation, stages=stages_of(joins))
        self._current, self.placement = placement, placement.number
        self._placements = [*self._placements, placement][-PLACEMENTS_KEPT:]
        event = {"placement": placement.number, "k": placement.k, "m": placement.m, "stripes": len(placement.stripes)}
        actions: list[Action] = [Record({"event": "placement", **event, "warnings": list(placement.warnings)})]
        warning = "; ".join(placement.warnings)
        if warning and warning != self._warned:
            actions.append(Announce(f"warning: {warning}"))
            self._warned = warning
        return actions

    def on_protected(self, placement: int, step: int) -> list[Action]:
        """A rank says which step every host has protected, under which placement; 0: none any more."""
        if placement == 0:
            self._protected = (-1, -1)
        if self._current is None or placement != self._current.number or step <= self._protected[1]:
            return []
        first = self._protected[0] != placement
        self._protected = (placement, step)
        tolerance = {"losses_tolerated": self._current.m}
        return [Record({"event": "protected", "placement": placement, "step": step, **tolerance})] if first else []

    def on_mismatch(self, rank: int, step: int, reason: str) -> list[Action]:
        """A rank's host found replicas that differ. Every rank of that host may say so: the operator hears it once."""
        if reason == self._mismatch:
            return []
        self._mismatch = reason
        found = {"rank": rank, "host": self.slots[rank].host, "step": step, "reason": reason}
        return [Record({"event": "replica_mismatch", **found}), Announce(f"warning: {reason}")]

    # ---- what others are told ---------------------------------------------------------------------------

    def tell(self) -> Tell:
        """The newest roster, and each host's topology."""
        self._number += 1
        roster = Roster(
            number=self._number,
            generation=self.generation,
            step=self.step,
            members={r: (self.slots[r].incarnation, host) for r, host in self.council.newest.items()},
            incarnations={rank: slot.incarnation for rank, slot in self.slots.items()},
            holders={rank: slot.host for rank, slot in self.slots.items() if rank not in self._waiting},
            hosts=tuple(self.book.all.values()),
            placements=tuple(placement.to_json() for placement in self._placements),
            before=self.council.before,
            term=self.term,
        )
        addresses = {str(index): address for index, address in self.book.protectors().items()}
        placement = self._settled.to_json() if self._settled is not None else None
        common = {"number": self._number, "hosts": addresses, "placement": placement}
        topology = {index: json.dumps({**common, "me": index}) for index in self.book.live()}
        return Tell(roster.encoded(), topology)

    def status(self) -> dict[str, object]:
        """Everything `holdfast status` shows, as plain values."""
        found = super().status()
        rows = found["ranks"]
        assert isinstance(rows, list)
        for row in rows:
            row["host"] = self.book.all[row["host"]].name if row["host"] in self.book.all else ""
        found["hosts"] = host_rows(self.book.all.values(), {rank: slot.host for rank, slot in self.slots.items()})
        found["waiting"] = sorted(self._waiting)
        lost = [index for index, host in self.book.all.items() if host.lost]
        found["redundancy"] = redundancy_row(self._current, self._protected, lost)
        return found

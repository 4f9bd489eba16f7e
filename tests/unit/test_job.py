"""Single decisions about the job over all its hosts; whole histories are in sim/test_hosts.py."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from holdfast.ckpt.memory.placement import Placement
from holdfast.launcher.actions import (
    Action,
    Adopt,
    Announce,
    Fence,
    Form,
    JobDone,
    Probe,
    Record,
    StepDown,
    StopJob,
    Tell,
    Welcome,
)
from holdfast.launcher.hosts import SILENT_NS, Host, Roster, Term
from holdfast.launcher.job import PLACEMENTS_KEPT, REBUILDS_TRIED, Job
from holdfast.launcher.membership import State
from holdfast.launcher.placing import fitting
from holdfast.launcher.slots import Joined
from holdfast.runtime.recovery.decide import Impossible, Report

S = 1_000_000_000
LEASE_NS = 6 * S
UNTIL = 9
IMAGE = 50_000


def of(kind: type, actions: list[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def event(actions: list[Action], name: str) -> dict[str, object]:
    (found,) = [a.event for a in actions if isinstance(a, Record) and a.event["event"] == name]
    return found


def host(index: int, *, capacity: int = 1, name: str = "") -> Host:
    name = name or f"host{index}"
    return Host(index, name, door=f"{name}:1", coordinator=f"{name}:2", protector=f"{name}:3", capacity=capacity)


def roster_of(actions: list[Action]) -> Roster:
    tell = of(Tell, actions)[-1]
    assert isinstance(tell, Tell)
    return Roster.decoded(tell.roster)


def topology_of(actions: list[Action], me: int) -> dict[str, object]:
    tell = of(Tell, actions)[-1]
    assert isinstance(tell, Tell)
    value: dict[str, object] = json.loads(tell.topology[me])
    return value


class Cluster:
    """A real Job, with hosts that hold what they are told to hold; rank r starts on host r."""

    def __init__(
        self,
        ranks: int = 3,
        *,
        live: int = 5,
        recovery: str = "exact",
        stage_of: dict[int, int] | None = None,
        **options: object,
    ) -> None:
        self.ranks, self.recovery, self.stage_of = ranks, recovery, stage_of or {}
        self.job = Job(ranks, lease_ns=LEASE_NS, **options)  # type: ignore[arg-type]
        self.now_ns = S
        self.held: dict[int, dict[int, frozenset[int]]] = {h: {h: frozenset({4, 5})} for h in range(ranks)}
        self.parity: dict[int, frozenset[int]] = {h: frozenset({4, 5}) for h in range(ranks)}
        for index in range(ranks):
            self.hello(host(index), [(index, 0, 100 + index)])
        for rank in range(ranks):
            self.rank_hello(rank)
        self.formed = self.join({rank: live for rank in range(ranks)})

    def hello(self, told: Host, ranks: list[tuple[int, int, int]] | None = None) -> list[Action]:
        return self.job.on_agent_hello(self.now_ns, told, ranks or [])

    def rank_hello(self, rank: int, generation: int = 0) -> list[Action]:
        slot = self.job.slots[rank]
        return self.job.on_rank_hello(self.now_ns, rank, slot.incarnation, 1, slot.host, generation, 0)

    def start(self, rank: int) -> None:
        """The host that was given it starts a process, which says hello."""
        slot = self.job.slots[rank]
        self.job.on_rank_started(self.now_ns, rank, slot.incarnation, 7, slot.host, "standby")
        self.rank_hello(rank)

    def joined(self, rank: int, live: int) -> Joined:
        slot = self.job.slots[rank]
        placements = self.job._placements
        parity = {
            (placement.number, stripe, index): self.parity.get(slot.host, frozenset())
            for placement in placements
            for stripe, index in placement.parity_on(slot.host)
        }
        units = {} if self.recovery == "exact" else {self.stage_of.get(rank, rank): "kind"}
        report = Report(rank, live, (rank,), self.held.get(slot.host, {}), units=units)
        return Joined(slot.incarnation, report, "p", "c", UNTIL, IMAGE, parity, recovery=self.recovery)

    def join(self, live: dict[int, int]) -> list[Action]:
        actions: list[Action] = []
        for rank, step in live.items():
            actions += self.job.on_join(self.now_ns, rank, self.job.generation, self.joined(rank, step))
        return [*actions, *self.learn()]

    def learn(self, *but: int) -> list[Action]:
        """The agents that are connected get what they were told last, and say so."""
        actions: list[Action] = []
        for index in [i for i, known in self.job.book.all.items() if known.connected and i not in but]:
            actions += self.job.on_agent_learnt(self.now_ns, index, self.job.term, self.job._number)
        return actions

    def kill(self, index: int) -> list[Action]:
        """Its stream ends, and the kernel refuses its door."""
        actions = self.job.on_agent_gone(self.now_ns, index)
        return [*actions, *self.job.on_probe(self.now_ns, index, refused=True)]

    def beat(self, *indices: int) -> None:
        for index in indices:
            self.job.on_agent_beat(self.now_ns, index)

    def pass_time(self, seconds: float, *beating: int) -> list[Action]:
        """Time goes by in half seconds; `beating` hosts say something each time."""
        actions: list[Action] = []
        for _ in range(int(2 * seconds)):
            self.now_ns += S // 2
            self.beat(*beating)
            actions += self.job.on_tick(self.now_ns)
        return actions


# ---- losing a host ----------------------------------------------------------------------------------------------


def test_a_host_whose_door_refuses_is_lost_at_once_and_its_rank_moves_with_a_new_incarnation() -> None:
    cluster = Cluster()
    (probe,) = of(Probe, cluster.job.on_agent_gone(cluster.now_ns + S, 2))
    assert probe == Probe(2, "host2:1")
    actions = cluster.job.on_probe(cluster.now_ns + S, 2, refused=True)
    assert of(Adopt, actions) == [Adopt(0, 2, 1)]
    (fence,) = of(Fence, actions)
    assert isinstance(fence, Fence)
    assert (fence.generation, fence.ranks) == (2, (0, 1))
    lost = event(actions, "host_lost")
    assert (lost["host"], lost["ranks"], lost["reason"]) == (2, [2], "host host2 lost: its agent is gone")
    assert roster_of(actions).holders == {0: 0, 1: 1, 2: 0}


def test_a_host_that_answers_at_its_door_is_not_lost() -> None:
    cluster = Cluster()
    cluster.job.on_agent_gone(cluster.now_ns, 2)
    assert cluster.job.on_probe(cluster.now_ns, 2, refused=False) == []
    assert not cluster.job.book.all[2].lost


def test_a_refusal_that_comes_after_the_agent_is_back_proves_nothing() -> None:
    cluster = Cluster()
    cluster.job.on_agent_gone(cluster.now_ns, 2)
    cluster.hello(host(2), [(2, 0, 1)])
    assert cluster.job.on_probe(cluster.now_ns, 2, refused=True) == []


def test_a_silent_host_is_asked_and_given_up_when_its_lease_has_run_out_and_not_before() -> None:
    cluster = Cluster()
    actions = cluster.pass_time(5.5, 0, 1)
    assert {probe.host for probe in actions if isinstance(probe, Probe)} == {2}
    assert of(Adopt, actions) == []
    actions = cluster.pass_time(1.5, 0, 1)
    assert of(Adopt, actions) == [Adopt(0, 2, 1)]
    assert "silent for 6." in str(event(actions, "host_lost")["reason"])
    assert cluster.job.book.dead() == set(), "silence is no proof"


def test_a_coordinator_that_hears_too_few_steps_down_and_gives_nothing_away() -> None:
    cluster = Cluster()
    before = cluster.job.generation
    actions = cluster.pass_time(7, 0)
    assert of(StepDown, actions)
    assert of(Adopt, actions) == of(Fence, actions) == []
    assert cluster.job.generation == before


def test_hosts_that_are_cut_off_together_are_not_given_up_one_after_the_other() -> None:
    """The one that spoke last still counted as heard when the first one's lease ended."""
    cluster = Cluster(5)
    cluster.now_ns += S // 10
    cluster.beat(3)
    cluster.now_ns += S // 10
    cluster.beat(4)
    actions = cluster.pass_time(8, 0, 1)
    kinds = [type(action) for action in actions if isinstance(action, (StepDown, Adopt, Fence))]
    assert kinds[0] is StepDown


def test_hosts_that_are_all_proven_dead_are_given_up_together() -> None:
    """Each alone would seem to leave too few others: 2 of 5 that live, with 3 that are dead."""
    cluster = Cluster(5, redundancy="rs:2+3")
    actions: list[Action] = []
    for index in (0, 1, 2):
        actions += cluster.job.on_agent_gone(cluster.now_ns, index)
    for index in (0, 1, 2):
        actions += cluster.job.on_probe(cluster.now_ns, index, refused=True)
    assert of(StepDown, actions) == []
    assert {adopt.rank for adopt in actions if isinstance(adopt, Adopt)} == {0, 1, 2}


def test_a_host_given_up_for_its_silence_counts_as_dead_once_its_door_refuses() -> None:
    """It was without power, and is on again: what keeps the others from deciding is gone."""
    cluster = Cluster(3)
    cluster.pass_time(7, 0, 1)
    assert cluster.job.book.all[2].lost
    cluster.job.on_probe(cluster.now_ns, 2, refused=True)
    assert cluster.job.book.dead() == {2}


def test_a_host_that_comes_back_gets_a_new_number_and_is_refused_under_the_old_one() -> None:
    cluster = Cluster()
    cluster.pass_time(7, 0, 1)
    cut_off = host(2, name="host2")
    assert cluster.hello(replace(cut_off), [(2, 0, 102)]) == [Welcome(2, fenced=True)]
    assert cluster.job.slots[2].incarnation == 1, "what it says of its ranks is not believed"
    told = replace(cut_off, index=-1)
    actions = cluster.hello(told)
    assert actions[0] == Welcome(3)
    assert event(actions, "host_joined")["host"] == 3
    assert "3" in topology_of(actions, 3)["hosts"]  # type: ignore[operator]


def test_a_rank_that_left_but_did_not_end_is_started_again_where_its_host_is_lost() -> None:
    """It had said goodbye: whatever its program does after training has still to be done."""
    cluster = Cluster()
    for rank in range(3):
        cluster.job.on_goodbye(cluster.now_ns, rank, 0, UNTIL)
    cluster.kill(2)
    cluster.held = {index: {index: frozenset({UNTIL})} for index in range(2)}
    cluster.start(2)
    assert not cluster.job.slots[2].finished
    (form,) = of(Form, cluster.join({2: -1}))
    assert isinstance(form, Form)
    assert form.solo
    assert form.resume_step == UNTIL


def test_the_last_state_is_found_although_those_who_hold_it_have_left() -> None:
    cluster = Cluster(3, redundancy="xor")
    for rank in (0, 1):
        cluster.job.on_rank_exited(cluster.now_ns, rank, 0, "exit 0", detected_ns=0, last_progress_ns=0, finished=True)
    cluster.kill(2)
    cluster.held, cluster.parity = {}, {}  # nobody who joins reports anything
    cluster.start(2)
    actions = cluster.join({2: -1})
    assert of(StopJob, actions) == []
    (form,) = of(Form, actions)
    assert isinstance(form, Form)
    assert (form.resume_step, form.members[0][3].rung) == (UNTIL, "parity")


def test_a_host_whose_ranks_have_all_ended_takes_nothing_with_it() -> None:
    cluster = Cluster()
    cluster.job.on_rank_exited(cluster.now_ns, 2, 0, "exit 0", detected_ns=0, last_progress_ns=0, finished=True)
    actions = cluster.kill(2)
    assert of(Adopt, actions) == of(Fence, actions) == []


def test_the_job_is_done_when_every_rank_has_ended_wherever_it_ran() -> None:
    cluster = Cluster()
    ended = [
        cluster.job.on_rank_exited(cluster.now_ns, rank, 0, "exit 0", detected_ns=0, last_progress_ns=0, finished=True)
        for rank in range(3)
    ]
    assert [len(of(JobDone, actions)) for actions in ended] == [0, 0, 1]


def test_a_host_that_cannot_go_on_ends_the_job_with_its_name() -> None:
    (told,) = Cluster().job.on_agent_failed(1, "its folder is another", waits=True)
    assert told == StopJob(1, "host host1: its folder is another", but=-1), "it ends when it is told to, not before"
    (stop,) = Cluster().job.on_agent_failed(1, "rank 1 died 3 times at step 4")
    assert isinstance(stop, StopJob)
    assert stop.reason == "host host1: rank 1 died 3 times at step 4"


# ---- waiting for a host -------------------------------------------------------------------------------------------


def test_ranks_wait_for_a_host_with_room_if_that_is_asked_for() -> None:
    cluster = Cluster(spread=False)
    actions = cluster.kill(2)
    assert of(Adopt, actions) == []
    assert cluster.job.status()["waiting"] == [2]
    assert of(Adopt, cluster.hello(host(-1, name="spare"))) == [Adopt(3, 2, 1)]
    assert cluster.job.status()["waiting"] == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_host_that_never_comes_ends_the_job_at_its_deadline(ranks: int) -> None:
    """Also where one host alone is left, of which there is nothing else to watch."""
    cluster = Cluster(ranks, spread=False, wait_ns=20 * S)
    cluster.kill(ranks - 1)
    others = range(ranks - 1)
    assert of(StopJob, cluster.pass_time(19, *others)) == []
    due = cluster.job.next_tick_ns()
    assert due is not None
    assert due > cluster.now_ns, "a timer that rests until then"
    stops = of(StopJob, cluster.pass_time(2, *others))
    assert stops
    assert isinstance(stops[0], StopJob)
    assert stops[0].reason == f"no host came for the ranks {ranks - 1} of lost hosts"


# ---- messages that come late ------------------------------------------------------------------------------------


def test_what_processes_of_older_incarnations_say_changes_nothing() -> None:
    cluster = Cluster()
    cluster.kill(2)
    cluster.start(2)
    job, now_ns = cluster.job, cluster.now_ns
    before = (job.generation, job.state, dict(job.members))
    stale = replace(cluster.joined(2, 5), incarnation=0)
    assert job.on_join(now_ns, 2, job.generation, stale) == []
    assert job.on_rank_started(now_ns, 2, 0, 1, 2, "fresh") == []
    assert job.on_rank_hello(now_ns, 2, 0, 1, 2, 1, 5) == []
    assert job.on_rank_exited(now_ns, 2, 0, "SIGKILL", detected_ns=0, last_progress_ns=0) == []
    assert job.on_session_lost(2, 0) == []
    assert (job.generation, job.state, dict(job.members)) == before
    assert job.slots[2].host == 0
    assert job.slots[2].connected


def test_a_join_of_a_generation_that_another_coordinator_began_begins_a_newer_one() -> None:
    """That coordinator is gone, and nobody else knew of it: the rank would wait for its Form for ever."""
    cluster = Cluster()
    job = cluster.job
    actions = job.on_join(cluster.now_ns, 1, 7, cluster.joined(1, 5))
    (fence,) = of(Fence, actions)
    assert isinstance(fence, Fence)
    assert fence.generation == 8
    assert job.state is State.FORMING


# ---- what others must know before ranks act on it ------------------------------------------------------------------


def test_a_generation_on_other_hosts_waits_until_every_agent_that_counts_has_learnt_of_it() -> None:
    cluster = Cluster(4, redundancy="rs:2+2")
    cluster.kill(3)
    cluster.start(3)
    joins = {rank: cluster.joined(rank, 5 if rank < 3 else -1) for rank in range(4)}
    actions: list[Action] = []
    for rank, joined in joins.items():
        actions += cluster.job.on_join(cluster.now_ns, rank, cluster.job.generation, joined)
    assert of(Form, actions) == []
    told = roster_of(actions)
    assert told.members[3] == (1, 0)
    assert told.before == ({0: 0, 1: 1, 2: 2, 3: 3},), "who hears of it must ask those before it too"
    assert len(told.placements) == 2
    laid = Placement.from_json(str(topology_of(actions, 0)["placement"]))
    assert laid.number == 1, "the old parity is what is rebuilt from: nothing may take its place yet"
    assert of(Form, cluster.learn(1)) == [], "one of them is missing"
    stale = cluster.job.on_agent_learnt(cluster.now_ns, 1, cluster.job.term, told.number - 1)
    foreign = cluster.job.on_agent_learnt(cluster.now_ns, 1, Term(3, "another"), told.number)
    assert of(Form, stale + foreign) == []
    actions = cluster.job.on_agent_learnt(cluster.now_ns, 1, cluster.job.term, told.number)
    (form,) = of(Form, actions)
    assert isinstance(form, Form)
    assert form.generation == 2
    assert roster_of(actions).before == ()
    assert Placement.from_json(str(topology_of(actions, 0)["placement"])).number == 2
    assert of(Form, cluster.learn()) == [], "once"


def test_a_lost_rank_that_starts_again_on_its_host_waits_for_nobody() -> None:
    cluster = Cluster(3, redundancy="xor")
    cluster.job.on_rank_exited(cluster.now_ns, 2, 0, "SIGKILL", detected_ns=0, last_progress_ns=0)
    cluster.job.on_rank_started(cluster.now_ns, 2, 1, 7, 2, "standby")
    actions: list[Action] = []
    for rank in range(3):
        joined = cluster.joined(rank, 5 if rank < 2 else -1)
        actions += cluster.job.on_join(cluster.now_ns, rank, cluster.job.generation, joined)
    assert len(of(Form, actions)) == 1, "no round trip more than the joins"


def test_a_host_that_is_lost_before_it_has_learnt_is_not_waited_for_and_nobody_acts_on_the_old_form() -> None:
    cluster = Cluster(4, redundancy="rs:2+2")
    cluster.kill(3)
    cluster.start(3)
    for rank in range(4):
        cluster.job.on_join(cluster.now_ns, rank, 2, cluster.joined(rank, 5 if rank < 3 else -1))
    actions = [*cluster.kill(2), *cluster.learn()]
    assert of(Form, actions) == []
    assert roster_of(actions).before == ()
    cluster.start(2)
    (form,) = of(Form, cluster.join({0: 5, 1: 5, 2: -1, 3: -1}))
    assert isinstance(form, Form)
    assert form.generation == 3


def test_a_coordinator_that_takes_over_in_between_asks_both_memberships_until_the_newer_stands() -> None:
    cluster = Cluster(4, redundancy="rs:2+2")
    cluster.kill(3)
    cluster.start(3)
    told: list[Action] = []
    for rank in range(4):
        told += cluster.job.on_join(cluster.now_ns, rank, 2, cluster.joined(rank, 5 if rank < 3 else -1))
    job = Job.from_roster(4, roster_of(told), cluster.now_ns, term=Term(1, "c1"), lease_ns=LEASE_NS)
    assert job.council.standing == ({0: 0, 1: 1, 2: 2, 3: 3}, {0: 0, 1: 1, 2: 2, 3: 0})
    actions: list[Action] = []
    for index in (0, 1, 2):
        actions += job.on_agent_hello(cluster.now_ns, host(index), [(index, 0, 1)])
    number = roster_of(actions).number
    assert number > 1 << 32, "later than whatever its predecessor told, and nobody here heard"
    for index in (0, 1, 2):
        actions = job.on_agent_learnt(cluster.now_ns, index, job.term, number)
    assert job.council.standing == ({0: 0, 1: 1, 2: 2, 3: 0},)
    assert roster_of(actions).before == ()


def test_before_the_first_generation_stands_its_members_have_a_say_already() -> None:
    """Another coordinator may be elected by them from the moment they are told."""
    job = Job(3, lease_ns=LEASE_NS)
    for index in range(3):
        job.on_agent_hello(S, host(index), [(index, 0, 1)])
    job.on_rank_hello(S, 0, 0, 1, 0, 0, 0)
    for rank in range(3):
        actions = job.on_join(S, rank, 1, Joined(0, Report(rank, 0, (rank,), {}), "p", "c", UNTIL))
    assert of(Form, actions) == []
    job.on_agent_beat(8 * S, 0)
    assert of(StepDown, job.on_tick(8 * S))


# ---- hosts that ended their ranks themselves ----------------------------------------------------------------------


def test_a_host_that_comes_back_without_its_ranks_is_given_up_under_its_old_number_at_once() -> None:
    cluster = Cluster()
    back = replace(host(2), index=-1)
    actions = cluster.hello(back)
    assert of(Welcome, actions) == [Welcome(3)]
    assert event(actions, "host_lost")["reason"] == "host host2 lost: it ended its ranks itself"
    assert of(Adopt, actions) == [Adopt(3, 2, 1)], "it has room again"
    assert cluster.job.book.heard(cluster.now_ns) == {0, 1, 2, 3}, "its say it has under both"


def test_all_hosts_that_ended_their_ranks_go_on_together_under_the_next_coordinator() -> None:
    cluster = Cluster(3, redundancy="xor")
    job = Job.from_roster(3, roster_of(cluster.formed), cluster.now_ns, term=Term(1, "c1"), lease_ns=LEASE_NS)
    actions: list[Action] = []
    for index in range(3):
        actions += job.on_agent_hello(cluster.now_ns, replace(host(index), index=-1), [])
    assert of(StepDown, actions) == []
    assert {adopt.rank for adopt in actions if isinstance(adopt, Adopt)} == {0, 1, 2}
    assert topology_of(actions, 5)["hosts"] == {str(n): f"host{n % 3}:3" for n in range(6)}, (
        "what a host keeps is asked for under the number that a placement knows it by"
    )


# ---- placements -------------------------------------------------------------------------------------------------


def test_the_first_generation_gets_a_placement_and_every_host_is_told() -> None:
    cluster = Cluster(3, redundancy="xor")
    (form,) = of(Form, cluster.formed)
    assert isinstance(form, Form)
    assert form.placement == cluster.job.generation == 1
    for me in range(3):
        told = topology_of(cluster.formed, me)
        assert told["me"] == me
        assert told["hosts"] == {str(h): f"host{h}:3" for h in range(3)}
        assert Placement.from_json(str(told["placement"])).number == 1
    order = [type(action) for action in cluster.formed]
    assert order.index(Tell) < order.index(Form), "hosts know the layout before the ranks go on"


def test_a_placement_stays_while_hosts_and_sizes_do_and_then_gets_a_higher_number() -> None:
    cluster = Cluster(3, redundancy="rs:2+1")
    job = cluster.job
    job.on_suspect(cluster.now_ns, 0, 1, "connection broke")
    cluster.pass_time(1, 0, 1, 2)
    actions = cluster.join({0: 5, 1: 5, 2: 5})
    (form,) = of(Form, actions)
    assert isinstance(form, Form)
    assert (form.generation, form.placement) == (2, 1)
    cluster.kill(2)
    cluster.start(2)
    actions = cluster.join({0: 5, 1: 5, 2: -1})
    (form,) = of(Form, actions)
    assert isinstance(form, Form)
    assert (form.generation, form.placement) == (3, 3)
    assert event(actions, "placement") == {
        "event": "placement", "placement": 3, "k": 1, "m": 1, "stripes": job._placements[-1].stripes.__len__(),
        "warnings": list(job._placements[-1].warnings),
    }  # fmt: skip
    assert [placement.number for placement in job._placements] == [1, 3], "old parity may still be needed"
    assert [Placement.from_json(text).number for text in roster_of(actions).placements] == [1, 3]


def test_only_so_many_old_placements_are_kept() -> None:
    cluster = Cluster(2, redundancy="mirror")
    for round_ in range(PLACEMENTS_KEPT + 2):
        cluster.kill(1 + round_)
        new = cluster.hello(host(-1, name=f"spare{round_}"))
        assert new[0] == Welcome(2 + round_)
        cluster.job.slots[1].host = 2 + round_
        cluster.job._waiting.clear()
        cluster.start(1)
        cluster.held = {0: {0: frozenset({5}), 1: frozenset({5})}, 2 + round_: {1: frozenset({5})}}
        assert of(Form, cluster.join({0: 5, 1: 5}))
    assert len(cluster.job._placements) == PLACEMENTS_KEPT
    numbers = [placement.number for placement in cluster.job._placements]
    assert numbers == sorted(set(numbers))


def test_one_host_that_is_left_alone_has_no_parity_and_goes_on() -> None:
    cluster = Cluster(2, redundancy="mirror")
    cluster.kill(1)
    cluster.start(1)
    (form,) = of(Form, cluster.join({0: 5, 1: -1}))
    assert isinstance(form, Form)
    assert form.placement == 0
    assert cluster.job.status()["redundancy"] is None


@pytest.mark.parametrize(
    ("text", "hosts", "code"),
    [
        ("rs:6+2", 8, "rs:6+2"),
        ("rs:6+2", 7, "rs:5+2"),
        ("rs:6+2", 2, "rs:1+1"),
        ("rs:6+2", 1, "none"),
        ("xor", 4, "rs:3+1"),
        ("xor", 1, "none"),
        ("mirror", 5, "rs:1+1"),
        ("auto", 1, "none"),
        ("none", 4, "none"),
    ],
)
def test_after_losses_less_redundancy_is_better_than_none(text: str, hosts: int, code: str) -> None:
    assert str(fitting(text, hosts)) == code


@pytest.mark.parametrize(
    ("text", "hosts", "code"),
    [("auto", 1, "none"), *(("auto", n, "rs:1+1") for n in range(2, 6)), ("auto", 6, "rs:4+2"), ("xor", 4, "rs:3+1")],
)
def test_with_stale_copies_auto_is_a_mirror_unless_any_two_hosts_may_be_lost(text: str, hosts: int, code: str) -> None:
    assert str(fitting(text, hosts, "stale")) == code


def test_copies_of_stages_lie_on_hosts_without_an_adjacent_stage() -> None:
    cluster = Cluster(4, redundancy="auto", recovery="stale", stage_of={0: 2, 1: 3, 2: 0, 3: 1})
    placement = cluster.job._current
    assert placement is not None
    assert (placement.k, placement.m) == (1, 1)
    kept = {(chunk.slot, stripe.parity[0]) for stripe in placement.stripes for chunk in stripe.data}
    assert kept == {(2, 0), (0, 2), (3, 1), (1, 3)}, "stages 0 and 2, 1 and 3"
    assert placement.warnings == ()


# ---- what can be survived -----------------------------------------------------------------------------------------


def tolerated(job: Job) -> object:
    found = job.status()["redundancy"]
    assert isinstance(found, dict)
    return found["losses_tolerated"]


def test_status_promises_nothing_before_parity_is_there() -> None:
    cluster = Cluster(4, redundancy="rs:2+2")
    assert tolerated(cluster.job) == 0
    (record,) = of(Record, cluster.job.on_protected(1, 5))
    assert isinstance(record, Record)
    assert record.event == {"event": "protected", "placement": 1, "step": 5, "losses_tolerated": 2}
    assert tolerated(cluster.job) == 2
    assert cluster.job.on_protected(1, 6) == [], "once a placement"


def test_status_counts_lost_hosts_until_redundancy_is_whole_again() -> None:
    cluster = Cluster(4, redundancy="rs:2+2")
    cluster.job.on_protected(1, 5)
    cluster.kill(3)
    assert tolerated(cluster.job) == 1
    cluster.start(3)
    cluster.join({0: 5, 1: 5, 2: 5, 3: -1})
    assert tolerated(cluster.job) == 0, "a new placement, without any parity yet"
    cluster.job.on_protected(1, 6)
    assert tolerated(cluster.job) == 0, "of the old placement"
    cluster.job.on_protected(2, 6)
    assert tolerated(cluster.job) == 2
    status = cluster.job.status()["redundancy"]
    assert isinstance(status, dict)
    assert (status["code"], status["placement"], status["protected_step"]) == ("rs:1+2", 2, 6)


def test_status_says_so_when_parity_lags_too_far_behind_to_protect_anything() -> None:
    cluster = Cluster(4, redundancy="rs:2+2")
    cluster.job.on_protected(1, 5)
    cluster.job.on_protected(0, -1)
    assert tolerated(cluster.job) == 0
    cluster.job.on_protected(1, 5)
    assert tolerated(cluster.job) == 2


def test_a_lost_rank_is_rebuilt_from_what_others_hold() -> None:
    cluster = Cluster(3, redundancy="xor")
    cluster.kill(2)
    cluster.start(2)
    (form,) = of(Form, cluster.join({0: 5, 1: 5, 2: -1}))
    assert isinstance(form, Form)
    assert form.resume_step == 5
    assert {rank: source.rung for rank, _, _, source in form.members} == {0: "live", 1: "live", 2: "parity"}


def test_survivors_go_back_to_the_step_that_has_parity() -> None:
    cluster = Cluster(3, redundancy="xor")
    cluster.kill(2)
    cluster.parity = {index: frozenset({4}) for index in range(3)}
    cluster.start(2)
    (form,) = of(Form, cluster.join({0: 5, 1: 5, 2: -1}))
    assert isinstance(form, Form)
    assert form.resume_step == 4
    assert {rank: source.rung for rank, _, _, source in form.members} == {0: "snapshot", 1: "snapshot", 2: "parity"}


def test_parity_of_another_step_does_not_help() -> None:
    cluster = Cluster(3, redundancy="xor")
    cluster.kill(2)
    cluster.parity = {index: frozenset({3}) for index in range(3)}
    cluster.start(2)
    (stop,) = of(StopJob, cluster.join({0: 5, 1: 5, 2: -1}))
    assert isinstance(stop, StopJob)


def test_what_cannot_be_survived_is_one_line_that_names_what_is_missing() -> None:
    cluster = Cluster(4, redundancy="xor")
    cluster.kill(2)
    cluster.kill(3)
    for rank in (2, 3):
        cluster.start(rank)
    (stop,) = of(StopJob, cluster.join({0: 5, 1: 5, 2: -1, 3: -1}))
    assert isinstance(stop, StopJob)
    assert stop.exit_code == 1
    assert "\n" not in stop.reason
    for part in ("rank 2, 3", "after step 5", "2 hosts were lost (host2, host3)", "rs:3+1", "too few shards"):
        assert part in stop.reason


def test_a_rebuild_that_fails_every_time_ends_the_job_and_does_not_go_on_for_ever() -> None:
    """The shards are reported, and yet nobody gets at them: a protector that is dead, say."""
    cluster = Cluster(3, redundancy="xor")
    cluster.kill(2)
    cluster.start(2)
    for _ in range(REBUILDS_TRIED):
        (form,) = of(Form, cluster.join({0: 5, 1: 5, 2: -1}))
        assert isinstance(form, Form)
        cluster.job.on_suspect(cluster.now_ns, 2, cluster.job.generation, "that snapshot cannot be rebuilt")
        cluster.pass_time(1, 0, 1)
    (stop,) = of(StopJob, cluster.join({0: 5, 1: 5, 2: -1}))
    assert isinstance(stop, StopJob)
    assert "rank 2 after step 5" in stop.reason


def test_what_is_said_of_lost_state_is_of_the_placement_that_had_parity() -> None:
    cluster = Cluster(3, redundancy="rs:2+1")
    cluster.job.on_protected(1, 5)
    cluster.kill(1)
    # The first loss was met with another placement, which the second did not leave the time for parity.
    cluster.job.slots[1].host = 2
    cluster.job._protect({rank: cluster.joined(rank, 5) for rank in range(3)})
    assert cluster.job._current is not None
    assert (cluster.job._current.k, cluster.job._current.m) == (1, 1)
    cluster.kill(2)
    line = cluster.job._why_lost(Impossible(5, (1, 2)))
    assert "2 hosts were lost" in line
    assert "redundancy rs:2+1 makes up for 1 at a time" in line


def test_warnings_of_a_placement_are_said_once() -> None:
    cluster = Cluster(3)
    job = cluster.job
    crowded = [replace(h, domain="rack") for h in job.book.all.values()]
    said = []
    for round_ in range(2):
        for told in crowded:
            job.book.all[told.index].domain = f"rack{round_}"
        job._current = None
        said += of(Announce, job._protect({rank: cluster.joined(rank, 5) for rank in range(3)}))
    assert len(said) <= 2
    assert all("failure domain" in line.line for line in said if isinstance(line, Announce))


# ---- another coordinator goes on --------------------------------------------------------------------------------


def successor(cluster: Cluster, actions: list[Action]) -> Job:
    return Job.from_roster(cluster.ranks, roster_of(actions), cluster.now_ns, lease_ns=LEASE_NS, redundancy="xor")


def test_a_healthy_job_is_taken_over_without_anybody_noticing() -> None:
    cluster = Cluster(3, redundancy="xor")
    job = successor(cluster, cluster.formed)
    assert (job.generation, job.state, job.step, job.placement) == (1, State.RUNNING, 5, 1)
    actions: list[Action] = []
    for index in range(3):
        actions += job.on_agent_hello(cluster.now_ns, host(index), [(index, 0, 100 + index)])
        actions += job.on_rank_hello(cluster.now_ns, index, 0, 100 + index, index, 1, 5)
    assert of(Fence, actions) == of(Adopt, actions) == []
    assert job.generation == 1
    assert roster_of(actions).number > roster_of(cluster.formed).number


def test_the_next_coordinator_has_the_same_voters_placements_and_incarnations() -> None:
    cluster = Cluster(3, redundancy="xor")
    cluster.kill(2)
    cluster.start(2)
    actions = cluster.join({0: 5, 1: 5, 2: -1})
    job = successor(cluster, actions)
    assert job.council.standing == ({0: 0, 1: 1, 2: 0},)
    assert [placement.number for placement in job._placements] == [1, 2]
    assert [slot.incarnation for slot in job.slots.values()] == [0, 0, 1]
    assert job.book.all[2].lost
    assert job.book.dead() == {2}
    assert job.on_agent_hello(cluster.now_ns, host(2), [])[0] == Welcome(2, fenced=True)


def test_hosts_that_say_nothing_to_the_next_coordinator_are_lost_when_their_lease_ends_anew() -> None:
    cluster = Cluster(3)
    cluster.now_ns += 20 * S
    job = successor(cluster, cluster.formed)
    for index in (1, 2):
        job.on_agent_hello(cluster.now_ns, host(index), [(index, 0, 1)])
    assert of(Adopt, job.on_tick(cluster.now_ns + S)) == []
    for _ in range(14):
        cluster.now_ns += S // 2
        for index in (1, 2):
            job.on_agent_beat(cluster.now_ns, index)
        actions = job.on_tick(cluster.now_ns)
        if of(Adopt, actions):
            break
    assert of(Adopt, actions) == [Adopt(1, 0, 1)]


def test_a_rank_that_was_on_its_way_to_a_host_that_is_lost_too_gets_another_place() -> None:
    """Rank 2 was given to host 0, whose coordinator then died with the host: only the roster knows."""
    cluster = Cluster(3)
    told = cluster.kill(2)
    assert roster_of(told).holders[2] == 0
    job = successor(cluster, told)
    adopted: list[Action] = []
    adopted += job.on_agent_hello(cluster.now_ns, host(1), [(1, 0, 1)])
    adopted += job.on_probe(cluster.now_ns, 0, refused=True)
    assert {adopt.rank for adopt in adopted if isinstance(adopt, Adopt)} == {0, 2}
    assert all(adopt.host == 1 for adopt in adopted if isinstance(adopt, Adopt))


def test_a_rank_that_waited_for_a_host_goes_on_waiting_under_the_next_coordinator() -> None:
    cluster = Cluster(3, spread=False)
    told = cluster.kill(2)
    job = Job.from_roster(3, roster_of(told), cluster.now_ns, lease_ns=LEASE_NS, spread=False, wait_ns=5 * S)
    assert job.status()["waiting"] == [2]
    assert of(StopJob, job.on_tick(cluster.now_ns + 6 * S))
    job.on_agent_hello(cluster.now_ns, host(0), [(0, 0, 1)])
    (adopt,) = of(Adopt, job.on_agent_hello(cluster.now_ns, host(-1, name="spare"), []))
    assert isinstance(adopt, Adopt)
    assert adopt.incarnation > 1, "whoever was given it meanwhile is not known here"


def test_an_order_to_start_a_rank_that_was_lost_with_the_stream_is_given_again() -> None:
    cluster = Cluster(3)
    assert of(Adopt, cluster.kill(2)) == [Adopt(0, 2, 1)]
    cluster.job.on_agent_gone(cluster.now_ns, 0)
    assert of(Adopt, cluster.hello(host(0), [(0, 0, 100)])) == [Adopt(0, 2, 1)]
    assert of(Adopt, cluster.hello(host(0), [(0, 0, 100), (2, 1, 7)])) == []


def test_a_host_that_starts_up_is_not_told_to_start_what_it_is_about_to_start() -> None:
    job = Job(2, lease_ns=LEASE_NS)
    assert of(Adopt, job.on_agent_hello(S, host(0), [])) == []


def test_a_timer_of_a_job_with_one_host_rests() -> None:
    cluster = Cluster(2)
    cluster.kill(1)
    cluster.now_ns += 3 * SILENT_NS
    assert cluster.job.next_tick_ns() is None

"""Several hosts under simulated failures: they die, lose power, are cut off; leaders are lost at any moment.

The world and its rules are in helpers/simhosts; here is what befalls it. A failing seed is replayed with SIM_SEED=N.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from simhosts import machine as machine_module
from simhosts import rank as rank_module
from simhosts.network import MS, S
from simhosts.scenario import Fault, Scenario
from simhosts.world import World

from holdfast.launcher import council as council_module
from holdfast.launcher import job as job_module
from holdfast.launcher.council import Council, councils
from holdfast.launcher.hosts import HostBook, has_quorum
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.gather import Kept, newest_common

PHASES = ("fence", "join", "form", "restore", "rebuild", "encode", "adopt", "takeover", "commit", "goodbye", "last")
CODES = {
    2: ("mirror", "xor", "auto"),
    3: ("mirror", "xor", "rs:1+2", "rs:2+1"),
    4: ("rs:2+2", "xor", "mirror"),
    5: ("rs:3+2", "rs:2+2", "auto"),
    6: ("rs:4+2", "auto", "rs:3+3"),
}
TOLERATED = {"rs:1+2": 2, "rs:2+2": 2, "rs:3+2": 2, "rs:4+2": 2, "rs:3+3": 3}


def losses(hosts: int, code: str) -> int:
    return TOLERATED.get(code, 2 if (hosts, code) == (6, "auto") else 1)


def when(chance: random.Random) -> tuple[int, str, int]:
    """A time, or a moment in some phase and a little after it."""
    if chance.random() < 0.4:
        return chance.randrange(50 * MS, 2 * S), "", 1
    return chance.choice((0, chance.randrange(30 * MS))), chance.choice(PHASES), chance.choice((1, 2, 3, 5, 9, 30))


def anything(seed: int) -> Scenario:
    """Losses at once up to what is tolerated and beyond, again and again, in any phase; cuts; leaders."""
    chance = random.Random(~seed)
    hosts = chance.choice((2, 3, 3, 4, 4, 5, 5, 6))
    code = chance.choice(CODES[hosts])
    m = losses(hosts, code)
    faults: list[Fault] = []
    for round_ in range(chance.choice((1, 1, 2, 3, 4))):
        ns, on, nth = when(chance)
        count = min(chance.choice((1, 1, m, m, m + 1)), hosts)
        kind = chance.choice(("kill", "kill", "kill", "power", "power", "cut", "cut", "coordinator", "rank", "rank"))
        lasts = chance.choice((0, chance.randrange(20 * S))) if kind != "cut" else chance.randrange(50 * MS, 15 * S)
        safe = round_ > 0 and chance.random() < 0.5
        faults.append(Fault(kind, ns, on, nth, count, lasts, chance.random() < 0.4, safe))
    return Scenario(
        hosts=hosts,
        per_host=chance.choice((1, 1, 2)),
        spares=chance.choice((0, 0, 1, 2)),
        replicas=2 if hosts % 2 == 0 and chance.random() < 0.3 else 1,
        redundancy=code,
        spread=chance.random() < 0.85,
        faults=tuple(faults),
    )


def promised(seed: int) -> Scenario:
    """Only what must be survived: never more hosts at once than `holdfast status` says may be lost just then."""
    chance = random.Random(7 * seed + 1)
    hosts = chance.choice((3, 4, 5, 6))
    code = chance.choice(CODES[hosts])
    faults: list[Fault] = []
    for _ in range(chance.choice((1, 2, 3))):
        kind = chance.choice(("kill", "kill", "power", "rank", "coordinator"))
        ns, on, nth = when(chance)
        lasts = chance.choice((0, 0, chance.randrange(10 * S)))
        count = chance.randint(1, losses(hosts, code))
        faults.append(Fault(kind, ns, on, nth, count, lasts, chance.random() < 0.3, safe=True))
    return Scenario(
        hosts=hosts,
        per_host=chance.choice((1, 1, 2)),
        spares=chance.choice((0, 1)),
        redundancy=code,
        faults=tuple(faults),
    )


def simulate(seed: int, befalls: Callable[[int], Scenario] = anything) -> World:
    world = World(seed, befalls(seed)).run()
    if not world.done and world.stopped is None:
        leader = world.leader()
        status = leader.job.status() if leader is not None and leader.job is not None else "nobody is in charge"
        assert not world.quorum_is_left(), f"{world}: hangs; {status}"
    return world


SEEDS = [int(os.environ["SIM_SEED"])] if "SIM_SEED" in os.environ else range(500)


def test_seeds_end_at_the_last_step_or_in_one_line_that_had_to_be() -> None:
    ends: Counter[str] = Counter()
    for seed in SEEDS:
        world = simulate(seed)
        ends["done" if world.done else "stopped" if world.stopped else "no majority is left"] += 1
        ends["takeovers"] += world.takeovers
        ends["stepped down"] += world.stepped_down
        ends["fenced themselves"] += world.self_fenced
        ends["rebuilt"] += world.rebuilt
        ends["formed again"] += max(0, len(world.forms) - 1)
        if world.stopped is not None:
            assert "\n" not in world.stopped.reason
    if len(SEEDS) > 1:
        assert ends["done"] > len(SEEDS) // 2, ends
        assert ends["no majority is left"] < len(SEEDS) // 6, f"whoever may decide is too few: {ends}"
        for what in ("stopped", "takeovers", "stepped down", "fenced themselves", "rebuilt", "formed again"):
            assert ends[what] > len(SEEDS) // 20, f"too little happened: {ends}"


def test_losses_within_what_status_promises_are_always_survived() -> None:
    rebuilt = 0
    for seed in SEEDS if len(SEEDS) == 1 else range(250):
        world = simulate(seed, promised)
        assert world.stopped is None, f"{world}: {world.stopped}"
        assert world.done, f"{world}: no end"
        rebuilt += world.rebuilt
    assert len(SEEDS) == 1 or rebuilt > 100


# ---- single histories ---------------------------------------------------------------------------------------------


def play(*faults: Fault, seed: int = 0, **scenario: Any) -> World:
    return simulate(seed, lambda _: Scenario(faults=faults, **scenario))


def test_a_minority_that_is_cut_off_gives_way_and_comes_back_as_a_spare() -> None:
    for seed in range(10):
        cut = Fault("cut", 600 * MS, hosts=(0,), lasts_ns=9 * S)
        world = play(cut, seed=seed, hosts=3, redundancy="xor")
        assert world.done, f"{world}"
        assert world.takeovers == 1
        assert all(coordinator.machine.number != 0 for _, coordinator in world.forms[1:])


def test_a_leaders_host_and_its_successors_host_may_be_lost_one_after_the_other() -> None:
    for seed in range(10):
        first = Fault("kill", 600 * MS, count=1, leader=True, safe=True)
        second = Fault("kill", 0, on="takeover", leader=True)
        world = play(first, second, seed=seed, hosts=5, redundancy="rs:3+2")
        assert world.done, f"{world}"
        assert world.takeovers == 2


def test_coordinators_that_die_while_a_generation_is_formed_leave_nobody_waiting() -> None:
    for seed in range(20):
        again = [Fault("coordinator", 0, on="join", nth=nth, count=3) for nth in (4, 5, 7)]
        world = play(Fault("rank", 500 * MS), Fault("rank", 520 * MS), *again, seed=seed, hosts=3, redundancy="xor")
        assert world.done, f"{world}"


def test_a_host_lost_in_the_middle_of_re_protection_is_made_up_for_by_what_is_left_of_the_old_parity() -> None:
    struck = 0
    for seed in range(24):
        first = Fault("kill", 900 * MS, count=1, safe=True)
        second = Fault("kill", seed % 4 * 10 * MS, on="re-encode", nth=1 + seed // 4 % 3)
        world = play(first, second, seed=seed, hosts=4 + seed % 2, redundancy="rs:2+2")
        assert world.done, f"{world}: {world.stopped}"
        struck += len(world.fired) == 2
    assert struck > 12


def test_all_but_one_host_may_die_at_once_if_their_death_is_certain() -> None:
    for seed in range(10):
        world = play(Fault("kill", 900 * MS, hosts=(0, 1, 2), safe=True), seed=seed, hosts=4, redundancy="rs:1+3")
        assert world.done, f"{world}"


def test_the_last_host_to_lose_its_rank_after_training_finds_its_state_on_those_that_have_left() -> None:
    for seed in range(10):
        world = play(Fault("kill", 0, on="goodbye", nth=2), seed=seed, hosts=3, redundancy="xor")
        assert world.done, f"{world}"


def silent(seed: int) -> Scenario:
    """Nobody hears anybody, for longer than a lease: every host ends its ranks."""
    cuts = tuple(Fault("cut", 600 * MS, hosts=(number,), lasts_ns=20 * S) for number in range(3))
    return Scenario(hosts=3, redundancy="xor", faults=cuts)


def test_a_network_that_is_gone_for_longer_than_a_lease_ends_no_job() -> None:
    for seed in range(10):
        world = simulate(seed, silent)
        assert world.done, f"{world}: every host is there, and every snapshot, but nobody leads"
        assert world.self_fenced + world.stepped_down == 3


MOMENTS = [(ns * MS // 3, "propose", 2) for ns in range(8)] + [(0, "form", 2)] * 8 + [(0, "propose", 3)] * 4


def apart(seed: int) -> Scenario:
    """Two hosts are dead, spares take their ranks; {0, 6, 7} is half of the new members, {1, 2, 3} most of the old."""
    dead = Fault("kill", 900 * MS, hosts=(4, 5))
    ns, on, nth = MOMENTS[seed % len(MOMENTS)]
    cut = Fault("cut", ns, on=on, nth=nth, hosts=(0, 6, 7))
    return Scenario(hosts=6, spares=2, redundancy="rs:1+5", until_ns=40 * S, faults=(dead, cut))


def test_two_sides_that_are_cut_apart_while_a_generation_is_formed_never_both_train() -> None:
    for seed in range(len(MOMENTS)):
        simulate(seed, apart)


def orphan(seed: int) -> Scenario:
    """Host 2 is cut off, and comes back as those die who went on without it; a spare has the rank that it had."""
    cut = Fault("cut", 600 * MS, hosts=(2,), lasts_ns=6_600 * MS)
    dead = Fault("kill", (6_900 + 10 * seed) * MS, hosts=(0, 1))
    return Scenario(hosts=3, spares=1, redundancy="rs:1+2", faults=(cut, dead))


def test_a_host_that_was_cut_off_does_not_go_on_when_those_who_went_on_without_it_die() -> None:
    """It has proof of the death of everybody that it knows, and is alone."""
    for seed in range(24):
        world = simulate(seed, orphan)
        assert all(coordinator.machine.number != 2 or len(coordinator.agents) > 1 for _, coordinator in world.forms)


# ---- the simulation finds what it is for --------------------------------------------------------------------------


def found(befalls: Callable[[int], Scenario], seeds: range) -> bool:
    for seed in seeds:
        try:
            world = simulate(seed, befalls)
        except (AssertionError, KeyError):
            return True
        if befalls is promised and not world.done:
            return True
    return False


def older_half(steps: list[int], step: int, kept: Kept, *, must: bool = False) -> int:
    return steps.index(min(steps))


def older_parity(kept: list[Any], keep: int, everywhere: object) -> int:
    empty = {0, 1} - {one.half for one in kept}
    return min(empty) if empty else int(min(kept, key=lambda one: one.step).half)


def smallest_of_the_newest(rows: Any, placement: int, before: Kept | None = None) -> Kept:
    ready = placement != 0 and all(row[2] == placement for row in rows)
    protected = min(row[3] for row in rows) if ready else int(NO_STEP)
    return Kept(newest_common([row[:2] for row in rows]), protected, placement)


def silence_is_death(voters: Any, heard: Any, dead: Any) -> bool:
    return has_quorum(voters, heard, set(voters.values()) - set(heard))


def the_fenced_speak_for_the_dead(voters: Any, here: Any, former: Any, dead: Any) -> bool:
    return has_quorum(voters, {*here, *former}, dead)


def the_newest_alone(roster: Any) -> Any:
    return councils(replace(roster, before=()))


def by_number(roster: Any, asking: Any) -> Any:
    return {one.told.index for one in asking}, set()


def now_only(book: Any) -> Any:
    return {index: host.protector for index, host in book.live().items()}


def anybody(voters: Any, heard: Any, dead: Any) -> bool:
    return bool(heard)


def any_step_will_do(placement: Any, data: Any, parity: Any) -> Any:
    return {slot.slot: frozenset().union(*data.values()) for slot in placement.slots}


def who_leads(rule: Any) -> list[tuple[Any, str, Any]]:
    return [(council_module, "has_quorum", rule)]


MUTANTS: dict[str, tuple[Callable[[int], Scenario], list[tuple[Any, str, Any]]]] = {
    "the older half is overwritten, protected or not": (promised, [(rank_module, "choose", older_half)]),
    "the older parity is overwritten, kept or not": (promised, [(machine_module, "choose_half", older_parity)]),
    "protected is the smallest of the newest steps": (promised, [(Kept, "of", staticmethod(smallest_of_the_newest))]),
    "who is silent counts as dead": (anything, who_leads(silence_is_death)),
    "whoever is there decides": (anything, who_leads(anybody)),
    "shards of any step will do": (anything, [(job_module, "decodable", any_step_will_do)]),
    "ranks act on what nobody has learnt": (apart, [(Council, "is_learnt", lambda *_: True)]),
    "only the newest members are asked": (apart, [(council_module, "councils", the_newest_alone)]),
    "who is cut off speaks for the dead": (orphan, [(council_module, "may_elect", the_fenced_speak_for_the_dead)]),
    "who ended its ranks has no say": (silent, [(council_module, "_numbers", by_number)]),
    "parity is asked for under new numbers": (silent, [(HostBook, "protectors", now_only)]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_simulation_notices_a_rule_that_is_broken(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    befalls, changes = MUTANTS[mutant]
    for owner, name, value in changes:
        monkeypatch.setattr(owner, name, value)
    assert found(befalls, range(400)), "nobody noticed"

"""Jobs over hosts of our own, which are killed, cut off and come back: each ends with the bits of the unbroken run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from host_losses import SCRIPT, compare, count, is_protected, options_of, steps_of  # noqa: E402
from hosts import HostJob, Hosts, start_job, wait_for  # noqa: E402
from jobs import reference  # noqa: E402

START_S, END_S = 90.0, 90.0
STEPS = 30

pytestmark = pytest.mark.skipif(Hosts.available() is not None, reason=f"no namespaces: {Hosts.available()}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same job as one process that nothing happens to."""
    return reference(tmp_path_factory.mktemp("unbroken"), SCRIPT, "--steps", str(STEPS))


@pytest.fixture
def run() -> Iterator[Any]:
    """Starts a job of one rank a host and waits until its parity is complete; ends whatever is left of it."""
    opened: list[tuple[Hosts, HostJob]] = []

    def begin(
        code: str, size: int, *more: str, policy: str = "spread", on: range | None = None, step_s: float = 0.2
    ) -> HostJob:
        hosts = Hosts(size).__enter__()
        arguments = ["--steps", str(STEPS), "--step-seconds", str(step_s)]
        nnodes = len(on) if on is not None else size
        options = [*options_of(code, policy), *more]
        job = start_job(hosts, SCRIPT, arguments, options=options, on=on, nnodes=nnodes)
        opened.append((hosts, job))
        wait_for(lambda: is_protected(job) and steps_of(job) > 4, START_S, "parity")
        return job

    yield begin
    for hosts, job in opened:
        job.kill()
        hosts.close()


def lose(job: HostJob, *indices: int) -> None:
    for index in indices:
        job.hosts[index].kill()


def test_a_lost_host_is_made_up_for_by_parity_and_its_rank_goes_on_elsewhere(run: Any, unbroken: Any) -> None:
    job = run("2+1", 3)
    lose(job, 1)
    ended = job.wait(END_S, only={0, 2})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    recovery = next(event for event in ended.events if event["event"] == "recovery")
    assert recovery["exact"]
    assert "parity" in recovery["sources"]
    assert is_protected(job), "redundancy must be complete again on the hosts that are left"


def test_the_host_of_the_coordinator_may_be_lost_too(run: Any, unbroken: Any) -> None:
    job = run("1+1", 2)
    lose(job, 0)
    ended = job.wait(END_S, only={1})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    assert [event["on"] for event in ended.events if event["event"] == "coordinator_took_over"] == [1]


def test_two_hosts_lost_at_once_and_then_a_third_after_parity_was_rebuilt(run: Any, unbroken: Any) -> None:
    job = run("2+2", 4)
    lose(job, 0, 3)
    wait_for(lambda: count(job, "recovery") == 1 and is_protected(job), END_S, "parity on two hosts")
    lose(job, 1)
    ended = job.wait(END_S, only={2})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []


def test_a_host_lost_during_the_recovery_from_another(run: Any, unbroken: Any) -> None:
    job = run("2+2", 4)
    lose(job, 3)
    wait_for(lambda: count(job, "host_lost") == 1, END_S, "detection")
    lose(job, 2)
    ended = job.wait(END_S, only={0, 1})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []


def test_more_losses_than_parity_makes_up_for_end_in_one_clear_line(run: Any) -> None:
    job = run("2+1", 3)
    lose(job, 1, 2)
    began = time.monotonic()
    ended = job.wait(END_S, only={0})
    assert ended.code == 1
    assert time.monotonic() - began < 60.0
    lines = [line for line in ended.errs[0].splitlines() if "holdfast: error:" in line]
    assert len(lines) == 1, ended.errs[0]
    assert "the state of rank" in lines[0]
    assert "is lost" in lines[0]
    assert "rs:2+1" in lines[0]


def test_a_host_that_is_cut_off_stops_within_its_lease_and_serves_as_a_spare_when_it_is_back(
    run: Any, unbroken: Any
) -> None:
    job = run("2+1", 3)
    job.hosts[2].cut()
    cut = time.monotonic()
    wait_for(lambda: "the ranks of this host end" in (job.folder / "host2" / "run.err").read_text(), 30.0, "the fence")
    stopped_s = time.monotonic() - cut
    assert stopped_s < 5.0 + 2.0, f"its ranks went on for {stopped_s:.1f} s, the lease is 5 s"
    wait_for(lambda: count(job, "recovery") == 1, 30.0, "the others going on")
    job.hosts[2].join()
    ended = job.wait(END_S)
    assert ended.codes == {0: 0, 1: 0, 2: 0}, ended.err
    assert compare(ended, unbroken) == []
    lost = [event for event in ended.events if event["event"] == "host_lost"]
    assert len(lost) == 1
    assert "silent" in lost[0]["reason"]


def test_a_majority_that_loses_the_coordinator_in_a_partition_goes_on_without_it(run: Any, unbroken: Any) -> None:
    job = run("2+1", 3)
    job.hosts.partition({0}, {1, 2})
    wait_for(lambda: count(job, "recovery") == 1, 60.0, "the majority going on")
    assert "the ranks of this host end" in (job.folder / "host0" / "run.err").read_text()
    ended = job.wait(END_S, only={1, 2})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    formed = [event for event in ended.events if event["event"] == "formed"]
    assert [event["on"] for event in formed] == [0, 1], "the minority must not have formed a generation"


def test_a_host_that_loses_power_says_nothing_and_is_given_up_after_its_lease(run: Any, unbroken: Any) -> None:
    job = run("2+1", 3)
    job.hosts[1].power_off()
    ended = job.wait(END_S, only={0, 2})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []


def test_a_spare_takes_the_ranks_of_a_lost_host(run: Any, unbroken: Any) -> None:
    job = run("2+1", 4, on=range(3), step_s=1.0)
    spare = job.start(3)
    wait_for(lambda: "ready to take ranks" in spare.err.read_text(), START_S, "the spare")
    lose(job, 1)
    ended = job.wait(END_S, only={0, 2, 3})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    assert [event["host"] for event in ended.events if event["event"] == "rank_moved"] == [3]


def test_ranks_wait_for_a_host_that_comes_back_when_that_is_asked_for(run: Any, unbroken: Any) -> None:
    job = run("2+1", 3, policy="wait")
    lose(job, 2)
    wait_for(lambda: count(job, "host_lost") == 1, END_S, "detection")
    job.restart(2)
    ended = job.wait(END_S)
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    assert [event["host"] for event in ended.events if event["event"] == "rank_moved"] == [3]

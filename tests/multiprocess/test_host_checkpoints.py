"""Checkpoints that several hosts write together: what was saved there goes on anywhere, with the same bits."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.ckpt.saver.choose import committed_steps
from holdfast.ckpt.universal.latest import leftovers
from holdfast.ckpt.universal.verify import verify

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from host_losses import SCRIPT, compare, count, is_protected, options_of, steps_of  # noqa: E402
from hosts import HostJob, Hosts, start_job, wait_for  # noqa: E402
from jobs import job as on_one_host  # noqa: E402
from jobs import reference  # noqa: E402

START_S, END_S = 90.0, 90.0
STEPS = 30
WIDTH = ("--width", "256")

pytestmark = pytest.mark.skipif(Hosts.available() is not None, reason=f"no namespaces: {Hosts.available()}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same job as one process that nothing happens to."""
    return reference(tmp_path_factory.mktemp("unbroken"), SCRIPT, "--steps", str(STEPS), *WIDTH)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    """Starts a job over hosts; ends whatever is left of it."""
    opened: list[tuple[Hosts, HostJob]] = []

    def begin(size: int, *options: str, nproc: int = 1, step_s: float = 0.05, layout: tuple[str, ...] = ()) -> HostJob:
        hosts = Hosts(size).__enter__()
        arguments = ["--steps", str(STEPS), "--step-seconds", str(step_s), *WIDTH, *layout]
        job = start_job(hosts, SCRIPT, arguments, options=options, nproc=nproc)
        opened.append((hosts, job))
        return job

    yield begin
    for hosts, job in opened:
        job.kill()
        hosts.close()


def saving(folder: Path, every: int, keep: int = 9) -> tuple[str, ...]:
    return ("--checkpoint-dir", str(folder), "--checkpoint-every", str(every), "--checkpoint-keep", str(keep))


def test_what_two_hosts_save_together_goes_on_on_one_in_another_layout(run: Any, unbroken: Any, tmp_path: Path) -> None:
    """Replicas over hosts: half of each stage's state is snapshotted on either."""
    folder = tmp_path / "runs"
    layout = ("--stages", "2", "--replicas", "2")
    ended = run(2, *saving(folder, 12), "--redundancy", "none", nproc=2, layout=layout).wait(END_S)
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    assert list(committed_steps(folder)) == [12, 24, 30], [e for e in ended.events if "checkpoint" in e["event"]]
    assert {path.name for path in folder.iterdir()} >= {"latest", "step-00000030"}
    for path in committed_steps(folder).values():
        assert verify(path) == []
        assert len(list((path / "optim").glob("exp_avg-*"))) == 2, "each host wrote what it held"
    resumed = on_one_host(
        tmp_path / "one", 3, SCRIPT, "--steps", str(STEPS), *WIDTH, "--out", str(tmp_path / "one/out"),
        options=("--resume", str(folder / "step-00000012")),
    )  # fmt: skip
    assert resumed.code == 0, resumed.err
    assert compare(resumed, unbroken) == []


def test_hosts_that_die_while_they_write_cost_that_checkpoint_only_and_sigterm_leaves_a_last_one(
    run: Any, unbroken: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    job = run(3, *saving(folder, 4), *options_of("2+1", "spread"), step_s=0.3)
    wait_for(lambda: is_protected(job) and leftovers(folder), START_S, "an attempt, under parity")
    job.hosts[1].kill()
    wait_for(lambda: count(job, "recovery") == 1 and is_protected(job), END_S, "recovery")
    lost_at = steps_of(job)
    wait_for(lambda: max(committed_steps(folder), default=0) > lost_at, END_S, "one by the hosts that are left")
    # The last host that is left leads: rank 0 was on the one that goes now.
    job.hosts[0].kill()
    wait_for(lambda: count(job, "recovery") == 2, END_S, "the second recovery")
    step = steps_of(job)
    wait_for(lambda: steps_of(job) > step, END_S, "training")
    job.processes[2].send_signal(signal.SIGTERM)
    ended = job.wait(END_S, only={2})
    assert ended.code == 1, ended.err
    there = committed_steps(folder)
    assert max(there) >= step, (there, ended.errs[2])
    assert [path for path in there.values() if verify(path)] == []
    assert [path for path in leftovers(folder) if path.name.startswith(".step-")] == []
    again = run(2, *saving(folder, 100), "--redundancy", "none", "--resume", "latest", step_s=0.0).wait(END_S)
    assert again.code == 0, again.err
    assert compare(again, unbroken) == []
    assert max(committed_steps(folder)) == STEPS


def test_hosts_that_do_not_share_the_folder_are_told_so_at_the_start(run: Any) -> None:
    job = run(2, *saving(Path("each-its-own"), 4), "--redundancy", "none")
    ended = job.wait(END_S)
    assert all(ended.codes.values())
    lines = [line for line in ended.errs[1].splitlines() if "holdfast: error:" in line]
    assert len(lines) == 1, ended.errs[1]
    assert "is not the folder that" in lines[0]
    assert "file system that all of them share" in lines[0]
    assert "Traceback" not in ended.err

"""Whole jobs under faults: each ends with the bits of the unbroken run, and only the ranks that were hit replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from campaign import LAYOUTS, SCRIPT, Run, plan_faults, run_job, verify  # noqa: E402
from jobs import put_together  # noqa: E402
from recovery import lines  # noqa: E402

DEADLINE_S = 90.0


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Run]:
    """The reference of each layout."""
    runs = {layout: run_job(layout) for layout in LAYOUTS}
    for run in runs.values():
        assert run.code == 0, run.output
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeded_kills_at_every_point_end_with_the_bits_of_the_unbroken_run(
    layout: str, unbroken: dict[str, Run]
) -> None:
    faults = plan_faults(11, layout, 9)
    run = run_job(layout, faults)
    assert verify(run, unbroken[layout], faults) == [], run.output
    assert len(run.recoveries()) >= 5
    assert all(event["exact"] for event in run.recoveries())


def test_layouts_agree_with_each_other(unbroken: dict[str, Run]) -> None:
    import torch

    one = put_together(unbroken["PP=4"].state.items())
    for layout in LAYOUTS:
        other = put_together(unbroken[layout].state.items())
        assert one.keys() == other.keys(), layout
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], layout


def test_a_difference_of_one_bit_is_noticed(unbroken: dict[str, Run]) -> None:
    run = unbroken["PP=4"]
    name = next(name for name, tensor in run.state.items() if tensor.is_floating_point() and tensor.dim())
    changed = run.state[name].clone()
    changed.view(-1)[0] = changed.view(-1)[0].nextafter(changed.new_tensor(9.0))
    broken = Run(0, "", run.events, {**run.state, name: changed}, 0.0)
    assert verify(broken, run, []) != []


def test_every_kind_of_fault_is_detected_and_survived(unbroken: dict[str, Run]) -> None:
    kinds = {
        "stop": "stopped",
        "hang": "hung in backward",
        "loop": "hung in backward",
        "raise": "exit 1",
        "segv": "SIGSEGV",
        "exit": "exit 13",
    }
    faults = [f"rank={n % 4},step={5 + 6 * n},at=backward:3,kind={kind}" for n, kind in enumerate(kinds)]
    run = run_job("PP=4", faults)
    assert verify(run, unbroken["PP=4"], faults) == [], run.output
    lost = [event["reason"] for event in run.events if event["event"] == "rank_lost"]
    assert [reason for reason, told in zip(kinds.values(), lost, strict=True) if reason not in told] == [], lost


# ---- the other processes of a job


class Live:
    """A job that is watched and hurt while it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"live-{os.getpid()}-{time.monotonic_ns() % 10**9}"
        self.events_path = folder / "events.jsonl"
        command = [
            sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", "4", "--standbys", "1",
            "--job-id", self.name, "--events", str(self.events_path), str(SCRIPT), "--preset", "tiny", "--steps", "250",
            "--microbatches", "8", "--microbatch-size", "2", "--context", "32", "--stages", "4",
            "--step-log", str(folder / "steps.jsonl"), "--out", str(folder / "state"),
        ]  # fmt: skip
        self.output = (folder / "output.txt").open("wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT, cwd=folder
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in lines(self.events_path) if event["event"] == kind]

    def await_step(self, step: int) -> None:
        self.await_(lambda: any(line["step"] >= step for line in lines(self.folder / "steps.jsonl")), f"step {step}")

    def last_step(self) -> int:
        return max((line["step"] for line in lines(self.folder / "steps.jsonl")), default=0)

    def await_(self, ready: Any, what: str) -> None:
        limit = time.monotonic() + DEADLINE_S
        while not ready():
            assert time.monotonic() < limit, f"no {what}: {(self.folder / 'output.txt').read_text()[-3000:]}"
            assert self.process.poll() is None, f"ended: {(self.folder / 'output.txt').read_text()[-3000:]}"
            time.sleep(0.02)

    def pid_of(self, rank: int) -> int:
        return int([event for event in self.events("rank_started") if event["rank"] == rank][-1]["pid"])

    def members(self) -> list[psutil.Process]:
        """Every process of the job, by descent, environment or arguments; but for the agent."""
        found = []
        descendants = set()
        if self.process.poll() is None:
            descendants = {p.pid for p in psutil.Process(self.process.pid).children(recursive=True)}
        for process in psutil.process_iter():
            try:
                ours = self.name in (process.environ().get("HOLDFAST_JOB"), *process.cmdline())
                ours = ours or process.pid in descendants
                if ours and process.pid != self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.output.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    job = Live(tmp_path)
    try:
        yield job
    finally:
        job.end()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_coordinator_costs_no_step_and_the_next_rank_failure_is_survived(
    live: Live, how: signal.Signals
) -> None:
    live.await_step(5)
    os.kill(live.events("coordinator_started")[0]["pid"], how)
    live.await_(lambda: live.events("coordinator_restarted"), "restart of the coordinator")
    live.await_step(live.last_step() + 5)
    assert live.events("recovery") == [], "training never waited for it"
    assert [event["generation"] for event in live.events("formed")] == [1]
    command = [sys.executable, "-m", "holdfast.launcher.cli", "status", "--job", live.name]
    status = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert status.stdout.count("trains") == 4, "the new one knows everybody"
    before = live.last_step()
    os.kill(live.pid_of(1), signal.SIGKILL)
    live.await_(lambda: live.events("recovery"), "recovery after the restart")
    (recovery,) = live.events("recovery")
    assert recovery["resume_step"] >= before - 1
    assert recovery["generation"] == 2
    steps = [line["step"] for line in lines(live.folder / "steps.jsonl")]
    assert steps == sorted(set(steps)), "no step was reported twice"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_snapshot_manager_is_replaced_and_protects_again(live: Live, how: signal.Signals) -> None:
    live.await_step(5)
    managers = [p for p in live.members() if "holdfast.ckpt.memory.manager" in " ".join(p.cmdline())]
    assert len(managers) == 1
    managers[0].send_signal(how)
    live.await_(lambda: managers[0].pid not in {p.pid for p in live.members()}, "end of the manager")
    live.await_step(live.last_step() + 8)
    before = live.last_step()
    os.kill(live.pid_of(2), signal.SIGKILL)
    live.await_(lambda: live.events("recovery"), "recovery")
    (recovery,) = live.events("recovery")
    assert recovery["resume_step"] >= before - 3, "the arenas were offered to the new manager"


@pytest.mark.parametrize("ranks_too", [False, True])
def test_after_sigkill_of_the_agent_nothing_of_the_job_is_left(live: Live, ranks_too: bool) -> None:
    live.await_step(5)
    members = live.members()
    assert len(members) >= 7, "ranks, standby, zygote, coordinator, snapshot manager"
    folders = {p for p in Path(os.environ.get("TMPDIR", "/tmp")).glob("holdfast-*") if p.is_dir()}
    victims = [live.process.pid, *([live.pid_of(rank) for rank in range(4)] if ranks_too else [])]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(members, timeout=10)
    assert alive == [], f"left after 10 s: {[p.cmdline() for p in alive]}"
    assert live.members() == []
    left = [str(p) for folder in folders for p in folder.rglob(f"*{live.name}*") if p.exists()]
    assert left == [], f"files left: {left}"

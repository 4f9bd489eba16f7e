"""`holdfast run` from outside: real processes, real signals; ranks that only talk to the agent (helpers/scripts)."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.launcher import run
from holdfast.launcher.processes import read_stat

SCRIPTS = Path(__file__).parents[1] / "helpers" / "scripts"
MANAGED = str(SCRIPTS / "managed.py")
PLAIN = str(SCRIPTS / "plain.py")
DEADLINE_S = 90.0


def wait_until(true: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `true()` is true; its value."""
    end = time.monotonic() + deadline_s
    while not (value := true()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)
    return value


class Job:
    """One `holdfast run` in a folder of its own, and all processes that came from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.env = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "XDG_RUNTIME_DIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "HOLDFAST_TEST_MARK": self.mark,
        }
        self.env.pop("PYTHONSAFEPATH", None)  # the scripts import their neighbours
        self.proc: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, command: str = "holdfast.launcher.run") -> Job:
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            self.proc = subprocess.Popen(
                [sys.executable, "-m", command, *arguments],
                cwd=self.folder,
                env=self.env,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return self

    def wait(self) -> int:
        assert self.proc is not None
        return self.proc.wait(DEADLINE_S)

    def run(self, *arguments: str) -> int:
        return self.start(*arguments).wait()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def ups(self) -> dict[tuple[int, int], int]:
        """(rank, incarnation) -> pid of every rank that came up."""
        found = re.findall(r"up rank=(\d+) incarnation=(\d+) pid=(\d+)", self.out)
        return {(int(rank), int(incarnation)): int(pid) for rank, incarnation, pid in found}

    def await_ups(self, *wanted: tuple[int, int]) -> dict[tuple[int, int], int]:
        def up() -> dict[tuple[int, int], int] | None:
            assert self.proc is not None
            found = self.ups() if set(wanted) <= self.ups().keys() else None
            assert found or self.proc.poll() is None, f"ended before {wanted} came up: {self.err}"
            return found

        found: dict[tuple[int, int], int] = wait_until(up, f"{wanted} up")
        return found

    def processes(self) -> dict[int, str]:
        """Living processes that come from this job: pid -> command line."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def events(self) -> list[dict[str, Any]]:
        (path,) = self.folder.glob("**/events.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def leftovers(self) -> list[str]:
        """Temporary files that are still there, but for torch's cache and the registry's own folder, empty."""
        found = [str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*")]
        return [name for name in found if name != f"holdfast-{os.getuid()}" and "torchinductor_" not in name]

    def assert_nothing_is_left(self) -> None:
        wait_until(lambda: not self.processes(), f"no process left of {self.processes()}", 15.0)
        assert self.leftovers() == []


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    for pid in job.processes():
        os.kill(pid, signal.SIGKILL)
    if job.proc is not None:
        job.proc.wait(10.0)


def test_a_plain_torchrun_script_finds_torchruns_environment(job: Job) -> None:
    assert job.run("--nproc-per-node", "2", PLAIN, "one", "--two") == 0, job.err
    ranks = [json.loads(line) for line in job.out.splitlines()]
    assert sorted(rank["RANK"] for rank in ranks) == ["0", "1"]
    for rank in ranks:
        assert (rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["GROUP_RANK"]) == ("2", "2", "0")
        assert rank["LOCAL_RANK"] == rank["RANK"] == rank["ROLE_RANK"]
        assert rank["TORCHELASTIC_RESTART_COUNT"] == rank["TORCHELASTIC_MAX_RESTARTS"] == "0"
        assert rank["argv"][1:] == ["one", "--two"]
        assert rank["MASTER_ADDR"]
        assert int(rank["MASTER_PORT"]) > 0
    job.assert_nothing_is_left()


def test_a_rank_that_fails_without_ever_saying_hello_fails_the_job_as_in_torchrun(job: Job) -> None:
    assert job.run("--nproc-per-node", "2", PLAIN, "--fail") == 1
    assert "exitcode  : 7" in job.err
    assert "Traceback" not in job.err
    assert len(job.out.splitlines()) == 2, "no rank was replaced"
    job.assert_nothing_is_left()


def test_a_plain_script_is_restarted_whole_as_often_as_max_restarts_allows(job: Job) -> None:
    assert job.run("--nproc-per-node", "2", "--max-restarts", "1", PLAIN, "--fail") == 1
    ranks = [json.loads(line) for line in job.out.splitlines()]
    assert sorted(rank["TORCHELASTIC_RESTART_COUNT"] for rank in ranks) == ["0", "0", "1", "1"]


def test_a_killed_rank_is_replaced_alone_by_a_standby_and_its_log_goes_on(job: Job) -> None:
    job.start("--nproc-per-node", "3", "--tee", "3", "--log-dir", "logs", MANAGED, "60", "0.1")
    before = job.await_ups((0, 0), (1, 0), (2, 0))
    wait_until(lambda: standbys(job), "a standby")
    os.kill(before[1, 0], signal.SIGKILL)
    after = job.await_ups((1, 1))
    assert job.wait() == 0, job.err
    assert {key for key in after if key not in before} == {(1, 1)}, "only the killed rank came up again"
    events = [event for event in job.events() if event["event"] in ("rank_lost", "rank_started")]
    lost = next(event for event in events if event["event"] == "rank_lost")
    assert (lost["rank"], lost["incarnation"], lost["reason"], lost["phase"]) == (1, 0, "SIGKILL", "forward")
    started = [event for event in events if event["event"] == "rank_started" and event["incarnation"] == 1]
    assert [(event["rank"], event["source"]) for event in started] == [(1, "standby")]
    (log,) = job.folder.glob("logs/*/attempt_0/1/stdout.log")
    assert re.findall(r"(up|done) rank=1 incarnation=(\d)", log.read_text()) == [
        ("up", "0"),
        ("up", "1"),
        ("done", "1"),
    ]
    assert "[default1]:done rank=1 incarnation=1" in job.out, "the tee follows the replacement"
    job.assert_nothing_is_left()


def standbys(job: Job) -> list[int]:
    """Forks of the zygote that wait for an assignment."""
    return [
        pid for pid, command in job.processes().items() if command.startswith("holdfast standby") and is_asleep(pid)
    ]


def is_asleep(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.state == "S"


def test_without_standbys_a_fresh_process_takes_the_slot(job: Job) -> None:
    assert job.run("--nproc-per-node", "2", "--standbys", "0", MANAGED, "30", "0.1", "kill=1:0:3") == 0, job.err
    started = [event for event in job.events() if event["event"] == "rank_started" and event["incarnation"] == 1]
    assert [(event["rank"], event["source"]) for event in started] == [(1, "fresh")]
    assert job.ups()[1, 1] != job.ups()[1, 0]


def test_stopped_and_hung_ranks_are_killed_and_replaced(job: Job) -> None:
    arguments = (
        "--nproc-per-node",
        "2",
        "--lease-min",
        "0.5",
        MANAGED,
        "30",
        "0.1",
        "stop=0:0:3",
        "hang=1:0:5",
    )
    assert job.run(*arguments) == 0, job.err
    reasons = {event["rank"]: event["reason"] for event in job.events() if event["event"] == "rank_lost"}
    assert re.fullmatch(r"stopped for 0\.[5-9] s", reasons[0])
    assert re.fullmatch(r"hung in forward for 0\.[5-9] s", reasons[1])


def test_two_ranks_killed_at_once_are_both_replaced_with_one_standby(job: Job) -> None:
    job.start("--nproc-per-node", "3", MANAGED, "50", "0.1")
    ups = job.await_ups((0, 0), (1, 0), (2, 0))
    wait_until(lambda: standbys(job), "a standby")
    os.kill(ups[1, 0], signal.SIGKILL)
    os.kill(ups[2, 0], signal.SIGKILL)
    job.await_ups((1, 1), (2, 1))
    assert job.wait() == 0, job.err
    started = [event for event in job.events() if event["event"] == "rank_started" and event["incarnation"] == 1]
    assert [event["source"] for event in started] == ["standby", "standby"]


def test_a_rank_that_dies_three_times_at_the_same_step_fails_the_job(job: Job) -> None:
    assert job.run("--nproc-per-node", "1", MANAGED, "10", "0.05", "exit=0:*:3") == 1
    assert "rank 0 died 3 times after step 2 with no step committed in between (exit 3, exit 3, exit 3)" in job.err
    assert sorted(job.ups()) == [(0, 0), (0, 1), (0, 2)]
    assert "exitcode  : 3" in job.err
    job.assert_nothing_is_left()


def test_max_restarts_bounds_the_replacements(job: Job) -> None:
    assert (
        job.run("--nproc-per-node", "1", "--max-restarts", "1", MANAGED, "9", "0.05", "exit=0:0:3", "exit=0:1:5") == 1
    )
    assert sorted(job.ups()) == [(0, 0), (0, 1)]
    assert "all 1 replacements are used up" in job.err


def test_a_config_error_of_the_ranks_is_told_once_with_exit_code_2(job: Job) -> None:
    assert job.run("--nproc-per-node", "2", MANAGED, "30", "0.1", "config=0:0:2", "config=1:0:2") == 2
    lines = [line for line in job.err.splitlines() if line.startswith("holdfast: error:")]
    assert lines == ["holdfast: error: microbatches must be divisible [by=4]"]
    assert "Traceback" not in job.err
    assert sorted(job.ups()) == [(0, 0), (1, 0)], "nobody was replaced"
    job.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_agent_ends_everything(job: Job, number: signal.Signals) -> None:
    job.start("--nproc-per-node", "2", MANAGED, "1000", "0.1")
    job.await_ups((0, 0), (1, 0))
    wait_until(lambda: standbys(job), "a standby")
    assert job.proc is not None
    job.proc.send_signal(number)
    assert job.wait() == 1
    assert job.err.strip().splitlines()[-1] == f"holdfast: error: stopped by {number.name}"
    job.assert_nothing_is_left()


def test_a_signal_in_the_middle_of_the_start_leaves_nothing(job: Job) -> None:
    job.start("--nproc-per-node", "2", MANAGED, "1000", "0.1")
    wait_until(lambda: len(job.processes()) > 1, "the first child")
    assert job.proc is not None
    job.proc.send_signal(signal.SIGTERM)
    job.wait()
    wait_until(lambda: not job.processes(), f"no process left of {job.processes()}", 15.0)


def test_sigkill_of_the_agent_leaves_no_process(job: Job) -> None:
    job.start("--nproc-per-node", "2", MANAGED, "1000", "0.1")
    job.await_ups((0, 0), (1, 0))
    wait_until(lambda: standbys(job), "a standby")
    assert len(job.processes()) >= 6, "agent, coordinator, zygote, standby, two ranks"
    assert job.proc is not None
    job.proc.kill()
    wait_until(lambda: not job.processes(), f"no process left of {job.processes()}", 15.0)


def test_a_killed_coordinator_is_restarted_and_the_ranks_learn_its_address(job: Job) -> None:
    job.start("--nproc-per-node", "2", MANAGED, "30", "0.1", "kill=1:0:20")
    job.await_ups((0, 0), (1, 0))
    coordinator = next(pid for pid, command in job.processes().items() if "launcher.coordinator" in command)
    os.kill(coordinator, signal.SIGKILL)
    assert job.wait() == 0, job.err
    events = job.events()
    addresses = [event["address"] for event in events if event["event"].startswith("coordinator_")]
    assert len(addresses) == 2
    assert f"done rank=0 incarnation=0 coordinator={addresses[-1]} told=1" in job.out
    lost = [event for event in events if event["event"] == "rank_lost"]
    assert [(event["rank"], event["reason"]) for event in lost] == [(1, "SIGKILL")], "the new one hears of deaths"
    job.assert_nothing_is_left()


def test_a_killed_zygote_is_replaced_and_costs_only_warmth(job: Job) -> None:
    job.start("--nproc-per-node", "1", MANAGED, "30", "0.1")
    job.await_ups((0, 0))
    zygote = next(pid for pid, command in job.processes().items() if command.startswith("holdfast zygote"))
    os.kill(zygote, signal.SIGKILL)
    os.kill(job.ups()[0, 0], signal.SIGKILL)
    job.await_ups((0, 1))
    assert job.wait() == 0, job.err
    job.assert_nothing_is_left()


def test_a_forged_hello_is_refused(job: Job) -> None:
    job.start("--nproc-per-node", "1", "--job-id", f"forge-{job.mark[:8]}", MANAGED, "40", "0.1")
    job.await_ups((0, 0))
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(f"\0forge-{job.mark[:8]}-agent-{socket.gethostname()}")
        stranger.sendall(b'{"hello": {"rank": 0, "incarnation": 7, "pid": 1}}\n')
        assert stranger.recv(100) == b""
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(f"\0forge-{job.mark[:8]}-agent-{socket.gethostname()}")
        stranger.sendall(b"no json\n")
        assert stranger.recv(100) == b""
    assert job.wait() == 0, job.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log-dirr", "x", PLAIN], "unknown option --log-dirr; did you mean --log-dir?"),
        (["absent.py"], "no such script: absent.py"),
        ([], "no script given"),
        (["-m", "absent.module"], "no module named absent.module"),
        (["--faults", "rank=1,at=nowhere", PLAIN], "--faults: fault 'rank=1,at=nowhere': no point 'nowhere'"),
        (["--nproc-per-node", "0", PLAIN], "--nproc-per-node must be at least 1, got 0"),
        (["--nproc-per-node", "many", PLAIN], "--nproc-per-node: Unsupported nproc_per_node value: many"),
        (["--nnodes", "2:1", PLAIN], "--nnodes must be at least 1 and rising, got '2:1'"),
        (["--tee", "7", PLAIN], "--tee is 0..3 or RANK:0..3,..., got '7'"),
        (["--lease-min", "0", PLAIN], "--lease-min must be above 0 seconds, got 0.0"),
        (["--max-restarts", "-1", PLAIN], "--max-restarts must be 0 or more, got -1"),
        (["--coordinator-bind", "127.0.0.1:99999", PLAIN], "--coordinator-bind is HOST:PORT"),
        (["--job-id", "a/b", PLAIN], "--job-id has letters"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"holdfast: error: {message}")
    assert not (tmp_path / "holdfast-runs").exists(), "nothing was begun"


def test_unknown_options_end_the_real_command_with_2(job: Job) -> None:
    assert job.start("run", "--standbies", "2", PLAIN, command="holdfast.launcher.cli").wait() == 2
    assert (
        job.err == "holdfast: error: unknown option --standbies; did you mean --standbys? (see holdfast run --help)\n"
    )
    assert job.out == ""


def test_a_port_in_use_is_one_line_and_exit_code_2(job: Job) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert job.run("--coordinator-bind", f"127.0.0.1:{taken.getsockname()[1]}", PLAIN) == 2
    assert job.err.strip().splitlines() == [
        f"holdfast: error: cannot listen on 127.0.0.1:{taken_port(job)}: the port is in use"
    ]
    assert job.out == "", "no rank was started"
    job.assert_nothing_is_left()


def taken_port(job: Job) -> str:
    match = re.search(r"127\.0\.0\.1:(\d+)", job.err)
    assert match is not None
    return match[1]


@pytest.mark.parametrize("as_module", [False, True])
def test_a_script_in_a_fork_sees_what_a_fresh_process_sees(job: Job, as_module: bool) -> None:
    """At the first start and as a replacement."""
    program = [str(SCRIPTS / "identity.py")]
    if as_module:
        (job.folder / "pack").mkdir()
        (job.folder / "pack" / "__init__.py").write_text("")
        (job.folder / "pack" / "train.py").write_text((SCRIPTS / "identity.py").read_text())
        job.env["PYTHONPATH"] = str(SCRIPTS)
        program = ["-m", "pack.train"]
    options = ["--nproc-per-node", "1", "--job-id", "same", "--log-dir", "logs"]
    for standbys, source in (("0", "fresh"), ("1", "standby")):
        assert job.run(*options, "--standbys", standbys, *program, "argument") == 0, job.err
        started = [event["source"] for event in job.events() if event["event"] == "rank_started"]
        assert started == [source, source]
    seen = [json.loads(line) for line in job.out.splitlines()]
    assert [one.pop("incarnation") for one in seen] == [0, 1, 0, 1]
    for one in seen:
        # Of the one run and not of the other; that they are there is compared.
        one["environment"] |= dict.fromkeys(one["environment"].keys() & PER_RUN)
    assert seen[1:] == seen[:1] * 3


PER_RUN = {
    "HOLDFAST_COORDINATOR",
    "HOLDFAST_TOKEN",
    "HOLDFAST_SMP",
    "HOLDFAST_AGENT",
    "MASTER_PORT",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_RUN_ID",
}


def test_ranks_are_shown_as_what_they_run(job: Job) -> None:
    job.start("--nproc-per-node", "2", MANAGED, "50", "0.1")
    job.await_ups((0, 0), (1, 0))
    titles = [command for command in job.processes().values() if command.startswith("holdfast rank ")]
    assert job.proc is not None
    job.proc.terminate()
    assert sorted(title.split()[:4] for title in titles) == [
        ["holdfast", "rank", f"{rank}:", str(MANAGED)] for rank in (0, 1)
    ]


def test_a_rank_of_a_second_host_is_replaced_by_its_own_agent(job: Job) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", job.mark]
    arguments += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--events", "none", MANAGED, "30", "0.1", "kill=1:0:10"]
    first = job.start(*arguments).proc
    assert first is not None
    assert job.start(*arguments).wait() == 0, job.err
    assert first.wait(DEADLINE_S) == 0, job.err
    assert sorted(job.ups()) == [(0, 0), (1, 0), (1, 1)]
    addresses = set(re.findall(r"coordinator=(\S+)", job.out))
    assert len(addresses) == 1, "one coordinator for both"
    job.assert_nothing_is_left()


def test_a_rank_that_leaves_children_behind_takes_them_along(job: Job) -> None:
    job.start("--nproc-per-node", "1", "--standbys", "0", MANAGED, "200", "0.1", "orphan=0:0:3")
    job.await_ups((0, 1))
    wait_until(lambda: not any("sleep 1000" in command for command in job.processes().values()), "no orphan", 10.0)
    assert job.proc is not None
    assert job.proc.poll() is None, "not only at the end of the job"
    job.proc.terminate()
    job.wait()


def test_status_answers_for_a_running_job(job: Job) -> None:
    job.start("--nproc-per-node", "1", "--job-id", "here", MANAGED, "60", "0.1")
    job.await_ups((0, 0))
    folder = job.temporary / f"holdfast-{os.getuid()}"
    assert (folder.stat().st_mode & 0o777, (folder / "here.json").stat().st_mode & 0o777) == (0o700, 0o600)
    stale = {**json.loads((folder / "here.json").read_text()), "job": "gone", "agent_start": 1}
    (folder / "gone.json").write_text(json.dumps(stale))
    asked = subprocess.run(
        [sys.executable, "-m", "holdfast.launcher.cli", "status", "--json"],
        env=job.env,
        cwd=job.folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["world_size"] == 1
    assert not (folder / "gone.json").exists(), "an entry without its agent is taken away"
    assert job.proc is not None
    job.proc.terminate()
    job.wait()

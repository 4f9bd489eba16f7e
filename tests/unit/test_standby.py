"""What of the zygote is decided before torch is there, and what a standby is told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.launcher import standby
from holdfast.launcher.loop import Loop
from holdfast.launcher.standby import Standby, StandbyPool, Zygote, early_environment
from holdfast.launcher.zygote import HEADER, Assignment


@pytest.mark.parametrize(
    ("argv", "threads"),
    [
        (["train.py"], None),
        (["--nproc-per-node", "1", "train.py"], None),
        (["--nproc-per-node", "4", "train.py"], "1"),
        (["--nproc_per_node=4", "train.py"], "1"),
        (["--standbys", "2", "--nproc-per-node=2", "train.py", "--nproc-per-node", "1"], "1"),
    ],
)
def test_a_zygote_is_begun_with_the_threads_that_torchrun_gives_its_ranks(argv: list[str], threads: str | None) -> None:
    assert early_environment(argv, {"A": "b"}) == {"A": "b"} | ({"OMP_NUM_THREADS": threads} if threads else {})


def test_threads_that_the_user_has_set_stay() -> None:
    assert early_environment(["--nproc-per-node", "4"], {"OMP_NUM_THREADS": "3"}) == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["--standbys", "0", "x.py"], ["--standbys=0"], ["--preload=x"], ["--no-python", "x"]]
)
def test_none_is_begun_where_none_is_needed_or_another_would_be(argv: list[str]) -> None:
    assert early_environment(argv, {}) is None


def test_a_standby_that_closes_its_end_when_it_has_read_all_is_a_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was once taken for dead, and killed: an empty rest was sent after the message."""
    ours, theirs = socket.socketpair()
    assignment = Assignment({"RANK": "0"}, ["x.py"], False, str(tmp_path))
    send_fds = socket.send_fds

    def send_and_let_it_read(sock: socket.socket, buffers: list[bytes], descriptors: list[int]) -> int:
        sent = send_fds(sock, buffers, descriptors)
        data, received, _, _ = socket.recv_fds(theirs, 1 << 16, 2)
        assert Assignment.decode(data[HEADER.size :]) == assignment
        for descriptor in received:
            socket.close(descriptor)
        theirs.close()
        return sent

    monkeypatch.setattr(standby.socket, "send_fds", send_and_let_it_read)
    monkeypatch.setattr(standby, "kill_group", lambda pid: pytest.fail("killed"))
    handler = Standby(ours, 123456).become(0, assignment, stdout="", stderr="")
    assert handler is not None
    assert handler.proc.pid == 123456


# ---- all ranks of a start at once ------------------------------------------------------------------------------


class FakeZygote(Zygote):
    """The other end of the socket is ours; nothing is forked."""

    def __init__(self) -> None:
        self.environment, self.preload = {"A": "b"}, ()
        self.control, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.settimeout(10.0)
        self.asked: list[socket.socket] = []

    def fork(self) -> None:
        """What a real one does on request, up to "ready"."""
        _, descriptors, _, _ = socket.recv_fds(self.theirs, 64, 1)
        child = socket.socket(fileno=descriptors[0])
        child.sendall(json.dumps({"ready": os.getpid()}).encode())
        self.asked.append(child)

    def close(self) -> None:
        self.control.close()


@pytest.fixture
def zygote(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeZygote]:
    monkeypatch.setattr(standby, "kill_group", lambda pid: None)
    made = FakeZygote()
    yield made
    for one in (made.theirs, made.control, *made.asked):
        one.close()


@pytest.fixture
def pool(zygote: FakeZygote, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandbyPool]:
    def no_other(*arguments: Any) -> Zygote:
        raise AssertionError("it fits")

    monkeypatch.setattr(standby, "Zygote", no_other)
    loop = Loop(lambda error: None)
    environment = {"A": "b", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM"}
    made = StandbyPool(loop, target=1, preload=(), environment=environment, on_change=lambda: None, early=zygote)
    made.start()
    loop.start()
    yield made
    loop.stop()
    made.close()


def test_a_claim_gets_as_many_standbys_as_it_wants_once_they_are_ready(pool: StandbyPool, zygote: FakeZygote) -> None:
    forks = threading.Thread(target=lambda: [zygote.fork() for _ in range(3)])
    forks.start()
    given = pool.claim(3, 10.0)
    forks.join()
    assert len(given) == 3
    assert all(one.pid == os.getpid() for one in given)
    for one in given:
        one.socket.close()


def test_a_claim_gets_none_when_the_zygote_dies(pool: StandbyPool, zygote: FakeZygote) -> None:
    def fork_once_and_die() -> None:
        zygote.fork()
        zygote.theirs.close()

    dying = threading.Thread(target=fork_once_and_die)
    dying.start()
    assert pool.claim(3, 10.0) == []
    dying.join()


def test_a_claim_that_waits_too_long_gets_none_and_takes_none_later(pool: StandbyPool, zygote: FakeZygote) -> None:
    assert pool.claim(2, 0.05) == []
    zygote.fork()
    zygote.fork()
    assert len(pool.claim(2, 10.0)) == 2, "they were ready for the next one"


def test_a_zygote_of_another_environment_does_not_fit() -> None:
    fake = FakeZygote()
    assert fake.fits({"A": "b"}, ())
    assert not fake.fits({"A": "b", "OMP_NUM_THREADS": "1"}, ())
    assert not fake.fits({"A": "b"}, ("numpy",))
    StandbyPool(Loop(print), target=1, preload=("numpy",), environment={"A": "b"}, on_change=lambda: None, early=fake)
    assert fake.theirs.recv(1) == b"", "it is ended, and not left to wait for the end of the job"
    fake.theirs.close()


SLOW_TO_END = """
import os, socket, time
from holdfast.launcher import zygote
from holdfast.launcher.processes import become_subreaper

become_subreaper()  # as the agent is
control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if os.fork() == 0:
    control.close()
    end = os._exit
    os._exit = lambda code: (time.sleep(0.5), end(code))  # the process between zygote and standby, on a busy machine
    agent = zygote.serve(theirs)
    agent.send(b"%d" % os.getpid())
    agent.recv(1)
    end(7)
theirs.close()
ours, standby = socket.socketpair()
socket.send_fds(control, [zygote.FORK], [standby.fileno()])
standby.close()
pid = int(ours.recv(64))
ended, _ = os.waitpid(pid, os.WNOHANG)  # ChildProcessError if it is not our child yet
ours.send(b"x")
print(ended, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_standby_is_ready_only_when_the_agent_can_wait_for_it() -> None:
    """A rank was taken for lost with exit code 255 if the process between it and the zygote was slow to end."""
    command = [sys.executable, "-c", SLOW_TO_END]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout == "0 7\n", run.stderr

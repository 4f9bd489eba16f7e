"""What of the zygote is decided before torch is there, and what a standby is told."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from holdfast.launcher import standby
from holdfast.launcher.standby import Standby, early_environment
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

"""The snapshot manager as a process: what it keeps when others die, and what it leaves when it does.

Ranks are real processes, killed with SIGKILL. They say what they did on a pipe, so nothing here sleeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from holdfast.ckpt.memory.arena import ArenaEntry, Half, State, arena_bytes
from holdfast.ckpt.memory.client import HalfInfo, MappedHalf, SmpClient
from holdfast.ckpt.memory.memfd import create
from holdfast.ckpt.memory.wire import MESSAGE_BYTES_MAX, Inbox, pack, send_some
from holdfast.proto.errors import ConfigError, PeerLost, SnapshotCorrupt, SnapshotError, SnapshotIncomplete

DEADLINE_S = 20.0
JOB = "job-1"
TOKEN = "secret"
PLAN = bytes(32)
ENTRIES = [
    ArenaEntry("w", "weight", "F32", (1000,), 0, 1000),
    ArenaEntry("w", "exp_avg", "F32", (1000,), 0, 1000),
]
META = {"lr": 1}
NBYTES = arena_bytes(ENTRIES, META)


@dataclass
class Smp:
    """A manager process under test."""

    name: str
    ttl_s: float
    cleanup: list[Path]
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.process = self.spawn(stderr=None)
        pidfd = os.pidfd_open(self.process.pid)
        deadline = time.monotonic() + DEADLINE_S
        try:
            while True:
                with contextlib.suppress(PeerLost):
                    self.client("admin").close()
                    return
                assert not select.select([pidfd], [], [], 0.01)[0], "the manager ended"
                assert time.monotonic() < deadline, "the manager does not listen"
        finally:
            os.close(pidfd)

    def spawn(self, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "holdfast.ckpt.memory.manager", "--socket", self.name, "--job", JOB]
        command += ["--ttl", str(self.ttl_s), "--token-env", "TEST_TOKEN"]
        command += ["--cleanup", *map(str, self.cleanup)] if self.cleanup else []
        environment = {**os.environ, "TEST_TOKEN": TOKEN, "PYTHONSAFEPATH": "1"}
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **options)

    def client(self, role: str = "rank", **options: Any) -> SmpClient:
        options = {"job": JOB, "token": TOKEN, "rank": 0, "timeout_s": DEADLINE_S, **options}
        return SmpClient(self.name, role=role, **options)

    def kill(self) -> None:
        """SIGKILL, whatever it did before."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def fds(self, client: SmpClient) -> int:
        """Its descriptors, once `client` is its only client and everything asked so far is done with."""
        wait_for(lambda: client.stats()["connections"] == {"rank": 1}, "other connections end")
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture
def smp(tmp_path: Path) -> Iterator[Smp]:
    manager = Smp(f"holdfast-test-{secrets.token_hex(8)}", ttl_s=60.0, cleanup=[])
    try:
        manager.start()
        yield manager
    finally:
        manager.kill()


def write(mapped: MappedHalf, step: int) -> None:
    for entry in mapped.half.begin(step, PLAN, 0, ENTRIES, META):
        mapped.half.view(entry)[:] = bytes([step % 251]) * entry.nbytes
    mapped.half.finish()


def store(client: SmpClient, slot: int, half: int, step: int) -> MappedHalf:
    mapped = client.arena(slot, half, NBYTES)
    write(mapped, step)
    client.copied(slot, half, step)
    return mapped


def check(client: SmpClient, slot: int, half: int, step: int) -> None:
    """A reader finds `step`, whole."""
    with client.open(slot, half) as mapped:
        table = mapped.half.read(step, PLAN)
        mapped.half.verify()
        assert table.metadata == META
        for entry in table.entries:
            assert mapped.half.view(entry) == bytes([step]) * entry.nbytes


def states(client: SmpClient) -> dict[tuple[int, int], tuple[str, int]]:
    return {(half.slot, half.half): (half.state, half.step) for half in client.list()}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll what another process will do without telling us."""
    deadline = time.monotonic() + DEADLINE_S
    turn = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, what
        turn.wait(0.005)


RANK = """
import os, sys
from holdfast.ckpt.memory.arena import ArenaEntry, arena_bytes
from holdfast.ckpt.memory.client import SmpClient
name, job, token, slot, *steps = sys.argv[1:]
client = SmpClient(name, job=job, token=token, role="rank", rank=int(slot), timeout_s=20.0)
entries = [ArenaEntry("w", state, "F32", (1000,), 0, 1000) for state in ("weight", "exp_avg")]
for number, word in enumerate(steps):
    step, _, torn = word.partition("-")
    mapped = client.arena(int(slot), number % 2, arena_bytes(entries, {"lr": 1}))
    placed = mapped.half.begin(int(step), bytes(32), 0, entries, {"lr": 1})
    for entry in placed[:1] if torn == "torn" else placed:
        mapped.half.view(entry)[:] = bytes([int(step)]) * entry.nbytes
    if torn != "torn":
        mapped.half.finish()
        if torn != "untold":
            client.copied(int(slot), number % 2, int(step))
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def rank(smp: Smp, slot: int, *steps: str, script: str = RANK) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stores the steps ("4", "5-torn": killed while copying, "5-untold": before telling)."""
    command = [sys.executable, "-c", script, smp.name, JOB, TOKEN, str(slot), *steps]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], DEADLINE_S)[0], "the rank is late"
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


# ---- ranks that die -------------------------------------------------------------------------------------


def test_a_writer_killed_in_the_middle_of_a_copy_leaves_the_other_half_readable(smp: Smp) -> None:
    with rank(smp, 3, "4", "5-torn"):
        pass
    with smp.client() as client:
        assert states(client)[3, 1] == ("FILLING", 5)
        with pytest.raises(SnapshotIncomplete, match="FILLING"):
            client.open(3, 1)
        check(client, 3, 0, 4)


def test_a_copy_is_kept_although_its_writer_died_before_it_could_tell(smp: Smp) -> None:
    with rank(smp, 0, "4", "5-untold"):
        pass
    with smp.client() as client:
        assert states(client)[0, 1] == ("COPIED", 5)
        check(client, 0, 1, 5)
        assert states(client)[0, 1] == ("SEALED", 5)


def test_arenas_survive_the_death_of_every_rank(smp: Smp) -> None:
    with rank(smp, 0, "6", "7"), rank(smp, 1, "6", "7"):
        pass
    with smp.client() as client:
        wait_for(lambda: client.stats()["connections"] == {"rank": 1}, "the dead ranks' connections end")
        for slot in (0, 1):
            for half in (0, 1):
                check(client, slot, half, 6 + half)


def test_a_replacement_writes_on_in_the_memory_of_the_dead(smp: Smp) -> None:
    with rank(smp, 0, "6", "7-torn"):
        pass
    with smp.client(incarnation=1) as client:
        with store(client, 0, 1, 8):
            check(client, 0, 0, 6)
            check(client, 0, 1, 8)
        assert client.stats()["created"] == 2


RACER = """
import sys
from holdfast.ckpt.memory.arena import ArenaEntry, arena_bytes
from holdfast.ckpt.memory.client import SmpClient
client = SmpClient(sys.argv[1], job=sys.argv[2], token=sys.argv[3], role="rank", rank=0, timeout_s=20.0)
entries = [ArenaEntry(str(i), "weight", "U8", (100_000,), 0, 100_000) for i in range(8)]
mapped = client.arena(0, 0, arena_bytes(entries, None))
step = 0
while True:
    step += 1
    for entry in mapped.half.begin(step, bytes(32), 0, entries, None):
        mapped.half.view(entry)[:] = bytes([step % 251]) * 100_000
    mapped.half.finish()
    client.copied(0, 0, step)
    if step == 3:
        print("ready", flush=True)
"""


def test_a_reader_racing_with_a_writer_gets_one_whole_step_or_is_told(smp: Smp) -> None:
    def read_one(client: SmpClient) -> str:
        try:
            with client.open(0, 0) as mapped:
                table = mapped.half.read()
                data = b"".join(bytes(mapped.half.view(entry)) for entry in table.entries)
                mapped.half.confirm(table)
        except SnapshotIncomplete:
            return "told"
        return "whole" if data == bytes([table.step % 251]) * 800_000 else f"torn: {table.step} {set(data)}"

    outcomes: list[str] = []
    deadline = time.monotonic() + DEADLINE_S
    with smp.client() as client, rank(smp, 0, script=RACER):
        while outcomes.count("whole") < 20 or outcomes.count("told") < 20:
            outcomes.append(read_one(client))
            assert time.monotonic() < deadline, outcomes
        assert client.stats()["corrupt"] == 0
    assert set(outcomes) == {"whole", "told"}


# ---- readers --------------------------------------------------------------------------------------------


def test_a_byte_flipped_after_the_seal_is_found_and_never_offered_again(smp: Smp) -> None:
    with smp.client() as client, store(client, 0, 0, 4) as mapped:
        check(client, 0, 0, 4)
        entry = mapped.half.read(4).entries[1]
        mapped.half.view(entry)[17] ^= 1
        with client.open(0, 0) as reader, pytest.raises(SnapshotCorrupt, match="not what was sealed"):
            reader.half.verify()
        assert client.corrupt(0, 0, 4)
        assert states(client)[0, 0] == ("CORRUPT", 4)
        with pytest.raises(SnapshotCorrupt, match="marked corrupt"):
            client.open(0, 0)
        assert client.stats()["corrupt"] == 1
        write(mapped, 6)
        client.copied(0, 0, 6)
        check(client, 0, 0, 6)


def test_a_reader_that_is_wrong_about_corruption_destroys_nothing(smp: Smp) -> None:
    with smp.client() as client, store(client, 0, 0, 4):
        check(client, 0, 0, 4)
        assert not client.corrupt(0, 0, 4)
        assert not client.corrupt(0, 0, 3)
        check(client, 0, 0, 4)


def test_a_copy_that_the_manager_does_not_hold_is_refused(smp: Smp) -> None:
    with smp.client() as client, store(client, 0, 0, 4) as mapped:
        with pytest.raises(SnapshotIncomplete, match="no such half"):
            client.copied(0, 1, 4)
        with pytest.raises(SnapshotIncomplete, match="not copied into this arena"):
            client.copied(0, 0, 5)
        mapped.half.begin(5, PLAN, 0, ENTRIES, META)
        with pytest.raises(SnapshotIncomplete, match="state=FILLING"):
            client.copied(0, 0, 5)
        with pytest.raises(SnapshotIncomplete, match="no such half"):
            client.open(9, 0)


def test_a_rebuilt_half_is_sealed_with_the_digest_that_it_had_and_only_on_a_protectors_word(smp: Smp) -> None:
    with smp.client() as client, smp.client("protector") as protector, client.arena(0, 0, NBYTES) as mapped:
        write(mapped, 4)
        judged = mapped.half.judge()
        assert judged is not None
        assert isinstance(judged[1], bytes)
        with pytest.raises(SnapshotIncomplete, match="another step"):
            protector.rebuilt(0, 0, 5, judged[1])
        protector.rebuilt(0, 0, 4, judged[1])
        assert states(client) == {(0, 0): ("SEALED", 4)}
        check(client, 0, 0, 4)
        mapped.half.begin(5, PLAN, 0, ENTRIES, META)
        with pytest.raises(SnapshotIncomplete, match="FILLING"):
            protector.rebuilt(0, 0, 5, judged[1])
        write(mapped, 5)
        protector.rebuilt(0, 0, 5, judged[1])  # of other bytes: whoever reads finds it
        with client.open(0, 0) as opened, pytest.raises(SnapshotCorrupt, match="not what was sealed"):
            opened.half.verify()
        write(mapped, 6)
        with pytest.raises(PeerLost):
            protector.rebuilt(0, 0, 6, b"short")
        with pytest.raises(PeerLost):
            smp.client().rebuilt(0, 0, 6, judged[1])
        assert states(client) == {(0, 0): ("COPIED", 6)}
        assert client.stats()["violations"] == 2


def test_a_bigger_arena_replaces_a_smaller_one_and_readers_keep_what_they_opened(smp: Smp) -> None:
    with smp.client() as client:
        store(client, 0, 0, 4).close()
        with client.open(0, 0) as reader, client.arena(0, 0, 4 * NBYTES) as bigger:
            assert bigger.nbytes >= 4 * NBYTES
            assert states(client)[0, 0] == ("EMPTY", 0)
            reader.half.read(4)
            reader.half.verify()
        assert client.stats()["nbytes"] == bigger.nbytes
        with client.arena(0, 0, NBYTES) as same:
            assert same.nbytes == bigger.nbytes


def test_too_little_memory_is_an_answer_with_the_numbers_and_takes_nothing(smp: Smp) -> None:
    with smp.client() as client:
        with pytest.raises(SnapshotError, match=r"not enough memory .*needed_bytes=1125899906842624") as caught:
            client.arena(0, 0, 1 << 50)
        assert caught.value.fields["available_bytes"] > 0
        assert client.stats()["nbytes"] == 0
        assert client.list() == ()
        store(client, 0, 0, 1).close()


# ---- a manager that dies --------------------------------------------------------------------------------


def test_ranks_offer_their_arenas_to_the_next_manager(smp: Smp) -> None:
    with smp.client() as client:
        old, new = store(client, 0, 0, 4), store(client, 0, 1, 5)
        check(client, 0, 1, 5)
        torn = client.arena(1, 0, NBYTES)
        torn.half.begin(5, PLAN, 0, ENTRIES, META)
        smp.kill()
        with pytest.raises(PeerLost):
            client.copied(0, 1, 5)
        with pytest.raises(PeerLost, match="closed"):
            client.list()
    smp.start()
    with smp.client() as client:
        assert client.list() == ()
        for slot, half, mapped in ((0, 0, old), (0, 1, new), (1, 0, torn)):
            assert client.adopt(slot, half, mapped)
            assert client.adopt(slot, half, mapped)
        assert client.stats()["adopted"] == 3
        check(client, 0, 0, 4)
        check(client, 0, 1, 5)
        assert states(client)[1, 0][0] == "FILLING"
        write(torn, 6)
        client.copied(1, 0, 6)
        check(client, 1, 0, 6)
        for mapped in (old, new, torn):
            mapped.close()


def test_an_older_step_never_replaces_a_newer_one(smp: Smp) -> None:
    with smp.client() as client, smp.client() as other:
        older = store(client, 0, 0, 4)
        newer = client.arena(0, 0, 2 * NBYTES)
        write(newer, 6)
        assert not other.adopt(0, 0, older)
        check(other, 0, 0, 6)
        blank = client.arena(0, 1, NBYTES)
        assert not other.adopt(0, 0, blank)
        assert client.adopt(0, 1, older), "nothing whole is there: an older step is better than none"
        check(other, 0, 1, 4)
        assert other.adopt(0, 1, newer)
        check(other, 0, 1, 6)


def _offer(fd: int) -> MappedHalf:
    mapped = MappedHalf(fd, JOB, slot=0, index=0)
    mapped.half.format()
    return mapped


def test_what_is_no_arena_of_ours_is_not_adopted(smp: Smp, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    loose = os.memfd_create("loose")
    os.ftruncate(loose, 8192)
    with smp.client() as client:
        for fd in (os.open(path, os.O_RDWR), loose):
            with _offer(fd) as mapped, pytest.raises(SnapshotCorrupt, match="could shrink"):
                client.adopt(0, 0, mapped)
        with MappedHalf(create(8192), JOB, slot=0, index=0) as mapped:
            with pytest.raises(SnapshotCorrupt, match="not an arena"):
                client.adopt(0, 0, mapped)
            Half(memoryview(mapped.half._bytes), "another job").format()
            with pytest.raises(SnapshotCorrupt, match="another job"):
                client.adopt(0, 0, mapped)
        closed = _offer(create(8192))
        closed.close()
        with pytest.raises(SnapshotError, match="closed arena"):
            client.adopt(0, 0, closed)
        assert client.list() == ()


@pytest.mark.parametrize("offset", [48, 56, 64, 72])
def test_hostile_lengths_are_refused_by_the_manager_and_by_the_reader(smp: Smp, offset: int) -> None:
    hostile = struct.pack("<Q", 2**64 - 4096)
    with smp.client() as client:
        mapped = client.arena(0, 0, NBYTES)
        write(mapped, 4)
        mapped.half._bytes[offset : offset + 8] = hostile
        client.copied(0, 0, 4)
        with pytest.raises(SnapshotCorrupt, match="marked corrupt"):
            client.open(0, 0)
        with _offer(create(NBYTES)) as offered:
            write(offered, 9)
            offered.half._bytes[offset : offset + 8] = hostile
            with pytest.raises(SnapshotCorrupt, match="does not lie in the arena"):
                client.adopt(0, 0, offered)
        store(client, 0, 0, 5).close()
        check(client, 0, 0, 5)


# ---- the end --------------------------------------------------------------------------------------------


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Callable[[float], Smp]]:
    """Starts managers that have things to clean up."""
    started: list[Smp] = []

    def start(ttl_s: float) -> Smp:
        directory, file, keep = tmp_path / "run", tmp_path / "registry.json", tmp_path / "keep"
        (directory / "inner").mkdir(parents=True)
        (directory / "inner" / "log").write_text("x")
        keep.mkdir()
        (directory / "link").symlink_to(keep)
        file.write_text("{}")
        started.append(Smp(f"holdfast-test-{secrets.token_hex(8)}", ttl_s, [directory, file, tmp_path / "absent"]))
        started[-1].start()
        return started[-1]

    yield start
    for smp in started:
        smp.kill()


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


def test_without_a_lease_the_manager_ends_and_removes_what_it_was_told_to(
    tmp_path: Path, short: Callable[[float], Smp]
) -> None:
    smp = short(0.3)
    with rank(smp, 0, "4") as process:
        admin = smp.client("admin")
        assert smp.process.poll() is None
        process.kill()
    assert smp.process.wait(DEADLINE_S) == 0
    assert left(tmp_path) == ["keep"]
    with pytest.raises(PeerLost):
        admin.list()


def test_a_lease_keeps_the_manager_beyond_its_ttl(short: Callable[[float], Smp]) -> None:
    smp = short(0.1)
    with smp.client("standby"), pytest.raises(subprocess.TimeoutExpired):
        smp.process.wait(0.5)
    assert smp.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("how", ["bye", "term"])
def test_a_goodbye_and_sigterm_end_it_at_once(tmp_path: Path, short: Callable[[float], Smp], how: str) -> None:
    smp = short(60.0)
    with smp.client("agent") as agent, smp.client() as client, store(client, 0, 0, 4):
        if how == "bye":
            agent.bye()
        else:
            smp.process.terminate()
        assert smp.process.wait(DEADLINE_S) == 0
    assert left(tmp_path) == ["keep"]


def test_ctrl_c_and_a_hangup_do_not_end_it(smp: Smp) -> None:
    with smp.client() as client:
        for number in (signal.SIGINT, signal.SIGHUP):
            smp.process.send_signal(number)
        assert client.list() == ()
        assert os.getsid(smp.process.pid) == smp.process.pid


def test_a_second_manager_exits_with_3_and_touches_nothing(tmp_path: Path, short: Callable[[float], Smp]) -> None:
    smp = short(60.0)
    second = smp.spawn(stderr=subprocess.PIPE)
    _, errors = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 3
    assert errors.decode() == f"holdfast: error: another snapshot manager has the socket {smp.name}\n"
    assert left(tmp_path) == ["keep", "registry.json", "run"]
    smp.client("agent").bye()
    assert smp.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(("ttl_s", "name"), [(-1.0, "x"), (float("nan"), "x"), (1.0, "x" * 200)])
def test_bad_arguments_are_one_line_and_exit_2(ttl_s: float, name: str) -> None:
    process = Smp(name, ttl_s, []).spawn(stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert errors.startswith(b"holdfast: error: ")
    assert errors.count(b"\n") == 1


# ---- strangers ------------------------------------------------------------------------------------------


def test_a_wrong_token_job_or_role_is_refused(smp: Smp) -> None:
    with pytest.raises(ConfigError, match="wrong job token"):
        smp.client(token="guess")
    with pytest.raises(ConfigError, match="wrong job token"):
        smp.client(token="\ud800")
    with pytest.raises(ConfigError, match="another job"):
        smp.client(job="job-2")
    with pytest.raises(ConfigError, match="unknown role"):
        smp.client("king")
    with smp.client() as client:
        assert client.stats()["connections"] == {"rank": 1}


def test_only_an_agent_ends_the_job_and_only_ranks_have_arenas(smp: Smp) -> None:
    with pytest.raises(PeerLost):
        smp.client("rank").bye()
    with pytest.raises(PeerLost):
        smp.client("agent").arena(0, 0, NBYTES)
    with smp.client() as client:
        assert client.stats()["violations"] == 2


def raw(smp: Smp, *, hello: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE_S)
    sock.connect(f"\0{smp.name}")
    if hello:
        who = {"op": "hello", "role": "rank", "rank": 0, "incarnation": 0, "token": TOKEN, "job": JOB}
        sock.sendall(pack({"id": 1, **who}))
        assert answer(sock)["ok"]
    return sock


def answer(sock: socket.socket) -> dict[str, Any]:
    inbox = Inbox()
    while (message := inbox.take()) is None:
        assert inbox.receive(sock)
    inbox.close()
    return message


def ended(sock: socket.socket) -> bool:
    """Whether the other side closed."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    sock.close()
    return True


def frame(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


BAD = [
    struct.pack("!I", MESSAGE_BYTES_MAX + 1),
    struct.pack("!I", 0xFFFFFFFF) + b"x" * 100,
    frame(b"{"),
    frame(b"[]"),
    frame(b"[" * 60_000),
    frame(b'{"id":1,"op":"\\ud800"}'),
    frame(b'{"id":1,"op":["list"]}'),
    frame(b'{"op":"list"}'),
    frame(b'{"id":true,"op":"list"}'),
    frame(b'{"id":1,"op":"arena","slot":0,"half":2,"nbytes":1}'),
    frame(b'{"id":1,"op":"arena","slot":0,"half":0,"nbytes":1e99}'),
    frame(b'{"id":1,"op":"copied","slot":-1,"half":0,"step":1}'),
    frame(b'{"id":1,"op":"adopt","slot":0,"half":0}'),
    frame(b'{"id":1,"op":"hello","role":"agent","token":"secret","job":"job-1","rank":-2}'),
    frame(b'{"id":1,"op":"open","slot":0,"half":0,"x":' + b"9" * 5000 + b"}"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_message_ends_its_own_connection_only(smp: Smp, number: int) -> None:
    with smp.client() as bystander:
        for hello in (True, False):
            sock = raw(smp, hello=hello)
            sock.sendall(BAD[number])
            assert ended(sock)
        assert bystander.stats()["violations"] == 2


def test_no_random_bytes_end_the_process(smp: Smp) -> None:
    chance = random.Random(7)
    words = [
        b'{"id":1',
        b'"op":"list"',
        b'"slot":0',
        b"}",
        b"\x00",
        b"[",
        b"\xff",
        frame(b'{"id":2,"op":"stats"}'),
    ]
    for _ in range(60):
        sock = raw(smp, hello=chance.random() < 0.8)
        body = b"".join(chance.choices(words, k=chance.randrange(1, 12)))
        with contextlib.suppress(OSError):
            sock.sendall(frame(body) if chance.random() < 0.7 else body)
        sock.close()
    with smp.client() as client:
        assert client.list() == ()


def test_descriptors_that_nobody_asked_for_are_closed(smp: Smp) -> None:
    with smp.client() as client:
        before = smp.fds(client)
        for count in (1, 4, 5, 50):
            sock = raw(smp)
            with contextlib.suppress(OSError):
                send_some(sock, pack({"id": 2, "op": "list"}), [sock.fileno()] * count)
                send_some(sock, pack({"id": 3, "op": "nonsense"}), [sock.fileno()] * count)
            ended(sock)
        assert smp.fds(client) == before


def test_a_client_that_does_not_read_its_answers_is_cut_off(smp: Smp) -> None:
    sock = raw(smp)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with smp.client() as client:
        request, data = pack({"id": 2, "op": "stats"}), memoryview(b"")

        def cut() -> bool:
            nonlocal data
            for _ in range(1000):
                data = data or memoryview(request)
                try:
                    data = data[sock.send(data) :]
                except BlockingIOError:
                    break
                except OSError:
                    return True
            return False

        wait_for(cut, "the silent client is cut off")
        assert client.stats()["connections"] == {"rank": 1}
    sock.close()


# ---- nothing leaks, nothing hangs -----------------------------------------------------------------------


def test_descriptors_stay_flat_over_200_openings(smp: Smp) -> None:
    with smp.client() as client, store(client, 0, 0, 4):
        check(client, 0, 0, 4)
        ours, theirs = len(os.listdir("/proc/self/fd")), smp.fds(client)
        for number in range(200):
            client.open(0, 0).close()
            client.arena(0, 0, NBYTES).close()
            if number % 10 == 0:
                smp.client().close()
        assert len(os.listdir("/proc/self/fd")) == ours
        assert smp.fds(client) == theirs


def test_arenas_that_grow_leave_no_descriptor_behind(smp: Smp) -> None:
    with smp.client() as client:
        store(client, 0, 0, 1).close()
        check(client, 0, 0, 1)
        assert not client.corrupt(0, 0, 1)
        theirs = smp.fds(client)
        for factor in range(2, 12):
            client.arena(0, 0, factor * NBYTES).close()
        assert smp.fds(client) == theirs
        assert client.stats()["created"] == 11


def test_a_call_ends_by_its_deadline_although_the_manager_is_stopped(smp: Smp) -> None:
    client = smp.client(timeout_s=0.3)
    smp.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(PeerLost, match="no answer in time"):
            client.list()
        with pytest.raises(PeerLost, match="no answer in time"):
            smp.client(timeout_s=0.3)
    finally:
        smp.process.send_signal(signal.SIGCONT)
    with pytest.raises(PeerLost, match="closed"):
        client.list()
    smp.client().close()


def test_a_call_that_takes_work_may_take_longer_than_one_that_does_not(
    smp: Smp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.ckpt.memory.client.QUICK_S", 0.2)
    with smp.client() as client:
        smp.process.send_signal(signal.SIGSTOP)
        timer = threading.Timer(0.5, smp.process.send_signal, [signal.SIGCONT])
        timer.start()
        with pytest.raises(SnapshotIncomplete, match="no such half"):
            client.open(0, 0)
        timer.join(DEADLINE_S)


def test_closing_wakes_a_call_in_another_thread(smp: Smp) -> None:
    client = smp.client()
    smp.process.send_signal(signal.SIGSTOP)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            client.open(0, 0)
        except PeerLost as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    try:
        thread.start()
        wait_for(client._lock.locked, "the call is under way")
        client.close()
        thread.join(DEADLINE_S)
    finally:
        smp.process.send_signal(signal.SIGCONT)
    assert len(caught) == 1


def test_an_answer_to_another_request_is_never_taken() -> None:
    name = f"holdfast-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        listener.settimeout(DEADLINE_S)

        def answers() -> None:
            sock, _ = listener.accept()
            with sock:
                answer(sock)
                sock.sendall(pack({"id": 1, "ok": True, "pid": 1}))
                answer(sock)
                sock.sendall(pack({"id": 1, "ok": True, "halves": []}))

        thread = threading.Thread(target=answers)
        thread.start()
        client = SmpClient(name, job=JOB, token=TOKEN, role="rank", timeout_s=DEADLINE_S)
        with pytest.raises(PeerLost, match="an answer to something else"):
            client.list()
        thread.join(DEADLINE_S)


def test_calls_from_many_threads_get_their_own_answers(smp: Smp) -> None:
    with smp.client() as client:
        for slot in range(4):
            store(client, slot, 0, slot).close()
        failures: list[BaseException] = []

        def work(slot: int) -> None:
            try:
                for _ in range(25):
                    check(client, slot, 0, slot)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert failures == []


def test_the_list_is_whole_for_a_host_of_many_ranks(smp: Smp) -> None:
    with smp.client() as client:
        for slot in range(64):
            for half in (0, 1):
                client.arena(slot, half, 8192).close()
        halves = client.list()
    assert [(h.slot, h.half) for h in halves] == [(slot, half) for slot in range(64) for half in (0, 1)]
    assert halves[0] == HalfInfo(slot=0, half=0, step=0, state=State.EMPTY.name, nbytes=8192)
    assert len(json.dumps([[h.slot, h.half] for h in halves])) < MESSAGE_BYTES_MAX


def test_the_manager_needs_no_torch_and_no_numpy() -> None:
    code = "import sys, holdfast.ckpt.memory.manager, holdfast.ckpt.memory.client; print(*sys.modules)"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"torch", "numpy", "grpc", "google.protobuf", "safetensors"} & set(found.stdout.split())

"""The hosts of the tests are like hosts: reachable, killed with a reset, gone without a word, cut off, slow, and tidy.

Shown with plain sockets, so that what fails over hosts elsewhere is not the fault of the harness. A client on one
host asks an echo server on another again and again, and prints each answer's time, and how the connection ended.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import hosts as harness  # noqa: E402
import jobs  # noqa: E402
from hosts import Host, HostJob, Hosts, Process, start_job  # noqa: E402

HOSTJOB = ROOT / "tests" / "helpers" / "scripts" / "hostjob.py"
PORT = 4711  # of a host's own: nobody else is there to take it
WITHIN_S = 10.0

SERVER = """
import socket, sys, threading

def answer(connection):
    while data := connection.recv(1 << 16):
        connection.sendall(data)

server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listening", flush=True)
while True:
    threading.Thread(target=answer, args=[server.accept()[0]], daemon=True).start()
"""

CLIENT = """
import socket, sys, time

connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5.0)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
connection.settimeout(None)
try:
    while True:
        asked = time.monotonic()
        connection.sendall(b"?")
        if not connection.recv(1):
            print("end of stream", flush=True)
            break
        print(f"echo {1000 * (time.monotonic() - asked):.3f}", flush=True)
        time.sleep(0.02)
except OSError as error:
    print(type(error).__name__, flush=True)
"""

RECEIVE = """
import hashlib, socket, sys, time

connection, _ = socket.create_server((sys.argv[1], int(sys.argv[2]))).accept()
digest = hashlib.sha256()
while data := connection.recv(1 << 16):
    digest.update(data)
print(digest.hexdigest(), time.monotonic(), flush=True)
"""

SEND = """
import hashlib, random, socket, sys, time

data = random.Random(0).randbytes(int(sys.argv[3]))
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5.0)
print(hashlib.sha256(data).hexdigest(), time.monotonic(), flush=True)
connection.settimeout(None)
connection.sendall(data)
"""


@pytest.fixture(autouse=True, scope="module")
def _available() -> None:
    reason = Hosts.available()
    if reason is not None:
        pytest.skip(reason)


def serve(host: Host, code: str = SERVER) -> Process:
    process = host.popen(host.python(code, host.address, str(PORT)))
    harness.wait_for(lambda: "listening" in process.out.read_text(), WITHIN_S, "the server listens")
    return process


def ask(client: Host, server: Host) -> Process:
    """A client that has had its first answer."""
    process = client.popen(client.python(CLIENT, server.address, str(PORT)))
    harness.wait_for(lambda: "echo" in process.out.read_text(), WITHIN_S, f"an echo\n{process.tail()}")
    return process


def echoes(process: Process) -> list[float]:
    lines = process.out.read_text().splitlines()
    return [float(line.removeprefix("echo ")) for line in lines if line.startswith("echo ")]


def silent(process: Process, seconds: float = 1.0) -> bool:
    """Whether nothing at all happens to the client so long: no answer, no end."""
    threading.Event().wait(0.1)  # what was under way
    before = process.out.read_text()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return process.out.read_text() == before
    return False


def answered_again(process: Process) -> None:
    count = len(echoes(process))
    harness.wait_for(lambda: len(echoes(process)) > count + 1, WITHIN_S, f"more echoes\n{process.tail()}")


def left_of(name: str) -> list[str]:
    """What is still there of the hosts of that name."""
    folders = [harness.NAMESPACES, harness.SHARED_MEMORY, Path(tempfile.gettempdir())]
    return [str(path) for folder in folders for path in folder.glob(f"{name}*")]


# ---- hosts ------------------------------------------------------------------------------------------------


def test_every_host_reaches_every_other_and_has_places_of_its_own() -> None:
    with Hosts(3) as hosts:
        for host in hosts:
            serve(host)
        for client in hosts:
            for server in hosts:
                assert echoes(ask(client, server))
        show = ["sh", "-c", "echo $HOME $TMPDIR $XDG_RUNTIME_DIR"]
        assert len({host.run(show) for host in hosts}) == 3
        assert len({host.address for host in hosts}) == 3


def test_abstract_sockets_and_shared_memory_of_one_host_are_not_seen_by_another() -> None:
    name = f"hosts-{secrets.token_hex(4)}"
    bind = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0{name}'); open('/dev/shm/{name}', 'x')"
    with Hosts(2) as hosts:
        for host in hosts:
            if not hosts.own_names:
                pytest.skip("no mount namespaces on this machine")
            host.run(host.python(bind))
            assert host.run(["ls", "/dev/shm"]).split() == [name]
        assert not Path("/dev/shm", name).exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("none", ["-", "-"]),
        ("loopback", ["127.0.1.1", "-"]),
        ("own", ["address 0", "-"]),
        ("all", ["address 0", "address 1"]),
    ],
)
def test_a_host_resolves_the_names_that_it_should_and_no_other(names: harness.Names, expected: list[str]) -> None:
    resolve = (
        "import socket\n"
        "for name in (socket.gethostname(), 'host1'):\n"
        "    try:\n"
        "        print(socket.gethostbyname(name))\n"
        "    except OSError:\n"
        "        print('-')\n"
    )
    with Hosts(2, names=names) as hosts:
        if not hosts.own_names:
            pytest.skip("no mount namespaces on this machine")
        found = hosts[0].run(hosts[0].python(resolve)).split()
        assert found == [hosts[int(text[-1])].address if text.startswith("address") else text for text in expected]


# ---- how a host ends --------------------------------------------------------------------------------------


def test_a_killed_host_resets_its_peers_connections_within_a_second() -> None:
    with Hosts(2) as hosts:
        server = "import socket, sys, time; s = socket.create_server((sys.argv[1], int(sys.argv[2]))); "
        server += "print('listening', flush=True); c, _ = s.accept(); c.sendall(b'!'); time.sleep(1000)"
        serve(hosts[1], server)
        client = ask(hosts[0], hosts[1])  # asked twice by now: the second question is never read
        threading.Event().wait(0.2)
        started = time.monotonic()
        hosts[1].kill()
        assert client.wait(1.0) == 0
        assert time.monotonic() - started < 1.0
        assert client.out.read_text().splitlines()[-1] == "ConnectionResetError"


def test_kill_reaches_every_process_of_the_host_and_no_other() -> None:
    with Hosts(2) as hosts:
        other = hosts[0].popen(["sleep", "1000"])
        family = hosts[1].popen(["sh", "-c", "setsid sleep 1000 & nohup sleep 1000 & echo started; sleep 1000"])
        hosts[1].wait_for("started", WITHIN_S)
        harness.wait_for(lambda: len(hosts[1].pids()) == 4, WITHIN_S, "the shell and three children")
        hosts[1].kill()
        assert hosts[1].pids() == []
        assert family.poll() == -signal.SIGKILL
        assert other.poll() is None
        assert hosts[0].pids() == [other.pid]
        assert hosts[1].run(["echo", "still a host"]) == "still a host\n"


def test_a_host_without_power_is_silent_and_knows_nothing_of_its_connections_when_it_is_back() -> None:
    with Hosts(2) as hosts:
        serve(hosts[1])
        client = ask(hosts[0], hosts[1])
        hosts[1].power_off()
        assert hosts[1].pids() == []
        assert silent(client)
        hosts[1].power_on()
        client.wait(WITHIN_S)
        assert client.out.read_text().splitlines()[-1] == "ConnectionResetError"
        serve(hosts[1])
        ask(hosts[0], hosts[1])


# ---- the network ------------------------------------------------------------------------------------------


def test_a_partition_is_silent_between_groups_and_nothing_within_them_and_connections_live_through_it() -> None:
    with Hosts(4) as hosts:
        serve(hosts[1])
        serve(hosts[2])
        within, across = ask(hosts[0], hosts[1]), ask(hosts[0], hosts[2])
        hosts.partition({0, 1}, {2, 3})
        assert silent(across)
        answered_again(within)
        hosts.partition({0, 2}, {1})  # host 3 is the rest
        answered_again(across)
        assert silent(within)
        hosts.heal()
        answered_again(within)
        answered_again(across)


def test_a_host_that_is_cut_off_is_silent_until_it_joins_again() -> None:
    with Hosts(3) as hosts:
        serve(hosts[1])
        hurt, other = ask(hosts[0], hosts[1]), ask(hosts[2], hosts[1])
        hosts[0].cut()
        assert silent(hurt)
        answered_again(other)
        hosts[0].join()
        answered_again(hurt)


def test_a_new_connection_to_a_host_that_is_cut_off_is_not_refused_by_the_own_kernel() -> None:
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 4711), timeout=4.0)"  # ARP gives up after 3
    with Hosts(2) as hosts:
        hosts[1].cut()
        with pytest.raises(AssertionError, match="TimeoutError: timed out"):
            hosts[0].run(hosts[0].python(connect, hosts[1].address))


@pytest.fixture(params=["netem", "relay"])
def netem(request: pytest.FixtureRequest) -> bool:
    by_kernel = bool(request.param == "netem")
    reason = Hosts.can_shape(netem=by_kernel)
    if reason is not None:
        pytest.skip(reason)
    return by_kernel


def test_a_delay_is_paid_in_each_direction_by_connections_that_were_there_before(netem: bool) -> None:
    with Hosts(2, netem=netem) as hosts:
        serve(hosts[1])
        client = ask(hosts[0], hosts[1])
        assert min(echoes(client)) < 20.0
        hosts[1].shape(delay_ms=40)
        harness.wait_for(lambda: echoes(client)[-1] > 79.0, WITHIN_S, f"a slow echo\n{client.tail()}")
        answered_again(client)
        assert min(echoes(client)[-2:]) > 79.0
        hosts[1].cut()
        assert silent(client)
        hosts[1].join()
        answered_again(client)
        hosts[1].unshape()
        harness.wait_for(lambda: echoes(client)[-1] < 20.0, WITHIN_S, f"a fast echo\n{client.tail()}")


def test_a_slow_and_lossy_link_takes_its_time_and_delivers_what_was_sent(netem: bool) -> None:
    with Hosts(2, netem=netem) as hosts:
        hosts[0].shape(delay_ms=2, loss_pct=2, rate_mbit=16)
        receiver = hosts[1].popen(hosts[1].python(RECEIVE, hosts[1].address, str(PORT)))
        table = hosts[1].python("print(open('/proc/net/tcp').read())")
        harness.wait_for(lambda: f"{PORT:04X}" in hosts[1].run(table), WITHIN_S, "the receiver listens")
        sent, at = hosts[0].run(hosts[0].python(SEND, hosts[1].address, str(PORT), "1000000")).split()
        assert receiver.wait(20.0) == 0
        received, end = receiver.out.read_text().split()
        assert received == sent
        assert float(end) - float(at) > 0.4  # 8 Mbit over 16 Mbit/s are 0.5 s; the last bytes may wait in buffers


def test_a_lossy_link_loses_about_as_much_as_it_should(netem: bool) -> None:
    send = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for number in range(1000):\n"
        "    s.sendto(b'%d' % number, (sys.argv[1], 4711))\n"
    )
    receive = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)\n"
        "s.bind((sys.argv[1], 4711))\n"
        "s.settimeout(2.0)\n"
        "print('listening', flush=True)\n"
        "count = 0\n"
        "try:\n"
        "    while s.recv(10):\n"
        "        count += 1\n"
        "except TimeoutError:\n"
        "    print(count)\n"
    )
    with Hosts(2, netem=netem) as hosts:
        hosts[0].shape(loss_pct=40)
        receiver = serve(hosts[1], receive)
        hosts[0].run(hosts[0].python(send, hosts[1].address))
        assert receiver.wait(WITHIN_S) == 0
        assert 500 < int(receiver.out.read_text().split()[-1]) < 700


# ---- nothing is left --------------------------------------------------------------------------------------


def both_there(hosts: Hosts) -> bool:
    return [len(host.pids()) for host in hosts] == [0, 2]


def test_nothing_is_left_after_the_end_nor_after_an_exception() -> None:
    for error in (None, KeyboardInterrupt):
        pids = []
        try:
            with Hosts(2) as hosts:
                hosts[0].shape(delay_ms=1)
                hosts[1].popen(["sleep", "1000"])
                hosts[1].popen(["setsid", "-f", "sleep", "1000"]).wait(WITHIN_S)
                # The first may still be on its way into the host's namespace.
                harness.wait_for(partial(both_there, hosts), WITHIN_S, "two processes on the second host")
                pids = hosts[1].pids()
                assert left_of(hosts.name)
                if error:
                    raise error
        except KeyboardInterrupt:
            assert error
        assert left_of(hosts.name) == []
        assert [pid for pid in pids if harness._started(pid) is not None] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_by_a_signal_leaves_nothing_to_the_next(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        f"import sys, threading; sys.path.insert(0, {str(ROOT / 'tests' / 'helpers')!r})\n"
        "from hosts import Hosts\n"
        "with Hosts(2) as hosts:\n"
        "    hosts[1].shape(delay_ms=1)\n"
        "    print(hosts.name, hosts[0].popen(['sleep', '1000']).pid, flush=True)\n"
        "    threading.Event().wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        name, pid = process.stdout.readline().split()
        process.send_signal(number)
        assert process.wait(WITHIN_S) == -number
    finally:
        process.kill()
        process.stdout.close()
    if number == signal.SIGKILL:
        with Hosts(1):
            pass
    assert left_of(name) == []
    assert harness._started(int(pid)) is None


def test_the_hosts_of_a_run_that_goes_on_are_left_alone() -> None:
    with Hosts(2) as hosts:
        process = hosts[0].popen(["sleep", "1000"])
        harness.sweep()
        assert process.poll() is None
        assert len(left_of(hosts.name)) == 5  # three namespaces, a folder, shared memory


# ---- jobs -------------------------------------------------------------------------------------------------


def test_a_jobs_records_are_merged_in_order_and_a_host_that_comes_back_runs_the_same_again(tmp_path: Path) -> None:
    code = (
        "import json, os, sys, time\n"
        "with open('events.jsonl', 'a') as log:\n"
        "    print(json.dumps({'event': sys.argv[1], 'monotonic_ns': time.monotonic_ns()}), file=log)\n"
        "    print('{\"torn', end='', file=log) if sys.argv[1] == 'host1' else None\n"
        "print('out of', sys.argv[1], flush=True)\n"
        "time.sleep(1000 if sys.argv[1] == 'host0' and not os.path.exists('../go') else 0)\n"
    )
    with Hosts(2, folder=tmp_path) as hosts:
        job = HostJob(hosts, tmp_path / "job", lambda index: hosts[index].python(code, f"host{index}"), {})
        job.start(0)
        hosts[0].wait_for("out of host0", WITHIN_S)
        job.start(1)
        assert job.wait(WITHIN_S, only={1}).codes == {1: 0}
        hosts[0].power_off()
        assert job.processes[0].returncode == -signal.SIGKILL
        (tmp_path / "job" / "go").touch()
        job.restart(0)
        ended = job.wait(WITHIN_S)
        assert ended.codes == {0: 0, 1: 0}
        assert [(event["event"], event["on"]) for event in ended.events] == [("host0", 0), ("host1", 1), ("host0", 0)]
        assert ended.outs[0] == "out of host0\n" * 2


def test_a_job_that_does_not_end_is_killed_and_fails_with_the_output_of_all_hosts(tmp_path: Path) -> None:
    with Hosts(2, folder=tmp_path) as hosts:
        job = HostJob(hosts, tmp_path / "job", lambda i: ["sh", "-c", f"echo I am {i}; sleep 1000"], {})
        for index in range(2):
            job.start(index)
        hosts[1].wait_for("I am 1", WITHIN_S)
        with pytest.raises(AssertionError, match=r"(?s)no end within.*I am 0.*I am 1"):
            job.wait(0.5)
        assert [host.pids() for host in hosts] == [[], []]


def test_the_script_for_hosts_ends_with_the_same_bits_in_any_layout(tmp_path: Path) -> None:
    arguments = ("--steps", "4", "--width", "16")
    reference = jobs.reference(tmp_path / "reference", HOSTJOB, *arguments)
    with Hosts(1, folder=tmp_path) as hosts:
        layout = ("--stages", "2", "--replicas", "2", "--step-seconds", "0.2")
        ended = start_job(hosts, HOSTJOB, (*arguments, *layout), nproc=4, options=("--standbys", "0")).wait(60.0)
    assert ended.codes == {0: 0}, ended.err
    found, expected = ended.state(), reference.state()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    assert ended.told() == reference.told()
    assert ended.started() == {0: 1, 1: 1, 2: 1, 3: 1}
    formed = [event for event in ended.events if event["event"] == "rank_started"]
    assert {event["on"] for event in formed} == {0}

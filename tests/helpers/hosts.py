"""Several hosts on this machine: network namespaces on a switch of their own, to be killed, cut off and slowed down.

    Hosts(3)         switch:  [ bridge g0 ]── p0, p1, p2      a namespace too: nothing appears in the machine's own
                                 │   │   │    veth pairs
                     hosts[i]: eth0 10.77.R.10+i, loopback, processes, HOME, TMPDIR, XDG_RUNTIME_DIR, /dev/shm

    hosts[1].popen(command)        in that namespace; output in files under hosts[1].folder
    hosts[1].kill()                all its processes die; its kernel goes on and closes their connections
    hosts[1].power_off()           first the link, then the processes: nobody hears anything; power_on() forgets all
    hosts[1].cut() / .join(); hosts.partition({0, 1}, {2, 3}); hosts.heal()
    hosts[1].shape(delay_ms=20, loss_pct=1, rate_mbit=100) / .unshape()
    start_job(hosts, script, arguments).wait(60.0)             `holdfast run` on every host

What is cut is silent: neighbours are entered by hand, so that no host learns from an unanswered ARP request that
a peer is gone. shape() uses tc's netem where the kernel has it; elsewhere a relay, a process between the host's port
and the switch that holds frames back. What it is NOT: hosts share the clock, the disk, the process ids and two cores.
A host resolves its own name, host<i>, to its own address and nobody else's (`names`: see Names).

Invariants:

* Nothing is left after the `with`: no namespace, process or folder; also after an exception, or SIGTERM. Names
  carry who made them, so what a killed run left behind is removed by the next one.
* Network and processes of the machine itself are never touched.

Needs root, iproute2 and util-linux: Hosts.available() says what is missing. Making 8 hosts takes 0.1 s on two cores,
removing them 0.03 to 0.15 s; a partition 3 ms.

Long: the harness is one file so that benchmarks, and the relay, which is this file run as a script, need no other.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Literal, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jobs

Found = TypeVar("Found")
# What a host's hosts file knows: nothing; its own name as 127.0.1.1 (Debian's way); its own name as its own address;
# the names of all. Where this machine allows no mount namespaces, hosts have its name and file, whatever was asked for.
Names = Literal["none", "loopback", "own", "all"]

NAMESPACES: Final = Path("/run/netns")
SHARED_MEMORY: Final = Path("/dev/shm")
COMMAND_S: Final = 30.0
END_S: Final = 20.0
TAIL: Final = 3000
OURS: Final = re.compile(r"[a-z][a-z0-9]*-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{4}(-(\d+|switch|probe))?")
# Own host name, own /dev/shm, and a hosts file, as far as this machine allows; then the program, with the same pid.
ENTER: Final = """
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2" /dev/shm
mount --bind "$3" /etc/hosts
shift 3
exec "$@"
"""


class HostsError(Exception):
    """The harness itself could not do what it was asked to."""


# ---- small things ------------------------------------------------------------------------------------------


def wait_for(predicate: Callable[[], Found], deadline_s: float, what: str = "") -> Found:
    """What `predicate` returns as soon as that is true; AssertionError at the deadline."""
    end, pause = time.monotonic() + deadline_s, threading.Event()
    while not (found := predicate()):
        assert time.monotonic() < end, f"not within {deadline_s:.1f} s: {what or predicate}"
        pause.wait(0.02)
    return found


def _run(command: Sequence[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        raise HostsError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}\n{text}")
    return done.stdout


def _reason(error: Exception) -> str:
    """What a tool said, without which command it was."""
    return str(error).splitlines()[0].rpartition(": ")[2]


def _ip(lines: Sequence[str], namespace: str = "") -> None:
    """`ip` with many commands at once: a process costs more than what it does here."""
    if lines:
        _run(["ip", *(["-n", namespace] if namespace else []), "-batch", "-"], "\n".join(lines) + "\n")


def _started(pid: int) -> int | None:
    """When that process started, in ticks since boot; None if there is none. With the pid it names one for good."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Which namespace a file stands for."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _pids_in(namespace: tuple[int, int]) -> list[int]:
    """Processes in a network namespace; one that has ended (a zombie) is in none."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    return [pid for pid in pids if _identity(f"/proc/{pid}/ns/net") == namespace]


def _kill_all(namespace: tuple[int, int] | None) -> None:
    """SIGKILL to all processes of a namespace, again until there are none: one may fork while we look."""
    end = time.monotonic() + END_S
    while namespace is not None and (pids := _pids_in(namespace)):
        with contextlib.ExitStack() as stack:
            handles: dict[int, int] = {}
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    handles[pid] = os.pidfd_open(pid)
                    stack.callback(os.close, handles[pid])
            poll, watched = select.poll(), set[int]()
            for pid, handle in handles.items():
                if _identity(f"/proc/{pid}/ns/net") == namespace:  # the handle is of the process that we looked at
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                    poll.register(handle, select.POLLIN)
                    watched.add(handle)
            while watched and time.monotonic() < end:
                for handle, _ in poll.poll(1000.0):
                    poll.unregister(handle)
                    watched.discard(handle)
        if time.monotonic() > end:
            raise HostsError(f"processes {pids} do not end")


def _remove(name: str) -> None:
    """A namespace with all that runs in it; nothing if it is not there."""
    _kill_all(_identity(NAMESPACES / name))
    if (NAMESPACES / name).exists():
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=COMMAND_S, check=False)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Take the exit code of one that was killed. A wait() that a signal handler interrupted takes it itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)


def sweep() -> None:
    """Remove what runs left behind whose process is gone."""
    for folder in (NAMESPACES, SHARED_MEMORY, Path(tempfile.gettempdir())):
        for name in os.listdir(folder) if folder.is_dir() else []:
            made = OURS.fullmatch(name)
            if made is None or _started(int(made["pid"])) == int(made["started"]):
                continue
            if folder == NAMESPACES:
                _remove(name)
            else:
                shutil.rmtree(folder / name, ignore_errors=True)


def _new_name(prefix: str) -> str:
    return f"{prefix}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(2)}"


# ---- one host ----------------------------------------------------------------------------------------------


class Process(subprocess.Popen[bytes]):
    """A process on a host, its output in files."""

    out: Path
    err: Path

    def tail(self) -> str:
        """The end of what it wrote."""
        texts = [f"--- {path.name}\n{_read(path)[-TAIL:]}" for path in (self.out, self.err) if path.exists()]
        return "\n".join(texts)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A link's properties, in each direction."""

    delay_ms: float = 0.0
    loss_pct: float = 0.0
    rate_mbit: float = 0.0

    def netem(self) -> list[str]:
        """tc's words; the limit is in packets, and must hold what is under way."""
        rate = ["rate", f"{self.rate_mbit}mbit"] if self.rate_mbit else []
        return ["netem", "limit", "20000", "delay", f"{self.delay_ms}ms", "loss", f"{self.loss_pct}%", *rate]


class Host:
    """One namespace. Made by Hosts."""

    def __init__(self, hosts: Hosts, index: int, folder: Path, private: Path, memory: Path) -> None:
        self.index, self.folder, self.address = index, folder, hosts.address_of(index)
        self.name = f"{hosts.name}-{index}"
        self.is_on = True
        self._hosts, self._private, self._memory = hosts, private, memory
        self._processes: list[Process] = []
        for path in (folder, *(private / name for name in ("home", "run", "tmp")), memory):
            path.mkdir(parents=True, exist_ok=True)
        (private / "run").chmod(0o700)
        (private / "hosts").write_text("".join(f"{line}\n" for line in ("127.0.0.1 localhost", *hosts.names_of(index))))

    def environment(self) -> dict[str, str]:
        """What a process on this host finds, apart from what it inherits."""
        places = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "TMPDIR": "tmp"}
        return {name: str(self._private / place) for name, place in places.items()}

    def popen(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        name: str = "",
        stdout: Path | None = None,
        stderr: Path | None = None,
    ) -> Process:
        """Start `command` here. Its output goes to `name`.out and .err in the host's folder, appended."""
        assert self.is_on, f"host {self.index} is off"
        name = name or f"process{len(self._processes)}"
        out, err = stdout or self.folder / f"{name}.out", stderr or self.folder / f"{name}.err"
        with out.open("ab") as to, err.open("ab") as errors:
            process = Process(
                [*self._enter(), *command],
                env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **self.environment(), **(env or {})},
                cwd=cwd or self.folder,
                stdin=subprocess.DEVNULL,
                stdout=to,
                stderr=errors,
                start_new_session=True,
            )
        process.out, process.err = out, err
        self._processes.append(process)
        return process

    def _enter(self) -> list[str]:
        command = ["nsenter", f"--net={NAMESPACES / self.name}"]
        if not self._hosts.own_names:
            return command
        return [*command, "unshare", "--uts", "--mount", "sh", "-ec", ENTER, "sh", f"host{self.index}",
                str(self._memory), str(self._private / "hosts")]  # fmt: skip

    def run(self, command: Sequence[str], *, deadline_s: float = COMMAND_S, env: dict[str, str] | None = None) -> str:
        """`command` to its end; what it printed. AssertionError with its errors if it does not end well."""
        process = self.popen(command, env=env, name=f"run{len(self._processes)}")
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"no end within {deadline_s} s: {list(command)}\n{process.tail()}") from None
        assert code == 0, f"exit code {code}: {list(command)}\n{process.tail()}"
        return _read(process.out)

    def python(self, code: str, *arguments: str) -> list[str]:
        """The command for a few lines of Python."""
        return [sys.executable, "-c", code, *arguments]

    def free_port(self) -> int:
        """A port that is free on this host's address, and stays so: only what runs here could take it."""
        code = "import socket, sys; s = socket.socket(); s.bind((sys.argv[1], 0)); print(s.getsockname()[1])"
        return int(self.run(self.python(code, self.address)))

    def wait_for(self, found: Callable[[], Found] | str, deadline_s: float) -> Found | str:
        """Wait until the predicate is true, or the text is in any output of this host's processes."""
        if not isinstance(found, str):
            return wait_for(found, deadline_s)
        text = found
        try:
            return wait_for(lambda: text if any(text in _read(p) for p in self.logs()) else "", deadline_s)
        except AssertionError:
            tails = "\n".join(process.tail() for process in self._processes)
            raise AssertionError(f"host {self.index} did not say {text!r} within {deadline_s:.1f} s\n{tails}") from None

    def logs(self) -> list[Path]:
        """Files with output."""
        return [path for process in self._processes for path in (process.out, process.err)]

    def pids(self) -> list[int]:
        """Every process in this namespace, whoever started it."""
        identity = _identity(NAMESPACES / self.name)
        return _pids_in(identity) if identity else []

    def kill(self) -> None:
        """SIGKILL to everything that runs here, until nothing does. The kernel then closes the connections."""
        _kill_all(_identity(NAMESPACES / self.name))
        for process in self._processes:
            _reap(process)

    def power_off(self) -> None:
        """Cut the link first, so that no FIN and no RST reaches anybody; then end all processes. HOME stays."""
        if self.is_on:
            self.is_on = False
            self._hosts.wire()
            self.kill()
            self._hosts.forget(self.index)
            for path in (self._private / "run", self._private / "tmp", self._memory):
                for entry in path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def power_on(self) -> None:
        """An empty host at the same address: it answers what belongs to old connections with a reset."""
        if not self.is_on:
            self.is_on = True
            self._hosts.make([self.index])

    def cut(self) -> None:
        """Silently lose all packets between this host and all others."""
        self._hosts.cut_off.add(self.index)
        self._hosts.wire()

    def join(self) -> None:
        """Undo cut(). A partition stays."""
        self._hosts.cut_off.discard(self.index)
        self._hosts.wire()

    def shape(self, *, delay_ms: float = 0.0, loss_pct: float = 0.0, rate_mbit: float = 0.0) -> None:
        """Delay, lose and slow down what this host sends and receives, each way by as much; connections stay.

        A packet is what the kernel hands over: up to 64 KB of one connection. What a rate holds back longer than a
        second is lost.
        """
        self._hosts.shape(self.index, Shape(delay_ms, loss_pct, rate_mbit))

    def unshape(self) -> None:
        """Undo shape(); what is under way may be lost."""
        self._hosts.shape(self.index, None)


# ---- all hosts ---------------------------------------------------------------------------------------------


class Hosts:
    """Some hosts on one switch; a context manager."""

    def __init__(
        self,
        count: int,
        *,
        prefix: str | None = None,
        folder: Path | None = None,
        names: Names = "own",
        netem: bool | None = None,
    ) -> None:
        assert 1 <= count <= 200
        self.count = count
        self.name = _new_name(prefix or "hf")
        assert OURS.fullmatch(self.name), f"a prefix is small letters and digits, got {prefix!r}"
        self.network = random.SystemRandom().randrange(1, 255)
        self.cut_off: set[int] = set()
        self.own_names = False
        self._root = Path(tempfile.gettempdir()) / self.name
        self._memory = SHARED_MEMORY / self.name
        self.folder = folder or self._root / "logs"
        self._names = names
        self._groups: tuple[frozenset[int], ...] = ()
        self._bridges = 0
        self._wired: dict[str, str] = {}  # port -> bridge
        self._hosts: list[Host] = []
        self._shapes: dict[int, Shape] = {}
        self._relays: dict[int, subprocess.Popen[bytes]] = {}
        self._handler: Any = None
        self._netem = netem  # None: found out by the first shape()

    @property
    def switch(self) -> str:
        """The namespace in the middle."""
        return f"{self.name}-switch"

    def address_of(self, index: int) -> str:
        """Where host `index` is reached."""
        return f"10.77.{self.network}.{10 + index}"

    def names_of(self, index: int) -> list[str]:
        """Lines for the hosts file of host `index`."""
        match self._names:
            case "none":
                return []
            case "loopback":
                return [f"127.0.1.1 host{index}"]
            case "own":
                return [f"{self.address_of(index)} host{index}"]
            case "all":
                return [f"{self.address_of(other)} host{other}" for other in range(self.count)]

    def _hardware(self, index: int) -> str:
        return f"02:77:00:00:{self.network:02x}:{index:02x}"

    @staticmethod
    def available() -> str | None:
        """Why there can be no hosts on this machine; None if there can."""
        if os.geteuid() != 0:
            return "network namespaces need root"
        missing = [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]
        if missing:
            return f"no {' and no '.join(missing)} on this machine (iproute2, util-linux)"
        name = f"{_new_name('hf')}-probe"
        try:
            _ip([f"netns add {name}"])
            pair = "link add name p0 type veth peer name q0"
            _ip(["link add name g0 type bridge", pair, "link set dev p0 master g0 up"], name)
            _run(["nsenter", f"--net={NAMESPACES / name}", "true"])
        except (HostsError, OSError, subprocess.TimeoutExpired) as error:
            return f"no network namespaces: {_reason(error)}"
        finally:
            _remove(name)
        return None

    @staticmethod
    def can_shape(*, netem: bool = False) -> str | None:
        """Why links cannot be shaped, None if they can; with `netem`, why not by the kernel itself."""
        reason = Hosts.available()
        if reason is not None:
            return reason
        name = f"{_new_name('hf')}-probe"
        try:
            _ip([f"netns add {name}"])
            _run(["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", *Shape(1.0, 1.0, 1.0).netem()])
        except (HostsError, OSError) as error:
            reason = f"no netem: {_reason(error)}"
        finally:
            _remove(name)
        if reason is None or netem:
            return reason
        try:
            _frames("lo").close()
        except OSError as error:
            return f"{reason}; and no relay: {error}"
        return None

    # ---- life ----

    def __enter__(self) -> Hosts:
        reason = self.available()
        if reason is not None:
            raise HostsError(reason)
        sweep()
        self._catch()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def _build(self) -> None:
        self._root.mkdir(mode=0o700)
        places = [str(SHARED_MEMORY), "/etc/hosts"]
        own = ["unshare", "--uts", "--mount", "sh", "-ec", ENTER, "sh", "host0", *places, "true"]
        with contextlib.suppress(OSError):
            self.own_names = subprocess.run(own, capture_output=True, timeout=COMMAND_S, check=False).returncode == 0
        for index in range(self.count):
            own_places = (self.folder / f"host{index}", self._root / str(index), self._memory / str(index))
            self._hosts.append(Host(self, index, *own_places))
        _ip([f"netns add {self.switch}"])
        self.make(range(self.count))

    def make(self, indices: Sequence[int]) -> None:
        """Make the namespaces of these hosts and their links."""
        _ip([f"netns add {self._hosts[index].name}" for index in indices])
        pairs = []
        for index in indices:
            there = f"eth0 address {self._hardware(index)} netns {self._hosts[index].name}"
            pairs += [f"link add name p{index} type veth peer name {there}", f"link set dev p{index} up"]
        _ip(pairs, self.switch)
        for index in indices:
            others = [other for other in range(self.count) if other != index]
            _ip(
                [
                    "link set dev lo up",
                    f"addr add {self.address_of(index)}/24 brd + dev eth0",
                    "link set dev eth0 addrgenmode none up",
                    *(f"neigh add {self.address_of(o)} lladdr {self._hardware(o)} dev eth0" for o in others),
                ],
                self._hosts[index].name,
            )
        self.wire()
        for index in indices:
            if index in self._shapes:
                self.shape(index, self._shapes[index])

    def forget(self, index: int) -> None:
        """Take away a host's namespace: connections, ports and all."""
        shape = self._shapes.get(index)
        self.shape(index, None)
        if shape is not None:
            self._shapes[index] = shape
        _ip([f"link del dev p{index}"], self.switch)
        self._wired.pop(f"p{index}", None)
        _remove(self._hosts[index].name)

    def close(self) -> None:
        """Remove everything. May be called twice, and in the middle of anything."""
        with contextlib.ExitStack() as stack:  # last in, first out; one that fails does not keep the others from it
            stack.callback(self._release)
            for folder in (self._root, self._memory):
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            for name in (self.switch, *(host.name for host in self._hosts)):
                stack.callback(_remove, name)
            for relay in self._relays.values():
                stack.callback(_reap, relay)
                stack.callback(relay.kill)
            for host in self._hosts:
                stack.callback(host.kill)

    def _catch(self) -> None:
        """On SIGTERM clean up, then let it do what it would have done: end the process, or call a handler."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.close()
            os.kill(os.getpid(), number)

        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, stop)

    def _release(self) -> None:
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    # ---- the network ----

    def partition(self, *groups: set[int]) -> None:
        """Silently lose packets between the groups; hosts in none of them are one more group."""
        assert sum(map(len, groups)) == len(set().union(*groups)), "a host is in two groups"
        self._groups = tuple(frozenset(group) for group in groups)
        self.wire()

    def heal(self) -> None:
        """Undo partition() and every cut()."""
        self._groups = ()
        self.cut_off.clear()
        self.wire()

    def wire(self) -> None:
        """Put each port on the bridge of its group, or on none. First all that move leave: no group sees another."""
        wanted: dict[str, str] = {}
        for host in self._hosts:
            port = f"q{host.index}" if host.index in self._relays else f"p{host.index}"
            group = next((n for n, group in enumerate(self._groups, 1) if host.index in group), 0)
            if host.is_on and host.index not in self.cut_off:
                wanted[port] = f"g{group}"
        leaves = [port for port, bridge in self._wired.items() if wanted.get(port) != bridge]
        enters = [(port, bridge) for port, bridge in wanted.items() if self._wired.get(port) != bridge]
        made = range(self._bridges, 1 + len(self._groups))
        bridges = [f"link add name g{n} type bridge forward_delay 0\nlink set dev g{n} up" for n in made]
        _ip(
            [
                *bridges,
                *(f"link set dev {port} nomaster" for port in leaves),
                *(f"link set dev {port} master {bridge}" for port, bridge in enters),
            ],
            self.switch,
        )
        self._bridges, self._wired = max(self._bridges, made.stop), wanted

    def shape(self, index: int, shape: Shape | None) -> None:
        """Replace what a host's link is like."""
        if self._netem is None:
            self._netem = self.can_shape(netem=True) is None
        if shape is None:
            self._shapes.pop(index, None)
        else:
            self._shapes[index] = shape
        if not self._hosts[index].is_on and shape is not None:
            return
        if self._netem:
            self._shape_by_netem(index, shape)
        else:
            self._shape_by_relay(index, shape)

    def _shape_by_netem(self, index: int, shape: Shape | None) -> None:
        for name, device in ((self._hosts[index].name, "eth0"), (self.switch, f"p{index}")):
            qdisc = ["tc", "-n", name, "qdisc"]
            subprocess.run([*qdisc, "del", "dev", device, "root"], capture_output=True, timeout=COMMAND_S, check=False)
            if shape is not None:
                _run([*qdisc, "add", "dev", device, "root", *shape.netem()])

    def _shape_by_relay(self, index: int, shape: Shape | None) -> None:
        """p ── relay ── r ═ q on the bridge, instead of p on the bridge."""
        old = self._relays.pop(index, None)
        if old is not None:
            old.kill()
            old.wait(END_S)
            _ip([f"link del dev q{index}"], self.switch)
            self._wired.pop(f"q{index}", None)
        if shape is not None:
            pair = f"link add name q{index} type veth peer name r{index}"
            _ip([pair, f"link set dev q{index} up", f"link set dev r{index} up"], self.switch)
            numbers = [str(number) for number in (shape.delay_ms, shape.loss_pct, shape.rate_mbit, index)]
            command = [sys.executable, str(Path(__file__).resolve()), f"p{index}", f"r{index}", *numbers]
            relay = self._relays[index] = subprocess.Popen(
                ["nsenter", f"--net={NAMESPACES / self.switch}", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            assert relay.stdout is not None
            with relay.stdout as told:
                if told.readline() != b"ready\n":
                    raise HostsError(f"the relay of host {index} did not start")
        self.wire()


# ---- jobs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostsEnded(jobs.Ended):
    """What a job left: jobs.Ended over all hosts (code: the first that is not 0), and each host's own."""

    codes: dict[int, int] = field(default_factory=dict)
    outs: dict[int, str] = field(default_factory=dict)
    errs: dict[int, str] = field(default_factory=dict)


class HostJob:
    """`holdfast run` on some hosts. Folders: `folder`/out for all, `folder`/host<i> for each host's record."""

    def __init__(self, hosts: Hosts, folder: Path, command: Callable[[int], list[str]], env: dict[str, str]) -> None:
        self.hosts, self.folder = hosts, folder
        self.processes: dict[int, Process] = {}
        self._command, self._env = command, env

    def start(self, index: int) -> Process:
        """Start the command on host `index`."""
        folder = self.folder / f"host{index}"
        folder.mkdir(parents=True, exist_ok=True)
        self.processes[index] = self.hosts[index].popen(
            self._command(index), env=self._env, cwd=folder, stdout=folder / "run.out", stderr=folder / "run.err"
        )
        return self.processes[index]

    def restart(self, index: int) -> Process:
        """The same command again, on a host that comes back: after kill(), or after power_off()."""
        self.hosts[index].kill()
        self.hosts[index].power_on()
        return self.start(index)

    def wait(self, deadline_s: float, only: set[int] | None = None) -> HostsEnded:
        """Wait for the end on all hosts (or `only` those); at the deadline kill all and fail with what they wrote."""
        end = time.monotonic() + deadline_s
        waited = {i: process for i, process in self.processes.items() if only is None or i in only}
        for process in waited.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"no end within {deadline_s:.0f} s\n{self.tails()}") from None
        codes = {i: process.returncode for i, process in waited.items()}
        outs = {i: _read(process.out) for i, process in self.processes.items()}
        errs = {i: _read(process.err) for i, process in self.processes.items()}
        code = next((code for code in codes.values() if code), 0)
        both = ["\n".join(f"[host {i}]\n{text}" for i, text in texts.items()) for texts in (outs, errs)]
        return HostsEnded(code, both[0], both[1], self.events(), self.folder, codes, outs, errs)

    def kill(self) -> None:
        """End the job on every host, by force."""
        for index in self.processes:
            self.hosts[index].kill()

    def tails(self) -> str:
        """The end of each host's output."""
        return "\n".join(f"===== host {i} ({p.poll()})\n{p.tail()}" for i, p in self.processes.items())

    def events(self) -> list[dict[str, Any]]:
        """All hosts' records in order of time, older ones of restarted hosts included; `on` says whose it is."""
        found = []
        for index in self.processes:
            for path in (self.folder / f"host{index}").glob("events.jsonl*"):
                for line in path.read_text().splitlines():
                    # A host that died while it wrote leaves a torn line.
                    with contextlib.suppress(ValueError):
                        found.append({**json.loads(line), "on": index})
        return sorted(found, key=lambda event: int(event.get("monotonic_ns", 0)))


def start_job(
    hosts: Hosts,
    script: Path,
    arguments: Sequence[str] = (),
    *,
    nproc: int = 1,
    nnodes: int | str | None = None,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
    on: Sequence[int] | None = None,
    out: bool = True,
) -> HostJob:
    """`holdfast run` of the script on every host (or those in `on`; HostJob.start() adds one). With --out for all."""
    number = len(list(hosts.folder.glob("job*")))
    folder = hosts.folder / f"job{number}"
    folder.mkdir(parents=True)
    endpoint, job = f"{hosts[0].address}:{hosts[0].free_port()}", f"hosts-{secrets.token_hex(4)}"
    to = ["--out", str(folder / "out")] if out else []

    def command(index: int) -> list[str]:
        return [
            sys.executable, "-m", "holdfast.launcher.cli", "run",
            "--nnodes", str(nnodes or len(hosts)), "--nproc-per-node", str(nproc),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job,
            "--events", str(folder / f"host{index}" / "events.jsonl"),
            *options, str(script), *arguments, *to,
        ]  # fmt: skip

    started = HostJob(hosts, folder, command, env or {})
    for index in on if on is not None else range(len(hosts)):
        started.start(index)
    return started


# ---- the relay ---------------------------------------------------------------------------------------------


def _frames(device: str) -> socket.socket:
    """What comes in at a device, and the way out. The numbers are of linux/if_packet.h; Python does not name them."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
    end.setsockopt(263, 23, 1)  # PACKET_IGNORE_OUTGOING: else what we send comes back
    end.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
    end.setblocking(False)
    end.bind((device, 3))  # ETH_P_ALL
    return end


def relay(devices: tuple[str, str], shape: Shape, seed: int) -> None:
    """Carry frames between two devices, late and not all, until killed.

    Frames come and go with what the kernel knows of them (virtio's header of 10 bytes): one may be 64 KB of a
    connection, its checksum still open. Loss and delay are per frame.
    """
    ends = [_frames(device) for device in devices]
    chance, late, count = random.Random(seed), list[tuple[float, int, int, bytes]](), 0
    free_at = [0.0, 0.0]  # when each direction has sent all that it was given
    print("ready", flush=True)
    while True:
        pause = max(0.0, late[0][0] - time.monotonic()) if late else None
        ready, _, _ = select.select(ends, [], [], pause)
        now = time.monotonic()
        for end in ready:
            with contextlib.suppress(BlockingIOError):
                frame = end.recv(1 << 18)
                way = ends.index(end)
                sending_s = 8e-6 * len(frame) / shape.rate_mbit if shape.rate_mbit else 0.0
                if chance.random() < shape.loss_pct / 100.0 or free_at[way] > now + 1.0:
                    continue  # lost; or more waits than a switch would hold
                free_at[way] = max(now, free_at[way]) + sending_s
                count += 1
                heapq.heappush(late, (free_at[way] + shape.delay_ms / 1000.0, count, 1 - way, frame))
        while late and late[0][0] <= time.monotonic():
            _, _, way, frame = heapq.heappop(late)
            try:
                ends[way].send(frame)
            except OSError as error:
                if error.errno not in (errno.ENOBUFS, errno.ENETDOWN, errno.EAGAIN, errno.ENXIO):
                    raise


if __name__ == "__main__":
    relay((sys.argv[1], sys.argv[2]), Shape(*map(float, sys.argv[3:6])), int(sys.argv[6]))

"""The processes beside the ranks: coordinator and snapshot manager, restarted if they die.

    begin(): started ──▶ await_ready(): once, at the start of the job ──▶ adopt(loop): watched from then on

Both are started in their own session, so that Ctrl-C reaches only the agent, which ends them in order. The
coordinator's lifeline is its standard input; the snapshot manager is *meant* to outlive the agent for a while
(its ttl), and removes the job's files if the agent was killed. Not here: what they do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

from holdfast.proto import env
from holdfast.proto.channel import CHANNEL
from holdfast.proto.errors import ConfigError, HoldfastError, JobFailed

from .loop import Loop
from .probe import Probe
from .processes import describe_exit, tell

START_DEADLINE_S: Final = 60.0
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MOST_S: Final = 5.0
STABLE_S: Final = 5.0  # lived so long: the next death is a new story
SMP_MODULE: Final = "holdfast.ckpt.memory.manager"
SMP_TTL_S: Final = 3
COORDINATOR_PATIENCE_S: Final = 3.0  # restarting it costs no step
SMP_PATIENCE_S: Final = 8.0  # its death costs what no living rank maps


class Backoff:
    """Delays between restarts: the first is at once, a process that dies young waits longer each time."""

    def __init__(self) -> None:
        self._delay_s = 0.0
        self._started = time.monotonic()

    def started(self) -> None:
        """The process was started."""
        self._started = time.monotonic()

    def next_s(self) -> float:
        """The process died: how long to wait."""
        if time.monotonic() - self._started > STABLE_S:
            self._delay_s = 0.0
        delay_s = self._delay_s
        self._delay_s = min(BACKOFF_MOST_S, max(BACKOFF_FIRST_S, 2 * delay_s))
        return delay_s


def last_line(path: Path) -> str:
    """Last line of a log, without our own prefix; what a failed process had to say."""
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].removeprefix("holdfast: error: ")
    return ""


class Coordinator:
    """The coordinator's process: on every host of the job one; on the first it leads."""

    def __init__(
        self,
        *,
        bind: str,
        job: str,
        world_size: int,
        events: Path,
        token: str,
        directory: Path,
        options: Sequence[str] = (),
    ) -> None:
        self.address = ""
        self._bind = bind
        self._command = ["--job", job, "--world-size", str(world_size), "--events", str(events), *options]
        self._token = token
        self._log = directory / "coordinator.log"
        self._proc: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._ready: IO[bytes] | None = None
        self._backoff = Backoff()
        self._loop: Loop | None = None
        self._on_moved: Callable[[str], None] = lambda address: None
        self._probe: Probe | None = None

    @property
    def pid(self) -> int:
        """Its process; 0 while there is none."""
        return self._proc.pid if self._proc is not None else 0

    def begin(self) -> None:
        """Start the process."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        command = [
            sys.executable,
            "-m",
            "holdfast.launcher.coordinator",
            "--bind",
            self._bind,
            *self._command,
        ]
        try:
            with self._log.open("ab") as log:
                self._proc = subprocess.Popen(
                    [*command, "--ready-fd", str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[writing],
                    env={**os.environ, env.TOKEN: self._token},
                    start_new_session=True,
                )
        finally:
            os.close(writing)
        self._ready = os.fdopen(reading, "rb")
        self._backoff.started()

    def await_ready(self) -> str:
        """Wait until it listens; returns its address. Raises ConfigError if it refuses its arguments."""
        assert self._ready is not None
        assert self._proc is not None
        select.select([self._ready], [], [], START_DEADLINE_S)
        if not self._take_address():
            code = self._proc.poll()
            said = last_line(self._log) or f"the coordinator said nothing for {START_DEADLINE_S:.0f} s"
            error: type[HoldfastError] = ConfigError if code in (None, 2) else JobFailed
            raise error(said if code in (None, 2) else f"the coordinator ended at its start: {said}")
        return self.address

    def adopt(self, loop: Loop, on_moved: Callable[[str], None]) -> None:
        """Watch it from the loop from now on; `on_moved` gets each new address."""
        self._loop, self._on_moved = loop, on_moved
        self._watch()
        self._probe = Probe("coordinator", self._answers, lambda: self.pid, COORDINATOR_PATIENCE_S)

    def _answers(self) -> bool:
        import grpc

        from holdfast.proto.gen import control_pb2 as pb
        from holdfast.proto.gen import control_pb2_grpc

        with grpc.insecure_channel(self.address, options=CHANNEL) as channel:
            try:
                stub = control_pb2_grpc.ControlStub(channel)
                stub.Status(pb.StatusRequest(), metadata=[("holdfast-token", self._token)], timeout=1.0)
            except grpc.RpcError:
                return False
        return True

    def close(self) -> None:
        """End it (any thread, once the loop has stopped)."""
        if self._probe is not None:
            self._probe.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._ready is not None:
            self._ready.close()
        if self._proc is None:
            return
        assert self._proc.stdin is not None
        self._proc.stdin.close()  # EOF: it ends by itself
        try:
            self._proc.wait(3.0)
        except subprocess.TimeoutExpired:
            self._proc.kill()
            self._proc.wait()

    # ---- callbacks ----------------------------------------------------------------------------------

    def _take_address(self) -> bool:
        assert self._ready is not None
        line = self._ready.readline() if select.select([self._ready], [], [], 0)[0] else b""
        if not line:
            if self._proc is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._proc.wait(1.0)
            return False
        self._ready.close()
        self._ready = None
        self.address = str(json.loads(line)["address"])
        # Restarts try the same port: whoever knows the address then needs to learn nothing.
        self._bind = self.address
        return True

    def _watch(self) -> None:
        assert self._loop is not None
        assert self._proc is not None
        self._pidfd = os.pidfd_open(self._proc.pid)
        self._loop.watch(self._pidfd, self._ended)

    def _ended(self) -> None:
        assert self._loop is not None
        assert self._proc is not None
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = self._proc.wait()
        assert self._proc.stdin is not None
        self._proc.stdin.close()
        if self._ready is not None:
            self._loop.unwatch(self._ready.fileno())
            self._ready.close()
            self._ready = None
        if code == 2 and self._bind == self.address:
            self._bind = self._bind.rpartition(":")[0] + ":0"  # somebody took the port meanwhile
        said = last_line(self._log) if code > 0 else ""
        detail = f": {said}" if said else ""
        tell(f"the coordinator ended ({describe_exit(code)}{detail}); restarting it")
        self._loop.later(self._backoff.next_s(), self._restart)

    def _restart(self) -> None:
        assert self._loop is not None
        self.begin()
        self._watch()
        assert self._ready is not None
        self._loop.watch(self._ready.fileno(), self._ready_again)

    def _ready_again(self) -> None:
        assert self._loop is not None
        assert self._ready is not None
        self._loop.unwatch(self._ready.fileno())
        ready = self._ready
        line = ready.readline()
        ready.close()
        self._ready = None
        if line:  # else it died before: _ended sees to it
            self.address = self._bind = str(json.loads(line)["address"])
            self._on_moved(self.address)


class SnapshotManager:
    """The host's snapshot manager. Everything here is a no-op if its module is not installed."""

    def __init__(self, *, name: str, job: str, token: str, directory: Path, cleanup: Sequence[Path]) -> None:
        self.name = name
        self._job = job
        self._token = token
        self._log = directory / "smp.log"
        self._cleanup = [str(path) for path in cleanup]
        self._proc: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self._pidfd = -1
        self._loop: Loop | None = None
        self._backoff = Backoff()
        self._deadline = 0.0
        self._probe: Probe | None = None

    @staticmethod
    def available() -> bool:
        """Whether there is one to start."""
        return importlib.util.find_spec("holdfast.ckpt.memory") is not None and (
            importlib.util.find_spec(SMP_MODULE) is not None
        )

    @property
    def pid(self) -> int:
        """Its process; 0 while there is none."""
        return self._proc.pid if self._proc is not None else 0

    def begin(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", SMP_MODULE, "--socket", self.name, "--job", self._job]
        command += ["--ttl", str(SMP_TTL_S), "--token-env", env.TOKEN]
        command += ["--cleanup", *self._cleanup] if self._cleanup else []
        with self._log.open("ab") as log:
            self._proc = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, env.TOKEN: self._token},
                start_new_session=True,
            )
        self._backoff.started()

    def await_ready(self) -> None:
        """Wait until it answers, and hold its lease. Raises JobFailed if it ended instead."""
        assert self._proc is not None
        deadline = time.monotonic() + START_DEADLINE_S
        pidfd = os.pidfd_open(self._proc.pid)
        try:
            while not self._lease():
                # The socket has no name to wait for; its owner's death has, so that is what is awaited.
                ended = select.select([pidfd], [], [], 0.02)[0]
                if ended or time.monotonic() > deadline:
                    raise JobFailed(f"the snapshot manager did not start: {last_line(self._log)}")
        finally:
            os.close(pidfd)

    def adopt(self, loop: Loop) -> None:
        """Watch it from the loop from now on."""
        assert self._proc is not None
        self._loop = loop
        self._pidfd = os.pidfd_open(self._proc.pid)
        loop.watch(self._pidfd, self._ended)
        if self._probe is None:
            self._probe = Probe("snapshot manager", self._answers, lambda: self.pid, SMP_PATIENCE_S)

    def _answers(self) -> bool:
        from holdfast.ckpt.memory.client import SmpClient

        try:
            with SmpClient(self.name, job=self._job, token=self._token, role="admin", timeout_s=1.0) as client:
                client.stats()
        except (HoldfastError, OSError):
            return False
        return True

    def close(self) -> None:
        """Say goodbye: the job is over and nothing is to be kept (any thread, once the loop has stopped)."""
        if self._probe is not None:
            self._probe.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._proc is None:
            return
        if self._client is not None:
            with contextlib.suppress(HoldfastError, OSError):
                self._client.bye()
            with contextlib.suppress(HoldfastError, OSError):
                self._client.close()
        else:
            self._proc.terminate()
        try:
            self._proc.wait(3.0)
        except subprocess.TimeoutExpired:
            self._proc.kill()
            self._proc.wait()

    def _lease(self) -> bool:
        from holdfast.ckpt.memory.client import SmpClient

        try:
            self._client = SmpClient(self.name, job=self._job, token=self._token, role="agent", timeout_s=2.0)
        except (HoldfastError, OSError):
            return False
        return True

    # ---- callbacks ----------------------------------------------------------------------------------

    def _ended(self) -> None:
        assert self._loop is not None
        assert self._proc is not None
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = self._proc.wait()
        if self._client is not None:
            with contextlib.suppress(HoldfastError, OSError):
                self._client.close()
            self._client = None
        tell(f"the snapshot manager ended ({describe_exit(code)}); restarting it")
        self._loop.later(self._backoff.next_s(), self._restart)

    def _restart(self) -> None:
        assert self._loop is not None
        self.begin()
        self.adopt(self._loop)
        self._deadline = time.monotonic() + START_DEADLINE_S
        self._retry_lease()

    def _retry_lease(self) -> None:
        assert self._loop is not None
        if self._pidfd >= 0 and not self._lease() and time.monotonic() < self._deadline:
            self._loop.later(0.05, self._retry_lease)

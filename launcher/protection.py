"""The host's protector: the process that keeps parity of other hosts' snapshots, and rebuilds from it.

    begin(): started ──▶ await_ready() ──▶ adopt(loop): watched, restarted if it dies
    topology(text) ──▶ sender thread ──▶ the protector, whichever process that is now

Its calls may take a while, so a thread makes them; only the newest topology counts. Not here: what it does with
it (ckpt/memory/protect), who is told what (job.py). Invariant: after a restart the new process is told the newest
topology again.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from holdfast.ckpt.memory.placement import Placement
from holdfast.ckpt.memory.protect.client import ProtectorClient
from holdfast.proto import env
from holdfast.proto.errors import HoldfastError, JobFailed, PeerLost, SnapshotError

from .loop import Loop
from .processes import describe_exit, tell
from .services import START_DEADLINE_S, Backoff, last_line

MODULE: Final = "holdfast.ckpt.memory.protect"
RETRY_S: Final = 0.5


class Protection:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        name: str,
        smp: str,
        bind: str,
        job: str,
        token: str,
        directory: Path,
        on_refused: Callable[[str], None],
    ) -> None:
        """`on_refused(why)` is called (by another thread) if the job's memory is not there at its start."""
        self.name = name
        self.address = ""
        self._command = ["--smp", smp, "--control", name, "--job", job, "--token-env", env.TOKEN]
        self._bind = bind
        self._job = job
        self._token = token
        self._log = directory / "protector.log"
        self._proc: subprocess.Popen[bytes] | None = None
        self._ready: IO[bytes] | None = None
        self._pidfd = -1
        self._loop: Loop | None = None
        self._backoff = Backoff()
        self._changed = threading.Condition()
        self._topology = ""
        self._told = ""
        self._reserved = False
        self._on_refused = on_refused
        self._closed = False
        self._sender = threading.Thread(target=self._send, name="holdfast-topology", daemon=True)

    @property
    def pid(self) -> int:
        """Its process; 0 while there is none."""
        return self._proc.pid if self._proc is not None else 0

    def begin(self) -> None:
        """Start the process."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-m", MODULE, *self._command, "--bind", self._bind, "--ready-fd", str(writing)]
        try:
            with self._log.open("ab") as log:
                self._proc = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
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
        """Wait until it listens; returns its address. Raises JobFailed if it does not."""
        assert self._ready is not None
        select.select([self._ready], [], [], START_DEADLINE_S)
        if not self._take_address():
            raise JobFailed(f"the protector did not start: {last_line(self._log)}")
        return self.address

    def adopt(self, loop: Loop) -> None:
        """Watch it from the loop from now on."""
        self._loop = loop
        self._watch()
        self._sender.start()

    def topology(self, text: str) -> None:
        """The newest topology (any thread)."""
        with self._changed:
            self._topology = text
            self._changed.notify_all()

    def close(self) -> None:
        """End it (any thread, once the loop has stopped)."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._ready is not None:
            self._ready.close()
        if self._proc is not None:
            self._proc.terminate()
            try:
                self._proc.wait(3.0)
            except subprocess.TimeoutExpired:
                self._proc.kill()
                self._proc.wait()

    # ---- the sender thread ----------------------------------------------------------------------------

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._topology and self._topology != self._told))
                if self._closed:
                    return
                text = self._topology
            try:
                value = json.loads(text)
                placement = Placement.from_json(value["placement"]) if value["placement"] else None
                hosts = {int(host): str(address) for host, address in value["hosts"].items()}
                with ProtectorClient(self.name, job=self._job, token=self._token, role="agent") as client:
                    client.topology(int(value["number"]), int(value["me"]), hosts, placement)
                    self._reserve(client, placement)
            except HoldfastError as error:
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, RETRY_S):
                        return
                if not isinstance(error, PeerLost):  # while it is restarted there is nobody to tell
                    tell(f"the protector was not told who is there: {error}")
                continue
            with self._changed:
                self._told = text

    def _reserve(self, client: ProtectorClient, placement: Placement | None) -> None:
        """At the start of the job its memory is taken, or the job refused; later a job goes on as well as it can."""
        if placement is None or self._reserved:
            return
        try:
            client.reserve(placement)
        except SnapshotError as error:
            self._on_refused(f"no room for the parity of other hosts: {error}; see --redundancy")
        self._reserved = True

    # ---- callbacks ------------------------------------------------------------------------------------

    def _take_address(self) -> bool:
        assert self._ready is not None
        line = self._ready.readline() if select.select([self._ready], [], [], 0)[0] else b""
        self._ready.close()
        self._ready = None
        if line:
            self.address = self._bind = str(json.loads(line)["address"])  # a restart takes the same port
        return bool(line)

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
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        tell(f"the protector ended ({describe_exit(code)}); restarting it")
        self._loop.later(self._backoff.next_s(), self._restart)

    def _restart(self) -> None:
        assert self._loop is not None
        if self._closed:
            return
        self.begin()
        self._watch()
        with self._changed:
            self._told = ""
            self._changed.notify_all()

"""The agent's side of the zygote: a pool of warm standbys, refilled on request.

    start ──▶ zygote imports (2 s) ──▶ request() ──▶ "ready" ──▶ take() ──▶ assign: it is a rank now

All calls are made by the loop's thread. A zygote or standby that dies costs warmth, never correctness: the
supervisor then starts a fresh process. Not here: when to refill, and who gets a standby.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .loop import Loop
from .processes import AdoptedProcess, RankHandler, append_logs, kill_group, tell
from .zygote import FORK, Assignment

ZYGOTE_STARTS: Final = 3  # so many in a row without a standby are worth a line
ZYGOTE_RETRY_MOST_S: Final = 60.0
ASSIGN_TIMEOUT_S: Final = 2.0
ZYGOTE_ENVIRONMENT: Final = {
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # Asking whether there is a CUDA device must not initialise the driver, which does not survive a fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


@dataclass(slots=True)
class Standby:
    """A forked process that waits for an assignment; `pid` is 0 until it says that it is ready."""

    socket: socket.socket
    pid: int = 0


class StandbyPool:
    """See the module's docstring."""

    def __init__(
        self,
        loop: Loop,
        *,
        target: int,
        preload: Sequence[str],
        environment: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called when a standby became ready or can no longer be hoped for."""
        self._loop = loop
        self._target = target
        self._preload = preload
        self._environment = environment
        self._on_change = on_change
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._starts = 0
        self._warm = False
        self._pending: list[Standby] = []
        self._ready: deque[Standby] = deque()

    @property
    def warm(self) -> bool:
        """Whether the zygote has delivered, so that a fork takes milliseconds."""
        return self._warm and self._control is not None

    @property
    def pids(self) -> list[int]:
        """Zygote and standbys."""
        zygote = [self._zygote.pid] if self._zygote is not None else []
        return zygote + [standby.pid for standby in (*self._ready, *self._pending) if standby.pid]

    def start(self) -> None:
        """Start the zygote and ask for the first standbys; they come when it has imported everything."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-u", "-m", "holdfast.launcher.zygote", str(theirs.fileno())]
        if self._preload:
            command += ["--preload", ",".join(self._preload)]
        with theirs:
            self._zygote = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**self._environment, **ZYGOTE_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the agent, which then ends everything in order
            )
        ours.setblocking(False)
        self._starts += 1
        self._control = ours
        self._loop.watch(ours.fileno(), self._zygote_ended)
        self.refill()

    def refill(self, at_least: int = 0) -> None:
        """Ask for as many standbys as are still lacking, to have the target, or `at_least` so many."""
        for _ in range(max(self._target, at_least) - len(self._ready) - len(self._pending)):
            if self._control is None:
                return
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(self._control, [FORK], [theirs.fileno()])
                except OSError:
                    ours.close()  # the zygote's end is handled where its socket shows it
                    return
            standby = Standby(ours)
            self._pending.append(standby)
            self._loop.watch(ours.fileno(), lambda standby=standby: self._on_standby(standby))  # type: ignore[misc]

    def assign(self, local_rank: int, assignment: Assignment, *, stdout: str, stderr: str) -> RankHandler | None:
        """Make a standby a rank; None if there is none (or none that listens)."""
        while self._ready:
            standby = self._ready.popleft()
            self._loop.unwatch(standby.socket.fileno())
            with standby.socket, append_logs(stdout, stderr) as (out, err):
                message = assignment.encode()
                try:
                    standby.socket.settimeout(ASSIGN_TIMEOUT_S)
                    descriptors = [1 if out is None else out, 2 if err is None else err]
                    sent = socket.send_fds(standby.socket, [message], descriptors)
                    standby.socket.sendall(message[sent:])
                except OSError:
                    kill_group(standby.pid)
                    continue
            return RankHandler(local_rank, AdoptedProcess(standby.pid))
        return None

    def close(self) -> None:
        """End zygote and standbys (any thread, once the loop has stopped)."""
        for standby in (*self._ready, *self._pending):
            if standby.pid:
                kill_group(standby.pid)  # our child, not waited for yet
            standby.socket.close()
        self._ready.clear()
        self._pending.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._zygote is not None:
            # It may be in the middle of its imports, and then hears nothing of the closed socket.
            self._zygote.kill()
            self._zygote.wait()

    # ---- callbacks ----------------------------------------------------------------------------------

    def _on_standby(self, standby: Standby) -> None:
        try:
            data = standby.socket.recv(4096)
        except OSError:
            data = b""
        if data:
            standby.pid = int(json.loads(data)["ready"])
            self._warm, self._starts = True, 1
            self._pending.remove(standby)
            self._ready.append(standby)
        else:
            self._loop.unwatch(standby.socket.fileno())
            standby.socket.close()
            with contextlib.suppress(ValueError):
                self._pending.remove(standby)
            with contextlib.suppress(ValueError):
                self._ready.remove(standby)
        self._on_change()

    def _zygote_ended(self) -> None:
        # It never says anything: readable means that it is gone.
        assert self._control is not None
        assert self._zygote is not None
        self._loop.unwatch(self._control.fileno())
        self._control.close()
        self._control, self._warm = None, False
        self._zygote.kill()
        self._zygote.wait()
        for standby in self._pending:
            self._loop.unwatch(standby.socket.fileno())
            standby.socket.close()
        self._pending.clear()
        if self._starts == ZYGOTE_STARTS:
            tell("the zygote keeps failing: replacements start as fresh processes meanwhile")
        self._loop.later(min(ZYGOTE_RETRY_MOST_S, 2.0 ** (self._starts - 1)), self.start)
        self._on_change()

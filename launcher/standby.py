"""The agent's side of the zygote: a pool of warm standbys, refilled on request.

    Zygote() ──▶ imports (2 s) ──▶ refill() ──▶ "ready" ──┬─▶ assign(): one rank is replaced
                                                          └─▶ claim(): all ranks of a start at once

The first zygote may have been started before the agent itself has imported torch (`begin_early`). All calls of the
pool but `claim` are made by the loop's thread. A zygote or standby that dies costs warmth, never correctness:
the caller then starts a fresh process. Not here: when to refill, and who gets a standby.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from .loop import Loop
from .processes import AdoptedProcess, RankHandler, append_logs, kill_group, tell
from .zygote import FORK, Assignment

ZYGOTE_STARTS: Final = 3  # so many in a row without a standby are worth a line
ZYGOTE_RETRY_MOST_S: Final = 60.0
ASSIGN_TIMEOUT_S: Final = 2.0
SET_BY_TORCHRUN: Final = {"TORCHELASTIC_SIGNALS_TO_HANDLE"}  # in its own process, once it has parsed its arguments
ROOM: Final = "." * 200
ZYGOTE_ENVIRONMENT: Final = {
    "SPT_NOENV": "1",  # setproctitle would take the room of the environment, which /proc shows too
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # Asking whether there is a CUDA device must not initialise the driver, which does not survive a fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class Zygote:
    """The process that forks standbys, and the socket by which it is asked to."""

    def __init__(self, environment: Mapping[str, str], preload: Sequence[str] = ()) -> None:
        self.environment = dict(environment)
        self.preload = tuple(preload)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-u", "-m", "holdfast.launcher.zygote", str(theirs.fileno()), "--room", ROOM]
        if preload:
            command += ["--preload", ",".join(preload)]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**environment, **ZYGOTE_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the agent, which then ends everything in order
            )
        ours.setblocking(False)
        self.control = ours

    def fits(self, environment: Mapping[str, str], preload: Sequence[str]) -> bool:
        """Whether it imports what is asked for, as it would with this environment."""
        differs = {name for name, _ in self.environment.items() ^ environment.items()}
        return differs <= SET_BY_TORCHRUN and self.preload == tuple(preload)

    def close(self) -> None:
        """End it; harmless to repeat."""
        self.control.close()
        # It may be in the middle of its imports, and then hears nothing of the closed socket.
        self.process.kill()
        self.process.wait()


def begin_early(argv: Sequence[str], environment: Mapping[str, str]) -> Zygote | None:
    """A zygote for `holdfast run` with these arguments, before torch is there to parse them; None: it takes none.

    It imports what the agent imports at the same time, and is used only if `early_environment` guessed right.
    """
    guessed = early_environment(argv, environment)
    return Zygote(guessed) if guessed is not None else None


def early_environment(argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment that ranks will have, as far as a process keeps it from its start; None if it cannot be told."""
    options: dict[str, str] = {}
    for word, following in pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            options.setdefault(name.replace("_", "-"), value if equals else following)
    other = {"--preload", "--no-python", "--numa-binding"} & options.keys()
    if other or options.get("--standbys") == "0" or {"-h", "--help"} & set(argv):
        return None
    count = options.get("--nproc-per-node", "1")
    several = count.isdecimal() and int(count) > 1
    # torchrun's rule: with several ranks on a host, one thread each unless the user says otherwise.
    return {**({"OMP_NUM_THREADS": "1"} if several else {}), **environment}


@dataclass(slots=True)
class Standby:
    """A forked process that waits for an assignment; `pid` is 0 until it says that it is ready."""

    socket: socket.socket
    pid: int = 0

    def become(self, local_rank: int, assignment: Assignment, *, stdout: str, stderr: str) -> RankHandler | None:
        """Make it a rank, its output appended to these files ("": inherited). None if it does not listen any more."""
        with self.socket, append_logs(stdout, stderr) as (out, err):
            message = assignment.encode()
            try:
                self.socket.settimeout(ASSIGN_TIMEOUT_S)
                descriptors = [1 if out is None else out, 2 if err is None else err]
                sent = socket.send_fds(self.socket, [message], descriptors)
                if sent < len(message):  # else the standby may have closed its end by now
                    self.socket.sendall(message[sent:])
            except OSError:
                self.discard()
                return None
        return RankHandler(local_rank, AdoptedProcess(self.pid))

    def discard(self) -> None:
        """It is not needed."""
        if self.pid:
            kill_group(self.pid)  # our child, not waited for yet
        self.socket.close()


@dataclass(frozen=True, slots=True)
class Claim:
    """So many standbys are wanted at once; `given` gets them, or none."""

    count: int
    given: Future[list[Standby]]


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
        early: Zygote | None = None,
    ) -> None:
        """`on_change` is called when a standby became ready or can no longer be hoped for. `early`: if it fits."""
        self._loop = loop
        self._target = target
        self._preload = preload
        self._environment = dict(environment)
        self._on_change = on_change
        self._early = early
        if early is not None and not early.fits(environment, preload):
            early.close()
            self._early = None
        self._zygote: Zygote | None = None
        self._control: socket.socket | None = None
        self._starts = 0
        self._warm = False
        self._pending: list[Standby] = []
        self._ready: deque[Standby] = deque()
        self._claim: Claim | None = None

    @property
    def warm(self) -> bool:
        """Whether the zygote has delivered, so that a fork takes milliseconds."""
        return self._warm and self._control is not None

    @property
    def pids(self) -> list[int]:
        """Zygote and standbys."""
        zygote = [self._zygote.process.pid] if self._zygote is not None else []
        return zygote + [standby.pid for standby in (*self._ready, *self._pending) if standby.pid]

    def start(self) -> None:
        """Start the zygote and ask for the first standbys; they come when it has imported everything."""
        self._zygote = self._early if self._early is not None else Zygote(self._environment, self._preload)
        self._early = None
        self._starts += 1
        self._control = self._zygote.control
        self._loop.watch(self._control.fileno(), self._zygote_ended)
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
            handler = standby.become(local_rank, assignment, stdout=stdout, stderr=stderr)
            if handler is not None:
                return handler
        return None

    def claim(self, count: int, timeout_s: float) -> list[Standby]:
        """`count` standbys, which are the caller's from then on; none of them if they cannot be had in that time.

        For any other thread than the loop's. The time is that of the zygote's imports, if it has just been started.
        """
        claim = Claim(count, Future())
        self._loop.post(lambda: self._enter(claim))
        try:
            return claim.given.result(timeout_s)
        except TimeoutError:
            return [] if claim.given.cancel() else claim.given.result()

    def _enter(self, claim: Claim) -> None:
        self._claim = claim
        self.refill(at_least=claim.count)
        self._serve_claim()

    def _serve_claim(self) -> None:
        claim = self._claim
        if claim is None or (self._control is not None and len(self._ready) < claim.count):
            return
        self._claim = None
        if claim.given.set_running_or_notify_cancel():
            enough = len(self._ready) >= claim.count
            given = [self._ready.popleft() for _ in range(claim.count)] if enough else []
            for standby in given:
                self._loop.unwatch(standby.socket.fileno())
            claim.given.set_result(given)

    def close(self) -> None:
        """End zygote and standbys (any thread, once the loop has stopped)."""
        for standby in (*self._ready, *self._pending):
            standby.discard()
        self._ready.clear()
        self._pending.clear()
        self._control = None
        if self._zygote is not None:
            self._zygote.close()

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
            if self._claim is not None:
                self.refill(at_least=self._claim.count)
        self._serve_claim()
        self._on_change()

    def _zygote_ended(self) -> None:
        # It never says anything: readable means that it is gone.
        assert self._control is not None
        assert self._zygote is not None
        self._loop.unwatch(self._control.fileno())
        self._control, self._warm = None, False
        self._zygote.close()
        for standby in self._pending:
            self._loop.unwatch(standby.socket.fileno())
            standby.socket.close()
        self._pending.clear()
        if self._starts == ZYGOTE_STARTS:
            tell("the zygote keeps failing: replacements start as fresh processes meanwhile")
        self._loop.later(min(ZYGOTE_RETRY_MOST_S, 2.0 ** (self._starts - 1)), self.start)
        self._serve_claim()
        self._on_change()

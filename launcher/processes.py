"""Processes as the kernel shows them: /proc, pidfd, sessions, orphans, and ranks forked by others.

    subreaper    a process whose parent died becomes our child: standbys (forked twice by the zygote) on
                 purpose, leftovers of dead ranks by accident; both can then be waited for
    ProcStat     one pread of /proc/PID/stat tells a death 1-2 ms after the kill, long before pidfd and EOF,
                 which come only after the memory is torn down (82 ms per GiB, measured)
    RankHandler  what torch's SubprocessContext keeps per rank, over a Popen or an adopted process

Not here: who dies and who is replaced. Invariants: an exit status is collected by one place only per
process (`poll` of its handle); orphans are reaped only from foreign sessions, so a library's own Popen is
never robbed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

_PR_SET_CHILD_SUBREAPER: Final = 36
_PF_EXITING: Final = 0x4
_LOST_STATUS: Final = 255  # exit code when somebody else collected it


def become_subreaper() -> None:
    """Orphans among our descendants become our children from now on."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@dataclass(frozen=True, slots=True)
class ProcStat:
    """Parts of /proc/PID/stat. `status` is the wait status of a process that is exiting or a zombie."""

    state: str
    parent: int
    group: int
    session: int
    exiting: bool
    status: int


def parse_stat(data: bytes) -> ProcStat:
    """Parse the content of /proc/PID/stat; the command name may hold spaces and parentheses."""
    fields = data[data.rindex(b")") + 2 :].split()
    return ProcStat(
        state=fields[0].decode(),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        exiting=bool(int(fields[6]) & _PF_EXITING),
        status=int(fields[49]),
    )


def read_stat(pid: int) -> ProcStat | None:
    """State of a process, or None if there is none."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_bytes())
    except (OSError, ValueError):
        return None


def start_ticks(pid: int) -> int:
    """When the process started, in ticks; tells it from a later one with its pid. 0: there is none."""
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
        return int(data[data.rindex(b")") + 2 :].split()[19])
    except (OSError, ValueError):
        return 0


def children() -> list[int]:
    """Our children, adopted ones too, zombies too."""
    found: set[int] = set()
    for path in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in (path / "children").read_text().split())
    return sorted(found)


def reap_orphans(known: Iterable[int]) -> int:
    """Collect dead children that nobody waits for: leftovers of dead ranks. Returns how many.

    Only those in a session other than ours: what a library started with Popen lives in ours, and so does a
    process between fork and setsid.
    """
    spared, own, reaped = set(known), os.getsid(0), 0
    for pid in children():
        if pid in spared:
            continue
        stat = read_stat(pid)
        if stat is not None and stat.state == "Z" and stat.session != own:
            with contextlib.suppress(ChildProcessError):
                reaped += os.waitpid(pid, os.WNOHANG)[0] != 0
    return reaped


def kill_group(pid: int) -> None:
    """SIGKILL the process group that `pid` leads. Only for a leader that was not waited for yet.

    Until then its number cannot be given to another group.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill_leaders(spared: Iterable[int]) -> None:
    """SIGKILL and collect every child of ours that leads a session: ranks of a start that was broken off."""
    keep = set(spared)
    for pid in children():
        stat = read_stat(pid)
        if stat is not None and stat.session == pid and pid not in keep:
            kill_group(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def kill_sessions(sessions: Iterable[int]) -> list[int]:
    """SIGKILL every child of ours that lives in one of `sessions`; returns their pids."""
    wanted, killed = set(sessions), []
    for pid in children():
        stat = read_stat(pid)
        if stat is not None and stat.session in wanted and stat.state != "Z":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    return killed


class AdoptedProcess:
    """The part of Popen's interface that torch uses, over a process that was re-parented to us."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.args = f"standby {pid}"
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Exit code if it has ended (negative: signal), else None."""
        with self._lock:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:
                    self.returncode = _LOST_STATUS
                else:
                    if pid:
                        self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired like Popen."""
        code = self.poll()
        if code is not None:
            return code
        pidfd = os.pidfd_open(self.pid)
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            poller.poll(None if timeout is None else max(0.0, timeout * 1000))
        finally:
            os.close(pidfd)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code


class RankHandler:
    """Stands in torch's `SubprocessContext.subprocess_handlers` for a replaced rank."""

    def __init__(self, local_rank: int, proc: subprocess.Popen[bytes] | AdoptedProcess) -> None:
        self.local_rank_id = local_rank
        self.proc = proc
        # torch closes these at the end; ours are closed once the child has them.
        self._stdout: IO[Any] | None = None
        self._stderr: IO[Any] | None = None

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Signal the rank's process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.proc.pid, death_sig or signal.SIGTERM)


@contextlib.contextmanager
def append_logs(stdout: str, stderr: str) -> Iterator[tuple[int | None, ...]]:
    """Open a rank's log files for appending ("" means: inherited). Yields two descriptors or None each."""
    with contextlib.ExitStack() as stack:
        # torch's own handler truncates, which would lose the earlier incarnation and break its tail.
        files = [stack.enter_context(open(path, "ab")) if path else None for path in (stdout, stderr)]
        yield tuple(file.fileno() if file is not None else None for file in files)


def spawn_rank(
    local_rank: int, command: Sequence[str], environment: Mapping[str, str], *, stdout: str, stderr: str
) -> RankHandler:
    """Start a fresh process for a rank, in its own session, its logs appended."""
    with append_logs(stdout, stderr) as (out, err):
        proc = subprocess.Popen(list(command), env=dict(environment), stdout=out, stderr=err, start_new_session=True)
    return RankHandler(local_rank, proc)


def describe_exit(code: int) -> str:
    """An exit code as Popen gives it, in words: "exit 1", "SIGKILL"."""
    try:
        return signal.Signals(-code).name if code < 0 else f"exit {code}"
    except ValueError:
        return f"signal {-code}"


def tell(line: str) -> None:
    """One line for the operator. Whoever closed our stderr wants none, and must not end the job by it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"[holdfast] {line}\n")  # one write: ranks print to the same place
        sys.stderr.flush()

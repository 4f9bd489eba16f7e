"""The client of the snapshot manager: blocking calls with a deadline, from any thread.

    SmpClient(...) ── hello ──▶ manager            one request at a time, one connection = one lease
      .arena(slot, half, nbytes)  ▸ MappedHalf, writable: half.begin() ▸ bytes ▸ half.finish()
      .copied(slot, half, step)   ▸ returns when the manager has seen COPIED in the memory that it holds
      .list() .open(slot, half)   ▸ MappedHalf, a private view of a SEALED half: half.read() ▸ half.verify()

Does not retry and does not reconnect: whoever uses it knows what a lost manager means for it. After PeerLost
the client is closed, and the arenas that were handed out are still mapped: offer them to the next manager
with adopt(). Invariants:

* every call ends by its deadline, with its own answer or an error, never with another call's answer;
* a descriptor that arrives is owned by the MappedHalf returned, or closed.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from holdfast.proto.errors import PeerLost, ProtocolViolation, SnapshotError

from .memfd import MappedHalf
from .wire import Inbox, error_from, pack, send_some

__all__ = ["HalfInfo", "MappedHalf", "SmpClient"]

QUICK_S: Final = 3.0
"""Deadline of what the manager answers without working: it is stopped, or its host is, if this passes."""
PREFAULT_BYTES_PER_S: Final = 100_000_000
"""New memory may take a second per this many bytes: a quarter of what a small, busy virtual machine did."""


@dataclass(frozen=True, slots=True)
class HalfInfo:
    """One half on the manager's shelf."""

    slot: int
    half: int
    step: int
    state: str
    """EMPTY, FILLING, COPIED, SEALED or CORRUPT; COPIED and SEALED ones can be opened."""
    nbytes: int
    fill: int = 0
    memory: int = field(default=0, compare=False)
    """Tells memory that was replaced by other memory."""


class SmpClient:
    """A connection to the host's snapshot manager. Raises PeerLost when there is none."""

    def __init__(
        self,
        socket_name: str,
        *,
        job: str,
        token: str,
        role: str,
        rank: int = -1,
        incarnation: int = 0,
        timeout_s: float = 10.0,
    ) -> None:
        self._job = job
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._inbox = Inbox()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._closed = False
        try:
            self._sock.settimeout(min(timeout_s, QUICK_S))
            self._sock.connect(f"\0{socket_name}")
            who = {"role": role, "rank": rank, "incarnation": incarnation}
            self.pid: Final = int(self._quick("hello", token=token, job=job, **who)["pid"])
        except OSError as error:
            self.close()
            raise PeerLost("no snapshot manager", socket=socket_name, reason=str(error)) from error
        except BaseException:
            self.close()
            raise

    # ---- ranks ------------------------------------------------------------------------------------------

    def arena(self, slot: int, half: int, nbytes: int) -> MappedHalf:
        """Memory of at least `nbytes` for this half. Raises SnapshotError when the host has no room."""
        deadline_s = self._timeout_s + nbytes / PREFAULT_BYTES_PER_S
        _, fd = self._call("arena", deadline_s, want_fd=True, slot=slot, half=half, nbytes=nbytes)
        return MappedHalf(fd, self._job, slot=slot, index=half)

    def copied(self, slot: int, half: int, step: int) -> None:
        """Tell that `step` is COPIED. SnapshotIncomplete if the memory that it holds says otherwise."""
        self._quick("copied", slot=slot, half=half, step=step)

    def adopt(self, slot: int, half: int, mapped: MappedHalf) -> bool:
        """Offer memory to a manager that may be new. False: it has something newer; ask for its arena()."""
        if mapped.fd < 0:
            raise SnapshotError("a closed arena cannot be offered", slot=slot, half=half)
        return bool(self._quick("adopt", offered=mapped.fd, slot=slot, half=half)["adopted"])

    # ---- everybody --------------------------------------------------------------------------------------

    def list(self) -> tuple[HalfInfo, ...]:
        """Every half on the shelf, by slot and half."""
        return tuple(HalfInfo(**row) for row in self._quick("list")["halves"])

    def watch(self, since: int, wait_s: float) -> tuple[int, tuple[HalfInfo, ...]]:
        """(version, list) as soon as the version is not `since`, or after `wait_s`. Occupies this client."""
        reply, _ = self._call("watch", wait_s + QUICK_S, since=since, wait_ms=int(wait_s * 1000))
        return int(reply["version"]), tuple(HalfInfo(**row) for row in reply["halves"])

    def repaired(self, slot: int, half: int, fill: int) -> bool:
        """Protectors: that CORRUPT half was repaired. True: the manager looked, and it is SEALED again."""
        reply, _ = self._call("repaired", self._timeout_s, slot=slot, half=half, fill=fill)
        return bool(reply["sealed"])

    def rebuilt(self, slot: int, half: int, step: int, digest: bytes) -> None:
        """Protectors: `step` was rebuilt there, its bytes found to have this digest as they lie: it is SEALED."""
        self._quick("rebuilt", slot=slot, half=half, step=step, digest=digest.hex())

    def open(self, slot: int, half: int) -> MappedHalf:
        """A private view of a half that is whole. The reader still has to read() and verify() it."""
        _, fd = self._call("open", self._timeout_s, want_fd=True, slot=slot, half=half)
        return MappedHalf(fd, self._job, slot=slot, index=half, writable=False)

    def corrupt(self, slot: int, half: int, step: int) -> bool:
        """Report a digest mismatch. False: the manager, looking itself, finds that step intact, or gone."""
        reply, _ = self._call("corrupt", self._timeout_s, slot=slot, half=half, step=step)
        return bool(reply["marked"])

    def stats(self) -> dict[str, Any]:
        """Counters and bytes."""
        stats = self._quick("stats")["stats"]
        assert isinstance(stats, dict)
        return stats

    def bye(self) -> None:
        """The job is over: the manager ends and frees everything (agents only)."""
        self._quick("bye")

    def close(self) -> None:
        """Give the lease back. Wakes a call that is under way in another thread with PeerLost."""
        self._closed = True
        with contextlib.suppress(OSError):  # not connected, or closed before
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._lock.acquire(timeout=QUICK_S):
            try:
                self._sock.close()
                self._inbox.close()
            finally:
                self._lock.release()

    def __enter__(self) -> SmpClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside -----------------------------------------------------------------------------------------

    def _quick(self, op: str, **values: Any) -> dict[str, Any]:
        reply, _ = self._call(op, min(self._timeout_s, QUICK_S), **values)
        return reply

    def _call(
        self, op: str, timeout_s: float, *, want_fd: bool = False, offered: int = -1, **values: Any
    ) -> tuple[dict[str, Any], int]:
        """Send one request and wait for its answer. A call that broke off leaves the client closed."""
        # Another thread's call may be one that takes time: that is no reason to think the manager lost.
        if not self._lock.acquire(timeout=self._timeout_s):
            raise PeerLost("the snapshot manager keeps another call waiting", op=op, timeout_s=self._timeout_s)
        deadline = time.monotonic() + timeout_s
        try:
            if self._closed:
                raise PeerLost("the connection to the snapshot manager is closed", op=op)
            number = next(self._numbers)
            try:
                self._send(pack({"id": number, "op": op, **values}), offered, deadline)
                reply = self._receive(number, deadline)
                fd = self._inbox.take_fd() if want_fd and "error" not in reply else -1
            except (OSError, ProtocolViolation) as error:
                self._abandon()
                reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
                raise PeerLost("lost the snapshot manager", op=op, reason=reason) from error
            except BaseException:
                self._abandon()  # such as KeyboardInterrupt: the answer would be taken for the next call's
                raise
        finally:
            self._lock.release()
        if "error" in reply:
            raise error_from(reply["error"])
        return reply, fd

    def _abandon(self) -> None:
        self._closed = True
        self._sock.close()
        self._inbox.close()

    def _send(self, frame: bytes, offered: int, deadline: float) -> None:
        data = memoryview(frame)
        fds = [offered] if offered >= 0 else []
        while data:
            self._patience(deadline)
            data = data[send_some(self._sock, data, fds) :]
            fds = []

    def _receive(self, number: int, deadline: float) -> dict[str, Any]:
        while (reply := self._inbox.take()) is None:
            self._patience(deadline)
            if not self._inbox.receive(self._sock):
                raise ConnectionResetError("it closed the connection")
        if reply.get("id") != number:
            raise ProtocolViolation("an answer to something else", id=reply.get("id"), wanted=number)
        return reply

    def _patience(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

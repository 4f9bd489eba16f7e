"""The client of a host's protector: blocking calls with a deadline, for agents, ranks and tests.

    ProtectorClient(control, job=…, token=…, role="agent" | "rank" | "admin") ── hello ──▶ protector
      agent:   .topology(…) .reserve(…) .rebuild(…) .bye()      anybody: .status() .keep(step) .page()
      rank:    .announce(…) .ring(…) .deliver(…)                what they are for: deliver.py

One request at a time on one connection: whoever rebuilds two slots at once uses two clients. Does not retry
and does not reconnect; after PeerLost the client is closed. Invariants:

* every call ends by its deadline, with its own answer or an error;
* a descriptor that arrives is owned by the Page returned, or closed.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from holdfast.proto.errors import PeerLost, ProtocolViolation

from ..wire import Inbox, error_from, pack, send_some
from .page import NO_DUTY, Page

if TYPE_CHECKING:
    from ..placement import Placement

__all__ = ["CONTROL_BYTES_MAX", "NO_DUTY", "PARITY_SLOT", "Page", "ProtectorClient", "Rebuilt"]

PARITY_SLOT: Final = (1 << 20) - 1
"""The pseudo-slot of the snapshot manager in which a host's parity lies."""
CONTROL_BYTES_MAX: Final = 4 << 20
"""A placement of 128 hosts, and a status of its stripes, fit in it."""
RESERVE_BYTES_PER_S: Final = 100_000_000
_GRACE_S: Final = 2.0
"""How much later than the protector's own deadline a caller gives up on its answer."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A slot that the local snapshot manager holds SEALED now."""

    half: int
    nbytes: int
    source: str
    """"held": it was there; "copy": from a host that holds it; "parity": decoded."""
    shards: tuple[str, ...]
    """Where the bytes came from, such as "host 3 slot 2" or "host 4 stripe 0.1"."""
    seconds: float


class ProtectorClient:
    """A connection to this host's protector. Raises PeerLost when there is none, ConfigError when refused."""

    def __init__(
        self, control_name: str, *, job: str, token: str, role: str = "agent", timeout_s: float = 10.0
    ) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._inbox = Inbox(limit=CONTROL_BYTES_MAX)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._closed = False
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(f"\0{control_name}")
            self.pid: Final = int(self._call("hello", job=job, token=token, role=role)["pid"])
        except OSError as error:
            self.close()
            raise PeerLost("no protector", socket=control_name, reason=str(error)) from error
        except BaseException:
            self.close()
            raise

    # ---- agents -----------------------------------------------------------------------------------------

    def topology(self, number: int, me: int, hosts: Mapping[int, str], placement: Placement | None) -> bool:
        """Who is there ("address:port" by host number) and how stripes lie. Idempotent; the newest number wins.

        False: the protector knows a newer one. Returns at once: encoding and arenas come in the background.
        """
        text = placement.to_json() if placement is not None else None
        named = {str(host): address for host, address in hosts.items()}
        return bool(self._call("topology", number=number, me=me, hosts=named, placement=text)["accepted"])

    def reserve(self, placement: Placement, *, me: int = -1) -> int:
        """Take the memory of this host's parity under `placement` now; its bytes. SnapshotError: no room.

        `me`: this host's number, if no topology() has told it yet.
        """
        nbytes = sum(slot.nbytes for slot in placement.slots) * 2
        wait_s = self._timeout_s + nbytes / RESERVE_BYTES_PER_S
        return int(self._call("reserve", wait_s, placement=placement.to_json(), me=me)["nbytes"])

    def rebuild(self, slot: int, step: int, *, halves: Sequence[int] = (0, 1), deadline_s: float = 60.0) -> Rebuilt:
        """Make the local snapshot manager hold `slot` at `step`, SEALED, in one of `halves`.

        SnapshotIncomplete names what is missing, by the deadline at the latest.
        """
        wait_s = deadline_s + _GRACE_S
        reply = self._call("rebuild", wait_s, slot=slot, step=step, halves=list(halves), deadline_s=deadline_s)
        return Rebuilt(reply["half"], reply["nbytes"], reply["source"], tuple(reply["shards"]), float(reply["seconds"]))

    def bye(self) -> None:
        """The job is over (agents and admins only)."""
        self._call("bye")

    # ---- everybody --------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """{"host", "topology", "placement", "protected", "tolerance", "stripes": [...], "counters", "lag", ...}."""
        status = self._call("status")["status"]
        assert isinstance(status, dict)
        return status

    def keep(self, step: int) -> None:
        """`step` is protected on every host: its parity is not overwritten until a newer one is told."""
        self._call("keep", step=step)

    def page(self) -> Page:
        """The shared word; read it as often as you like, without a call. Ask again after a restart."""
        number = self._call("page", want_fd=True)
        return Page(number["fd"])

    # ---- ranks, through deliver.Delivery ----------------------------------------------------------------

    def announce(self, slot: int, step: int, placement: int) -> dict[str, Any]:
        """The rank of `slot` is about to keep `step`: the parity that it is to compute from its replica."""
        return self._call("announce", slot=slot, step=step, placement=placement)

    def ring(self, slot: int) -> int:
        """New shared memory to hand blocks over in; the caller owns the descriptor."""
        return int(self._call("ring", want_fd=True, slot=slot)["fd"])

    def deliver(
        self, slot: int, order: int, stripe: int, index: int, *, first: int, digests: Sequence[str], parity: str
    ) -> None:
        """Blocks from `first` on of a parity chunk are in the ring; digests of their data, by column, and of them."""
        chunk = {"stripe": stripe, "index": index, "first": first}
        self._call("deliver", slot=slot, order=order, chunk=chunk, digests=list(digests), parity=parity)

    def close(self) -> None:
        """End the connection. Wakes a call that is under way in another thread with PeerLost."""
        self._closed = True
        with contextlib.suppress(OSError):  # not connected, or closed before
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._lock.acquire(timeout=_GRACE_S):
            try:
                self._sock.close()
                self._inbox.close()
            finally:
                self._lock.release()

    def __enter__(self) -> ProtectorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside -----------------------------------------------------------------------------------------

    def _call(self, op: str, timeout_s: float = 0.0, *, want_fd: bool = False, **values: Any) -> dict[str, Any]:
        """Send one request and wait for its answer. A call that broke off leaves the client closed."""
        wait_s = timeout_s or self._timeout_s
        if not self._lock.acquire(timeout=wait_s):
            raise PeerLost("the protector keeps another call waiting", op=op, timeout_s=wait_s)
        deadline = time.monotonic() + wait_s
        try:
            if self._closed:
                raise PeerLost("the connection to the protector is closed", op=op)
            number = next(self._numbers)
            frame = pack({"id": number, "op": op, **values}, limit=CONTROL_BYTES_MAX)
            try:
                reply = self._exchange(number, frame, deadline)
                if want_fd and "error" not in reply:
                    reply["fd"] = self._inbox.take_fd()
            except (OSError, ProtocolViolation) as error:
                self._abandon()
                reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
                raise PeerLost("lost the protector", op=op, reason=reason) from error
            except BaseException:
                self._abandon()  # such as KeyboardInterrupt: the answer would be taken for the next call's
                raise
        finally:
            self._lock.release()
        if "error" in reply:
            raise error_from(reply["error"])
        return reply

    def _abandon(self) -> None:
        self._closed = True
        self._sock.close()
        self._inbox.close()

    def _exchange(self, number: int, frame: bytes, deadline: float) -> dict[str, Any]:
        data = memoryview(frame)
        while data:
            self._patience(deadline)
            data = data[send_some(self._sock, data, []) :]
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

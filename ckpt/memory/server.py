"""The manager's loop: who is connected, what they ask, and when nobody is left to live for.

    agent ─┐ leases                              ┌─ worker thread: prefault, digest
    ranks ─┼─▶ abstract unix socket ─▶ loop ─────┤
    admin ─┤   JSON, descriptors                 └─ Shelf: (slot, half) ─▶ memfd
protector ─┘   no lease: it lives by us, not we by it

One thread answers; what takes time runs in the worker and is answered later. Decides nothing about arenas
(the shelf does) and ends no process (the manager does). Invariants:

* a bad message ends its connection only, and a descriptor of a dead client is closed;
* nothing is answered before a hello with this job's id and token, from a process of our own user;
* while an agent, rank or standby is connected, run() returns for bye and stop() only.
"""

from __future__ import annotations

import hmac
import logging
import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from holdfast.proto.errors import ConfigError, HoldfastError, ProtocolViolation, SnapshotError

from .digest import Worker
from .shelf import Shelf
from .wire import MESSAGE_BYTES_MAX, Inbox, error_value, pack, send_some

ROLES: Final = frozenset({"rank", "standby", "agent", "admin", "protector"})
LEASES: Final = ROLES - {"admin", "protector"}
HELLO_NS: Final = 5_000_000_000
"""A client says who it is within this time; ours do it in their constructor."""
CONNECTIONS_MAX: Final = 512
_OUT_BYTES_MAX: Final = 4 * MESSAGE_BYTES_MAX
_SLOTS_MAX: Final = 1 << 20
_WATCH_MS_MAX: Final = 60_000
_BYTES_MAX: Final = 1 << 50
_CREDENTIALS: Final = struct.Struct("3i")

log = logging.getLogger("holdfast.smp")


def over(now_ns: int, *, unleased_since_ns: int | None, ttl_ns: int) -> bool:
    """Whether nobody has held a lease for `ttl_ns`."""
    return unleased_since_ns is not None and now_ns - unleased_since_ns >= ttl_ns


@dataclass(slots=True, eq=False)
class Connection:
    """One client. `role` is empty until its hello was accepted."""

    sock: socket.socket
    since_ns: int
    inbox: Inbox = field(default_factory=Inbox)
    role: str = ""
    rank: int = -1
    incarnation: int = 0
    out: deque[tuple[memoryview, list[int]]] = field(default_factory=deque)
    out_bytes: int = 0
    doomed: bool = False  # closed as soon as everything is sent
    closed: bool = False

    def __str__(self) -> str:
        return f"{self.role or 'stranger'} rank={self.rank} incarnation={self.incarnation}"


class Manager:
    """The loop. Everything in here runs on one thread."""

    def __init__(self, listener: socket.socket, *, job: str, token: str, ttl_ns: int) -> None:
        self._job = job
        self._token = token
        self._ttl_ns = ttl_ns
        self._listener = listener
        self._worker = Worker()
        self._shelf = Shelf(job, self._worker)
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._unleased_since_ns: int | None = time.monotonic_ns()
        self._violations = 0
        self._watchers: list[tuple[Connection, int, int, int]] = []  # connection, request, since, due (ns)
        self.ended = ""
        self._operations: Final[dict[str, Callable[[Connection, dict[str, Any]], None]]] = {
            "arena": self._arena,
            "copied": self._copied,
            "list": self._list,
            "watch": self._watch,
            "repaired": self._repaired,
            "rebuilt": self._rebuilt,
            "open": self._open,
            "corrupt": self._corrupt,
            "adopt": self._adopt,
            "stats": self._stats,
            "bye": self._bye,
        }
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._selector.register(self._worker.wake_fd, selectors.EVENT_READ, None)

    @property
    def agent_connected(self) -> bool:
        """Whether an agent holds a lease."""
        return any(connection.role == "agent" for connection in self._connections)

    def stop(self, reason: str) -> None:
        """End run() at its next turn; safe in a signal handler."""
        self.ended = self.ended or reason
        os.eventfd_write(self._worker.wake_fd, 1)

    def run(self) -> None:
        """Serve until bye, a signal, or the end of the last lease."""
        while not self.ended:
            for key, events in self._selector.select(self._patience_s(time.monotonic_ns())):
                if isinstance(key.data, Connection):
                    self._serve(key.data, events)
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._worker.collect()
            self._expire(time.monotonic_ns())
            self._tell_watchers(time.monotonic_ns())

    # ---- time -----------------------------------------------------------------------------------------

    def _patience_s(self, now_ns: int) -> float | None:
        """Until the next thing that happens by itself."""
        dues = [c.since_ns + HELLO_NS for c in self._connections if not c.role]
        if self._unleased_since_ns is not None:
            dues.append(self._unleased_since_ns + self._ttl_ns)
        dues += [due_ns for _, _, _, due_ns in self._watchers]
        return max(0.0, (min(dues) - now_ns) / 1e9) if dues else None

    def _expire(self, now_ns: int) -> None:
        for connection in [c for c in self._connections if not c.role and now_ns - c.since_ns >= HELLO_NS]:
            self._close(connection)
        # A stranger counts until its hello is due: after a pause of ours it may well be the agent.
        if any(connection.role in LEASES or not connection.role for connection in self._connections):
            self._unleased_since_ns = None
        elif self._unleased_since_ns is None:
            self._unleased_since_ns = now_ns
        if over(now_ns, unleased_since_ns=self._unleased_since_ns, ttl_ns=self._ttl_ns):
            self.ended = self.ended or f"no lease for {self._ttl_ns / 1e9:g} s"

    # ---- connections ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # the client is gone already, or we are out of descriptors
            log.warning("no connection accepted: %s", error)
            return
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(raw)
        if uid != os.getuid() or len(self._connections) >= CONNECTIONS_MAX:
            log.warning("connection refused: uid=%d connections=%d", uid, len(self._connections))
            sock.close()
            return
        sock.setblocking(False)
        connection = Connection(sock, time.monotonic_ns())
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: Connection, events: int) -> None:
        """Take what came, answer it, send what can be sent. Whatever is wrong ends this connection."""
        if connection.closed:
            return  # by an earlier event of the same turn
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(connection)
            if events & selectors.EVENT_READ and not connection.closed:
                alive = connection.inbox.receive(connection.sock)
                while not (connection.doomed or connection.closed) and (message := connection.inbox.take()) is not None:
                    self._handle(connection, message)
                if not alive:
                    self._close(connection)
        except BlockingIOError:
            return
        except ProtocolViolation as error:
            self._violations += 1
            log.warning("connection ended: %s: %s", connection, error)
            self._close(connection)
        except OSError as error:
            log.info("connection lost: %s: %s", connection, error)
            self._close(connection)

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        op, number = message.get("op"), _integer(message, "id", 0, 1 << 62)
        if not connection.role:
            if op != "hello":
                raise ProtocolViolation("the first message is not hello", op=op)
            self._hello(connection, message)
            return
        operation = self._operations.get(op) if isinstance(op, str) else None
        if operation is None:
            raise ProtocolViolation("an unknown operation", op=op)
        try:
            operation(connection, message)
        except SnapshotError as error:
            self._reply(connection, number, error)

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        self._connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        connection.inbox.close()
        for _, fds in connection.out:
            _close_all(fds)
        connection.out.clear()

    def _reply(
        self,
        connection: Connection,
        number: int,
        error: HoldfastError | None = None,
        fd: int = -1,
        **values: Any,
    ) -> None:
        """Answer request `number`; owns `fd`. A client that is gone, or does not read, gets nothing."""
        fds = [fd] if fd >= 0 else []
        if connection.closed:
            _close_all(fds)
            return
        body = {"ok": True, **values} if error is None else {"error": error_value(error)}
        try:
            frame = pack({"id": number, **body})
        except ProtocolViolation as too_long:
            frame = pack({"id": number, "error": error_value(too_long)})
        connection.out.append((memoryview(frame), fds))
        connection.out_bytes += len(frame)
        if connection.out_bytes > _OUT_BYTES_MAX:
            log.warning("connection ended: %s: it does not read its answers", connection)
            self._close(connection)
            return
        try:
            self._flush(connection)
        except OSError as lost:
            log.info("connection lost: %s: %s", connection, lost)
            self._close(connection)

    def _flush(self, connection: Connection) -> None:
        while connection.out:
            data, fds = connection.out[0]
            try:
                sent = send_some(connection.sock, data, fds)
            except BlockingIOError:
                break
            _close_all(fds)
            connection.out_bytes -= sent
            if sent < data.nbytes:
                connection.out[0] = (data[sent:], [])
            else:
                connection.out.popleft()
        if not connection.out and connection.doomed:
            self._close(connection)
            return
        write = selectors.EVENT_WRITE if connection.out else 0
        self._selector.modify(connection.sock, selectors.EVENT_READ | write, connection)

    # ---- operations -----------------------------------------------------------------------------------

    def _hello(self, connection: Connection, message: dict[str, Any]) -> None:
        number = _integer(message, "id", 0, 1 << 62)
        role = message.get("role")
        refusal = None
        if not hmac.compare_digest(str(message.get("token")).encode(errors="surrogatepass"), self._token.encode()):
            refusal = ConfigError("wrong job token")
        elif message.get("job") != self._job:
            refusal = ConfigError("the snapshot manager of another job", job=self._job)
        elif not isinstance(role, str) or role not in ROLES:
            refusal = ConfigError("an unknown role", role=role)
        if refusal is not None:
            log.warning("connection refused: %s", refusal)
            connection.doomed = True
            self._reply(connection, number, refusal)
            return
        connection.rank = _integer(message, "rank", -1, _SLOTS_MAX)
        connection.incarnation = _integer(message, "incarnation", 0, 1 << 62)
        connection.role = str(role)
        self._reply(connection, number, pid=os.getpid())

    def _arena(self, connection: Connection, message: dict[str, Any]) -> None:
        number, slot, half = _place(message)
        if connection.role not in ("rank", "standby", "protector"):
            raise ProtocolViolation("arenas are for ranks", role=connection.role)
        nbytes = _integer(message, "nbytes", 1, _BYTES_MAX)
        self._shelf.arena(slot, half, nbytes, self._fd_reply(connection, number))

    def _copied(self, connection: Connection, message: dict[str, Any]) -> None:
        number, slot, half = _place(message)
        self._shelf.copied(slot, half, _integer(message, "step", 0, 1 << 62))
        self._reply(connection, number)

    def _list(self, connection: Connection, message: dict[str, Any]) -> None:
        self._reply(connection, message["id"], halves=self._shelf.listing())

    def _watch(self, connection: Connection, message: dict[str, Any]) -> None:
        """The list, once it is not the one of version `since` any more, or after `wait_ms`."""
        since, wait_ms = _integer(message, "since", 0, 1 << 62), _integer(message, "wait_ms", 0, _WATCH_MS_MAX)
        due_ns = time.monotonic_ns() + wait_ms * 1_000_000
        self._watchers.append((connection, message["id"], since, due_ns))

    def _tell_watchers(self, now_ns: int) -> None:
        waiting, self._watchers = self._watchers, []
        for connection, number, since, due_ns in waiting:
            if self._shelf.version != since or now_ns >= due_ns:
                self._reply(connection, number, version=self._shelf.version, halves=self._shelf.listing())
            elif not connection.closed:
                self._watchers.append((connection, number, since, due_ns))

    def _repaired(self, connection: Connection, message: dict[str, Any]) -> None:
        number, slot, half = _place(message)
        if connection.role != "protector":
            raise ProtocolViolation("repairs are the protector's", role=connection.role)
        fill = _integer(message, "fill", 0, 1 << 62)
        self._shelf.repaired(slot, half, fill, lambda right: self._reply(connection, number, sealed=right))

    def _rebuilt(self, connection: Connection, message: dict[str, Any]) -> None:
        number, slot, half = _place(message)
        if connection.role != "protector":
            raise ProtocolViolation("rebuilds are the protector's", role=connection.role)
        self._shelf.rebuilt(slot, half, _integer(message, "step", 0, 1 << 62), message.get("digest"))
        self._reply(connection, number)

    def _open(self, connection: Connection, message: dict[str, Any]) -> None:
        number, slot, half = _place(message)
        self._shelf.open(slot, half, self._fd_reply(connection, number))

    def _corrupt(self, connection: Connection, message: dict[str, Any]) -> None:
        number, slot, half = _place(message)
        step = _integer(message, "step", 0, 1 << 62)

        def done(marked: bool) -> None:
            log.warning("corrupt? said %s: slot=%d half=%d step=%d marked=%s", connection, slot, half, step, marked)
            self._reply(connection, number, marked=marked)

        self._shelf.corrupt(slot, half, step, done)

    def _adopt(self, connection: Connection, message: dict[str, Any]) -> None:
        number, slot, half = _place(message)
        fd = connection.inbox.take_fd()
        self._reply(connection, number, adopted=self._shelf.adopt(slot, half, fd))

    def _stats(self, connection: Connection, message: dict[str, Any]) -> None:
        roles = sorted(c.role for c in self._connections if c.role)
        self._reply(
            connection,
            message["id"],
            stats={
                **asdict(self._shelf.counters),
                "violations": self._violations,
                "nbytes": self._shelf.nbytes(),
                "connections": {role: roles.count(role) for role in roles},
                "pid": os.getpid(),
            },
        )

    def _bye(self, connection: Connection, message: dict[str, Any]) -> None:
        if connection.role not in ("agent", "admin"):
            raise ProtocolViolation("only an agent ends the job", role=connection.role)
        self._reply(connection, message["id"])
        self.stop("bye")

    def _fd_reply(self, connection: Connection, number: int) -> Callable[[int | HoldfastError], None]:
        def done(result: int | HoldfastError) -> None:
            if isinstance(result, HoldfastError):
                self._reply(connection, number, result)
            else:
                self._reply(connection, number, fd=result)

        return done


def _integer(message: dict[str, Any], key: str, low: int, high: int) -> int:
    """A field that is an integer in [low, high]."""
    value = message.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolViolation(f"{key} is not a number in {low}..{high}", value=repr(value)[:40])
    return value


def _place(message: dict[str, Any]) -> tuple[int, int, int]:
    """(id, slot, half) of a request."""
    return message["id"], _integer(message, "slot", 0, _SLOTS_MAX), _integer(message, "half", 0, 1)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())

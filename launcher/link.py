"""The agent socket: where a rank says hello, gets its lease page, and hears that the coordinator moved.

    rank ──{"hello": {rank, incarnation, pid}}──▶ agent ──{"welcome": {...}} + lease page──▶ rank
    rank ──{"config_error"} | {"done"}─────────▶        ──{"coordinator": "host:port"}────▶

The open connection is also the rank's lifeline: its end tells the rank that the agent is gone. JSON lines
over an abstract unix socket; only processes of our own user are heard. All calls are the loop thread's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from .loop import Loop

LINE_LIMIT: Final = 65536
_PEERCRED: Final = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to an accepted hello: the slot, the message, and the lease page's descriptor."""

    local_rank: int
    message: dict[str, Any]
    lease_fd: int


@dataclass(slots=True, eq=False)
class Connection:
    """One rank's connection; `local_rank` is -1 until its hello was accepted."""

    socket: socket.socket
    local_rank: int = -1
    buffer: bytearray = field(default_factory=bytearray)


class AgentSocket:
    """See the module's docstring."""

    def __init__(
        self,
        loop: Loop,
        name: str,
        *,
        on_hello: Callable[[int, int, int], Welcome | None],
        on_message: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """`on_hello(rank, incarnation, pid)` answers None to refuse; `on_message(local_rank, message)`."""
        self._loop = loop
        self._on_hello = on_hello
        self._on_message = on_message
        self._connections: set[Connection] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + name)
        self._listener.listen(128)
        self._listener.setblocking(False)
        loop.watch(self._listener.fileno(), self._accept)

    def push(self, message: dict[str, Any]) -> None:
        """Send to every rank that said hello."""
        data = json.dumps(message).encode() + b"\n"
        for connection in [c for c in self._connections if c.local_rank >= 0]:
            try:
                connection.socket.send(data)
            except OSError:
                self._drop(connection)

    def drop(self, local_rank: int) -> None:
        """Close the connections of a slot's process: it is dead or fenced."""
        for connection in [c for c in self._connections if c.local_rank == local_rank]:
            self._drop(connection)

    def drain(self, local_rank: int) -> None:
        """Handle what a slot's process has sent so far."""
        for connection in [c for c in self._connections if c.local_rank == local_rank]:
            self._read(connection)

    def close(self) -> None:
        """Close everything (any thread, once the loop has stopped)."""
        self._listener.close()
        for connection in self._connections:
            connection.socket.close()
        self._connections.clear()

    # ---- callbacks ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            if _PEERCRED.unpack(credentials)[1] != os.getuid():
                accepted.close()
                continue
            accepted.setblocking(False)
            connection = Connection(accepted)
            self._connections.add(connection)
            self._loop.watch(accepted.fileno(), lambda connection=connection: self._read(connection))  # type: ignore[misc]

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(LINE_LIMIT, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)  # not a death yet: the kernel's word decides that
            return
        connection.buffer += data
        *lines, rest = connection.buffer.split(b"\n")
        connection.buffer = rest
        try:
            for line in lines:
                self._handle(connection, json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            self._drop(connection)
        if len(rest) > LINE_LIMIT:
            self._drop(connection)

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        hello = message.get("hello")
        if hello is None:
            if connection.local_rank >= 0:
                self._on_message(connection.local_rank, message)
            return
        welcome = self._on_hello(int(hello["rank"]), int(hello["incarnation"]), int(hello["pid"]))
        if welcome is None:
            self._drop(connection)
            return
        data = json.dumps({"welcome": welcome.message}).encode() + b"\n"
        try:
            socket.send_fds(connection.socket, [data], [welcome.lease_fd])
        except OSError:
            self._drop(connection)
            return
        connection.local_rank = welcome.local_rank

    def _drop(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            with contextlib.suppress(ValueError):
                self._loop.unwatch(connection.socket.fileno())
            connection.socket.close()

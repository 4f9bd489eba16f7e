"""The control socket: what the agent, ranks and tests ask of their own host's protector.

    agent ─┐ hello: job, token, role, own user      ┌ topology reserve rebuild bye     agent, admin (rebuild: ranks)
    rank  ─┼─▶ abstract unix socket ─▶ a thread ────┤
    admin ─┘   JSON frames as in wire.py            ├ announce ring deliver            rank, admin
                                                    └ status keep page                 everybody

Answers one request after the other on each connection, so a rebuild delays its own connection only. Knows no
operation: the service gives them. Invariants: nothing is answered before a hello with this job's token, from a
process of our own user; a bad message ends its connection only.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from holdfast.proto.errors import ConfigError, HoldfastError, ProtocolViolation

from ..wire import Inbox, error_value, pack, send_some
from .client import CONTROL_BYTES_MAX

log = logging.getLogger("holdfast.protect")

ROLES: Final = frozenset({"agent", "rank", "admin"})
AGENTS: Final = frozenset({"agent", "admin"})
RANKS: Final = frozenset({"rank", "admin"})
CONNECTIONS_MAX: Final = 512
_CREDENTIALS: Final = struct.Struct("3i")
_SEND_S: Final = 10.0

Operation = Callable[[dict[str, Any]], tuple[dict[str, Any], int]]
"""Takes a request; (values of the answer, a descriptor that goes with it, or -1)."""


class Control:
    """Accepts local connections."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        job: str,
        token: str,
        hello_s: float,
        operations: Mapping[str, tuple[frozenset[str], Operation]],
    ) -> None:
        self._listener = listener
        self._job = job
        self._token = token
        self._hello_s = hello_s
        self._operations = operations
        self._count = threading.Semaphore(CONNECTIONS_MAX)

    def run(self) -> None:
        """Accept until the listener is closed."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:
                    return
                log.warning("no connection accepted: %s", error)
                threading.Event().wait(0.05)
                continue
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            _, uid, _ = _CREDENTIALS.unpack(raw)
            if uid != os.getuid() or not self._count.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), name="control", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        inbox = Inbox(limit=CONTROL_BYTES_MAX)
        try:
            sock.settimeout(self._hello_s)
            role = self._hello(sock, inbox)
            sock.settimeout(None)
            while role and (message := _take(sock, inbox)) is not None:
                self._answer(sock, role, message)
        except ProtocolViolation as error:
            log.warning("control connection ended: %s", error)
        except OSError as error:
            log.info("control connection lost: %s", error)
        finally:
            sock.close()
            inbox.close()
            self._count.release()

    def _hello(self, sock: socket.socket, inbox: Inbox) -> str:
        message = _take(sock, inbox)
        if message is None:
            return ""
        if message.get("op") != "hello":
            raise ProtocolViolation("the first message is not hello", op=message.get("op"))
        role, refusal = message.get("role"), None
        if not hmac.compare_digest(str(message.get("token")).encode(errors="surrogatepass"), self._token.encode()):
            refusal = ConfigError("wrong job token")
        elif message.get("job") != self._job:
            refusal = ConfigError("the protector of another job", job=self._job)
        elif not isinstance(role, str) or role not in ROLES:
            refusal = ConfigError("an unknown role", role=role)
        if refusal is not None:
            _send(sock, {"id": _number(message), "error": error_value(refusal)})
            return ""
        _send(sock, {"id": _number(message), "ok": True, "pid": os.getpid()})
        return str(role)

    def _answer(self, sock: socket.socket, role: str, message: dict[str, Any]) -> None:
        number, op = _number(message), message.get("op")
        roles, operation = self._operations.get(op if isinstance(op, str) else "", (frozenset(), None))
        if operation is None or role not in roles:
            raise ProtocolViolation("an operation that is unknown, or not for that role", op=op, role=role)
        fd = -1
        try:
            values, fd = operation(message)
            reply: dict[str, Any] = {"id": number, "ok": True, **values}
        except ProtocolViolation:
            raise
        except HoldfastError as error:
            reply = {"id": number, "error": error_value(error)}
        try:
            _send(sock, reply, fd)
        finally:
            if fd >= 0:
                os.close(fd)


def _take(sock: socket.socket, inbox: Inbox) -> dict[str, Any] | None:
    """The next message; None at the end of the stream."""
    while (message := inbox.take()) is None:
        if not inbox.receive(sock):
            return None
    return message


def _send(sock: socket.socket, reply: Mapping[str, Any], fd: int = -1) -> None:
    data = memoryview(pack(reply, limit=CONTROL_BYTES_MAX))
    fds = [fd] if fd >= 0 else []
    before = sock.gettimeout()
    sock.settimeout(_SEND_S)
    try:
        while data:
            data = data[send_some(sock, data, fds) :]
            fds = []
    finally:
        with contextlib.suppress(OSError):
            sock.settimeout(before)


def _number(message: dict[str, Any]) -> int:
    number = message.get("id")
    if type(number) is not int or not 0 <= number < 1 << 62:
        raise ProtocolViolation("a request without a number")
    return number

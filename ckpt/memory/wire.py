"""What goes over the manager's socket: frames of JSON, descriptors beside them, errors as values.

    4 bytes, length, big endian | JSON object with "id" and "op", or "id" and "ok" or "error" |  + SCM_RIGHTS

Both ends use the same Inbox. Tables and tensors never travel here: they lie in the arenas. Blocks or not
as its socket does. Invariants:

* no frame is longer than its connection's limit (the manager's: 64 KiB), in either direction;
* a descriptor that arrives is taken by a message that announces one, or closed with the connection.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from holdfast.proto import errors
from holdfast.proto.errors import HoldfastError, ProtocolViolation

MESSAGE_BYTES_MAX: Final = 64 << 10
FDS_MAX: Final = 4
"""Descriptors that may wait at one end of a connection; a message takes one at most."""
_LENGTH: Final = struct.Struct("!I")
_FD: Final = struct.Struct("i")
_ERRORS: Final = (
    errors.ConfigError,
    errors.SnapshotError,
    errors.SnapshotIncomplete,
    errors.SnapshotCorrupt,
    errors.ProtocolViolation,
)


def pack(message: Mapping[str, Any], *, limit: int = MESSAGE_BYTES_MAX) -> bytes:
    """One frame."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > limit:
        raise ProtocolViolation("a message that is too long", nbytes=len(body), nbytes_max=limit)
    return _LENGTH.pack(len(body)) + body


class Inbox:
    """Bytes and descriptors as they arrive; whole messages as they are taken."""

    def __init__(self, *, limit: int = MESSAGE_BYTES_MAX) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._fds: deque[int] = deque()

    def receive(self, sock: socket.socket) -> bool:
        """One recvmsg(); False at the end of the stream. ProtocolViolation for too many descriptors."""
        room = socket.CMSG_SPACE(_FD.size * FDS_MAX)
        data, control, flags, _ = sock.recvmsg(MESSAGE_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, raw in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.extend(fd for (fd,) in _FD.iter_unpack(raw[: len(raw) - len(raw) % _FD.size]))
        if flags & socket.MSG_CTRUNC or len(self._fds) > FDS_MAX:
            raise ProtocolViolation("more descriptors than any message has")
        self._buffer += data
        return bool(data)

    def take(self) -> dict[str, Any] | None:
        """The next whole message."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self._limit:
            raise ProtocolViolation("a message that is too long", nbytes=length, nbytes_max=self._limit)
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ProtocolViolation("a message that is not JSON", reason=str(error)) from error
        if not isinstance(message, dict):
            raise ProtocolViolation("a message that is not an object")
        return message

    def take_fd(self) -> int:
        """The descriptor that the message just taken announced; the caller owns it."""
        if not self._fds:
            raise ProtocolViolation("a message without the descriptor that it announces")
        return self._fds.popleft()

    def close(self) -> None:
        """Close what nobody took."""
        while self._fds:
            os.close(self._fds.popleft())


def send_some(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int]) -> int:
    """One sendmsg(); the descriptors travel with the first byte. Returns the bytes that went."""
    if not fds:
        return sock.send(data)
    rights = b"".join(_FD.pack(fd) for fd in fds)
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def error_value(error: HoldfastError) -> dict[str, Any]:
    """An error as JSON: its name, message and fields, never an object."""
    fields = {key: value if isinstance(value, (int, str)) else str(value) for key, value in error.fields.items()}
    return {"code": type(error).__name__, "message": error.message, "fields": fields}


def error_from(value: object) -> HoldfastError:
    """The error that the other end described; an unknown name is a ProtocolViolation."""
    if not isinstance(value, dict) or not isinstance(value.get("fields", {}), dict):
        return ProtocolViolation("an error that cannot be read")
    fields = {str(key): item for key, item in value.get("fields", {}).items() if key not in ("message", "self")}
    kinds = {kind.__name__: kind for kind in _ERRORS}
    kind = kinds.get(str(value.get("code")), ProtocolViolation)
    return kind(str(value.get("message")), **fields)

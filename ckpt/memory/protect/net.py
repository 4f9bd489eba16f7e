"""Frames between protectors: a mutual proof of the job key, then length-prefixed JSON with raw bytes behind it.

    client ── "HFP1", nonce c ──▶ server        frame: | 4 B header length | 4 B payload length | JSON | bytes |
    client ◀── nonce s, HMAC(server, c, s) ──
    client ── HMAC(client, s, c) ──▶            then requests, answered in order; several may be under way

Both proofs name the role and the job, so one side's proof is never the other's, and both nonces, so an old one
proves nothing. Proves who speaks; does not hide or sign what is said: blocks carry digests of their own.
Invariants: every wait has a deadline, for the frame as a whole and not for each byte; no length is trusted
before it is compared with its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Final

from holdfast.proto.errors import PeerLost, ProtocolViolation

from .options import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX

MAGIC: Final = b"HFP1"
NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
_FRAME: Final = struct.Struct("!II")
_SLOWEST_BYTES_PER_S: Final = 1_000_000
"""A peer slower than this is as good as lost."""
_SOCKET_BYTES: Final = 4 << 20


class Key:
    """What both ends know."""

    def __init__(self, job: str, token: str) -> None:
        self._key = hashlib.sha256(b"holdfast protector\0" + token.encode()).digest()
        self._job = hashlib.sha256(job.encode()).digest()

    def proof(self, role: bytes, first: bytes, second: bytes) -> bytes:
        """That `role` knows the key, to whoever chose one of the nonces."""
        return hmac.digest(self._key, MAGIC + role + self._job + first + second, "sha256")


class Channel:
    """One authenticated connection. One thread at a time in each direction."""

    def __init__(self, sock: socket.socket, patience_s: float) -> None:
        self.sock: Final = sock
        self.patience_s: Final = patience_s
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, header: Mapping[str, Any], payload: memoryview | bytes | bytearray = b"") -> None:
        """One frame; the payload goes from where it lies."""
        body = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        if len(body) > HEADER_BYTES_MAX or len(payload) > PAYLOAD_BYTES_MAX:
            raise ProtocolViolation("a frame that is too long", header=len(body), payload=len(payload))
        self.send_raw(_FRAME.pack(len(body), len(payload)) + body, payload)

    def send_raw(self, head: bytes, payload: memoryview | bytes | bytearray = b"") -> None:
        """Bytes, in one sendmsg() as a rule."""
        rest = memoryview(payload)
        deadline = self._deadline(len(head) + len(rest))
        first = memoryview(head)
        while first or rest:
            self._patience(deadline)
            sent = self.sock.sendmsg([first, rest])
            rest = rest[max(0, sent - len(first)) :]
            first = first[sent:]

    def receive(self, *, wait_s: float = 0.0) -> tuple[dict[str, Any], int]:
        """The next header and the length of its payload, which the caller takes. EOFError: the end."""
        frame = bytearray(_FRAME.size)
        self._fill(memoryview(frame), wait_s or self.patience_s, first=True)
        header_bytes, payload_bytes = _FRAME.unpack(frame)
        if header_bytes > HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
            raise ProtocolViolation("a frame that is too long", header=header_bytes, payload=payload_bytes)
        body = bytearray(header_bytes)
        self.take(memoryview(body))
        try:
            header = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ProtocolViolation("a header that is not JSON", reason=str(error)) from error
        if not isinstance(header, dict):
            raise ProtocolViolation("a header that is not an object")
        return header, payload_bytes

    def take(self, into: memoryview) -> None:
        """Fill `into`."""
        self._fill(into, self.patience_s)

    def payload(self, nbytes: int) -> bytes:
        """A payload of its own."""
        data = bytearray(nbytes)
        self.take(memoryview(data))
        return bytes(data)

    def readable(self) -> bool:
        """Whether bytes, the end or an error are there."""
        poll = select.poll()  # select() refuses descriptors beyond 1023
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def wake(self) -> None:
        """From another thread: what its owner waits for ends. Closing it here could leave the owner waiting for
        a descriptor that is no more, or for somebody else's."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it; the owner only."""
        self.wake()
        self.sock.close()

    def _fill(self, into: memoryview, wait_s: float, *, first: bool = False) -> None:
        deadline = time.monotonic() + wait_s + len(into) / _SLOWEST_BYTES_PER_S
        while into:
            self._patience(deadline)
            count = self.sock.recv_into(into)
            if not count:
                raise EOFError("the peer closed the connection")
            into = into[count:]
            if first:
                deadline, first = min(deadline, self._deadline(len(into))), False

    def _deadline(self, nbytes: int) -> float:
        return time.monotonic() + self.patience_s + nbytes / _SLOWEST_BYTES_PER_S

    def _patience(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the peer is too slow")
        self.sock.settimeout(left)


def connect(address: str, key: Key, *, patience_s: float) -> Channel:
    """A connection to a peer that proved that it knows the key. PeerLost if there is none."""
    host, _, port = address.rpartition(":")
    sock: socket.socket | None = None
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=patience_s)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # requests are small and many are under way
        channel = Channel(sock, patience_s)
        mine = os.urandom(NONCE_BYTES)
        channel.send_raw(MAGIC + mine)
        answer = channel.payload(NONCE_BYTES + PROOF_BYTES)
        theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        if not hmac.compare_digest(proof, key.proof(b"server", mine, theirs)):
            raise PeerLost("a peer without the job key", address=address)
        channel.send_raw(key.proof(b"client", theirs, mine))
    except (OSError, EOFError, ValueError) as error:
        if sock is not None:
            sock.close()
        raise PeerLost("cannot reach a peer", address=address, reason=str(error) or type(error).__name__) from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return channel


def welcome(sock: socket.socket, key: Key, *, hello_s: float, patience_s: float) -> Channel:
    """The server's side of connect(). ProtocolViolation, OSError or EOFError for whoever is not one of us."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    hello = Channel(sock, hello_s)
    begin = hello.payload(len(MAGIC) + NONCE_BYTES)
    if begin[: len(MAGIC)] != MAGIC:
        raise ProtocolViolation("not a protector")
    theirs, mine = begin[len(MAGIC) :], os.urandom(NONCE_BYTES)
    hello.send_raw(mine + key.proof(b"server", theirs, mine))
    if not hmac.compare_digest(hello.payload(PROOF_BYTES), key.proof(b"client", mine, theirs)):
        raise ProtocolViolation("a peer without the job key")
    return Channel(sock, patience_s)

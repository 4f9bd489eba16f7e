"""The server for other hosts' protectors: accepts, checks who it is, answers in order.

    accept ─▶ one thread a connection: welcome() ▸ request ▸ answer ▸ request ▸ …

    inventory(since, wait_ms)   what is sealed here, as soon as it is not version `since` any more
    record / mirrored           the seal record and tail of a half that is here / of one whose parity is here
    placement(number)           the layout that some parity here was made under
    read(…) -> bytes, 1 byte    a range of an image, straight from the arena; the byte: still the same fill
    write, written              parity that its encoder computed
    corrupt(…)                  somebody got bytes that are not in the record: look again

Decides nothing about what is read or written. Invariants: whatever is wrong with a connection ends that
connection only; a stranger holds a thread for hello_s at most.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from holdfast.proto.errors import HoldfastError, ProtocolViolation, SnapshotError, SnapshotIncomplete

from ..wire import error_value
from .client import PARITY_SLOT
from .local import Local
from .net import Channel, Key, welcome
from .news import News
from .options import BLOCK_BYTES, PAYLOAD_BYTES_MAX, Options
from .peers import Sealed
from .record import digest_of_block

log = logging.getLogger("holdfast.protect")


class Parity(Protocol):
    """What the server needs of the parity of this host."""

    def accept(self, number: int, step: int, stripe: int, index: int, offset: int, data: memoryview) -> None:
        """Bytes of a parity chunk from its encoder. SnapshotIncomplete: not wanted (any more)."""

    def complete(self, number: int, step: int, stripe: int, index: int) -> None:
        """That chunk is whole."""

    def mirrored(self, number: int, step: int, slot: int) -> Sealed:
        """The record kept beside the parity."""

    def placement_text(self, number: int) -> str:
        """A placement as JSON."""


class Server:
    """Accepts connections of peers."""

    def __init__(
        self,
        listener: socket.socket,
        key: Key,
        local: Local,
        parity: Parity,
        *,
        options: Options,
        suspect: Callable[[int, int], None],
        news: News,
    ) -> None:
        self._listener = listener
        self._key = key
        self._local = local
        self._parity = parity
        self._options = options
        self._suspect = suspect
        self._news = news
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.refused = 0
        self.read_bytes = 0
        self.written_bytes = 0
        self._operations: Final[dict[str, Callable[[Channel, dict[str, Any], int, memoryview], None]]] = {
            "inventory": self._inventory,
            "record": self._record,
            "mirrored": self._mirrored,
            "placement": self._placement,
            "read": self._read,
            "write": self._write,
            "written": self._written,
            "corrupt": self._corrupt,
        }

    def run(self) -> None:
        """Accept until the listener is closed."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:
                    return
                log.warning("no connection accepted: %s", error)
                threading.Event().wait(0.05)  # out of descriptors: somebody has to close one first
                continue
            with self._lock:
                full = len(self._open) >= self._options.connections_max
                if not full:
                    self._open.add(sock)
            if full:
                self.refused += 1
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), name="serve", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            channel = welcome(sock, self._key, hello_s=self._options.hello_s, patience_s=self._options.serve_s)
            room = memoryview(bytearray(BLOCK_BYTES))
            while True:
                header, nbytes = channel.receive(wait_s=self._options.idle_s)
                self._answer(channel, header, nbytes, room)
        except EOFError:
            return
        except ProtocolViolation as error:
            self.refused += 1
            log.warning("connection ended: %s", error)
        except OSError as error:
            log.info("connection lost: %s", error)
        finally:
            with self._lock:
                self._open.discard(sock)
            with contextlib.suppress(OSError):
                sock.close()

    def _answer(self, channel: Channel, header: dict[str, Any], nbytes: int, room: memoryview) -> None:
        op = header.get("op")
        operation = self._operations.get(op) if isinstance(op, str) else None
        if operation is None or nbytes > (BLOCK_BYTES if op == "write" else 0):
            raise ProtocolViolation("an unknown operation, or one with too many bytes", op=op, nbytes=nbytes)
        data = room[:nbytes]
        channel.take(data)
        try:
            operation(channel, header, nbytes, data)
        except (SnapshotError, HoldfastError) as error:
            if isinstance(error, ProtocolViolation):
                raise
            channel.send({"error": error_value(error)})

    # ---- operations -------------------------------------------------------------------------------------

    def _inventory(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        since, wait_ms = _integer(header, "since"), _integer(header, "wait_ms", 60_000)
        count = self._news.wait(since, wait_ms / 1000) if since else self._news.count
        slots, parity = [], []
        for held in self._local.sealed():
            assert held.record is not None
            if held.slot == PARITY_SLOT:
                parity.append([held.record.placement, held.step, held.token])
            else:
                slots.append([held.slot, held.step, held.token, held.record.placement])
        channel.send({"version": count, "slots": slots, "parity": parity})

    def _record(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        slot, step, token = _integer(header, "slot"), _integer(header, "step"), _integer(header, "token", low=-1)
        held = self._local.find(slot, step, token=token)
        if held is None or held.record is None:
            raise SnapshotIncomplete("not held here", slot=slot, step=step)
        _send_sealed(channel, Sealed(held.record, held.tail))

    def _mirrored(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        slot, step, number = _integer(header, "slot"), _integer(header, "step"), _integer(header, "placement")
        _send_sealed(channel, self._parity.mirrored(number, step, slot))

    def _placement(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        channel.send({"ok": True}, self._parity.placement_text(_integer(header, "number")).encode())

    def _read(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        slot, step, token = _integer(header, "slot"), _integer(header, "step"), _integer(header, "token")
        offset, length = _integer(header, "offset"), _integer(header, "length", PAYLOAD_BYTES_MAX)
        held = self._local.find(slot, step, token=token)
        if held is None:
            raise SnapshotIncomplete("not held here (any more)", slot=slot, step=step)
        channel.send({"ok": True}, held.view(offset, offset + length))
        channel.send_raw(b"\x01" if held.current() else b"\x00")
        self.read_bytes += length

    def _write(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        if digest_of_block(data).hex() != header.get("digest"):
            raise SnapshotError("bytes were changed on their way")
        self._parity.accept(*_chunk(header), _integer(header, "offset"), data)
        self.written_bytes += nbytes
        channel.send({"ok": True})

    def _written(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        self._parity.complete(*_chunk(header))
        channel.send({"ok": True})

    def _corrupt(self, channel: Channel, header: dict[str, Any], nbytes: int, data: memoryview) -> None:
        held = self._local.find(_integer(header, "slot"), _integer(header, "step"), token=_integer(header, "token"))
        if held is not None:
            self._suspect(held.slot, held.index)
        channel.send({"ok": True})


def _chunk(header: dict[str, Any]) -> tuple[int, int, int, int]:
    return (
        _integer(header, "placement"),
        _integer(header, "step"),
        _integer(header, "stripe"),
        _integer(header, "index"),
    )


def _send_sealed(channel: Channel, sealed: Sealed) -> None:
    body = json.dumps(sealed.record.to_json(), separators=(",", ":")).encode()
    channel.send({"json": len(body)}, body + sealed.tail)


def _integer(header: dict[str, Any], key: str, high: int = 1 << 62, *, low: int = 0) -> int:
    value = header.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolViolation(f"{key} is not a number in {low}..{high}", value=repr(value)[:40])
    return value

"""How savers of one job reach one another: a file per saver in the folder that they share, and one connection each.

    DIR/.savers/NAME.json   {"job","address"}      written by each saver when it listens; Register
    leader ── held | take | write | bye ──▶ Server ── Hand (this host's)
           ◀── busy, once a second ─ answer ──────

A request is a frame and its JSON body in further frames, and so is the answer. A connection that ends, or says
nothing for SILENT_S, is a host that is lost: whoever waited fails; what was taken for a leader is given up when its
connection ends. Both ends prove first that they know the job's token (memory/protect/net.py). Decides nothing.
Invariants: no body is longer than BODY_BYTES_MAX, and none is held before it came; a stranger's file in the folder
costs one refused connection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from holdfast.proto.errors import HoldfastError, PeerLost, ProtocolViolation, SnapshotError

from ..memory.protect.net import Channel, Key, connect, welcome
from ..memory.protect.options import PAYLOAD_BYTES_MAX
from ..memory.wire import error_from, error_value
from ..universal.disk import Disk
from ..universal.errors import CheckpointError
from ..universal.manifest import MANIFEST_BYTES_MAX
from .divide import Piece
from .hand import Hand, Written

log = logging.getLogger("holdfast.saver")

FOLDER: Final = ".savers"
CONNECT_S: Final = 3.0
BUSY_S: Final = 1.0
SILENT_S: Final = 10.0
IDLE_S: Final = 3600.0
"""A leader waits for the slowest host before it says anything to the others; one that died is noticed earlier."""
BODY_BYTES_MAX: Final = MANIFEST_BYTES_MAX
_ENTRY_BYTES_MAX: Final = 4096


def key_of(job: str, token: str) -> Key:
    """What savers know in common; a protector's proof is none of a saver's."""
    return Key(f"saver of {job}", token)


class Register:
    """The files by which savers find one another."""

    def __init__(self, folder: Path, job: str, disk: Disk) -> None:
        self._folder = folder / FOLDER
        self._job = job
        self._disk = disk
        self._mine: Path | None = None

    def enter(self, name: str, address: str) -> None:
        """We listen there. One file a host: a saver that was restarted takes its predecessor's place."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = self._folder / f"{name}.json"
        aside = self._folder / f".{name}.tmp"
        self._disk.write_file(aside, json.dumps({"job": self._job, "address": address}).encode() + b"\n")
        self._disk.rename(aside, mine)
        self._mine = mine

    def leave(self) -> None:
        """We do not any more."""
        if self._mine is not None:
            with contextlib.suppress(OSError):
                self._disk.unlink(self._mine)

    def others(self) -> dict[str, str]:
        """Name -> address of every other saver of this job. Files of jobs that are over are removed."""
        found = {}
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else []:
            with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
                with path.open("rb") as file:
                    told = json.loads(file.read(_ENTRY_BYTES_MAX))
                if told.get("job") != self._job:
                    self._disk.unlink(path)
                elif path != self._mine and isinstance(told.get("address"), str):
                    found[path.stem] = told["address"]
        return found


# ---- messages -----------------------------------------------------------------------------------------------


def say(channel: Channel, header: dict[str, Any], value: Any) -> None:
    """One request or answer."""
    body = memoryview(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())
    channel.send({**header, "bytes": len(body)})
    for at in range(0, len(body), PAYLOAD_BYTES_MAX):
        channel.send({}, body[at : at + PAYLOAD_BYTES_MAX])


def hear(channel: Channel, wait_s: float) -> tuple[dict[str, Any], Any]:
    """The next one: its header and its value."""
    header, nbytes = channel.receive(wait_s=wait_s)
    total = header.get("bytes")
    if nbytes or type(total) is not int or not 0 <= total <= BODY_BYTES_MAX:
        raise ProtocolViolation("not a message of a saver", bytes=repr(total)[:40])
    body = bytearray()
    while len(body) < total:
        _, nbytes = channel.receive()
        if not 0 < nbytes <= total - len(body):
            raise ProtocolViolation("a message of another length than it said", bytes=total)
        body += channel.payload(nbytes)
    try:
        return header, json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolViolation("a message that is not JSON", reason=str(error)[:200]) from error


# ---- the leader's end ---------------------------------------------------------------------------------------


class Peer:
    """Another host's Hand. One thread at a time; every call raises PeerLost when that host does not answer."""

    def __init__(self, name: str, address: str, key: Key) -> None:
        self.name = name
        self._channel = connect(address, key, patience_s=CONNECT_S)

    def held(self) -> dict[int, list[int]]:
        """See Hand."""
        return _holdings(self._call("held", None))

    def take(self, attempt: str, step: int, slots: Sequence[int]) -> list[Any]:
        """See Hand."""
        return _list(self._call("take", {"attempt": attempt, "step": step, "slots": list(slots)}))

    def write(self, attempt: str, folder: str, identity: str, number: int, pieces: Sequence[Piece]) -> Written:
        """See Hand."""
        asked = {"attempt": attempt, "folder": folder, "id": identity, "number": number}
        answer = self._call("write", {**asked, "pieces": [piece.to_json() for piece in pieces]})
        if not isinstance(answer, dict) or not all(isinstance(answer.get(key), str) for key in ("folder", "manifest")):
            raise ProtocolViolation("not the answer of a saver", peer=self.name)
        return Written(answer["folder"], answer["manifest"].encode())

    def bye(self) -> None:
        """There will be no checkpoint after this one."""
        self._call("bye", None)

    def close(self) -> None:
        """End the connection; a write that is under way there ends too. Any thread may wake() it."""
        self._channel.close()

    def wake(self) -> None:
        """From another thread: a call that waits ends."""
        self._channel.wake()

    def _call(self, op: str, value: Any) -> Any:
        try:
            say(self._channel, {"op": op}, value)
            while True:
                header, answer = hear(self._channel, SILENT_S)
                if header.get("busy"):
                    continue
                if "error" in header:
                    raise error_from(header["error"])
                return answer
        except (OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
            raise PeerLost("a host was lost while a checkpoint was written", host=self.name, reason=reason) from error


def _holdings(value: Any) -> dict[int, list[int]]:
    try:
        return {int(slot): [int(step) for step in steps] for slot, steps in value.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ProtocolViolation("not what a saver holds", reason=str(error)[:200]) from error


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ProtocolViolation("not a list of shares")
    return value


# ---- the other end ------------------------------------------------------------------------------------------


class Server:
    """Lets whoever leads use this host's Hand."""

    def __init__(self, listener: socket.socket, key: Key, hand: Hand) -> None:
        self._listener = listener
        self._key = key
        self._hand = hand
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._heard_s = time.monotonic()
        self.released = threading.Event()
        """A leader said bye, and none has come since."""

    def start(self) -> None:
        """Accept from now on."""
        threading.Thread(target=self._accept, name="saver-server", daemon=True).start()

    def quiet_s(self) -> float:
        """Since when no leader speaks to us; 0 while one does."""
        with self._lock:
            return 0.0 if self._open else time.monotonic() - self._heard_s

    def close(self) -> None:
        """End it all."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                threading.Event().wait(0.05)  # out of descriptors: somebody has to close one first
                continue
            threading.Thread(target=self._serve, args=(sock,), name="saver-serve", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        attempts: set[str] = set()
        known = False
        try:
            _notice_death(sock)
            channel = welcome(sock, self._key, hello_s=CONNECT_S, patience_s=SILENT_S)
            with self._lock:
                self._open.add(sock)
            known = True
            self.released.clear()
            while True:
                header, value = hear(channel, IDLE_S)
                self._answer(channel, str(header.get("op")), value, attempts)
        except EOFError:
            return
        except (OSError, HoldfastError) as error:
            log.info("a leader's connection ended: %s", error)
        finally:
            for attempt in attempts:
                self._hand.drop(attempt)
            with self._lock:
                self._open.discard(sock)
                if known:
                    self._heard_s = time.monotonic()
            sock.close()

    def _answer(self, channel: Channel, op: str, value: Any, attempts: set[str]) -> None:
        done: list[Any] = []

        def work() -> None:
            try:
                done.append(self._do(op, value, attempts))
            except ProtocolViolation as error:
                done.append(error)
            except CheckpointError as error:
                done.append(SnapshotError(str(error)))
            except HoldfastError as error:
                done.append(error)

        worker = threading.Thread(target=work, name=f"saver-{op}", daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(BUSY_S)
                if worker.is_alive():
                    say(channel, {"busy": True}, None)
        except (OSError, EOFError):
            for attempt in attempts:
                self._hand.drop(attempt)
            worker.join()
            raise
        (answer,) = done or [SnapshotError("the saver could not do what it was asked", op=op)]
        if isinstance(answer, HoldfastError):
            say(channel, {"error": error_value(answer)}, None)
        else:
            say(channel, {}, answer)

    def _do(self, op: str, value: Any, attempts: set[str]) -> Any:
        try:
            if op == "held":
                return self._hand.held()
            if op == "take":
                attempts.add(str(value["attempt"]))
                return self._hand.take(
                    str(value["attempt"]), int(value["step"]), [int(slot) for slot in value["slots"]]
                )
            if op == "write":
                pieces = [Piece.of(piece) for piece in value["pieces"]]
                attempt, folder, identity = (str(value[name]) for name in ("attempt", "folder", "id"))
                written = self._hand.write(attempt, folder, identity, int(value["number"]), pieces)
                return {"folder": written.folder, "manifest": written.manifest.decode()}
            if op == "bye":
                return self.released.set()
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolViolation("not a request of a saver", op=op, reason=str(error)[:200]) from error
        raise ProtocolViolation("an unknown request", op=op)


def _notice_death(sock: socket.socket) -> None:
    """A leader's host may lose its power, and nobody would ever close the connection."""
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def listen(bind: str, key: Key, hand: Hand) -> tuple[Server, str]:
    """A server, and the address that it listens on."""
    host, _, port = bind.rpartition(":")
    listener = socket.create_server((host.strip("[]"), int(port)), backlog=16)
    address = f"{host}:{listener.getsockname()[1]}"
    return Server(listener, key, hand), address

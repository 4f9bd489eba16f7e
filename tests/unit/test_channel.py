"""A call ends when its server goes, however it goes: what gRPC's own retries break."""

from __future__ import annotations

import ast
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import grpc
import pytest

from holdfast.launcher.hosts import Host
from holdfast.launcher.session import CoordinatorSession, Hooks
from holdfast.proto.channel import CHANNEL
from holdfast.proto.gen import control_pb2_grpc

ROOT: Final = Path(__file__).resolve().parents[2]
DEADLINE_S: Final = 20.0
PREFACE_BYTES, HEAD_BYTES = 24, 9
HEADERS, RESET, SETTINGS, GOAWAY = 1, 3, 4, 7  # RFC 9113, 6


def frame(kind: int, stream: int = 0, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, 0]) + struct.pack(">I", stream) + body


LAST_WORDS: Final[dict[str, Callable[[int], bytes]]] = {
    "goes away": lambda stream: frame(GOAWAY, body=struct.pack(">II", 0, 0)),
    "cancels all calls": lambda stream: frame(GOAWAY, body=struct.pack(">II", 0, 2)),
    "refuses the stream": lambda stream: frame(RESET, stream, struct.pack(">I", 7)),
    "says nothing": lambda stream: b"",
}


class Leaving:
    """A server of HTTP/2 that reads a call's headers, says its last words and is gone: nobody listens there again."""

    def __init__(self, last_words: Callable[[int], bytes]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.called = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(last_words,), daemon=True)
        self._thread.start()

    def _serve(self, last_words: Callable[[int], bytes]) -> None:
        with self._listener.accept()[0] as connection:
            self._listener.close()
            stream = connection.makefile("rb")
            connection.sendall(frame(SETTINGS))
            stream.read(PREFACE_BYTES)
            while True:
                head = stream.read(HEAD_BYTES)
                stream.read(int.from_bytes(head[:3], "big"))
                if head[3] == HEADERS:
                    break
            self.called.set()
            connection.sendall(last_words(int.from_bytes(head[5:], "big")))
            stream.close()


@pytest.mark.parametrize("how", LAST_WORDS)
def test_a_call_ends_when_its_server_goes(how: str) -> None:
    server = Leaving(LAST_WORDS[how])
    outbox: SimpleQueue[Any] = SimpleQueue()
    channel = grpc.insecure_channel(server.address, options=CHANNEL)
    call = control_pb2_grpc.ControlStub(channel).AgentSession(iter(outbox.get, None))
    ended: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        try:
            ended.put(list(call))
        except grpc.RpcError as error:
            ended.put(error.code())

    threading.Thread(target=read, daemon=True).start()
    assert ended.get(timeout=DEADLINE_S) is grpc.StatusCode.UNAVAILABLE
    outbox.put(None)
    channel.close()


@pytest.mark.parametrize("how", LAST_WORDS)
def test_an_agent_whose_coordinator_goes_as_it_calls_reaches_the_next_one(how: str) -> None:
    first, second = Leaving(LAST_WORDS[how]), Leaving(LAST_WORDS["says nothing"])
    session = CoordinatorSession(me=Host(0, "a"), token="t", world_size=1, hooks=Hooks(on_order=lambda order: None))
    session.start(first.address)
    try:
        assert first.called.wait(DEADLINE_S)
        session.moved(second.address)
        assert second.called.wait(DEADLINE_S)
    finally:
        session.close()


def channels() -> Iterator[tuple[str, ast.Call]]:
    """Every place where a channel is opened."""
    for folder in ("launcher", "runtime", "ckpt", "proto"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                named = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("insecure_channel")
                if named and "gen" not in path.parts:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_channel_is_opened_with_these_options() -> None:
    found = dict(channels())
    assert len(found) >= 6
    for where, call in found.items():
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("options", "")
        assert options in ("CHANNEL", "_OPTIONS"), where

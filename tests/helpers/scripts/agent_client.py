"""A rank as the agent sees it, without the runtime: hello, lease page, lifeline. For the launcher's tests."""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
import time

from holdfast.proto import env
from holdfast.proto.lease import PAGE_BYTES, LeasePage, Phase, Word


class Client:
    """Says hello at once; beats until the process ends; ends the process when the agent is gone."""

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.incarnation = int(os.environ[env.INCARNATION])
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect("\0" + os.environ[env.AGENT])
        self.send({"hello": {"rank": self.rank, "incarnation": self.incarnation, "pid": os.getpid()}})
        data, fds, _, _ = socket.recv_fds(self.socket, 65536, 1)
        if not fds:
            raise SystemExit("the agent refused this rank")
        self.coordinator = json.loads(data)["welcome"]["coordinator"]
        self.told = 0  # messages that the agent sent after the welcome
        self.page = LeasePage(memoryview(mmap.mmap(fds[0], PAGE_BYTES)))
        os.close(fds[0])
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: dict[str, object]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def renew(self, phase: Phase) -> None:
        self.page.renew(time.monotonic_ns(), phase)

    def commit(self, step: int) -> None:
        self.page.set(Word.STEP, step + 1)
        self.page.set(Word.COMMIT_NS, time.monotonic_ns())

    def _listen(self) -> None:
        self.socket.settimeout(0.1)
        while True:
            self.page.set(Word.BEAT_NS, time.monotonic_ns())
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                os._exit(1)
            for line in data.splitlines():
                self.told += 1
                self.coordinator = json.loads(line).get("coordinator", self.coordinator)

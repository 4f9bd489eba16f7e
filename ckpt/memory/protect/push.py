"""Handing parity rows to the host that keeps them: blocks on one connection, several under way, then "written".

Gives up on a host that does not take them and says so once: the encoder goes on, and that host's protector
fetches the data itself. Invariant: after finish() either the host has said that its chunk is whole, or it was
given up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from .blocks import Sources
from .peers import LOST, Link
from .record import digest_of_block

log = logging.getLogger("holdfast.protect")


class Pusher:
    """One row, for one other host."""

    def __init__(self, sources: Sources, host: int, where: Mapping[str, int]) -> None:
        self._sources = sources
        self._host = host
        self._where = where
        self._link: Link | None = None
        self._dropped = False

    def push(self, offset: int, data: memoryview) -> None:
        """One block."""
        digest = digest_of_block(data).hex()
        self._do({"op": "write", **self._where, "offset": offset, "digest": digest}, data)

    def finish(self) -> None:
        """All blocks are pushed."""
        self._do({"op": "written", **self._where}, b"")
        self._settle(0)

    def close(self) -> None:
        """Give the link back, or end it if answers are under way."""
        if self._link is not None:
            self._sources.peers.give_back(self._link)
            self._link = None

    def _do(self, header: dict[str, object], data: memoryview | bytes) -> None:
        if self._dropped:
            return
        try:
            if self._link is None:
                self._link = self._sources.peers.borrow(self._host)
            self._link.send(header, data)
        except LOST as error:
            self._drop(error)
        self._settle(self._sources.options.window)

    def _settle(self, owed: int) -> None:
        try:
            while self._link is not None and self._link.owed > owed:
                self._link.answer(wait_s=self._sources.options.secondary_s)
        except LOST as error:
            self._drop(error)

    def _drop(self, error: BaseException) -> None:
        log.info("parity not delivered to host %d: %s", self._host, error or type(error).__name__)
        self._dropped = True
        if self._link is not None:
            self._link.close()
            self._link = None

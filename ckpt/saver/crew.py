"""All hosts' hands at once, as the one that leads uses them: every request goes to all of them side by side.

    Crew.gather(): our own Hand, and every saver in the register that answers
    held() ─▶ take() ─▶ write()        the first host that fails, or is lost, ends the request on all others

Leaving it ends every connection, and with that whatever the hosts still keep or do for the attempt. Decides nothing
(divide.py), and commits nothing (team.py). Invariant: after close() no host writes for this attempt any more, or soon.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Self, TypeVar

from holdfast.proto.errors import HoldfastError, PeerLost, SnapshotError

from ..memory.protect.net import Key
from .divide import Holdings, Piece
from .hand import Hand, Written
from .peers import Peer, Register
from .told import Told

log = logging.getLogger("holdfast.saver")

Answer = TypeVar("Answer")


class Crew:
    """The hosts of one attempt, numbered; ours is 0. A context manager."""

    def __init__(self, hand: Hand, peers: Sequence[Peer], attempt: str) -> None:
        self.attempt = attempt
        self._hand = hand
        self._peers = list(peers)
        self._pool = ThreadPoolExecutor(1 + len(peers), thread_name_prefix="crew")

    @staticmethod
    def gather(hand: Hand, register: Register, key: Key, attempt: str) -> Crew:
        """With every saver that answers; who does not is left out, and told to the log."""
        others = register.others()

        def reach(name: str) -> Peer | None:
            try:
                return Peer(name, others[name], key)
            except PeerLost as error:
                log.info("no saver there: %s", error)
                return None

        with ThreadPoolExecutor(max(1, len(others))) as pool:
            return Crew(hand, [peer for peer in pool.map(reach, others) if peer is not None], attempt)

    def names(self) -> list[str]:
        """For messages, by number."""
        return ["this host", *(peer.name for peer in self._peers)]

    def held(self) -> dict[int, Holdings]:
        """Host -> what it holds."""
        return self._all({number: one.held for number, one in self._members().items()})

    def take(self, step: int, hosts: Mapping[int, int]) -> list[Told]:
        """Have each host copy its slots' shares (`hosts`: slot -> host); what they are, by slot."""
        wanted: dict[int, list[int]] = {}
        for slot, host in sorted(hosts.items()):
            wanted.setdefault(host, []).append(slot)
        members = self._members()
        calls = {
            host: lambda one=members[host], slots=slots: one.take(self.attempt, step, slots)
            for host, slots in wanted.items()
        }
        shares = [Told.of(value) for told in self._all(calls).values() for value in told]
        if sorted((share.slot, share.step) for share in shares) != [(slot, step) for slot in sorted(hosts)]:
            raise SnapshotError("hosts have told other shares than they were asked for", step=step)
        return sorted(shares, key=lambda share: share.slot)

    def write(self, folder: str, identity: str, work: Mapping[int, Sequence[Piece]]) -> dict[int, Written]:
        """Have each host write its pieces below `folder`, durable."""
        members = self._members()
        calls = {
            host: lambda one=members[host], host=host, pieces=pieces: one.write(
                self.attempt, folder, identity, host, pieces
            )
            for host, pieces in work.items()
        }
        return self._all(calls)

    def bye(self) -> None:
        """Tell all others that the last checkpoint is there, or will not be."""
        for peer in self._peers:
            try:
                peer.bye()
            except HoldfastError as error:
                log.info("%s", error)

    def close(self) -> None:
        """End what is left of the attempt."""
        for peer in self._peers:
            peer.wake()
        self._hand.drop(self.attempt)
        self._pool.shutdown()
        for peer in self._peers:
            peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _members(self) -> dict[int, Hand | Peer]:
        return {0: self._hand, **dict(enumerate(self._peers, 1))}

    def _all(self, calls: Mapping[int, Callable[[], Answer]]) -> dict[int, Answer]:
        """Every host's answer. The first error ends the waiting for the others', and the attempt with it."""
        futures = {self._pool.submit(call): host for host, call in calls.items()}
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in done if future.exception() is not None]
        if failed:
            for future in waiting:
                if futures[future]:
                    self._peers[futures[future] - 1].wake()
                else:
                    self._hand.stop(self.attempt)
            wait(futures)
            error = failed[0].exception()
            assert error is not None
            host = futures[failed[0]]
            if isinstance(error, HoldfastError):
                error.fields.setdefault("host", self.names()[host])
            raise error
        return {host: future.result() for future, host in futures.items()}

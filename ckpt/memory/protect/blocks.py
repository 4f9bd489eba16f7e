"""Reading a stripe block by block, verified, several in flight from each source, going on without those that fail.

    shards (any that are there) ─▶ k streams ─▶ read(b): {index: bytes of block b, or None for zeros}
                                     │ lost, slow, overwritten, or other bytes than its digest says
                                     └──▶ the next shard takes its place, from block b on

A block is returned only if its digest is that of the seal record, so what is decoded from it is right or the
code is wrong. Does not code. Invariants:

* read() returns k shards at least, of equal length, or raises SnapshotIncomplete with what was missing;
* memory: one block a stream here, at most twice `window` blocks a stream on the wire.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.proto.errors import PeerLost, SnapshotCorrupt, SnapshotIncomplete

from .local import Local
from .options import BLOCK_BYTES, PAYLOAD_BYTES_MAX, Options
from .peers import LOST, Link, Peers
from .record import Blocks, blocks_of, digest_of_block

log = logging.getLogger("holdfast.protect")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a stripe, and where it is."""

    index: int
    """Its number in the code: data from 0, parity from k."""
    host: int
    slot: int
    step: int
    token: int
    """Of the fill that it is in; see local.Held."""
    blocks: Blocks
    name: str

    def has(self, block: int) -> bool:
        """Whether it has bytes in that block; else they are zeros."""
        return block < blocks_of(self.blocks.stop - self.blocks.start)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where shards are read from."""

    local: Local
    peers: Peers
    options: Options
    me: Callable[[], int]
    suspect: Callable[[int, int], None]

    def stream(self, shard: Shard, first: int, until: int) -> _Here | _There:
        """Its blocks from `first` on, up to `until`."""
        return _Here(self, shard) if shard.host == self.me() else _There(self, shard, first, until)

    def report(self, shard: Shard) -> None:
        """Tell the owner that its bytes are not those of the record; it looks itself."""
        if shard.host == self.me():
            held = self.local.find(shard.slot, shard.step, token=shard.token)
            if held is not None:
                self.suspect(held.slot, held.index)
            return
        with contextlib.suppress(*LOST), self.peers.link(shard.host) as link:
            link.ask({"op": "corrupt", "slot": shard.slot, "step": shard.step, "token": shard.token})


class _Here:
    """A shard of this host's memory: read in place."""

    def __init__(self, sources: Sources, shard: Shard) -> None:
        self.shard: Final = shard
        self._local = sources.local
        self._room: bytearray | None = None

    def take(self, block: int, size: int, into: memoryview | None) -> memoryview:
        """One block, padded with zeros to `size`."""
        shard = self.shard
        held = self._local.find(shard.slot, shard.step, token=shard.token)
        if held is None:
            raise SnapshotIncomplete("overwritten meanwhile", slot=shard.slot, step=shard.step)
        data = held.view(*shard.blocks.span(block))
        if digest_of_block(data) != shard.blocks.digest(block):
            raise SnapshotCorrupt("other bytes than were sealed", shard=shard.name, block=block)
        if into is None and len(data) == size:
            return data
        if into is None:
            self._room = self._room or bytearray(BLOCK_BYTES)
            into = memoryview(self._room)[:size]
        into[: len(data)] = data
        into[len(data) :] = bytes(size - len(data))
        return into

    def ask(self) -> None:
        """Nothing to ask for."""

    def close(self) -> None:
        """Nothing to give back."""

    drop = close


class _There:
    """A shard of another host: asked for ahead of time, several blocks at once."""

    def __init__(self, sources: Sources, shard: Shard, first: int, until: int) -> None:
        self.shard: Final = shard
        self._peers = sources.peers
        self._window = min(sources.options.window, PAYLOAD_BYTES_MAX // BLOCK_BYTES)
        self._link: Link = sources.peers.borrow(shard.host)
        self._room: memoryview | None = None
        self._asked = first
        self._taken = first
        self._coming = 0
        """Blocks of the answer that is being taken which have not been taken."""
        self._groups: deque[int] = deque()
        self._until = min(until, blocks_of(shard.blocks.stop - shard.blocks.start))

    def ask(self) -> None:
        """Have `window` blocks under way, or twice that: asking for few at a time costs as much as the bytes do."""
        shard = self.shard
        while self._asked < min(self._taken + self._window + 1, self._until):
            after = min(self._asked + self._window, self._until)
            start, stop = shard.blocks.span(self._asked)[0], shard.blocks.span(after - 1)[1]
            where = {"slot": shard.slot, "step": shard.step, "token": shard.token}
            self._link.send({"op": "read", **where, "offset": start, "length": stop - start})
            self._groups.append(stop - start)
            self._asked = after

    def take(self, block: int, size: int, into: memoryview | None) -> memoryview:
        """One block, padded with zeros to `size`. Blocks are taken in order."""
        shard = self.shard
        self.ask()
        if not self._coming:
            _, nbytes = self._link.answer()
            wanted = self._groups.popleft()
            if nbytes != wanted:
                raise PeerLost("a peer sent another length", shard=shard.name, wanted=wanted, found=nbytes)
            self._coming = blocks_of(nbytes)
        start, stop = shard.blocks.span(block)
        nbytes = stop - start
        if into is None:
            self._room = self._room or memoryview(bytearray(BLOCK_BYTES))
            into = self._room[:size]
        self._link.take(into[:nbytes])
        right = digest_of_block(into[:nbytes]) == shard.blocks.digest(block)
        self._taken, self._coming = block + 1, self._coming - 1
        if (not self._coming or not right) and not self._same_fill(block):
            raise SnapshotIncomplete("overwritten while it was read", shard=shard.name)
        if not right:
            raise SnapshotCorrupt("other bytes than were sealed", shard=shard.name, block=block)
        into[nbytes:] = bytes(size - nbytes)
        return into

    def _same_fill(self, block: int) -> bool:
        """What the answer ends with: whether its bytes were of that fill to the last. What is left of it is dropped."""
        scrap = memoryview(bytearray(BLOCK_BYTES if self._coming else 1))
        for other in range(block + 1, block + 1 + self._coming):
            start, stop = self.shard.blocks.span(other)
            self._link.take(scrap[: stop - start])
        self._coming = 0
        self._link.take(scrap[:1])
        return scrap[0] == 1

    def close(self) -> None:
        """Give the link back, if no answers are under way on it."""
        if self._coming:
            self._link.close()
        else:
            self._peers.give_back(self._link)

    def drop(self) -> None:
        """End the link: something went wrong with it."""
        self._link.close()


class StripeReader:
    """Blocks of one stripe, in order."""

    def __init__(
        self,
        sources: Sources,
        shards: Iterable[Shard],
        *,
        k: int,
        chunk: int,
        lengths: Mapping[int, int],
        named: Mapping[str, object],
        avoid: set[int] | None = None,
        until: int | None = None,
    ) -> None:
        """`lengths`: real bytes of each data shard, there or not; beyond them it is zeros. `until`: no block from that
        one on will be read.

        `avoid`: hosts that kept somebody waiting; they come last, and who joins them here is noted.
        """
        me = sources.me()
        self._sources = sources
        self._avoid = avoid if avoid is not None else set()
        self._spare = sorted(shards, key=lambda s: (s.host in self._avoid, s.host != me, s.index, s.host))
        self._tried: set[Shard] = set()
        self._active: dict[int, _Here | _There] = {}
        self._k = k
        self._chunk = chunk
        self._lengths = lengths
        self._named = dict(named)
        self._until = blocks_of(chunk) if until is None else until
        self.failed: list[str] = []
        self.used: dict[str, None] = {}

    def size(self, block: int) -> int:
        """Bytes of that block in the (padded) chunk."""
        return min(BLOCK_BYTES, self._chunk - block * BLOCK_BYTES)

    def read(self, block: int, into: memoryview | None = None) -> dict[int, memoryview | None]:
        """k shards of one block, or more. What is returned is valid until the next call."""
        size = self.size(block) if into is None else len(into)
        have = self._zeros(block)
        while True:
            for index, stream in list(self._active.items()):
                if index in have or not stream.shard.has(block):
                    continue
                try:
                    have[index] = stream.take(block, size, into)
                except LOST as error:
                    self._drop(stream, error)
            if len(have) >= self._k:
                return have
            self._open(block, have)

    def ask(self, block: int) -> None:
        """Have blocks from that one on sent, for a read() that comes later. What cannot be had, read() will say."""
        have: dict[int, memoryview | None] = dict(self._zeros(block))
        with contextlib.suppress(SnapshotIncomplete):
            while len(have) + len(self._active) < self._k:
                self._open(block, have)
        for stream in list(self._active.values()):
            try:
                stream.ask()
            except LOST as error:
                self._drop(stream, error)

    def shun(self) -> None:
        """Leave hosts that failed somebody since ask(); they are there again when there is nobody else."""
        for index, stream in list(self._active.items()):
            if stream.shard.host in self._avoid:
                del self._active[index]
                stream.drop()
                self._spare.append(stream.shard)
        self._spare.sort(key=lambda shard: shard.host in self._avoid)

    def close(self) -> None:
        """Give all links back."""
        while self._active:
            _, stream = self._active.popitem()
            stream.close()

    def __enter__(self) -> StripeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _zeros(self, block: int) -> dict[int, memoryview | None]:
        """Data shards that have ended before that block."""
        return {index: None for index in range(self._k) if self._lengths.get(index, 0) <= block * BLOCK_BYTES}

    def _open(self, block: int, have: Mapping[int, memoryview | None]) -> None:
        """One stream more."""
        while self._spare:
            shard = self._spare.pop(0)
            if shard.index in self._active or shard.index in have or not shard.has(block):
                continue
            try:
                self._active[shard.index] = self._sources.stream(shard, block, self._until)
            except LOST as error:
                self._note(shard, error)
                continue
            self.used[shard.name] = None
            return
        raise SnapshotIncomplete(
            "fewer clean shards than the code needs",
            **self._named,
            block=block,
            needed=self._k,
            found=len(have),
            failed=self.failed,
        )

    def _drop(self, stream: _Here | _There, error: BaseException) -> None:
        shard = stream.shard
        del self._active[shard.index]
        stream.drop()
        self._note(shard, error)

    def _note(self, shard: Shard, error: BaseException) -> None:
        log.info("shard lost: %s: %s", shard.name, error or type(error).__name__)
        self.failed.append(f"{shard.name}: {error or type(error).__name__}")
        if isinstance(error, SnapshotCorrupt):
            self._sources.report(shard)
        elif not isinstance(error, SnapshotIncomplete):
            self._avoid.add(shard.host)
            self._spare.sort(key=lambda other: other.host in self._avoid)
            if shard not in self._tried:
                # A connection may break for a reason that passes: once more, after all others.
                self._tried.add(shard)
                self._spare.append(shard)

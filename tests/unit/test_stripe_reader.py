"""Shards read over a real connection in this process: several blocks at once, and what goes wrong between them."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from holdfast.ckpt.memory.arena import ArenaEntry, Half, State, Word, arena_bytes
from holdfast.ckpt.memory.protect import pen
from holdfast.ckpt.memory.protect.blocks import Shard, Sources, StripeReader
from holdfast.ckpt.memory.protect.local import Held, Local
from holdfast.ckpt.memory.protect.net import Key
from holdfast.ckpt.memory.protect.news import News
from holdfast.ckpt.memory.protect.options import BLOCK_BYTES, Options
from holdfast.ckpt.memory.protect.peers import Peers
from holdfast.ckpt.memory.protect.record import Blocks, Record, blocks_of, measure
from holdfast.ckpt.memory.protect.serve import Server
from holdfast.proto.errors import SnapshotIncomplete

JOB, KEY = "job", Key("job", "token")
NO: Any = None
"""What these parts have and do not use here: a manager, parity."""


def held(nbytes: int, seed: int) -> Held:
    """A sealed half with its record, in memory of this process."""
    entries = [ArenaEntry("w", "weight", "U8", (nbytes,), 0, nbytes)]
    half = Half(bytearray(arena_bytes(entries, None)), JOB)
    half.format()
    for entry in half.begin(7, bytes(32), 0, entries, None):
        half.view(entry)[:] = random.Random(seed).randbytes(entry.nbytes)
    half.finish()
    words = pen.words_of(half)
    chunks, digest = measure(half.memory, [(0, nbytes)], first=4096, data_bytes=words[Word.DATA_BYTES])
    record = Record(0, 7, 1, bytes(32).hex(), 0, words[Word.TABLE_OFFSET], words[Word.TABLE_BYTES],
                    words[Word.DATA_BYTES], words[Word.TABLE_OFFSET], digest, bytes(16).hex(), 1, chunks)  # fmt: skip
    return Held(0, 0, 1, half, State.SEALED, 7, 1, record)


@dataclass
class Machine:
    """A host that serves one half, and what it was told to look at."""

    held: Held
    suspected: list[tuple[int, int]] = field(default_factory=list)
    server: Server = NO
    address: str = ""

    def start(self, listener: socket.socket) -> None:
        local = Local(NO, JOB, News())
        local._held[0, 0] = self.held
        suspect: Callable[[int, int], None] = lambda slot, half: self.suspected.append((slot, half))  # noqa: E731
        self.server = Server(listener, KEY, local, NO, options=Options(), suspect=suspect, news=News())
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=self.server.run, daemon=True).start()

    @property
    def blocks(self) -> Blocks:
        assert self.held.record is not None
        return self.held.record.chunks[0]

    def shard(self, host: int) -> Shard:
        return Shard(0, host, 0, 7, self.held.token, self.blocks, f"host {host}")

    def right(self, block: int) -> bytes:
        return bytes(self.held.view(*self.blocks.span(block)))


Start = Callable[..., tuple[list[Machine], Sources]]


@pytest.fixture
def start() -> Iterator[Start]:
    listeners: list[socket.socket] = []

    def made(*nbytes: int, options: Options = Options()) -> tuple[list[Machine], Sources]:  # noqa: B008
        machines = [Machine(held(size, 5)) for size in nbytes]
        for machine in machines:
            listeners.append(socket.create_server(("127.0.0.1", 0)))
            machine.start(listeners[-1])
        peers = Peers(KEY, News(), options)
        peers.set_hosts({host: machine.address for host, machine in enumerate(machines, 1)})
        return machines, Sources(Local(NO, JOB, News()), peers, options, lambda: 0, lambda slot, half: None)

    yield made
    for listener in listeners:
        listener.close()


def reader(sources: Sources, machines: list[Machine], **options: Any) -> StripeReader:
    blocks = machines[0].blocks
    length = blocks.stop - blocks.start
    shards = [machine.shard(host) for host, machine in enumerate(machines, 1)]
    return StripeReader(sources, shards, k=1, chunk=length, lengths={0: length}, named={}, **options)


def taken(one: StripeReader, block: int) -> bytes:
    data = one.read(block)[0]
    assert data is not None
    return bytes(data)


@pytest.mark.parametrize("nbytes", [1, BLOCK_BYTES, 4 * BLOCK_BYTES, 13 * BLOCK_BYTES + 5])
def test_all_blocks_come_in_order_and_the_link_serves_the_next_reader(start: Start, nbytes: int) -> None:
    machines, sources = start(nbytes)
    for _ in range(2):
        with reader(sources, machines) as one:
            one.ask(0)
            found = [taken(one, block) for block in range(blocks_of(nbytes))]
        assert found == [machines[0].right(block) for block in range(blocks_of(nbytes))]
    assert [link.owed for link in sources.peers._idle[1]] == [0]


def test_a_reader_that_needs_one_block_has_one_block_sent(start: Start) -> None:
    machines, sources = start(9 * BLOCK_BYTES)
    with reader(sources, machines, until=4) as one:
        assert taken(one, 3) == machines[0].right(3)
    assert [link.owed for link in sources.peers._idle[1]] == [0], "nothing else is under way, so it is kept"


def test_a_reader_that_stops_early_leaves_no_bytes_to_the_next_one(start: Start) -> None:
    machines, sources = start(4 * BLOCK_BYTES)
    for stop in (1, 2, 3, 4):
        with reader(sources, machines) as one:
            assert [taken(one, block) for block in range(stop)] == [machines[0].right(block) for block in range(stop)]


@pytest.mark.parametrize("bad", [0, 2, 3, 5, 8])
def test_a_flipped_bit_anywhere_in_what_was_asked_for_at_once_is_found_at_its_block(start: Start, bad: int) -> None:
    machines, sources = start(9 * BLOCK_BYTES, 9 * BLOCK_BYTES)
    right = machines[1].right
    machines[0].held.view(*machines[0].blocks.span(bad))[77] ^= 4
    with reader(sources, machines) as one:
        found = [taken(one, block) for block in range(9)]
    assert found == [right(block) for block in range(9)]
    assert len(one.failed) == 1
    assert one.failed[0].startswith("host 1: other bytes than were sealed")
    assert machines[0].suspected == [(0, 0)]


def test_bytes_of_the_next_fill_are_never_returned_and_accuse_nobody(start: Start) -> None:
    # More than sockets hold is under way, so the host is in the middle of sending when its half is overwritten; or, if
    # this thread had to wait for a core, between two blocks, and then it says at once that it has them no more.
    machines, sources = start(20 * BLOCK_BYTES, options=Options(window=16))
    machine = machines[0]
    right = [machine.right(block) for block in range(20)]
    found = []
    with reader(sources, machines) as one:
        found.append(taken(one, 0))
        entries = [ArenaEntry("w", "weight", "U8", (20 * BLOCK_BYTES,), 0, 20 * BLOCK_BYTES)]
        for entry in machine.held.half.begin(8, bytes(32), 0, entries, None):
            machine.held.half.view(entry)[:] = bytes(entry.nbytes)
        with pytest.raises(SnapshotIncomplete, match=r"overwritten while it was read|not held here"):
            found += [taken(one, block) for block in range(1, 20)]
    assert found == right[: len(found)]
    assert machine.suspected == []


def test_a_host_that_failed_somebody_after_it_was_asked_is_left_for_another(start: Start) -> None:
    machines, sources = start(3 * BLOCK_BYTES, 3 * BLOCK_BYTES)
    avoid: set[int] = set()
    with reader(sources, machines, avoid=avoid) as one:
        one.ask(0)
        avoid.add(1)
        one.shun()
        assert taken(one, 0) == machines[1].right(0)
    assert list(one.used) == ["host 1", "host 2"]
    with reader(sources, machines[:1], avoid=avoid) as alone:
        alone.ask(0)
        alone.shun()
        assert taken(alone, 0) == machines[0].right(0), "it is better than nobody"

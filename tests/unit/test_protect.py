"""The parts of the protector that need no process: records, halves to overwrite, the pen, the page, the wire."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import xxhash

from holdfast.ckpt.memory.arena import ArenaEntry, Half, State, Word, arena_bytes
from holdfast.ckpt.memory.digest import digest_of
from holdfast.ckpt.memory.placement import HostInfo, Redundancy, SlotInfo, place
from holdfast.ckpt.memory.protect import pen
from holdfast.ckpt.memory.protect.client import NO_DUTY, Page
from holdfast.ckpt.memory.protect.encode import Duty
from holdfast.ckpt.memory.protect.net import Channel, Key, connect, welcome
from holdfast.ckpt.memory.protect.news import News
from holdfast.ckpt.memory.protect.options import BLOCK_BYTES
from holdfast.ckpt.memory.protect.page import PageWriter
from holdfast.ckpt.memory.protect.parity import Kept, choose_half
from holdfast.ckpt.memory.protect.peers import parse_inventory
from holdfast.ckpt.memory.protect.record import Blocks, Record, blocks_of, cut, digest_of_block, image_end_of, measure
from holdfast.proto.errors import HoldfastError, PeerLost, ProtocolViolation, SnapshotError

JOB = "job"
ENTRIES = [ArenaEntry("w", "weight", "U8", (5000,), 0, 5000), ArenaEntry("r", "extra", "U8", (70,), 0, 70)]


def sealed(metadata: Any = None, *, fill: int = 1) -> tuple[Half, bytearray, Record, bytes]:
    """A sealed half, its memory, its record and its tail."""
    memory = bytearray(arena_bytes(ENTRIES, metadata))
    half = Half(memory, JOB)
    half.format()
    for _ in range(fill):
        placed = half.begin(7, bytes(32), 2, ENTRIES, metadata)
        for entry in placed:
            half.view(entry)[:] = random.Random(entry.name).randbytes(entry.nbytes)
        half.finish()
    found = half.judge()
    assert found is not None
    assert isinstance(found[1], bytes)
    half.seal(found[0], found[1])
    table = half.read(7)
    words = pen.words_of(half)
    end, offset, length = (
        image_end_of(table, words[Word.TABLE_OFFSET]),
        words[Word.TABLE_OFFSET],
        words[Word.TABLE_BYTES],
    )
    chunks, digest = measure(half.memory, [(0, end - 4096)], first=4096, data_bytes=words[Word.DATA_BYTES])
    assert digest == pen.sealed_digest(half)
    tail = bytes(memory[end : offset + length])
    record = Record(
        slot=3,
        step=7,
        fill=fill,
        plan=bytes(32).hex(),
        incarnation=2,
        table_offset=offset,
        table_bytes=length,
        data_bytes=words[Word.DATA_BYTES],
        image_end=end,
        data_digest=digest,
        table_digest=digest_of(tail[-length:]).hex(),
        placement=-1,
        chunks=chunks,
    )
    return half, memory, record, tail


# ---- records --------------------------------------------------------------------------------------------


def test_a_record_survives_json() -> None:
    _, _, record, _ = sealed()
    assert Record.from_json(record.to_json()) == record
    assert record.image_bytes == len(range(4096, record.image_end))


@pytest.mark.parametrize(
    "change",
    [
        {"slot": -1},
        {"step": True},
        {"fill": "1"},
        {"placement": -2},
        {"plan": "00"},
        {"data_digest": "zz" * 16},
        {"image_end": 100},
        {"image_end": 1 << 40},
        {"data_bytes": 1 << 40},
        {"chunks": None},
        {"chunks": [[0, 10, ""]]},
        {"chunks": [[0, 10, "00" * 16]]},
        {"chunks": [[10, 5, ""]]},
        {"chunks": [[0, 10, "00" * 8], [5, 12, "00" * 8]]},
        {"chunks": [[0, 1 << 30, "00" * 8 * 1024]]},
        {"chunks": [["0", 10, "00" * 8]]},
        {"extra": 1},
    ],
    ids=repr,
)
def test_a_record_with_an_odd_field_is_refused(change: dict[str, Any]) -> None:
    value = sealed()[2].to_json()
    with pytest.raises(ProtocolViolation):
        Record.from_json({**value, **change})
    with pytest.raises(ProtocolViolation):
        Record.from_json([value])


def test_one_pass_gives_the_digests_of_all_blocks_and_of_all_data() -> None:
    rng = random.Random(1)
    data = memoryview(rng.randbytes(4096 + 3 * BLOCK_BYTES + 777))
    ranges = [(0, BLOCK_BYTES + 5), (BLOCK_BYTES + 5, 2 * BLOCK_BYTES), (2 * BLOCK_BYTES, 3 * BLOCK_BYTES + 100)]
    for data_bytes in (3 * BLOCK_BYTES + 777, 3 * BLOCK_BYTES + 60, 10, 0):
        chunks, whole = measure(data, ranges, first=4096, data_bytes=data_bytes)
        assert whole == xxhash.xxh3_128_hexdigest(data[4096 : 4096 + data_bytes])
    for chunk, (start, stop) in zip(chunks, ranges, strict=True):
        assert blocks_of(stop - start) * 8 == len(chunk.digests)
        for block, first, last in chunk.spans():
            assert chunk.digest(block) == digest_of_block(data[4096 + first : 4096 + last])
        assert list(chunk.spans())[-1][2] == stop


def test_chunks_are_clipped_to_the_image_and_what_they_leave_is_the_last_one() -> None:
    assert cut([(0, 100), (100, 200)], 150) == [(0, 100), (100, 150)]
    assert cut([(0, 100), (100, 200)], 90) == [(0, 90), (100, 100)]
    assert cut([(0, 100)], 150) == [(0, 100), (100, 150)]
    assert cut([], 7) == [(0, 7)]
    assert cut([], 0) == []


def test_the_image_ends_at_the_extra_of_replicated_state_only() -> None:
    for metadata, whole in (({"replicated": True}, False), ({"replicated": 1}, True), (None, True)):
        half, _, record, tail = sealed(metadata)
        table = half.read()
        assert (record.image_end == record.table_offset) == whole
        if not whole:
            assert record.image_end == table.entries[1].offset
        assert len(tail) == record.tail_bytes


def test_a_chunk_that_is_not_in_a_record_is_an_error_and_no_other_chunk() -> None:
    record = sealed()[2]
    assert record.chunk(0) == record.chunks[0]
    with pytest.raises(SnapshotError, match="without that chunk"):
        record.chunk(4096)


# ---- which half is overwritten --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "keep", "everywhere", "overwritten"),
    [
        ([], -1, set(), 0),
        ([Kept(0, 1, 5)], -1, set(), 1),
        ([Kept(1, 1, 5)], 5, set(), 0),
        ([Kept(0, 1, 5), Kept(1, 1, 6)], -1, set(), 0),
        ([Kept(0, 1, 6), Kept(1, 1, 5)], -1, set(), 1),
        ([Kept(0, 1, 5), Kept(1, 1, 6)], 5, set(), 1),
        ([Kept(0, 1, 5), Kept(1, 1, 6)], 6, set(), 0),
        ([Kept(0, 1, 5), Kept(1, 1, 6)], -1, {(1, 5)}, 1),
        ([Kept(0, 1, 5), Kept(1, 1, 6)], -1, {(1, 5), (1, 6)}, 0),
        ([Kept(0, 1, 6), Kept(1, 2, 6)], 6, set(), 1),
        ([Kept(0, 1, 6), Kept(1, 2, 6)], 6, {(2, 6)}, 0),
        ([Kept(0, 2, 6), Kept(1, 1, 6)], 6, set(), 0),
        ([Kept(0, 1, 9), Kept(1, 2, 6)], 6, set(), 0),
    ],
)
def test_the_kept_half_and_the_one_that_is_whole_everywhere_are_spared(
    kept: list[Kept], keep: int, everywhere: set[tuple[int, int]], overwritten: int
) -> None:
    assert choose_half(kept, keep, lambda number, step: (number, step) in everywhere) == overwritten


# ---- the pen --------------------------------------------------------------------------------------------


def test_the_header_that_a_record_gives_is_the_one_that_is_there() -> None:
    half, _, record, _ = sealed(fill=3)
    assert pen.words_of(half)[: Word.PEN] == pen.header_of(record, JOB)
    assert pen.header_intact(half, record, JOB)
    assert not pen.header_intact(half, record, "another")


def test_no_flipped_bit_of_the_header_looks_like_a_new_fill_and_each_is_mended() -> None:
    half, memory, record, _ = sealed(fill=2)
    for at in range(Word.PEN * 8):
        for bit in range(8):
            before = bytes(memory[at : at + 1])
            memory[at] ^= 1 << bit
            assert not pen.overtaken(half, record), (at, bit)
            assert not pen.header_intact(half, record, JOB)
            assert pen.mend_header(half, record, JOB)
            if not Word.VERDICT * 8 <= at < Word.VERDICT * 8 + 8:
                assert pen.header_intact(half, record, JOB), (at, bit)
            memory[at : at + 1] = before


def test_a_repair_never_lands_in_the_next_fill() -> None:
    half, memory, record, _ = sealed()
    placed = half.begin(8, bytes(32), 2, ENTRIES, None)
    half.view(placed[0])[:] = bytes(5000)
    assert pen.overtaken(half, record)
    assert not pen.write(half, record, 4096, b"\xff" * 100)
    assert not pen.mend_header(half, record, JOB)
    half.finish()
    assert pen.overtaken(half, record), "COPIED, with a table of its own"
    assert not pen.write(half, record, 4096, b"\xff" * 100)
    assert memory[4096:4196] == bytes(100)
    assert pen.word_at(half, Word.PEN) == 0


def test_a_fill_whose_table_lies_elsewhere_is_a_fill_although_the_old_table_is_still_there() -> None:
    half, memory, record, tail = sealed()
    half.begin(8, bytes(32), 2, ENTRIES[1:], None)
    half.finish()
    old = memory[record.table_offset : record.table_offset + record.table_bytes]
    assert old == tail[-record.table_bytes :], "the test would prove nothing"
    assert pen.overtaken(half, record)


def test_a_writer_waits_for_the_pen_and_gives_up_on_one_that_is_never_put_down() -> None:
    half, memory, record, _ = sealed()
    other = Half(memory, JOB)
    words = memoryview(memory)[:4096].cast("Q")
    words[Word.PEN] = record.fill
    begun = threading.Event()
    writer = threading.Thread(target=lambda: (other.begin(8, bytes(32), 2, ENTRIES, None), begun.set()))
    writer.start()
    deadline = time.monotonic() + 5
    while half.state is not State.FILLING and time.monotonic() < deadline:
        begun.wait(0.001)
    assert not begun.wait(0.05)
    assert half.step == 7, "nothing but STATE is written before the pen is down"
    words[Word.PEN] = 0
    assert begun.wait(5)
    writer.join()
    words[Word.PEN] = 9
    with pytest.raises(SnapshotError, match="does not end"):
        half.begin(9, bytes(32), 2, ENTRIES, None)
    pen.drop(half)
    half.begin(9, bytes(32), 2, ENTRIES, None)


def test_a_half_that_was_repaired_is_pardoned_only_if_it_is_what_was_sealed() -> None:
    half, memory, record, _ = sealed()
    memory[5000] ^= 8
    half.condemn(1)
    assert half.state is State.CORRUPT
    assert not half.reexamine(1)
    memory[5000] ^= 8
    assert half.reexamine(1)
    assert not half.reexamine(2)
    half.pardon(1)
    assert half.state is State.SEALED
    half.verify()
    memory[record.table_offset] ^= 1
    assert not half.reexamine(1)


# ---- the page, the news ---------------------------------------------------------------------------------


def test_a_page_says_what_was_stored_and_is_read_only() -> None:
    writer = PageWriter()
    with Page(writer.descriptor()) as page:
        assert page.read() == (-1, -1)
        for word in ((0, 0), (4, 17), (4, NO_DUTY), (-1, -1)):
            writer.store(*word)
            assert page.read() == writer.load() == word
        with pytest.raises(TypeError):
            page._words[1] = 3
        writer._words[0] += 1  # a writer that died between two stores
        assert page.read() == (-1, -1)
    writer.close()


def test_a_reader_of_the_page_never_sees_half_of_a_pair() -> None:
    writer = PageWriter()
    ended = threading.Event()

    def write() -> None:
        for number in range(30_000):
            writer.store(number, number)
        ended.set()

    with Page(writer.descriptor()) as page:
        thread = threading.Thread(target=write)
        thread.start()
        while not ended.is_set():
            placement, step = page.read()
            assert placement == step
        thread.join()
    writer.close()


def test_news_that_came_before_the_wait_end_it_at_once_and_pass_one_way() -> None:
    news = News()
    local = News(news)
    seen, there = local.count, news.count
    local.bump()
    assert local.wait(seen, 5.0) == seen + 1
    assert news.wait(there, 5.0) == there + 1
    seen = local.count
    news.bump()
    assert local.wait(seen, 0.01) == seen, "what others hold is no news for them"


# ---- who works on what ----------------------------------------------------------------------------------


def test_a_duty_names_the_slots_whose_records_are_needed_and_the_group_that_must_agree() -> None:
    slots = [SlotInfo(i, i, 1_000_000) for i in range(8)]
    hosts = [HostInfo(i, f"h{i}") for i in range(8)]
    whole = place(slots, hosts, Redundancy(6, 2), 1)
    duty = Duty.of(whole, 0)
    assert duty.group == frozenset(range(8))
    assert duty.hosts == frozenset(range(8))
    assert duty.slots == {c.slot for n, _ in duty.stripes for c in whole.stripes[n].data}
    pairs = place(slots, hosts, Redundancy(1, 1), 1)
    duty = Duty.of(pairs, 0)
    assert 0 in duty.hosts
    assert len(duty.hosts) < 8, "hosts that share no stripe do not wait for one another"
    for host in duty.hosts:
        assert Duty.of(pairs, host).hosts == duty.hosts


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"version": 1, "slots": [[1, 2, 3]], "parity": []},
        {"version": 1, "slots": [[1, 2, 3, "4"]], "parity": []},
        {"version": 1, "slots": [], "parity": [[1, 2, True]]},
        {"version": "1", "slots": [], "parity": []},
        {"version": 1, "slots": {}, "parity": []},
    ],
    ids=repr,
)
def test_an_odd_inventory_is_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        parse_inventory(answer)


# ---- the wire -------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        yield sock


def serve(listener: socket.socket, key: Key, then: Callable[[Channel], None]) -> tuple[threading.Thread, list[object]]:
    ended: list[object] = []

    def run() -> None:
        sock, _ = listener.accept()
        try:
            channel = welcome(sock, key, hello_s=0.5, patience_s=0.5)
            then(channel)
            ended.append("done")
        except (OSError, EOFError, HoldfastError) as error:
            ended.append(error)
        finally:
            sock.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_frames_go_both_ways_with_payloads_of_any_size(listener: socket.socket) -> None:
    def echo(channel: Channel) -> None:
        for _ in range(4):
            header, nbytes = channel.receive()
            channel.send(header, channel.payload(nbytes))

    key = Key("job", "token")
    thread, ended = serve(listener, key, echo)
    channel = connect(address(listener), key, patience_s=5.0)
    for nbytes in (0, 1, 70_000, 5_000_000):
        data = random.Random(nbytes).randbytes(nbytes)
        channel.send({"n": nbytes}, data)
        header, length = channel.receive()
        assert (header, channel.payload(length)) == ({"n": nbytes}, data)
    channel.close()
    thread.join()
    assert ended == ["done"]


@pytest.mark.parametrize(("job", "token"), [("job", "other"), ("other", "token")])
def test_each_side_refuses_the_other_without_the_key(listener: socket.socket, job: str, token: str) -> None:
    thread, ended = serve(listener, Key(job, token), lambda channel: None)
    with pytest.raises(PeerLost, match="without the job key"):
        connect(address(listener), Key("job", "token"), patience_s=5.0)
    thread.join()
    assert isinstance(ended[0], EOFError | OSError)


def test_a_server_without_the_key_cannot_borrow_the_proof_of_its_client(listener: socket.socket) -> None:
    """It sends the client's nonce back as its own, in the hope of a proof it could use."""
    key = Key("job", "token")
    mine, theirs = bytes(range(32)), bytes(range(32, 64))
    assert key.proof(b"client", theirs, mine) != key.proof(b"server", mine, theirs)
    assert key.proof(b"client", mine, mine) != key.proof(b"server", mine, mine)
    assert key.proof(b"client", theirs, mine) != Key("job2", "token").proof(b"client", theirs, mine)


def test_a_peer_that_drips_is_late_for_the_frame_however_often_it_sends(listener: socket.socket) -> None:
    key = Key("job", "token")
    thread, ended = serve(listener, key, lambda channel: channel.receive())
    channel = connect(address(listener), key, patience_s=5.0)
    began = time.monotonic()
    turn = threading.Event()
    while thread.is_alive() and time.monotonic() - began < 5.0:
        try:
            channel.sock.send(b"\0")
        except OSError:
            break
        turn.wait(0.2)
    thread.join(5.0)
    assert isinstance(ended[0], TimeoutError)
    assert time.monotonic() - began < 3.0
    channel.close()


def test_a_chunk_knows_its_blocks() -> None:
    chunk = Blocks(10, 10 + BLOCK_BYTES + 1, b"a" * 8 + b"b" * 8)
    assert list(chunk.spans()) == [(0, 10, 10 + BLOCK_BYTES), (1, 10 + BLOCK_BYTES, 11 + BLOCK_BYTES)]
    assert chunk.digest(1) == b"b" * 8
    assert blocks_of(0) == 0

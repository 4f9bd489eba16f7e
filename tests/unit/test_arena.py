"""One half of an arena: whole or not offered, whatever the moment at which its writer died.

The crash tests stop the writer before its n-th store, for every n, and then read with fresh eyes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.ckpt.memory.arena import ArenaEntry, Half, State, arena_bytes, layout
from holdfast.ckpt.memory.digest import digest_of, digest_while
from holdfast.ckpt.memory.memfd import RESERVE_BYTES, MappedHalf, Room, create, is_sealed, read_only, room
from holdfast.ckpt.memory.table import Table
from holdfast.proto.errors import ConfigError, SnapshotCorrupt, SnapshotError, SnapshotIncomplete

PLAN = bytes(range(32))
ENTRIES = [
    ArenaEntry("0.weight", "weight", "F32", (3, 5), 0, 15),
    ArenaEntry("0.weight", "exp_avg", "F32", (3, 5), 5, 10),
    ArenaEntry("1.bias", "weight", "BF16", (7,), 0, 7),
    ArenaEntry("empty", "buffer", "I64", (0, 4), 0, 0),
    ArenaEntry("flag", "buffer", "BOOL", (), 0, 1),
]
META = ["d", "lr", ["f", "0x1p-3"]]
USED_HEADER_BYTES = 160
WORD = {name: 8 * index for index, name in enumerate(["magic", "version", "state", "verdict", "step"])}
TABLE_OFFSET, TABLE_BYTES, DATA_OFFSET, DATA_BYTES = 48, 56, 64, 72


def memory() -> bytearray:
    """An EMPTY arena with room for ENTRIES."""
    buffer = bytearray(arena_bytes(ENTRIES, META))
    Half(buffer, "job").format()
    return buffer


def content(step: int, entry: ArenaEntry) -> bytes:
    return bytes((step * 7 + len(entry.state) + i) % 251 for i in range(entry.nbytes))


def write(half: Half, step: int) -> None:
    for entry in half.begin(step, PLAN, 2, ENTRIES, META):
        half.view(entry)[:] = content(step, entry)
    half.finish()


def judge(buffer: bytearray) -> None:
    """What the manager does after `copied`."""
    half = Half(buffer, "job")
    verdict = half.judge()
    assert verdict is not None
    assert isinstance(verdict[1], bytes)
    half.seal(verdict[0], verdict[1])


def sealed(step: int = 4) -> bytearray:
    buffer = memory()
    write(Half(buffer, "job"), step)
    judge(buffer)
    return buffer


def check_whole(buffer: bytearray, step: int) -> Table:
    """A new reader finds every byte of `step`."""
    half = Half(buffer, "job")
    table = half.read(step, PLAN)
    half.verify()
    for entry in table.entries:
        assert bytes(half.view(entry)) == content(step, entry)
    half.confirm(table)
    return table


def read_and_verify(buffer: bytearray) -> Table:
    half = Half(buffer, "job")
    table = half.read()
    half.verify()
    return table


# ---- layout ---------------------------------------------------------------------------------------------


def test_entries_are_aligned_and_do_not_overlap() -> None:
    offsets, end = layout(ENTRIES)
    assert offsets == (4096, 4160, 4224, 4288, 4288)
    assert end == 4289


def test_arena_bytes_are_enough_for_names_that_json_makes_six_times_longer() -> None:
    entries = [ArenaEntry(f"\u00e4\u4e2d{i}" * 40, "\u00e4" * 9, "U8", (1,) * 9, 0, 1) for i in range(300)]
    meta = ["b", "x" * 100_000]
    buffer = bytearray(arena_bytes(entries, meta))
    half = Half(buffer, "job")
    half.format()
    half.begin(2**62, PLAN, 2**62, entries, meta)
    half.finish()
    assert half.read().metadata == meta


def test_a_step_number_that_grows_does_not_ask_for_a_bigger_arena() -> None:
    assert arena_bytes(ENTRIES, {"step": 9}) == arena_bytes(ENTRIES, {"step": 10**12})


def test_what_was_written_is_read() -> None:
    table = check_whole(sealed(), 4)
    assert (table.metadata, table.incarnation, table.fill) == (META, 2, 1)
    assert [(e.name, e.state, e.dtype, e.shape, e.start, e.stop) for e in table.entries] == [
        (e.name, e.state, e.dtype, e.shape, e.start, e.stop) for e in ENTRIES
    ]


# ---- a crash at any store -------------------------------------------------------------------------------


class Crash(Exception):
    """The writer was killed here."""


class Dying:
    """A memoryview that lets `fuse` stores through, counted over all the views that share it."""

    def __init__(self, view: memoryview, fuse: list[int]) -> None:
        self._view = view
        self._fuse = fuse

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._fuse[0] == 0:
            raise Crash
        self._fuse[0] -= 1
        self._view[index] = value

    @property
    def nbytes(self) -> int:
        return self._view.nbytes


def dying(buffer: bytearray, stores: int) -> tuple[Half, list[int]]:
    half, fuse = Half(buffer, "job"), [stores]
    for name in ("_words", "_bytes"):
        setattr(half, name, Dying(getattr(half, name), fuse))
    return half, fuse


def fill_until_it_dies(buffer: bytearray, step: int, stores: int) -> bool:
    """Whether the writer lived to the end of its fill."""
    half, fuse = dying(buffer, stores)
    try:
        for entry in half.begin(step, PLAN, 2, ENTRIES, META):
            if entry.nbytes:
                Dying(half.view(entry), fuse)[:] = content(step, entry)
        half.finish()
    except Crash:
        return False
    return True


def test_a_torn_half_is_never_offered() -> None:
    outcomes = []
    for stores in range(100):
        buffer = sealed(4)
        lived = fill_until_it_dies(buffer, 6, stores)
        state = Half(buffer, "job").state
        outcomes.append(state)
        if state is State.SEALED:
            check_whole(buffer, 4)
        elif state is State.COPIED:
            judge(buffer)
            check_whole(buffer, 6)
        else:
            assert state is State.FILLING
            with pytest.raises(SnapshotIncomplete, match="FILLING"):
                Half(buffer, "job").read()
            assert Half(buffer, "job").judge() is None
        if lived:
            break
    assert outcomes[0] is State.SEALED
    assert outcomes[-1] is State.COPIED
    assert len(outcomes) > 10
    assert set(outcomes[1:-1]) == {State.FILLING}


def test_a_manager_that_dies_while_sealing_leaves_a_half_that_can_be_sealed_again() -> None:
    for stores in range(3):
        buffer = memory()
        write(Half(buffer, "job"), 4)
        verdict = Half(buffer, "job").judge()
        assert verdict is not None
        assert isinstance(verdict[1], bytes)
        half, _ = dying(buffer, stores)
        if stores < 2:
            with pytest.raises(Crash):
                half.seal(verdict[0], verdict[1])
            assert Half(buffer, "job").state is State.COPIED
            judge(buffer)
        else:
            half.seal(verdict[0], verdict[1])
        check_whole(buffer, 4)


def test_a_new_writer_fills_what_a_dead_one_left() -> None:
    buffer = sealed(4)
    assert not fill_until_it_dies(buffer, 6, 5)
    write(Half(buffer, "job"), 6)
    judge(buffer)
    assert check_whole(buffer, 6).fill == 3


# ---- two writers of one header --------------------------------------------------------------------------


def test_a_verdict_that_comes_late_says_nothing_about_the_next_fill() -> None:
    buffer = memory()
    rank, manager = Half(buffer, "job"), Half(buffer, "job")
    write(rank, 4)
    verdict = manager.judge()
    assert verdict is not None
    assert isinstance(verdict[1], bytes)
    rank.begin(6, PLAN, 2, ENTRIES, META)
    manager.seal(verdict[0], verdict[1])
    assert manager.state is State.FILLING
    rank.finish()
    assert manager.state is State.COPIED
    manager.condemn(verdict[0])
    assert manager.state is State.COPIED


def test_a_half_that_is_begun_again_while_it_is_digested_gets_no_verdict() -> None:
    buffer = memory()
    rank = Half(buffer, "job")
    write(rank, 4)

    class Slow(Half):
        def _data(self) -> memoryview:
            if rank.state is State.COPIED:
                rank.begin(6, PLAN, 2, ENTRIES, META)
            return super()._data()

    assert Slow(buffer, "job").judge() is None


def test_a_half_that_is_begun_again_after_its_last_byte_was_digested_gets_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = memory()
    rank = Half(buffer, "job")
    write(rank, 4)

    def slow(data: memoryview, wanted: Callable[[], bool]) -> bytes | None:
        digest = digest_while(data, wanted)
        rank.begin(6, PLAN, 2, ENTRIES, META)
        return digest

    monkeypatch.setattr("holdfast.ckpt.memory.arena.digest_while", slow)
    assert Half(buffer, "job").judge() is None


def test_a_reader_that_is_overtaken_hears_of_it() -> None:
    buffer = sealed(4)
    rank, reader = Half(buffer, "job"), Half(buffer, "job")
    table = reader.read(4, PLAN)
    write(rank, 6)
    judge(buffer)
    with pytest.raises(SnapshotIncomplete, match="overwritten"):
        reader.confirm(table)


def test_a_digest_is_stored_once_so_that_a_later_flip_stays_visible() -> None:
    buffer = sealed(4)
    buffer[4100] ^= 1
    half = Half(buffer, "job")
    assert half.judge() is None
    half.seal(1, digest_of(buffer[4096 : layout(ENTRIES)[1]]))
    with pytest.raises(SnapshotCorrupt, match="not what was sealed"):
        half.verify()


def test_finish_is_refused_when_somebody_else_began_meanwhile() -> None:
    buffer = memory()
    old, new = Half(buffer, "job"), Half(buffer, "job")
    old.begin(4, PLAN, 0, ENTRIES, META)
    new.begin(5, PLAN, 1, ENTRIES, META)
    with pytest.raises(SnapshotError, match="not this writer's"):
        old.finish()
    new.finish()
    assert new.peek() == (State.COPIED, 5, 2)


# ---- what a reader refuses ------------------------------------------------------------------------------


def test_no_flipped_bit_of_the_header_changes_what_is_restored() -> None:
    good = sealed(4)
    table = check_whole(good, 4)
    refused = 0
    for bit in range(8 * USED_HEADER_BYTES):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            found = read_and_verify(bad)
        except SnapshotError:
            refused += 1
        else:
            assert found == table
    assert refused > 8 * (USED_HEADER_BYTES - 8)


def test_every_flipped_byte_of_data_and_table_is_found() -> None:
    good = sealed(4)
    end = int.from_bytes(good[TABLE_OFFSET : TABLE_OFFSET + 8], "little")
    end += int.from_bytes(good[TABLE_BYTES : TABLE_BYTES + 8], "little")
    data_end = layout(ENTRIES)[1]
    for index in [*range(4096, data_end), *range((data_end + 63) // 64 * 64, end)]:
        bad = bytearray(good)
        bad[index] ^= 0x10
        with pytest.raises(SnapshotCorrupt):
            Half(bad, "job").verify()


@pytest.mark.parametrize("word", [TABLE_OFFSET, TABLE_BYTES, DATA_OFFSET, DATA_BYTES])
@pytest.mark.parametrize("value", [2**63, 2**64 - 1, 2**64 - 4096, 0, None])
def test_hostile_lengths_are_refused_before_they_are_used(word: int, value: int | None) -> None:
    buffer = sealed(4)
    hostile = len(buffer) + 1 if value is None else value
    buffer[word : word + 8] = hostile.to_bytes(8, "little")
    short = hostile == 0 and word in (TABLE_BYTES, DATA_BYTES)
    with pytest.raises(SnapshotCorrupt, match="table" if short else "does not lie in the arena"):
        read_and_verify(buffer)


@pytest.mark.parametrize(
    "rows",
    [
        [["a", "weight", "F32", [4], 0, 4, 1 << 40]],
        [["a", "weight", "F32", [4], 0, 4, 0]],
        [["a", "weight", "F32", [4], 0, 4, -64]],
        [["a", "weight", "F32", [1 << 60], 0, 1 << 60, 4096]],
        [["a", "weight", "F32", [4], 0, 5, 4096]],
        [["a", "weight", "F32", [4], -1, 4, 4096]],
        [["a", "weight", "PY", [4], 0, 4, 4096]],
        [["a", "weight", "F32"]],
        "nonsense",
        None,
    ],
)
def test_a_table_with_a_right_digest_and_hostile_rows_is_refused(rows: Any) -> None:
    buffer = sealed(4)
    half = Half(buffer, "job")
    original = Table.encoded

    def hostile(self: Table) -> bytes:
        text = original(self).decode()
        start, stop = text.index('"entries":'), text.index(',"metadata"')
        return (text[:start] + '"entries":' + json.dumps(rows) + text[stop:]).encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Table, "encoded", hostile)
        write(half, 6)
    with pytest.raises(SnapshotCorrupt):
        half.read()
    verdict = half.judge()
    assert verdict is not None
    assert isinstance(verdict[1], SnapshotCorrupt)


def test_what_was_not_asked_for_is_refused_by_name() -> None:
    buffer = sealed(4)
    with pytest.raises(SnapshotIncomplete, match=r"another step \[step=4 fill=1 wanted=5\]"):
        Half(buffer, "job").read(5)
    with pytest.raises(SnapshotIncomplete, match="another plan"):
        Half(buffer, "job").read(4, bytes(32))
    with pytest.raises(SnapshotCorrupt, match="another job"):
        Half(buffer, "other").read()
    with pytest.raises(SnapshotCorrupt, match="not an arena"):
        Half(bytearray(8192), "job").read()
    with pytest.raises(SnapshotIncomplete, match="EMPTY"):
        Half(memory(), "job").read()
    with pytest.raises(SnapshotCorrupt, match="smaller"):
        Half(bytearray(100), "job")


def test_a_fill_that_does_not_fit_leaves_the_old_step_whole() -> None:
    buffer = sealed(4)
    half = Half(buffer, "job")
    huge = [ArenaEntry("a", "weight", "F32", (1 << 20,), 0, 1 << 20)]
    with pytest.raises(SnapshotError, match="too small"):
        half.begin(6, PLAN, 2, huge, META)
    with pytest.raises(SnapshotError, match="two entries"):
        half.begin(6, PLAN, 2, [ENTRIES[0], ENTRIES[0]], META)
    with pytest.raises(ValueError, match="not JSON compliant"):
        half.begin(6, PLAN, 2, ENTRIES, float("nan"))
    check_whole(buffer, 4)


def test_a_dtype_that_cannot_be_kept_is_named() -> None:
    with pytest.raises(ConfigError, match="dtype=I128"):
        ArenaEntry("a", "weight", "I128", (1,), 0, 1)


# ---- the memory under it --------------------------------------------------------------------------------


def test_new_memory_cannot_shrink_under_its_readers() -> None:
    fd = create(1 << 16)
    try:
        assert is_sealed(fd)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 4096)
        assert os.pread(fd, 1 << 17, 0) == bytes(1 << 16)
    finally:
        os.close(fd)


def test_a_view_outlives_the_arena_that_it_was_taken_from() -> None:
    mapped = MappedHalf(create(arena_bytes(ENTRIES, META)), "job", slot=0, index=0)
    mapped.half.format()
    placed = mapped.half.begin(1, PLAN, 0, ENTRIES, META)
    view = mapped.half.view(placed[0])
    view[:] = content(1, placed[0])
    mapped.close()
    mapped.close()
    assert bytes(view) == content(1, placed[0])
    with pytest.raises(ValueError, match="released"):
        mapped.half.view(placed[0])


def test_a_reader_cannot_change_what_it_reads() -> None:
    fd = create(arena_bytes(ENTRIES, META))
    with MappedHalf(fd, "job", slot=0, index=0) as mapped:
        mapped.half.format()
        write(mapped.half, 4)
        with MappedHalf(read_only(fd), "job", slot=0, index=0, writable=False) as reader:
            entry = reader.half.read(4).entries[0]
            reader.half.view(entry)[:4] = b"\xff" * 4
            assert bytes(mapped.half.view(entry)) == content(4, entry)
            with pytest.raises(AssertionError, match="private copy"):
                reader.half.begin(6, PLAN, 0, ENTRIES, META)


def _host(root: Path, *, available_kib: int, cgroup: str, files: dict[str, str]) -> str:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def test_room_is_what_the_tightest_cgroup_leaves(tmp_path: Path) -> None:
    files = {
        "memory.max": "max\n",
        "memory.current": "5\n",
        "pod/memory.max": str(10 << 30),
        "pod/memory.current": str(7 << 30),
        "pod/memory.stat": f"anon 1\ninactive_file {1 << 30}\n",
        "pod/task/memory.max": str(20 << 30),
        "pod/task/memory.current": str(1 << 30),
    }
    root = _host(tmp_path, available_kib=30 << 20, cgroup="0::/pod/task\n", files=files)
    assert room(root) == Room(4 << 30, "cgroup memory.max")


def test_room_of_cgroup_v1_and_of_no_limit(tmp_path: Path) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": str(2 << 30),
        "memory/job/memory.usage_in_bytes": str(1 << 30),
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": str(3 << 30),
    }
    cgroup = "5:cpu,cpuacct:/x\n4:memory:/job\n"
    root = _host(tmp_path / "v1", available_kib=8 << 20, cgroup=cgroup, files=files)
    assert room(root) == Room(1 << 30, "cgroup memory.limit_in_bytes")
    root = _host(tmp_path / "free", available_kib=8 << 20, cgroup="0::/\n", files={})
    assert room(root) == Room(8 << 30, "host")


def test_too_little_memory_is_refused_with_the_numbers_before_anything_is_taken(tmp_path: Path) -> None:
    root = _host(tmp_path, available_kib=RESERVE_BYTES // 1024 + 4, cgroup="", files={})
    os.close(create(4096, root=root))
    with pytest.raises(SnapshotError, match=f"needed_bytes=8192 available_bytes={RESERVE_BYTES + 4096}"):
        create(8192, root=root)

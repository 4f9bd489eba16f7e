"""Writes past the page cache: the same bytes as through it, wherever they begin, end, or are not possible."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import os
import random
import threading
from pathlib import Path

import pytest

from holdfast.ckpt.universal import direct
from holdfast.ckpt.universal import disk as disk_module
from holdfast.ckpt.universal.direct import BLOCK_BYTES, DIRECT_BYTES_MIN, PAGE_BYTES, DirectFile
from holdfast.ckpt.universal.disk import Disk, Unsynced
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.verify import verify
from holdfast.ckpt.universal.write import WriteOptions, Writer

HELPERS = Path(__file__).parents[1] / "helpers" / "universal.py"
_spec = importlib.util.spec_from_file_location("universal_helpers", HELPERS)
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

FILE_BYTES = 3 * BLOCK_BYTES


class Watched(Disk):
    """Notes the writes of each descriptor, and can refuse those to one."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.refuse = -1

    def pwrite(self, fd: int, data: memoryview, offset: int) -> None:
        if fd == self.refuse:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.writes.append((fd, offset, data.nbytes))
        super().pwrite(fd, data, offset)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Watched, DirectFile, Path]:
    disk, path = Watched(), tmp_path / "file"
    fd = disk.open(path)
    os.ftruncate(fd, FILE_BYTES)
    file = DirectFile(disk, path, fd, threading.local())
    yield disk, file, path
    file.close()
    os.close(fd)


def test_ranges_with_any_edges_hold_what_was_written(opened: tuple[Watched, DirectFile, Path]) -> None:
    _, file, path = opened
    chance = random.Random(5)
    expected = bytearray(FILE_BYTES)
    # Neighbours share their edge pages, and arrive in any order, as chunks of neighbouring tensors do.
    edges = sorted({0, FILE_BYTES, *(chance.randrange(FILE_BYTES) for _ in range(24)), 5 * PAGE_BYTES})
    ranges = list(itertools.pairwise(edges))
    chance.shuffle(ranges)
    for low, high in ranges:
        data = chance.randbytes(high - low)
        expected[low:high] = data
        file.pwrite(memoryview(data), low)
    assert path.read_bytes() == expected


def test_a_page_goes_one_way_only(opened: tuple[Watched, DirectFile, Path]) -> None:
    disk, file, _ = opened
    if file._direct < 0:
        pytest.skip("this file system has only the page cache")
    file.pwrite(memoryview(bytes(BLOCK_BYTES)), 1000)
    past = [(at, n) for fd, at, n in disk.writes if fd != file.fd]
    through = [(at, n) for fd, at, n in disk.writes if fd == file.fd and n]
    assert past == [(PAGE_BYTES, BLOCK_BYTES - PAGE_BYTES)]
    assert through == [(1000, PAGE_BYTES - 1000), (BLOCK_BYTES, 1000)]


def test_small_writes_go_through_the_cache(opened: tuple[Watched, DirectFile, Path]) -> None:
    disk, file, _ = opened
    file.pwrite(memoryview(bytes(DIRECT_BYTES_MIN)), 8)
    assert disk.writes == [(file.fd, 8, DIRECT_BYTES_MIN)]


def test_a_disk_that_wants_another_alignment_is_written_to_as_ever(opened: tuple[Watched, DirectFile, Path]) -> None:
    disk, file, path = opened
    disk.refuse = file._direct
    data = random.Random(1).randbytes(BLOCK_BYTES)
    file.pwrite(memoryview(data), 77)
    assert path.read_bytes()[77 : 77 + BLOCK_BYTES] == data


def test_where_nothing_goes_past_the_cache_all_goes_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct.os, "O_DIRECT", 0)
    disk, path = Watched(), tmp_path / "file"
    fd = disk.open(path)
    file = DirectFile(disk, path, fd, threading.local())
    data = random.Random(2).randbytes(BLOCK_BYTES)
    file.pwrite(memoryview(data), 0)
    os.close(fd)
    assert disk.writes == [(fd, 0, BLOCK_BYTES)]
    assert path.read_bytes() == data


def test_who_does_not_wait_for_the_disk_writes_through_the_cache_and_hurries_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried: list[int] = []
    monkeypatch.setattr(disk_module, "write_back", lambda fd, offset, nbytes: hurried.append(nbytes))
    flags = []
    monkeypatch.setattr(direct, "_open", lambda path: flags.append(path) or -1)
    for kind, expected in ((Disk, 1), (Unsynced, 0)):
        hurried.clear()
        flags.clear()
        disk, path = kind(), tmp_path / kind.__name__
        fd = disk.open(path)
        file = DirectFile(disk, path, fd, threading.local())
        file.pwrite(memoryview(bytes(DIRECT_BYTES_MIN)), 0)
        assert (len(flags), len(hurried)) == (expected, expected)
        os.close(fd)


def test_a_checkpoint_written_past_the_cache_is_the_same(tmp_path: Path) -> None:
    found = helpers.tensors(scale=48)
    for name, options in (("one", WriteOptions(id="x")), ("other", WriteOptions(id="x", direct=True))):
        with Writer(tmp_path / name, options) as writer:
            writer.begin(helpers.plans(found))
            for (tensor, state), (_, array) in found.items():
                writer.put(tensor, state, memoryview(array.tobytes()))
            writer.commit()
    files = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "other") for p in (tmp_path / "other").rglob("*") if p.is_file()}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
    assert verify(tmp_path / "other") == []
    with Reader(open_checkpoint(tmp_path / "other")) as reader:
        for (tensor, state), (_, array) in found.items():
            assert bytes(reader.read(tensor, state)) == array.tobytes()

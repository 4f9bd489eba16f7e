"""The saver: which step, what is left untouched for it, how ranks' shares become one checkpoint, and what may fail."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.ckpt.memory.client import HalfInfo
from holdfast.ckpt.saver.choose import committed_steps, name_of, next_due, pick, pick_last
from holdfast.ckpt.saver.copy import take
from holdfast.ckpt.saver.page import Page
from holdfast.ckpt.saver.service import Options, Saver, metric_of
from holdfast.ckpt.universal.disk import Disk
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.verify import verify
from holdfast.proto.errors import ConfigError, SnapshotCorrupt, SnapshotIncomplete

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from shelf import Shelf, origin

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float32) - 2.5


def weights(name: str, value: Any, step: int) -> dict[tuple[str, str], Any]:
    """A parameter with AdamW's states."""
    return {
        (name, "weight"): value + step,
        (name, "exp_avg"): value * 0.5,
        (name, "exp_avg_sq"): value * value,
        (name, "step"): np.array(step, dtype=np.float32),
    }


def group(*names: str, **settings: Any) -> dict[str, Any]:
    return {"lr": 0.1, "betas": (0.9, 0.95), **settings, "names": list(names)}


def fill(shelf: Shelf, half: int, step: int, *, generations: tuple[int, int] = (1, 1), **where: Any) -> None:
    """Both ranks hold `step`."""
    for slot, (name, value) in enumerate([("0.w", A), ("1.w", B)]):
        home = origin(hosted=[slot], generation=generations[slot], **where)
        shelf.fill(slot, half, step, weights(name, value, step), groups=[group(name)], scalars={}, origin=home)


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    yield made
    made.free()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    Page.create(tmp_path / "page")
    made = Page(tmp_path / "page")
    yield made
    made.close()


class Run:
    """A saver in a thread."""

    def __init__(self, shelf: Shelf, page: Page, folder: Path, disk: Disk | None = None, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        chosen = {"every": 10, "keep": 3, "keep_best": 0, "world_size": 2, "start": -1, "job": "j", **options}
        self.news: list[dict[str, Any]] = []
        self.page = page
        self.saver = Saver(shelf.connect, page, Options(folder=folder, **chosen), self.news.append, disk)  # type: ignore[arg-type, return-value]
        self.thread = threading.Thread(target=self.saver.run)
        self.thread.start()

    def await_(self, ready: Any) -> None:
        limit = time.monotonic() + 20
        while not ready():
            assert time.monotonic() < limit, self.news
            time.sleep(0.005)

    def end(self) -> list[str]:
        """Stop; the events by name and step."""
        self.saver.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        return [f"{event['event']} {event['step']}" for event in self.news]


# ---- decisions ----------------------------------------------------------------------------------------------


def test_the_next_due_step_is_the_next_multiple() -> None:
    assert [next_due(last, 10) for last in (-1, 0, 9, 10, 11, 37)] == [10, 10, 10, 20, 20, 40]


def info(slot: int, step: int, state: str = "SEALED") -> HalfInfo:
    return HalfInfo(slot, 0, step, state, 4096)


def test_the_first_step_that_is_due_and_whole_on_every_rank_is_saved() -> None:
    halves = [info(0, 10), info(0, 11), info(1, 11), info(1, 10, "FILLING"), info(7, 10)]
    assert pick(halves, range(2), 10) == 11
    assert pick([*halves, info(1, 10, "COPIED")], range(2), 10) == 10
    assert pick(halves, range(2), 12) is None
    assert pick(halves, range(3), 10) is None, "a rank without any"
    assert pick([info(0, 10, "CORRUPT"), info(1, 10)], range(2), 10) is None


def test_the_last_checkpoint_is_of_the_newest_whole_step_unless_it_is_there() -> None:
    halves = [info(0, 11), info(0, 12), info(1, 11), info(1, 10)]
    assert pick_last(halves, range(2), 10) == 11
    assert pick_last(halves, range(2), 11) is None
    assert pick_last([info(0, 0), info(1, 0)], range(2), -1) is None, "nothing was trained"


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    for name, whole in [("step-00000010", True), ("step-00000020", False), ("step-9", True), ("other", True)]:
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / "COMMIT").write_text("x")
    assert list(committed_steps(tmp_path)) == [10]
    assert committed_steps(tmp_path / "none") == {}
    assert name_of(10) == "step-00000010"


def test_a_page_that_was_never_written_wants_nothing(page: Page) -> None:
    assert page.due == -1
    page.due = 0
    assert page.due == 0
    assert page.validation(5) is None
    page.validated(5, -0.25)
    assert (page.validation(5), page.validation(4)) == (-0.25, None)


def test_no_page_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no page of the saver"):
        Page(tmp_path / "none")


# ---- copies ------------------------------------------------------------------------------------------------


def test_what_its_manager_has_not_judged_yet_is_taken_and_accused_of_nothing(shelf: Shelf) -> None:
    fill(shelf, 0, 9)  # another digest lies where the next one will
    fill(shelf, 1, 8)
    shelf.copy(0, 0, 10, weights("0.w", A, 10))
    fill(shelf, 1, 10)
    halves = shelf.list()
    assert next(half.state for half in halves if (half.slot, half.half) == (0, 0)) == "COPIED"
    taken = take(shelf, 10, [half for half in halves if half.half == half.slot], [0, 1])  # type: ignore[arg-type]
    entry = next(e for e in taken[0].entries if (e.name, e.state) == ("0.w", "weight"))
    assert np.frombuffer(taken[0].view(entry), np.float32).tolist() == (A + 10).reshape(-1).tolist()
    assert shelf.accused == []


def test_what_is_not_what_was_sealed_or_was_condemned_is_not_taken(shelf: Shelf) -> None:
    fill(shelf, 0, 10)
    arena = shelf.half(1, 0).half
    table = arena.table()
    arena.view(table.entries[0])[0] ^= 1
    with pytest.raises(SnapshotCorrupt, match="not what was sealed"):
        take(shelf, 10, shelf.list(), [0, 1])  # type: ignore[arg-type]
    assert shelf.accused == [(1, 0, 10)]
    arena.condemn(table.fill)
    seen = [replace(half, state="SEALED") for half in shelf.list()]  # as it was when somebody looked
    with pytest.raises(SnapshotCorrupt, match="marked corrupt"):
        take(shelf, 10, seen, [0, 1])  # type: ignore[arg-type]


# ---- the service --------------------------------------------------------------------------------------------


def test_a_due_step_is_written_whole_and_the_next_multiple_is_due(shelf: Shelf, page: Page, tmp_path: Path) -> None:
    run = Run(shelf, page, tmp_path / "runs")
    run.await_(lambda: page.due == 10)
    assert time.monotonic_ns() - page.beat_ns < 5e9
    fill(shelf, 0, 9)
    fill(shelf, 1, 10)
    run.await_(lambda: page.due == 20)
    assert run.end() == ["checkpoint_written 10"]
    assert page.due == -1, "a saver that has ended wants nothing"
    found = open_checkpoint(tmp_path / "runs/step-00000010")
    assert verify(found.root) == []
    assert found.steps == {"0.w": 10, "1.w": 10}
    assert [(g.hyper, g.params) for g in found.groups] == [({"lr": 0.1, "betas": [0.9, 0.95]}, ("0.w", "1.w"))]
    assert {tensor.role for tensor in found.states.values()} == {"param", "optim", "opaque"}
    with Reader(found) as reader:
        assert np.frombuffer(reader.read("0.w", "weight"), np.float32).tolist() == (A + 10).reshape(-1).tolist()
        assert bytes(reader.read("slot1.rng.torch", "rng")) == bytes([1, 2, 3, 4])
    assert (tmp_path / "runs/latest").read_text() == "step-00000010\n"


def test_while_it_writes_nothing_is_held_and_what_passed_meanwhile_is_not_made_up_for(
    shelf: Shelf, page: Page, tmp_path: Path
) -> None:
    reached, go = threading.Event(), threading.Event()

    class Slow(Disk):
        def fsync(self, fd: int) -> None:
            reached.set()
            assert go.wait(20)
            super().fsync(fd)

    fill(shelf, 0, 10)
    run = Run(shelf, page, tmp_path / "runs", Slow())
    assert reached.wait(20)
    assert page.due == -1
    fill(shelf, 0, 36)
    fill(shelf, 1, 37)
    go.set()
    run.await_(lambda: page.due == 40)
    assert run.end() == ["checkpoint_written 10", "checkpoint_written 37"], "the second one at the end of the job"


def test_the_end_of_a_job_leaves_its_newest_state_once(shelf: Shelf, page: Page, tmp_path: Path) -> None:
    fill(shelf, 0, 6)
    fill(shelf, 1, 7)
    assert Run(shelf, page, tmp_path / "runs").end() == ["checkpoint_written 7"]
    assert Run(shelf, page, tmp_path / "runs").end() == []


def test_a_full_disk_is_told_once_and_tried_again_at_the_next_due_step(
    shelf: Shelf, page: Page, tmp_path: Path
) -> None:
    class Full(Disk):
        full = True

        def allocate(self, fd: int, nbytes: int) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().allocate(fd, nbytes)

    disk = Full()
    run = Run(shelf, page, tmp_path / "runs", disk)
    for half, step in enumerate((10, 20)):
        fill(shelf, half, step)
        run.await_(lambda step=step: page.due == step + 10)
    disk.full = False
    fill(shelf, 0, 30)
    run.await_(lambda: page.due == 40)
    assert run.end() == ["checkpoint_failed 10", "checkpoint_failed 20", "checkpoint_written 30"]
    assert [event.get("first") for event in run.news] == [True, False, None]
    assert "no space left" in run.news[0]["reason"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["latest", "step-00000030"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "mkdir", "write_file"])
def test_a_write_that_fails_anywhere_leaves_nothing_and_ends_nothing(
    call: str, shelf: Shelf, page: Page, tmp_path: Path
) -> None:
    disk = Disk()

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    setattr(disk, call, fail)
    fill(shelf, 0, 10)
    run = Run(shelf, page, tmp_path / "runs", disk)
    run.await_(lambda: page.due == 20)
    assert run.end()[0] == "checkpoint_failed 10"
    assert list((tmp_path / "runs").iterdir()) == []


def test_damage_in_a_snapshot_is_found_before_it_is_written_and_told_to_its_manager(
    shelf: Shelf, page: Page, tmp_path: Path
) -> None:
    fill(shelf, 0, 10)
    shelf.half(1, 0).half.memory[4096 + 3] ^= 1
    run = Run(shelf, page, tmp_path / "runs")
    run.await_(lambda: page.due == 20)
    assert shelf.accused == [(1, 0, 10)]
    shelf.half(1, 0).half.memory[4096 + 3] ^= 1
    fill(shelf, 0, 20)
    run.await_(lambda: page.due == 30)
    assert run.end() == ["checkpoint_failed 10", "checkpoint_written 20"]


def test_a_half_that_a_rank_begins_again_while_it_is_copied_is_not_taken(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(shelf, 0, 10)
    opened = shelf.open

    def overwritten(slot: int, half: int) -> Any:
        mapped = opened(slot, half)
        confirm = mapped.half.confirm
        monkeypatch.setattr(type(mapped.half), "confirm", lambda self, table: (fill(shelf, 0, 11), confirm(table))[1])
        return mapped

    monkeypatch.setattr(shelf, "open", overwritten)
    with pytest.raises(SnapshotIncomplete):
        take(shelf, 10, shelf.list(), range(2))  # type: ignore[arg-type]


def test_what_is_taken_does_not_change_when_the_ranks_go_on(shelf: Shelf) -> None:
    fill(shelf, 0, 10)
    taken = take(shelf, 10, shelf.list(), range(2))  # type: ignore[arg-type]
    before = [bytes(one.view(entry)) for one in taken for entry in one.entries]
    fill(shelf, 0, 99)
    assert [bytes(one.view(entry)) for one in taken for entry in one.entries] == before


def test_states_of_two_generations_are_never_put_together(shelf: Shelf, page: Page, tmp_path: Path) -> None:
    """One rank's copy is from before a failure, the other's from after it: of one step, but not of one history."""
    fill(shelf, 0, 10, generations=(1, 2))
    run = Run(shelf, page, tmp_path / "runs")
    run.await_(lambda: page.due == 11)
    fill(shelf, 1, 11, generations=(2, 2))
    run.await_(lambda: page.due == 20)
    assert run.end() == ["checkpoint_written 11"]


def test_a_manager_that_is_gone_for_good_ends_it(shelf: Shelf, page: Page, tmp_path: Path) -> None:
    shelf.lost = True
    run = Run(shelf, page, tmp_path / "runs")
    run.thread.join(20)
    assert not run.thread.is_alive()
    assert page.due == -1


def test_what_an_interrupted_saver_left_is_removed_but_not_what_somebody_writes(
    shelf: Shelf, page: Page, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    for name in (".step-00000010.tmp-0123456789abcdef", ".step-00000020.tmp-0123456789abcdef", ".mine.tmp-0"):
        (folder / name / "weights").mkdir(parents=True)
    fd = os.open(folder / ".step-00000020.tmp-0123456789abcdef", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        Run(shelf, page, folder).end()
    finally:
        os.close(fd)
    assert sorted(path.name for path in folder.iterdir()) == [".mine.tmp-0", ".step-00000020.tmp-0123456789abcdef"]


def test_the_newest_and_the_best_are_kept(shelf: Shelf, page: Page, tmp_path: Path) -> None:
    losses = {10: 0.5, 20: 0.1, 30: 0.9, 40: 0.7, 50: 0.8}
    run = Run(shelf, page, tmp_path / "runs", keep=2, keep_best=1)
    for step, loss in losses.items():
        for slot, (name, value) in enumerate([("0.w", A), ("1.w", B)]):
            home, half = origin(hosted=[slot]), step // 10 % 2
            shelf.fill(slot, half, step, weights(name, value, step), report={"loss": loss}, origin=home)
        run.await_(lambda step=step: page.due == step + 10)
    run.end()
    kept = committed_steps(tmp_path / "runs")
    assert list(kept) == [20, 40, 50]
    assert [metric_of(path) for path in kept.values()] == [0.1, 0.7, 0.8]


def test_with_validation_only_validated_steps_are_rated(shelf: Shelf, page: Page, tmp_path: Path) -> None:
    run = Run(shelf, page, tmp_path / "runs")
    fill(shelf, 0, 10, validates=True, validation_due=True)
    page.validated(10, 0.125)
    run.await_(lambda: page.due == 20)
    fill(shelf, 1, 20, validates=True)
    run.await_(lambda: page.due == 30)
    run.end()
    assert [metric_of(path) for path in committed_steps(tmp_path / "runs").values()] == [0.125, None]


# ---- shares become a checkpoint -----------------------------------------------------------------------------


def save(shelf: Shelf, page: Page, folder: Path) -> Any:
    assert Run(shelf, page, folder).end() == ["checkpoint_written 10"]
    return open_checkpoint(folder / "step-00000010")


def test_a_tied_parameter_is_an_alias_only_if_its_copies_are_equal(shelf: Shelf, page: Page, tmp_path: Path) -> None:
    ties = [["0.w", "1.w"]]
    for folder, second in (("equal", A), ("differs", A + np.float32(1e-6))):
        for slot, (name, value) in enumerate([("0.w", A), ("1.w", second)]):
            home = origin(hosted=[slot], ties=ties)
            shelf.fill(slot, 0, 10, weights(name, value, 10), groups=[group(name)], scalars={}, origin=home)
        found = save(shelf, page, tmp_path / folder)
        equal = folder == "equal"
        assert found.aliases == ({"1.w": "0.w"} if equal else {})
        assert found.groups[0].params == (("0.w",) if equal else ("0.w", "1.w"))
        assert (("1.w", "weight") in found.states) is not equal


@pytest.mark.parametrize("differs", [False, True])
def test_moments_in_parts_become_whole_and_those_of_tied_parameters_are_compared_as_a_whole(
    shelf: Shelf, page: Page, tmp_path: Path, differs: bool
) -> None:
    """With ZeRO-1 every holder has the weights, and a part of the moments; another part of each parameter."""
    cuts = {"0.w": (0, 4, 6), "1.w": (0, 1, 6)}
    other = A * 0.5
    if differs:
        other[1, 2] += 1
    for slot in range(2):
        tensors: dict[tuple[str, str], Any] = {}
        parts: dict[tuple[str, str], Any] = {}
        for name, moments in (("0.w", A * 0.5), ("1.w", other)):
            start, stop = cuts[name][slot : slot + 2]
            tensors |= {(name, "weight"): A, (name, "exp_avg"): moments.reshape(-1)[start:stop]}
            parts[name, "exp_avg"] = A.shape, start
        home = origin(hosted=[0, 1], replica=slot, replicas=2, ties=[["0.w", "1.w"]])
        shelf.fill(slot, 0, 10, tensors, parts, groups=[group("0.w", "1.w")], scalars={}, origin=home)
    found = save(shelf, page, tmp_path / "runs")
    assert found.aliases == ({} if differs else {"1.w": "0.w"})
    with Reader(found) as reader:
        for name, moments in (("0.w", A * 0.5), ("1.w", other)):
            assert bytes(reader.read(name, "exp_avg")) == moments.tobytes()


def test_replicated_state_is_stored_once_and_buffers_that_differ_for_each_replica(
    shelf: Shelf, page: Page, tmp_path: Path
) -> None:
    for slot in range(2):
        tensors = {
            ("0.w", "weight"): A,
            ("0.same", "buffer"): B,
            ("0.mean", "buffer"): B + slot,
            ("0.frozen", "weight"): B,
        }
        home = origin(hosted=[0], replica=slot, replicas=2, units=1)
        shelf.fill(slot, 0, 10, tensors, groups=[group("0.w")], scalars={}, origin=home)
    found = save(shelf, page, tmp_path / "runs")
    model = {key: tensor.role for key, tensor in found.states.items() if tensor.role != "opaque"}
    assert model == {
        ("0.w", "weight"): "param",
        ("0.frozen", "weight"): "frozen",
        ("0.same", "buffer"): "buffer",
        ("0.mean", "buffer"): "buffer",
        ("0.mean", "buffer.replica1"): "buffer",
    }


def test_groups_with_other_settings_stay_apart_and_steps_that_are_no_scalars_stay_tensors(
    shelf: Shelf, page: Page, tmp_path: Path
) -> None:
    for slot, (name, value) in enumerate([("0.w", A), ("1.w", B)]):
        tensors = {**weights(name, value, 10), (name, "step"): np.full(2, 10, dtype=np.float32)}
        settings = group(name, weight_decay=0.1 * slot)
        shelf.fill(slot, 0, 10, tensors, groups=[settings], scalars={name: {"seen": 3}})
    found = save(shelf, page, tmp_path / "runs")
    assert [g.params for g in found.groups] == [("0.w",), ("1.w",)]
    assert found.steps == {}
    assert ("0.w", "step") in found.states


def test_a_snapshot_whose_table_was_damaged_is_refused(shelf: Shelf) -> None:
    fill(shelf, 0, 10)
    half = shelf.half(0, 0).half
    offset = int.from_bytes(half.memory[48:56], "little")
    half.memory[offset + 20] ^= 1
    with pytest.raises(SnapshotCorrupt):
        take(shelf, 10, shelf.list(), range(2))  # type: ignore[arg-type]

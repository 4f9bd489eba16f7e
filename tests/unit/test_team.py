"""Savers of several hosts: who writes what, one checkpoint from their parts, and what a lost host costs. In threads."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.ckpt.saver.choose import committed_steps
from holdfast.ckpt.saver.divide import Piece, common, holders, merge
from holdfast.ckpt.saver.hand import Hand
from holdfast.ckpt.saver.page import Page
from holdfast.ckpt.saver.peers import FOLDER, Peer, Register, key_of, listen
from holdfast.ckpt.saver.service import Options
from holdfast.ckpt.saver.team import TeamSaver
from holdfast.ckpt.saver.told import Told
from holdfast.ckpt.universal.disk import Disk
from holdfast.ckpt.universal.errors import CorruptError, IncompleteError
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.verify import verify
from holdfast.proto.errors import PeerLost, ProtocolViolation, SnapshotError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from shelf import Shelf, origin

KEY = key_of("j", "secret")
SHAPE = (64, 3)


def values(name: str, step: int) -> Any:
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) + step + 1000 * int(name.partition(".")[0])


def states(name: str, step: int) -> dict[tuple[str, str], Any]:
    value = values(name, step)
    moments = {(name, "exp_avg"): value * 0.5, (name, "exp_avg_sq"): value * value}
    return {(name, "weight"): value, **moments, (name, "step"): np.array(step, dtype=np.float32)}


class HostOf:
    """One host: a shelf, a page, a saver in a thread. `disk`: what fails there."""

    def __init__(self, root: Path, folder: Path, name: str, world: int, disk: Disk | None = None, **more: Any) -> None:
        self.shelf, self.news = Shelf(), list[dict[str, Any]]()
        root.mkdir(parents=True, exist_ok=True)
        Page.create(root / name)
        self.page = Page(root / name)
        self.disk = disk or Disk()
        chosen = {"every": 10, "keep": 3, "keep_best": 0, "start": -1, "job": "j", **more}
        options = Options(folder=folder, world_size=world, **chosen)
        self.hand = Hand(self.shelf.connect, folder, self.disk)  # type: ignore[arg-type]
        register = Register(folder, "j", self.disk)
        self.server, address = listen("127.0.0.1:0", KEY, self.hand)
        register.enter(name, address)
        self.saver = TeamSaver(
            self.shelf.connect,  # type: ignore[arg-type]
            self.page,
            options,
            self.news.append,
            hand=self.hand,
            server=self.server,
            register=register,
            key=KEY,
            disk=self.disk,
        )
        self.thread = threading.Thread(target=self.saver.run)
        self.thread.start()

    def fill(self, slot: int, half: int, step: int, *names: str, generation: int = 1, **meta: Any) -> None:
        """Slot `slot`'s rank, which hosts these parameters, has kept `step` here."""
        tensors = {key: value for name in names for key, value in states(name, step).items()}
        settings = {"lr": 0.1, "names": list(names)}
        where = origin(hosted=[slot], generation=generation, **meta)
        self.shelf.fill(slot, half, step, tensors, groups=[settings], scalars={}, origin=where)

    def end(self) -> list[str]:
        self.saver.stop()
        return self.ended()

    def ended(self) -> list[str]:
        self.thread.join(40)
        assert not self.thread.is_alive()
        return [f"{event['event']} {event['step']}" for event in self.news]


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Any]:
    made: list[HostOf] = []

    def make(*disks: Disk | None, **more: Any) -> list[HostOf]:
        folder = tmp_path / "runs"
        folder.mkdir(exist_ok=True)
        for number, disk in enumerate(disks):
            made.append(HostOf(tmp_path / "pages", folder, f"host{number}", len(disks), disk, **more))
        return made

    yield make
    for host in made:
        host.saver.stop()
        host.server.released.set()
        host.thread.join(40)
        host.page.close()
        host.shelf.free()


def keep(hosts: list[HostOf], half: int, step: int) -> None:
    """Every rank holds `step`, and rank 0 says that all leave it untouched."""
    for slot, host in enumerate(hosts):
        host.fill(slot, half, step, f"{slot}.w")
    hosts[0].page.reserved = step


def await_(ready: Any, what: Any = "") -> None:
    limit = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < limit, what
        threading.Event().wait(0.005)


def check(path: Path, step: int, names: list[str]) -> None:
    """Whole, and the bytes of that step."""
    assert verify(path) == []
    found = open_checkpoint(path)
    assert found.steps == dict.fromkeys(names, step)
    with Reader(found) as reader:
        for name in names:
            for (_, state), value in states(name, step).items():
                if state != "step":
                    assert bytes(reader.read(name, state)) == value.tobytes(), (name, state)


# ---- together -----------------------------------------------------------------------------------------------


def test_each_host_writes_what_it_holds_and_one_checkpoint_comes_of_it(team: Any, tmp_path: Path) -> None:
    hosts = team(None, None, None)
    keep(hosts, 0, 10)
    await_(lambda: hosts[0].page.due == 20, hosts[0].news)
    path = tmp_path / "runs/step-00000010"
    check(path, 10, ["0.w", "1.w", "2.w"])
    assert sorted(p.name for p in (path / "optim").iterdir() if p.name.startswith("exp_avg-")) == [
        f"exp_avg-{n:05}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    index = (path / "weights/model.safetensors.index.json").read_text()
    assert all(f'"{n}.w": "model-{n + 1:05}-of-00003.safetensors"' in index for n in range(3))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {FOLDER, "latest", "step-00000010"}
    assert [host.page.due for host in hosts[1:]] == [-1, -1], "the leader's host alone says what is due"
    for host in hosts:
        host.saver.stop()
    assert [host.ended() for host in hosts] == [["checkpoint_written 10"], [], []]


def test_the_last_state_that_all_hosts_have_is_saved_at_the_end(team: Any, tmp_path: Path) -> None:
    hosts = team(None, None)
    keep(hosts, 0, 6)
    hosts[0].fill(0, 1, 7, "0.w")  # the other host had not copied it
    for host in reversed(hosts):
        host.saver.stop()
    assert [host.ended() for host in hosts] == [["checkpoint_written 6"], []]
    check(tmp_path / "runs/step-00000006", 6, ["0.w", "1.w"])


def test_a_parameter_of_two_hosts_is_one_tensor_with_a_slab_of_each(tmp_path: Path) -> None:
    """As sharded moments are: elements [0, 100) on one host, [100, 192) on the other."""
    whole = values("0.w", 3)
    cut = 100
    parts = {}
    work = {}
    for host, (start, stop) in enumerate(((0, cut), (cut, whole.size))):
        piece = Piece(host, 0, "0.w", "exp_avg", "F32", SHAPE, "optim", start, stop)
        parts[host] = _write_part(tmp_path, host, piece, whole.reshape(-1)[start:stop])
        work[host] = [piece]
    merged = merge(work, parts)
    (tensor,) = merged.layout.states.values()
    assert [slab.flat for slab in tensor.slabs] == [(0, cut), (cut, whole.size)]
    data = b"".join(
        (parts[move.host].root / move.source).read_bytes()[slab.span.offset : slab.span.stop]
        for slab in tensor.slabs
        for move in merged.moves
        if move.target == slab.span.file
    )
    assert data == whole.tobytes()
    with pytest.raises(IncompleteError, match="has not written its part"):
        merge(work, {0: parts[0]})
    with pytest.raises(CorruptError, match="other tensors"):
        merge({0: [*work[0], work[0][0]], 1: work[1]}, parts)


def _write_part(root: Path, host: int, piece: Piece, array: Any) -> Any:
    from holdfast.ckpt.universal.model import Checkpoint
    from holdfast.ckpt.universal.staging import Stage, WriteOptions

    plan = piece.plan()
    stage = Stage(root / f"part-{host:05}", [plan], WriteOptions(id="i"), Disk())
    stage.put(plan.name, plan.state, array.tobytes())
    found, facts = stage.finished()
    stage.close()
    return Checkpoint(root=stage.folder, format="holdfast", states=found, files=facts)


def test_replicated_state_marked_as_such_is_saved_like_any_other(team: Any, tmp_path: Path) -> None:
    """Replicas wrap their metadata once more, so that parity leaves it out."""
    hosts = team(None, None)
    plain = hosts[1].fill

    for slot, host in enumerate(hosts):
        plain = host.fill
        plain(slot, 0, 10, f"{slot}.w", replica=slot, replicas=2)
        half = host.shelf.half(slot, 0).half
        table = half.read(10)
        marked = {"replicated": True, "blob": table.metadata}
        kept = [bytes(half.view(entry)) for entry in table.entries]
        for entry, data in zip(half.begin(10, bytes(32), 0, table.entries, marked), kept, strict=True):
            half.view(entry)[:] = data
        half.finish()
        judged = half.judge()
        assert judged is not None
        half.seal(judged[0], judged[1])  # type: ignore[arg-type]
    hosts[0].page.reserved = 10
    await_(lambda: hosts[0].page.due == 20, hosts[0].news)
    check(tmp_path / "runs/step-00000010", 10, ["0.w", "1.w"])


# ---- what is lost -------------------------------------------------------------------------------------------


class Dies(Disk):
    """The host goes at its n-th write: its saver's connections end, as those of a killed process do."""

    def __init__(self) -> None:
        self.host: HostOf | None = None
        self.now = True

    def pwrite(self, fd: int, data: memoryview, offset: int) -> None:
        if self.now and self.host is not None:
            self.now = False
            self.host.server.close()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().pwrite(fd, data, offset)


def test_a_host_lost_while_it_writes_costs_that_checkpoint_and_leaves_nothing(team: Any, tmp_path: Path) -> None:
    disk = Dies()
    hosts = team(None, disk)
    disk.host = hosts[1]
    keep(hosts, 0, 10)
    await_(lambda: hosts[0].news)
    assert [(e["event"], e["step"]) for e in hosts[0].news] == [("checkpoint_failed", 10)]
    assert "host1" in hosts[0].news[0]["reason"]
    await_(lambda: {p.name for p in (tmp_path / "runs").iterdir()} == {FOLDER}, list((tmp_path / "runs").iterdir()))
    await_(lambda: hosts[0].page.due == 20)
    hosts[0].fill(1, 0, 20, "1.w")  # its rank goes on here
    hosts[0].fill(0, 1, 20, "0.w")
    hosts[0].page.reserved = 20
    await_(lambda: hosts[0].page.due == 30, hosts[0].news)
    check(tmp_path / "runs/step-00000020", 20, ["0.w", "1.w"])


@pytest.mark.parametrize("call", ["pwrite", "fsync", "mkdir"])
def test_a_full_disk_on_one_host_fails_that_checkpoint_by_its_name(call: str, team: Any, tmp_path: Path) -> None:
    disk = Disk()
    hosts = team(None, disk)

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(disk, call, fail)
    keep(hosts, 0, 10)
    await_(lambda: hosts[0].news)
    assert hosts[0].news[0]["event"] == "checkpoint_failed"
    assert "no space left" in hosts[0].news[0]["reason"]
    assert "host1" in hosts[0].news[0]["reason"]
    delattr(disk, call)
    keep(hosts, 1, 20)
    await_(lambda: hosts[0].page.due == 30, hosts[0].news)
    assert list(committed_steps(tmp_path / "runs")) == [20]


def test_who_takes_over_the_lead_removes_what_the_lost_leader_left(team: Any, tmp_path: Path) -> None:
    left = tmp_path / "runs/.step-00000010.tmp-0123456789abcdef/.part-00000.tmp-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "x").write_text("half")
    (tmp_path / "runs/.mine.tmp-0").mkdir()
    hosts = team(None, None)
    hosts[1].fill(1, 0, 10, "1.w")
    hosts[1].fill(0, 0, 10, "0.w")  # rank 0 is here now
    hosts[1].page.reserved = 10
    await_(lambda: hosts[1].page.due == 20, hosts[1].news)
    check(tmp_path / "runs/step-00000010", 10, ["0.w", "1.w"])
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {FOLDER, "latest", "step-00000010", ".mine.tmp-0"}


def test_a_step_that_only_rank_0_still_has_is_passed_over_for_the_next_that_all_have(team: Any, tmp_path: Path) -> None:
    """A rank that was rebuilt on another host has the step that the job resumed from, and none before."""
    hosts = team(None, None)
    hosts[0].fill(0, 0, 10, "0.w")
    hosts[0].fill(0, 1, 11, "0.w")
    hosts[1].fill(1, 0, 11, "1.w")
    hosts[0].page.reserved = 10
    await_(lambda: hosts[0].page.due == 20, hosts[0].news)
    assert list(committed_steps(tmp_path / "runs")) == [11]
    check(tmp_path / "runs/step-00000011", 11, ["0.w", "1.w"])


def test_of_two_that_believe_to_lead_one_checkpoint_comes(team: Any, tmp_path: Path) -> None:
    hosts = team(None, None)
    for host in hosts:
        for slot in range(2):
            host.fill(slot, 0, 10, f"{slot}.w")
    for host in hosts:
        host.page.reserved = 10
    await_(lambda: all(host.page.due > 10 for host in hosts), [host.news for host in hosts])
    assert sum(event["event"] == "checkpoint_written" for host in hosts for event in host.news) >= 1
    check(tmp_path / "runs/step-00000010", 10, ["0.w", "1.w"])


def test_a_host_alone_ends_without_a_leader(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.ckpt.saver.team.FOLLOW_S", 0.3)
    hosts = team(None, None)
    hosts[1].fill(1, 0, 6, "1.w")
    assert hosts[1].end() == []


# ---- decisions and messages ---------------------------------------------------------------------------------


def test_a_share_is_taken_where_it_is_whole_and_every_rank_must_have_one() -> None:
    held = {0: {0: [9, 10]}, 1: {0: [10], 1: [10]}, 2: {2: [9]}}
    assert holders(held, range(3), 10) == {0: 0, 1: 1}
    assert holders(held, range(3), 9) == {0: 0, 2: 2}
    assert common(held, range(1)) == [9, 10]
    assert common(held, range(2)) == [10]
    assert common(held, range(3)) == common({}, range(1)) == []


def test_what_is_told_of_a_share_is_checked(team: Any) -> None:
    (host,) = team(None)
    host.fill(0, 0, 10, "0.w")
    shares = host.hand.take("a", 10, [0])
    assert Told.of(shares[0]).step == 10
    for broken in (
        {**shares[0], "digests": []},
        {**shares[0], "scalars": {"0": "00"}},
        {**shares[0], "entries": [["x"]]},
        {**shares[0], "scalars": {"99": "00"}},
        [],
    ):
        with pytest.raises(ProtocolViolation):
            Told.of(broken)
    with pytest.raises(ProtocolViolation):
        Piece.of([1, 2])


def test_a_peer_does_only_what_it_is_asked_properly(team: Any) -> None:
    (host,) = team(None)
    host.fill(0, 0, 10, "0.w")
    (address,) = Register(host.saver._options.folder, "j", Disk()).others().values()
    with pytest.raises(PeerLost):
        Peer("x", address, key_of("j", "other secret"))
    peer = Peer("x", address, KEY)
    assert peer.held() == {0: [10]}
    with pytest.raises(SnapshotError, match="not held here"):
        peer.take("a", 11, [0])
    peer.take("a", 10, [0])
    piece = Piece(0, 0, "0.w", "weight", "F32", SHAPE, "param", 0, 192)
    for folder in ("..", "../x", "nowhere", "/tmp"):
        with pytest.raises(SnapshotError, match="is not there"):
            peer.write("a", folder, "i", 0, [piece])
    with pytest.raises(SnapshotError, match="not in memory"):
        peer.write("b", "x", "i", 0, [piece])
    peer.close()
    await_(lambda: host.hand._attempt == "", "what it held for us is given back when we go")


def test_files_of_jobs_that_are_over_are_removed_from_the_register(tmp_path: Path) -> None:
    for job, name in (("old", "a"), ("j", "b"), ("j", "c")):
        Register(tmp_path, job, Disk()).enter(name, f"127.0.0.1:{len(name)}")
    (tmp_path / FOLDER / "junk.json").write_text("[")
    mine = Register(tmp_path, "j", Disk())
    mine.enter("c", "127.0.0.1:1")
    assert mine.others() == {"b": "127.0.0.1:1"}
    assert not (tmp_path / FOLDER / "a.json").exists()
    mine.leave()
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["b.json", "junk.json"]


def test_a_tie_between_stages_on_two_hosts_is_an_alias_only_if_both_copies_are_equal(team: Any, tmp_path: Path) -> None:
    hosts = team(None, None)
    for half, (step, second) in enumerate([(10, values("0.w", 10)), (20, values("0.w", 20) + np.float32(1e-3))]):
        for slot, value in enumerate((values("0.w", step), second)):
            name = f"{slot}.w"
            where = origin(hosted=[slot], ties=[["0.w", "1.w"]])
            settings = {"lr": 0.1, "names": [name]}
            tensors = {(name, "weight"): value, (name, "exp_avg"): value * 0.5}
            hosts[slot].shelf.fill(slot, half, step, tensors, groups=[settings], scalars={}, origin=where)
        hosts[0].page.reserved = step
        await_(lambda step=step: hosts[0].page.due == step + 10, hosts[0].news)
    first, later = (open_checkpoint(path) for path in committed_steps(tmp_path / "runs").values())
    assert (first.aliases, later.aliases) == ({"1.w": "0.w"}, {})
    assert ("1.w", "weight") in later.states

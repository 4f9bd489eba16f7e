"""Whole jobs that write checkpoints and go on from them: in any layout with the bits of the run that was not broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "helpers" / "scripts"
sys.path.insert(0, str(SCRIPTS.parent))

from jobs import Ended, job, reference  # noqa: E402

SAVEJOB, FEATURES = SCRIPTS / "savejob.py", SCRIPTS / "features.py"
DEADLINE_S = 90.0


@dataclass(frozen=True)
class Saved:
    """A run that was not broken, and the checkpoints that it left."""

    unbroken: Ended
    folder: Path

    def at(self, step: int) -> str:
        return str(self.folder / f"step-{step:08}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """PP=4, 30 steps, a checkpoint at every tenth."""
    folder = tmp_path_factory.mktemp("saved")
    alone = reference(folder / "reference", SAVEJOB)
    options = ("--checkpoint-dir", str(folder / "checkpoints"), "--checkpoint-every", "10")
    run = job(folder / "run", 4, SAVEJOB, "--step-seconds", "0.05", "--out", str(folder / "run/out"), options=options)
    assert run.code == 0, run.err
    assert_same(run, alone, since=0)
    return Saved(alone, folder / "checkpoints")


@pytest.fixture(scope="module")
def sharded(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """DP=2 x PP=2 with ZeRO-1, in which ranks die where moments are lost, and where weights are of two steps."""
    folder = tmp_path_factory.mktemp("sharded")
    faults = ["rank=1,step=4,at=backward:1,kind=kill", "rank=3,step=12,at=applied,kind=kill"]
    faults += ["rank=2,step=22,at=gather,kind=kill"]
    options = ("--zero", "1", "--checkpoint-dir", str(folder / "checkpoints"), "--checkpoint-every", "10")
    grid = ("--stages", "2", "--replicas", "2", "--step-seconds", "0.05", "--out", str(folder / "run/out"))
    run = job(folder / "run", 4, SAVEJOB, *grid, faults=faults, options=options)
    assert_same(run, saved.unbroken, since=0)
    return Saved(run, folder / "checkpoints")


def assert_same(run: Ended, unbroken: Ended, *, since: int) -> None:
    """The steps after `since` gave the same figures, and all ended with the same bits."""
    assert run.code == 0, run.err
    told = unbroken.told()
    assert run.told() == [row for row in told if row["step"] > since]
    one, other = run.state(), unbroken.state()
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def verified(path: Path) -> bool:
    """Whether the stand-alone verifier finds nothing wrong with any byte."""
    command = [sys.executable, "-m", "holdfast.launcher.cli", "ckpt", "verify", "--full", str(path)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, capture_output=True, env=environment, cwd=path.parent, check=False).returncode == 0


def committed(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("step-*/COMMIT"))


# ---- save here, go on there ---------------------------------------------------------------------------------


def test_training_leaves_whole_checkpoints_and_says_so(saved: Saved) -> None:
    assert committed(saved.folder) == ["step-00000010", "step-00000020", "step-00000030"]
    assert (saved.folder / "latest").read_text() == "step-00000030\n"
    assert all(verified(saved.folder / name) for name in committed(saved.folder))
    assert [path for path in saved.folder.iterdir() if path.name.startswith(".")] == []
    manifest = json.loads(Path(saved.at(10), "MANIFEST.json").read_bytes())
    assert manifest["aliases"] == {"7.weight": "0.embed.weight"}
    assert len(manifest["groups"]) == 2
    assert set(manifest["steps"].values()) == {10}


def test_ranks_that_die_with_their_part_of_the_optimizers_state_change_no_bit(sharded: Saved) -> None:
    """What is equal is checked by the fixture; this, that something was sharded and that ranks were replaced."""
    run = sharded.unbroken
    assert run.started() == {0: 1, 1: 2, 2: 2, 3: 2}
    resumed = [event["resume_step"] for event in run.events if event["event"] == "formed" and event["generation"] > 1]
    assert resumed[0] in (2, 3)
    assert resumed[1:] == [11, 21], "no rank went on from weights of two steps"
    kept = {name.rpartition("/")[2] for name in run.state_by_rank() if "0.embed.weight@exp_avg[" in name}
    assert kept == {
        "rank-0.safetensors 0.embed.weight@exp_avg[0:256]",
        "rank-2.safetensors 0.embed.weight@exp_avg[256:512]",
    }
    assert committed(sharded.folder) == ["step-00000010", "step-00000020", "step-00000030"]
    assert all(verified(sharded.folder / name) for name in committed(sharded.folder))
    manifest = json.loads(Path(sharded.at(30), "MANIFEST.json").read_bytes())
    assert manifest["aliases"] == {"7.weight": "0.embed.weight"}, "tied parameters are so, whoever has which part"


@pytest.mark.parametrize(
    ("ranks", "layout", "zero"),
    [
        (1, (), "0"),
        (2, (), "0"),
        (3, ("--split", "1,5,2"), "0"),
        (2, ("--interleave", "2"), "0"),
        (4, ("--stages", "2", "--replicas", "2"), "0"),
        (4, ("--stages", "2", "--replicas", "2"), "1"),
    ],
    ids=["PP=1", "PP=2", "PP=3 uneven", "PP=2 interleaved", "DP=2 x PP=2", "DP=2 x PP=2 ZeRO-1"],
)
def test_a_checkpoint_of_four_stages_goes_on_in_any_layout_with_the_bits_of_the_unbroken_run(
    ranks: int, layout: tuple[str, ...], zero: str, saved: Saved, tmp_path: Path
) -> None:
    options = ("--resume", saved.at(10), "--zero", zero)
    run = job(tmp_path, ranks, SAVEJOB, *layout, "--out", str(tmp_path / "out"), options=options)
    assert_same(run, saved.unbroken, since=10)
    (formed,) = [event for event in run.events if event["event"] == "formed"]
    assert (formed["resume_step"], formed["fresh"]) == (10, False)


def test_a_checkpoint_of_a_sharded_optimizer_goes_on_in_another_layout_without(
    sharded: Saved, saved: Saved, tmp_path: Path
) -> None:
    options = ("--resume", sharded.at(10))
    run = job(tmp_path, 3, SAVEJOB, "--split", "1,5,2", "--out", str(tmp_path / "out"), options=options)
    assert_same(run, saved.unbroken, since=10)


def test_a_run_that_was_resumed_survives_failures_and_goes_on_saving(saved: Saved, tmp_path: Path) -> None:
    """The first death comes when there may be no snapshot yet: the state is then in the checkpoint alone."""
    faults = ["rank=1,step=11,at=forward:0,kind=kill", "rank=1,step=17,at=applied,kind=kill"]
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved.at(10), folder / "step-00000010")
    options = ("--resume", "latest", "--checkpoint-dir", str(folder), "--checkpoint-every", "10")
    arguments = ("--step-seconds", "0.05", "--out", str(tmp_path / "out"))
    run = job(tmp_path, 2, SAVEJOB, *arguments, faults=faults, options=options)
    assert_same(run, saved.unbroken, since=10)
    assert run.started() == {0: 1, 1: 3}
    assert committed(folder) == ["step-00000010", "step-00000020", "step-00000030"]
    assert all(verified(folder / name) for name in committed(folder))


@pytest.mark.parametrize(("case", "ranks"), [("odd", 1), ("odd", 2), ("half", 2)])
def test_streams_buffers_users_objects_and_loss_scales_come_along(case: str, ranks: int, tmp_path: Path) -> None:
    alone = reference(tmp_path / "alone", FEATURES, case, "--steps", "24")
    options = ("--checkpoint-dir", str(tmp_path / "checkpoints"), "--checkpoint-every", "8", "--checkpoint-keep", "9")
    run = job(tmp_path / "run", 3, FEATURES, case, "--steps", "24", options=options)
    assert run.code == 0, run.err
    step = int(committed(tmp_path / "checkpoints")[0].removeprefix("step-"))
    options = ("--resume", str(tmp_path / f"checkpoints/step-{step:08}"))
    out = tmp_path / "resumed/out"
    resumed = job(tmp_path / "resumed", ranks, FEATURES, case, "--steps", "24", "--out", str(out), options=options)
    assert step < 24
    assert_same(resumed, alone, since=step)


def test_buffers_of_replicas_that_differ_come_back_to_their_own_replica(tmp_path: Path) -> None:
    """Batch statistics see their own replica's microbatches: the reference is the unbroken run of this layout."""
    grid = ("--replicas", "2", "--stages", "2", "--steps", "24")
    options = ("--checkpoint-dir", str(tmp_path / "checkpoints"), "--checkpoint-every", "8", "--checkpoint-keep", "9")
    whole = job(tmp_path / "run", 4, FEATURES, "odd", *grid, "--out", str(tmp_path / "run/out"), options=options)
    assert whole.code == 0, whole.err
    step = int(committed(tmp_path / "checkpoints")[0].removeprefix("step-"))
    path, out = tmp_path / f"checkpoints/step-{step:08}", tmp_path / "resumed/out"
    states = {tensor["state"] for tensor in json.loads((path / "MANIFEST.json").read_bytes())["tensors"]}
    assert "buffer.replica1" in states
    resumed = job(tmp_path / "resumed", 4, FEATURES, "odd", *grid, "--out", str(out), options=("--resume", str(path)))
    assert resumed.code == 0, resumed.err
    assert resumed.told() == [row for row in whole.told() if row["step"] > step]
    one, other = resumed.state_by_rank(), whole.state_by_rank()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- what can go wrong while it is written ------------------------------------------------------------------


class Live:
    """A job that is watched and hurt while it runs: two ranks with a state of some megabytes."""

    def __init__(self, root: Path, *arguments: str, every: int = 10, folder: Path | None = None) -> None:
        self.root = root
        self.folder = folder or root / "checkpoints"
        command = [
            sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", "2", "--standbys", "1",
            "--lease-min", "1.0", "--events", str(root / "events.jsonl"), "--checkpoint-dir", str(self.folder),
            "--checkpoint-every", str(every), str(SAVEJOB), "--out", str(root / "out"), *arguments,
        ]  # fmt: skip
        root.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "XDG_RUNTIME_DIR": str(root)}
        with (root / "out.txt").open("wb") as out, (root / "err.txt").open("wb") as err:
            self.process = subprocess.Popen(
                command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def events(self, kind: str) -> list[dict[str, Any]]:
        try:
            listed = (self.root / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [event for line in listed if (event := json.loads(line))["event"] == kind]

    def step(self) -> int:
        lines = (self.root / "out.txt").read_text().splitlines()
        return max((int(line.rpartition(" ")[2]) for line in lines if line.startswith("savejob:")), default=0)

    def await_(self, ready: Callable[[], Any], what: str, pause_s: float = 0.02) -> Any:
        limit = time.monotonic() + DEADLINE_S
        while not (found := ready()):
            assert time.monotonic() < limit, f"no {what}: {self.output()}"
            assert self.process.poll() is None, f"ended before {what}: {self.output()}"
            time.sleep(pause_s)
        return found

    def await_writing(self) -> str:
        """The name of a checkpoint that is being written right now."""

        def writing() -> str:
            return next((p.name for p in self.folder.glob(".step-*") if not (p / "COMMIT").exists()), "")

        return str(self.await_(writing, "write under way", 0.0005))[1:14]

    def output(self) -> str:
        return (self.root / "out.txt").read_text()[-2000:] + (self.root / "err.txt").read_text()[-3000:]

    def end(self) -> Ended:
        code = self.process.wait(DEADLINE_S)
        events = [json.loads(line) for line in (self.root / "events.jsonl").read_text().splitlines()]
        return Ended(code, "", (self.root / "err.txt").read_text(), events, self.root)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """What every run of WIDE must end with."""
    return reference(tmp_path_factory.mktemp("wide"), SAVEJOB, *WIDE[:2], *WIDE[4:])


WIDE = ("--width", "400", "--step-seconds", "0.1", "--steps", "40")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    started: list[Live] = []

    def start(*arguments: str, **options: Any) -> Live:
        started.append(Live(tmp_path / f"live{len(started)}", *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(40)


def test_a_saver_killed_in_the_middle_of_a_write_costs_that_checkpoint_only(
    live: Callable[..., Live], wide: Ended
) -> None:
    run = live(*WIDE)
    name = run.await_writing()
    os.kill(run.events("saver_started")[-1]["pid"], signal.SIGKILL)
    ended = run.end()
    assert_same(ended, wide, since=0)
    assert len(run.events("saver_started")) == 2
    assert "the saver ended (SIGKILL); restarting it" in ended.err
    assert len(run.events("rank_started")) == 2, "no rank was touched"
    assert len(run.events("checkpoint_written")) >= 2, (name, ended.events)
    assert [path.name for path in run.folder.iterdir() if path.name.startswith(".")] == []
    assert committed(run.folder)[-1] == "step-00000040"
    assert all(verified(run.folder / name) for name in committed(run.folder))


def test_a_rank_killed_while_a_checkpoint_is_written_changes_neither(live: Callable[..., Live], wide: Ended) -> None:
    run = live(*WIDE)
    name = run.await_writing()
    os.kill(run.events("rank_started")[-1]["pid"], signal.SIGKILL)
    ended = run.end()
    assert_same(ended, wide, since=0)
    assert len(run.events("recovery")) == 1
    assert name in [Path(event["path"]).name for event in run.events("checkpoint_written")]
    assert all(verified(run.folder / name) for name in committed(run.folder))


def test_a_full_disk_is_told_once_and_training_goes_on(live: Callable[..., Live], wide: Ended, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        run = live(*WIDE, folder=small / "checkpoints")
        ended = run.end()
        assert_same(ended, wide, since=0)
        assert len(run.events("checkpoint_failed")) >= 3
        assert "no space left" in run.events("checkpoint_failed")[0]["reason"]
        assert ended.err.count("no space left") == 1
        assert run.events("checkpoint_written") == []
        assert committed(run.folder) == []
        assert list(run.folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# ---- the end of a run, and the start of the next ------------------------------------------------------------


def test_sigterm_leaves_a_last_checkpoint_from_which_the_run_goes_on(
    live: Callable[..., Live], saved: Saved, tmp_path: Path
) -> None:
    run = live("--step-seconds", "0.1", every=1000)
    run.await_(lambda: run.step() >= 7, "step 7")
    run.process.send_signal(signal.SIGTERM)
    ended = run.end()
    assert ended.code == 1
    (name,) = committed(run.folder)
    step = int(name.removeprefix("step-"))
    assert step >= 6, "a rank may have been killed while it copied the step after"
    assert [event["step"] for event in run.events("checkpoint_written")] == [step]
    assert f"step {step} saved" in ended.err
    options = ("--resume", "latest", "--checkpoint-dir", str(run.folder))
    resumed = job(tmp_path / "resumed", 3, SAVEJOB, "--out", str(tmp_path / "resumed/out"), options=options)
    assert_same(resumed, saved.unbroken, since=step)
    assert committed(run.folder)[-1] == "step-00000030"


def test_what_no_memory_holds_any_more_comes_back_from_disk(live: Callable[..., Live], wide: Ended) -> None:
    """A rank and the snapshot manager die together: its state is nowhere but in the checkpoint."""
    run = live(*WIDE)
    run.await_(lambda: run.events("checkpoint_written") and run.step() >= 14, "a checkpoint, and steps after it")
    manager = manager_of(run.process.pid)
    os.kill(run.events("rank_started")[-1]["pid"], signal.SIGKILL)
    os.kill(manager, signal.SIGKILL)
    ended = run.end()
    assert_same(ended, wide, since=0)
    (recovery,) = run.events("recovery")
    assert recovery["sources"]["disk"]["ranks"] == 2
    assert recovery["resume_step"] == 10
    assert "a checkpoint on disk" in ended.err


def manager_of(agent: int) -> int:
    import psutil

    children = psutil.Process(agent).children(recursive=True)
    return next(child.pid for child in children if "holdfast.ckpt.memory.manager" in child.cmdline())


@pytest.mark.parametrize(
    ("resume", "arguments", "says"),
    [
        ("{saved}/step-00000099", (), "no such folder"),
        ("{saved}", (), "not a committed checkpoint"),
        ("{saved}/step-00000010", ("--layers", "9"), "of a model of 8 layers, the script has 9"),
        ("{saved}/step-00000010", ("--width", "24"), "the script as F32["),
        ("{saved}/step-00000010", ("--sgd",), "has the state of torch.optim.adamw.AdamW, the script uses"),
        ("{broken}", (), "a digest differs"),
    ],
    ids=["no folder", "no checkpoint", "other model", "other shape", "other optimizer", "damaged"],
)
def test_what_cannot_be_resumed_is_one_line_and_exit_2(
    resume: str, arguments: tuple[str, ...], says: str, saved: Saved, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(saved.at(10), broken)
    payload = next(broken.glob("weights/*.safetensors"))
    data = bytearray(payload.read_bytes())
    data[-5] ^= 1
    payload.write_bytes(data)
    path = resume.format(saved=saved.folder, broken=broken)
    run = job(tmp_path / "run", 2, SAVEJOB, *arguments, options=("--resume", path))
    assert run.code == 2, run.err
    (line,) = run.errors
    assert says in line


def test_resuming_the_latest_of_nothing_starts_afresh_and_says_so(tmp_path: Path) -> None:
    options = ("--resume", "latest", "--checkpoint-dir", str(tmp_path / "none"), "--checkpoint-every", "2")
    run = job(tmp_path, 1, SAVEJOB, "--steps", "3", "--out", str(tmp_path / "out"), options=options)
    assert run.code == 0, run.err
    assert run.err.count("no checkpoint there yet, the run starts from step 0") == 1
    assert [row["step"] for row in run.told()] == [1, 2, 3]
    assert committed(tmp_path / "none")[-1] == "step-00000003", "the last step is always saved"

"""What `holdfast run` answers to options about checkpoints, before anything starts."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from holdfast.ckpt.universal.save import Part, save_universal
from holdfast.ckpt.universal.write import Details, WriteOptions
from holdfast.launcher.bootstrap import Bootstrap
from holdfast.launcher.saving import SaverProcess, add_options, check_history, plan_saving
from holdfast.launcher.sharing import mark, refusal
from holdfast.proto.errors import ConfigError


def ask(*options: str, hosts: int = 1, snapshots: str = "on") -> object:
    parser = argparse.ArgumentParser()
    add_options(parser)
    arguments = parser.parse_args(options)
    arguments.snapshots = snapshots
    return plan_saving(arguments, hosts)


def write(folder: Path, step: int, *, trainer: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08}"
    data = np.arange(4, dtype=np.float32).tobytes()
    details = Details(metadata={"trainer": {"step": step}} if trainer else {})
    save_universal(path, [Part("0.w", "weight", "F32", (4,), 0, 4, data)], details, WriteOptions(fsync=False))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    write(tmp_path / "runs", 10)
    write(tmp_path / "runs", 20)
    yield tmp_path / "runs"
    shutil.rmtree(tmp_path / "runs")


def test_nothing_asked_for_is_nothing_done() -> None:
    saving = ask()
    assert (saving.folder, saving.resume, saving.start) == (None, None, -1)  # type: ignore[attr-defined]


def test_the_newest_committed_checkpoint_is_the_latest_whatever_the_pointer_says(runs: Path) -> None:
    (runs / "latest").write_text("step-00000010\n")
    (runs / "step-00000030").mkdir()
    saving = ask("--checkpoint-dir", str(runs), "--resume", "latest")
    assert (saving.resume, saving.start) == (runs / "step-00000020", 20)  # type: ignore[attr-defined]


def test_the_latest_of_nothing_is_a_fresh_start_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ask("--checkpoint-dir", str(tmp_path / "new"), "--resume", "latest")
    assert (saving.resume, saving.start) == (None, -1)  # type: ignore[attr-defined]
    assert (tmp_path / "new").is_dir()
    assert "the run starts from step 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--checkpoint-dir", "{runs}"),
            "up to step 20, the run starts from step 0: give --resume latest",
        ),
        (("--checkpoint-dir", "{runs}", "--resume", "{runs}/step-00000010"), "the run starts from step 10"),
        (("--resume", "latest"), "needs --checkpoint-dir"),
        (
            ("--resume", "{runs}"),
            "it has no COMMIT; its newest one is {runs}/step-00000020",
        ),
        (("--resume", "{runs}/none"), "no such folder"),
        (("--checkpoint-every", "0"), "--checkpoint-every must be at least 1"),
        (("--checkpoint-keep", "0"), "--checkpoint-keep must be at least 1"),
        (("--checkpoint-keep-best", "-1"), "--checkpoint-keep-best must be 0 or more"),
        (("--checkpoint-grace", "0"), "--checkpoint-grace must be above 0"),
        (("--checkpoint-dir", "{runs}/step-00000010/COMMIT/x"), "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: tuple[str, ...], says: str, runs: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(*(option.format(runs=runs) for option in options))
    assert says.format(runs=runs) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_host_that_comes_late_to_a_job_of_several_is_not_refused_for_what_the_job_has_written(runs: Path) -> None:
    saving = ask("--checkpoint-dir", str(runs), hosts=2)
    assert (saving.folder, saving.start) == (runs, -1)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="give --resume latest"):
        check_history(runs, -1, asked=False)  # what a job of several hosts that starts now is answered


def test_the_first_host_says_what_the_job_starts_from(runs: Path) -> None:
    """`latest` may have become another one since."""
    late = ask("--checkpoint-dir", str(runs), "--resume", "latest", hosts=2)
    assert late.told() == f"20:{runs / 'step-00000020'}"  # type: ignore[attr-defined]
    first = late.as_told(f"10:{runs / 'step-00000010'}")  # type: ignore[attr-defined]
    assert (first.resume, first.start) == (runs / "step-00000010", 10)
    assert (late.as_told("").resume, late.as_told(None).resume) == (None, None)  # type: ignore[attr-defined]
    path = str(runs / "step-00000010")
    assert ask("--resume", path, hosts=2).as_told(None).told() == f"10:{path}"  # type: ignore[attr-defined]


def test_a_folder_that_another_host_does_not_see_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.launcher.sharing.SEEN_S", 0.2)
    here, there = tmp_path / "here", tmp_path / "there"
    mark(here, "j", "secret")
    first = Bootstrap("j", "secret", "h:1", "host0", 2, resume="", checkpoints=True)
    assert refusal(here, "j", "secret", None) == refusal(here, "j", "secret", first) == ""
    assert refusal(here, "j", "secret", replace(first, checkpoints=None)) == ""
    for folder, token in ((there, "secret"), (here, "another")):
        assert "is not the folder that host0 has there" in refusal(folder, "j", token, first)
    assert "this host without" in refusal(None, "j", "secret", first)
    assert "this host with:" in refusal(here, "j", "secret", replace(first, checkpoints=False))


def test_jobs_without_snapshots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs snapshots"):
        ask("--checkpoint-dir", str(tmp_path), snapshots="off")


def test_a_checkpoint_that_training_did_not_write_or_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "other", 5, trainer=False)
    with pytest.raises(ConfigError, match="was not written by training"):
        ask("--resume", str(path))
    manifest = path / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"0.w", b"0.x"))
    with pytest.raises(ConfigError, match="MANIFEST"):
        ask("--resume", str(path))


def test_the_record_gets_what_the_saver_tells_and_the_terminal_what_failed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ask("--checkpoint-dir", str(tmp_path / "runs"))
    events = tmp_path / "events.jsonl"
    process = SaverProcess(
        saving,  # type: ignore[arg-type]
        smp="s",
        job="j",
        token="t",
        world_size=1,
        directory=tmp_path,
        events=events,
    )
    for first in (True, False):
        process._record({"event": "checkpoint_failed", "step": 5, "reason": "no space left", "first": first})
    process._record({"event": "checkpoint_written", "step": 6})
    said = capsys.readouterr().err
    assert said.count("no checkpoint of step 5: no space left; training goes on") == 1
    assert "step 6" not in said
    assert events.read_text().count("checkpoint_failed") == 2
    assert '"first"' not in events.read_text()
    process.close()

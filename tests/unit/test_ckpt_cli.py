"""`holdfast ckpt`: what each verb does, says and returns, on small checkpoints; no framework is needed.

Verbs are called as a shell would call them; exit codes are a contract, and so is one line for each error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.ckpt.cli import main
from holdfast.ckpt.cli.app import VERBS
from holdfast.ckpt.cli.console import bar, human, table
from holdfast.ckpt.universal.latest import write_latest
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.write import Details, Writer

_spec = importlib.util.spec_from_file_location("model_helpers", Path(__file__).parents[1] / "helpers" / "models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small Llama with optimizer states, at step 7."""
    tensors = models.llama()
    models.save(tmp_path / "a", tensors, models.details(tensors, loss=2.5))
    return tmp_path / "a"


def other(saved: Path, name: str, seed: int = 1, step: int = 9, loss: float = 2.0) -> Path:
    tensors = models.llama(seed)
    models.save(saved.parent / name, tensors, models.details(tensors, step, loss=loss))
    return saved.parent / name


def run(*argv: object) -> int:
    return main([str(word) for word in argv])


def ask(capsys: Capture, *argv: object, code: int = 0) -> dict[str, Any]:
    """The one JSON object that a verb prints."""
    capsys.readouterr()
    assert run(*argv, "--json") == code, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def complaint(capsys: Capture, *argv: object, code: int) -> str:
    """The one line that an error is."""
    capsys.readouterr()
    assert run(*argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("holdfast ckpt")
    assert err.count("\n") == 1, err
    return err


def damage(path: Path, at: int, byte: int = 0xA5) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ byte]))


def payload(root: Path, state: str) -> tuple[Path, int]:
    """A file of a state, and where its first tensor begins."""
    checkpoint = open_checkpoint(root)
    spans = [s.span for (_, st), t in checkpoint.states.items() if st == state for s in t.slabs]
    first = min(spans, key=lambda span: (span.file, span.offset))
    return root / first.file, first.offset


# ---- around the verbs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_of_itself(capsys: Capture, verb: str) -> None:
    with pytest.raises(SystemExit) as end:
        run(verb, "--help")
    assert end.value.code == 0
    assert f"  holdfast ckpt {verb} " in capsys.readouterr().out


def test_usage_errors_are_exit_code_1_and_one_line(capsys: Capture, saved: Path) -> None:
    assert "did you mean inspect?" in complaint(capsys, "inspekt", code=1)
    assert "no such file" in complaint(capsys, "inspect", saved / "nope", code=1)
    assert "--help" in complaint(capsys, "inspect", saved, "--bogus", code=1)
    assert "not a size" in complaint(capsys, "convert", saved, "x", "--max-memory", "much", code=1)
    assert "from 1 to" in complaint(capsys, "verify", saved, "--jobs", "0", code=1)
    assert run() == 1
    assert "verbs:" in capsys.readouterr().out


def test_neither_torch_nor_grpc_is_imported_by_a_conversion(saved: Path) -> None:
    words = ["ckpt", "export", str(saved), str(saved.parent / "hf")]
    text = (
        f"import sys; from holdfast.launcher.cli import main; code = main({words}); "
        "bad = {'torch', 'grpc', 'deepspeed'} & set(sys.modules); sys.exit(code or (9 if bad else 0))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (saved.parent / "hf" / "model.safetensors").is_file()


def test_a_name_with_control_characters_does_not_reach_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    models.save(tmp_path / "a", {("evil\x1b[2Jname", "weight"): np.zeros(2, np.float32)})
    assert run("inspect", tmp_path / "a", "--tensors") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_numbers_are_for_people() -> None:
    assert [human(n) for n in (0, 999, 1000, 1_234_567, 10**13)] == ["0 B", "999 B", "1 KB", "1.23 MB", "10 TB"]
    assert "50 %" in bar("x", 50, 100, 1.0).replace("50%", "50 %")
    assert "finishing" in bar("x", 100, 100, 1.0)
    assert table(("a", "n"), [("x", 1), ("yy", 22)]) == ["a    n", "x    1", "yy  22"]


# ---- inspect, verify ------------------------------------------------------------------------------------------


def test_inspect_shows_what_is_there(capsys: Capture, saved: Path) -> None:
    found = ask(capsys, "inspect", saved)
    assert found["format"] == "holdfast"
    assert found["parameters"] == sum(a.size for (_, s), a in models.llama().items() if s == "weight")
    assert found["steps"] == {"7": 21}
    assert [len(group["params"]) for group in found["groups"]] == [16, 5]
    assert {"name": "lm_head.weight", "state": "fp32", "dtype": "F32", "shape": [24, 16]}.items() <= next(
        t for t in found["tensors"] if (t["name"], t["state"]) == ("lm_head.weight", "fp32")
    ).items()
    run("inspect", saved)
    assert "optimizer step: 7" in capsys.readouterr().out


def test_inspect_shows_what_a_mapping_would_make(capsys: Capture, saved: Path) -> None:
    words = ("--layout", "llama-megatron", "--set", "heads=4", "--set", "kv_heads=2")
    found = ask(capsys, "inspect", saved, *words)
    names = {tensor["name"] for tensor in found["tensors"]}
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in names
    assert "--set kv_heads=N" in complaint(capsys, "inspect", saved, "--layout", "llama-torchtitan", code=4)
    assert "no mapping has" in complaint(capsys, "inspect", saved, *words, "--set", "x=1", code=1)


def test_a_runs_folder_stands_for_its_latest_checkpoint(capsys: Capture, saved: Path) -> None:
    other(saved, "b")
    write_latest(saved.parent, "b")
    assert ask(capsys, "inspect", saved.parent)["steps"] == {"9": 21}


def test_verify_names_file_tensor_and_range_and_tells_damage_from_absence(capsys: Capture, saved: Path) -> None:
    assert ask(capsys, "verify", saved)["proven"]
    path, start = payload(saved, "exp_avg")
    damage(path, start + 5)
    assert ask(capsys, "verify", "--quick", saved)["ok"]
    found = ask(capsys, "verify", saved, code=2)["findings"]
    assert [f["kind"] for f in found] == ["digest"]
    assert found[0]["state"] == "exp_avg"
    assert found[0]["range"][0] <= start + 5 < found[0]["range"][1]
    assert len(ask(capsys, "verify", saved, "--sample", "1", code=2)["findings"]) == 1
    damage(path, start + 5)
    path.unlink()
    assert ask(capsys, "verify", "--quick", saved, code=3)["findings"][0]["kind"] == "missing"


def test_a_sample_reads_about_the_share_it_was_told(capsys: Capture, saved: Path) -> None:
    whole = ask(capsys, "verify", saved, "--sample", "1")["bytes"]
    half = [ask(capsys, "verify", saved, "--sample", "0.5", "--seed", seed)["bytes"] for seed in range(5)]
    assert 0.25 * whole < sum(half) / 5 < 0.75 * whole
    assert half[0] == ask(capsys, "verify", saved, "--sample", "0.5", "--seed", 0)["bytes"]


# ---- diff -----------------------------------------------------------------------------------------------------


def test_equal_checkpoints_are_equal_whatever_their_layout(capsys: Capture, saved: Path) -> None:
    assert run("convert", saved, saved.parent / "b", "--tile") == 0
    assert ask(capsys, "diff", saved, saved.parent / "b")["same"]


def test_a_difference_is_told_in_bits_ulps_and_values(capsys: Capture, tmp_path: Path) -> None:
    base = np.array([1.0, 2.0, -0.0, 4.0], np.float32)
    changed = np.array([np.nextafter(np.float32(1), np.float32(2)), 2.0, 0.0, 4.5], np.float32)
    models.save(tmp_path / "a", {("w", "fp32"): base, ("n", "buffer"): np.array([1 << 60])})
    models.save(tmp_path / "b", {("w", "fp32"): changed, ("n", "buffer"): np.array([(1 << 60) + 3])})
    found = {t["name"]: t for t in ask(capsys, "diff", tmp_path / "a", tmp_path / "b", code=2)["tensors"]}
    assert (found["w"]["differing"], found["w"]["first"], found["w"]["max_abs"]) == (3, 0, 0.5)
    assert found["w"]["max_ulp"] == int(np.float32(4.5).view(np.uint32)) - int(np.float32(4).view(np.uint32))
    assert found["w"]["cosine"] == pytest.approx(float(base @ changed / np.linalg.norm(base) / np.linalg.norm(changed)))
    assert found["n"]["max_abs"] == 3.0
    ask(capsys, "diff", tmp_path / "a", tmp_path / "b", "--abs", "3")
    ask(capsys, "diff", tmp_path / "a", tmp_path / "b", "--abs", "2.9", code=2)


def test_the_first_difference_is_found_behind_the_first_block(capsys: Capture, tmp_path: Path) -> None:
    base = np.zeros(600_000, np.float32)
    changed = base.copy()
    changed[500_000:500_003] = 1
    models.save(tmp_path / "a", {("w", "fp32"): base})
    models.save(tmp_path / "b", {("w", "fp32"): changed})
    (found,) = ask(capsys, "diff", tmp_path / "a", tmp_path / "b", code=2)["tensors"]
    assert (found["first"], found["differing"], found["cosine"]) == (500_000, 3, None)


def test_a_nan_equals_itself_and_is_infinitely_far_from_a_number(capsys: Capture, tmp_path: Path) -> None:
    models.save(tmp_path / "a", {("w", "fp32"): np.array([np.nan, 1.0], np.float32)})
    models.save(tmp_path / "b", {("w", "fp32"): np.array([np.nan, np.nan], np.float32)})
    ask(capsys, "diff", tmp_path / "a", tmp_path / "a")
    (found,) = ask(capsys, "diff", tmp_path / "a", tmp_path / "b", code=2)["tensors"]
    assert (found["differing"], found["max_abs"], found["cosine"]) == (1, "inf", None)
    ask(capsys, "diff", tmp_path / "a", tmp_path / "b", "--abs", "1e30", code=2)


def test_steps_and_hyper_parameters_are_compared_by_parameter(capsys: Capture, tmp_path: Path) -> None:
    tensors = models.states("w", (2, 2))
    models.save(tmp_path / "a", tensors, Details(steps={"w": 3}))
    models.save(tmp_path / "b", tensors, Details(steps={"w": 4}))
    assert ask(capsys, "diff", tmp_path / "a", tmp_path / "b", code=2)["other"] == ["step w: 3 and 4"]
    ask(capsys, "diff", tmp_path / "a", tmp_path / "b", "--tensors-only")


# ---- convert, export ------------------------------------------------------------------------------------------


def test_a_dry_run_says_bytes_time_memory_and_losses_and_does_nothing(capsys: Capture, saved: Path) -> None:
    target = saved.parent / "hf"
    found = ask(capsys, "convert", saved, target, "--to", "hf", "--dry-run")
    assert found["bytes_written"] == sum(a.nbytes for (_, s), a in models.llama().items() if s == "weight")
    assert found["memory_bytes"] > 0
    assert any("exp_avg (21)" in loss for loss in found["losses"])
    assert not target.exists()


def test_a_loss_is_refused_until_it_is_allowed(capsys: Capture, saved: Path) -> None:
    target = saved.parent / "hf"
    assert "--allow-lossy" in complaint(capsys, "convert", saved, target, "--to", "hf", code=7)
    assert not target.exists()
    assert run("convert", saved, target, "--to", "hf", "--allow-lossy") == 0
    assert run("export", saved, saved.parent / "hf2") == 0
    assert (target / "model.safetensors").read_bytes() == (saved.parent / "hf2" / "model.safetensors").read_bytes()
    found = complaint(capsys, "export", saved, saved.parent / "hf3", "--masters", "--dtype", "bf16", code=7)
    assert "rounded to BF16" in found


def test_masters_can_be_exported_in_place_of_the_rounded_weights(capsys: Capture, saved: Path) -> None:
    assert run("export", saved, saved.parent / "hf", "--masters", "--shard-size", "16K") == 0
    assert (saved.parent / "hf" / "model.safetensors.index.json").is_file()
    from holdfast.ckpt.formats.registry import open_any

    with Reader(open_any(saved.parent / "hf")) as reader:
        found = models.load(reader)
    for (name, state), array in models.llama().items():
        if state == "fp32":
            assert np.array_equal(found[name, "weight"], array)


def test_what_cannot_work_is_refused_before_anything_is_written(capsys: Capture, saved: Path) -> None:
    before = sorted(saved.parent.iterdir())
    assert "is there already" in complaint(capsys, "convert", saved, saved, code=1)
    assert "more memory" in complaint(capsys, "convert", saved, saved.parent / "b", "--max-memory", "1M", code=1)
    assert "folder to write to" in complaint(capsys, "convert", saved, saved.parent / "x" / "y", code=1)
    assert "unknown target" in complaint(capsys, "convert", saved, saved.parent / "b", "--to", "onnx", code=1)
    assert "leave it out" in complaint(capsys, "convert", saved, saved.parent / "b", "--to", "hf", "--resume", code=1)
    assert sorted(saved.parent.iterdir()) == before


@pytest.mark.parametrize("target", ["holdfast", "hf", "deepspeed:zero3,dp=2", "dcp:dp=2", "torch"])
def test_nobody_waits_for_the_disk_who_said_so(saved: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    words = ["--to", target, "--allow-lossy"]
    assert run("convert", saved, saved.parent / "lazy", *words, "--no-sync") == 0
    assert waits == []
    assert run("convert", saved, saved.parent / "durable", *words) == 0
    assert waits
    assert run("diff", saved.parent / "lazy", saved.parent / "durable") == 0


def test_a_damaged_source_leaves_no_target(capsys: Capture, saved: Path) -> None:
    path, start = payload(saved, "fp32")
    damage(path, start)
    found = complaint(capsys, "convert", saved, saved.parent / "b", code=2)
    assert path.name in found
    assert "state=fp32" in found
    assert not [p for p in saved.parent.iterdir() if p.name != "a"]
    assert run("convert", saved, saved.parent / "b", "--no-verify") == 0


@pytest.mark.parametrize("target", ["torch", "deepspeed:zero1,dp=3", "deepspeed:zero3,dp=2", "deepspeed-universal"])
def test_native_files_hold_the_same_tensors(capsys: Capture, saved: Path, target: str) -> None:
    out = saved.parent / ("out.pt" if target == "torch" else "out")
    assert run("reshard", saved, out, "--to", target, "--allow-lossy") == 0, capsys.readouterr().err
    common = ask(capsys, "diff", saved, out, "--common", "--tensors-only")
    assert common["counts"].get("same", 0) >= 42


@pytest.mark.parametrize("target", ["dcp:dp=3", "fsdp2:dp=2"])
def test_distributed_checkpoints_hold_the_masters_as_parameters_and_the_moments(saved: Path, target: str) -> None:
    assert run("reshard", saved, saved.parent / "out", "--to", target) == 0
    from holdfast.ckpt.formats.registry import open_any

    with Reader(open_any(saved.parent / "out")) as reader:
        found = models.load(reader)
    for (name, state), array in models.llama().items():
        if state != "weight":
            assert np.array_equal(found[name, "weight" if state == "fp32" else state], array)


def test_zero3_and_back_keeps_masters_moments_steps_and_groups(capsys: Capture, saved: Path) -> None:
    z3, back = saved.parent / "z3", saved.parent / "back"
    assert run("reshard", saved, z3, "--to", "deepspeed:zero3,dp=3") == 0
    assert run("convert", z3, back) == 0
    with Reader(open_checkpoint(saved)) as one, Reader(open_checkpoint(back)) as two:
        mine, theirs = models.load(one), models.load(two)
        assert one.checkpoint.steps == two.checkpoint.steps
        assert [g.params for g in one.checkpoint.groups] == [g.params for g in two.checkpoint.groups]
    for key, array in mine.items():
        if key[1] != "weight":
            assert np.array_equal(theirs[key], array), key


def test_a_strangers_zero3_of_8_ranks_goes_on_by_the_three_commands_that_the_guide_prints(tmp_path: Path) -> None:
    """Word for word, in a shell's words, in a folder that has DeepSpeed's files under the guide's name."""
    guide = (Path(__file__).parents[2] / "docs" / "CHECKPOINTS.md").read_text()
    section = guide.partition('## "I have a DeepSpeed ZeRO-3 checkpoint from 8 GPUs"\n')[2].partition("\n## ")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    holdfast ckpt ")]
    assert len(commands) == 3, commands
    tensors = models.llama()
    models.save(tmp_path / "a", tensors, models.details(tensors, 100, loss=2.5))
    assert run("reshard", tmp_path / "a", tmp_path / "checkpoints", "--to", "deepspeed:zero3,dp=8") == 0
    assert len(list((tmp_path / "checkpoints/global_step100").glob("*optim_states.pt"))) == 8
    for command in commands:
        words = [sys.executable, "-P", "-m", "holdfast.launcher.cli", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stderr)
    from holdfast.ckpt.formats.registry import open_any

    for command, states in zip(commands, (3, 3, 1), strict=True):
        with Reader(open_any(tmp_path / shlex.split(command)[4])) as reader:
            found = models.load(reader)
        assert len(found) == 21 * states
        for (parameter, state), array in found.items():
            kept = "fp32" if state == "weight" else state
            assert np.array_equal(array, models.llama()[parameter, kept])


def test_a_mapping_goes_into_any_target_and_back(capsys: Capture, saved: Path) -> None:
    words = ("--set", "heads=4", "--set", "kv_heads=2")
    there, back = saved.parent / "megatron", saved.parent / "back"
    assert run("convert", saved, there, "--layout", "llama-megatron", *words) == 0
    assert run("convert", there, back, "--layout", "llama-megatron:reverse", *words) == 0
    assert ask(capsys, "diff", saved, back)["same"]
    assert ask(capsys, "diff", saved, there, "--layout", "llama-megatron", *words)["same"]
    titan = ("--layout", "llama-megatron:reverse", "--layout", "llama-torchtitan")
    assert run("reshard", there, saved.parent / "dcp", "--to", "dcp:dp=2", *titan, *words, "--allow-lossy") == 0


def test_a_file_that_would_run_code_is_exit_code_5_and_runs_none(capsys: Capture, tmp_path: Path) -> None:
    hostile = b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00touchq\x00\x85R."
    with zipfile.ZipFile(tmp_path / "evil.pt", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("evil/data.pkl", hostile)
        archive.writestr("evil/version", b"3\n")
    for verb in (["inspect"], ["verify"], ["convert", tmp_path / "out"], ["adopt"]):
        found = complaint(capsys, verb[0], tmp_path / "evil.pt", *verb[1:], code=5)
        assert "posix.system" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


def test_a_missing_rank_file_is_exit_code_3_before_anything_is_written(capsys: Capture, saved: Path) -> None:
    z3 = saved.parent / "z3"
    assert run("reshard", saved, z3, "--to", "deepspeed:zero3,dp=3") == 0
    next(path for path in z3.rglob("*optim_states.pt") if "rank_1_" in path.name).unlink()
    assert "1" in complaint(capsys, "convert", z3, saved.parent / "b", code=3)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["a", "z3"]


def test_a_disk_that_is_too_full_is_exit_code_6_before_anything_is_written(
    capsys: Capture, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.ckpt.universal.plan.free_bytes", lambda target: 1000)
    assert "no space for the output" in complaint(capsys, "convert", saved, saved.parent / "b", code=6)
    assert ask(capsys, "convert", saved, saved.parent / "b", "--dry-run")["free_bytes"] == 1000
    assert sorted(path.name for path in saved.parent.iterdir()) == ["a"]


# ---- interrupted ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from holdfast.ckpt.cli import main
from holdfast.ckpt.universal.write import Writer
put, count = Writer.put, [0]
def counted(self, *given):
    count[0] += 1
    if count[0] == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, *given)
Writer.put = counted
sys.exit(main(["convert", {source!r}, {target!r}, "--resume", "--jobs", "1"]))
"""


@pytest.mark.parametrize("at", [1, 20, 60, 84])
def test_a_killed_conversion_leaves_nothing_readable_and_is_taken_up(capsys: Capture, saved: Path, at: int) -> None:
    target = saved.parent / "b"
    text = KILLED.format(at=at, source=str(saved), target=str(target))
    done = subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    total = ask(capsys, "convert", saved, saved.parent / "all")["bytes_written"]
    found = ask(capsys, "convert", saved, target, "--resume", "--jobs", "1")
    assert found["bytes_written"] <= total * (1 - (at - 1) / 84 * 0.5)
    assert ask(capsys, "diff", saved, target)["same"]
    assert [p.name for p in saved.parent.iterdir() if p.name.startswith(".")] == []


def test_an_interrupted_conversion_writes_only_what_is_left(
    capsys: Capture, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, done = Writer.put, [0]

    def limited(self: Writer, name: str, state: str, data: Any, region: Any = None) -> None:
        if done[0] >= 40:
            raise KeyboardInterrupt
        done[0] += 1
        put(self, name, state, data, region)

    monkeypatch.setattr(Writer, "put", limited)
    target = saved.parent / "b"
    assert run("convert", saved, target, "--resume", "--jobs", "1") == 130
    monkeypatch.setattr(Writer, "put", put)
    assert not target.exists()
    whole = ask(capsys, "convert", saved, saved.parent / "c", "--jobs", "1")["bytes_written"]
    states = list(open_checkpoint(saved).states.values())
    left = sum(tensor.nbytes for tensor in states[40:])
    found = ask(capsys, "convert", saved, target, "--resume", "--jobs", "1")["bytes_written"]
    assert found == left < whole


# ---- adopt, slice, merge, prune, repair -------------------------------------------------------------------------


def test_an_adopted_checkpoint_is_untouched_and_can_be_verified_from_then_on(capsys: Capture, saved: Path) -> None:
    z1 = saved.parent / "z1"
    assert run("reshard", saved, z1, "--to", "deepspeed:zero1,dp=2") == 0
    before = {path: path.read_bytes() for path in z1.rglob("*") if path.is_file()}
    assert ask(capsys, "adopt", z1, "--dry-run")["dry_run"]
    found = ask(capsys, "adopt", z1, "--digest")
    assert {path: path.read_bytes() for path in before} == before
    assert ask(capsys, "verify", z1)["proven"]
    assert ask(capsys, "inspect", z1)["adopted"]
    victim = next(path for path in before if "optim_states" in path.name)
    damage(victim, len(before[victim]) // 2)
    assert ask(capsys, "verify", z1, code=2)["findings"]
    assert Path(found["path"]).name.endswith(".holdfast")
    assert "already of our format" in complaint(capsys, "adopt", saved, code=1)


def test_the_slices_of_all_ranks_are_the_whole(capsys: Capture, saved: Path) -> None:
    folder = saved.parent / "shards"
    folder.mkdir()
    for rank in range(3):
        out = folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        found = ask(capsys, "slice", saved, "--rank", rank, "--world", 3, "--out", out)
        assert found["bytes_read"] <= 1.05 * found["bytes"] + 21 * 4096
    assert ask(capsys, "diff", saved, folder, "--common", "--tensors-only", "--weights-only")["counts"] == {"same": 21}
    assert "below the world" in complaint(capsys, "slice", saved, "--rank", 3, "--world", 3, "--out", "x", code=1)


def test_a_slice_can_be_a_stream(saved: Path) -> None:
    words = ["slice", str(saved), "--rank", "1", "--world", "2", "--states", "all"]
    text = f"import sys; from holdfast.ckpt.cli import main; sys.exit(main({words} + sys.argv[1:]))"
    streamed = subprocess.run(
        [sys.executable, "-P", "-c", text, "--out", "-"], capture_output=True, timeout=60, check=True
    )
    assert run(*words, "--out", saved.parent / "f.safetensors") == 0
    assert streamed.stdout == (saved.parent / "f.safetensors").read_bytes()


def test_merging_in_any_order_makes_the_same_tensors(capsys: Capture, saved: Path) -> None:
    b, c = other(saved, "b", 1, 9, 2.0), other(saved, "c", 2, 11, 1.5)
    words = ("--weights", "loss-power", "--metric", "loss", "--penalty", "2", "--masters")
    one = ask(capsys, "merge", saved, b, c, "--out", saved.parent / "m1", *words)
    ask(capsys, "merge", c, saved, b, "--out", saved.parent / "m2", *words)
    assert ask(capsys, "diff", saved.parent / "m1", saved.parent / "m2")["same"]
    assert one["bytes_written"] == sum(a.nbytes for (_, s), a in models.llama().items() if not s.startswith("exp"))
    with Reader(open_checkpoint(saved.parent / "m1")) as reader:
        found = models.load(reader)["model.norm.weight", "fp32"]
        record = reader.checkpoint.metadata["merge"]
    raw = np.array([1 / 2.5**2, 1 / 2.0**2, 1 / 1.5**2])
    parts = [models.llama(seed)["model.norm.weight", "fp32"].astype(np.float64) for seed in range(3)]
    assert np.allclose(found, sum(w * p for w, p in zip(raw / raw.sum(), parts, strict=True)), rtol=1e-6)
    assert [source["step"] for source in record["sources"]] == [7, 9, 11]


def test_a_merge_takes_steps_from_the_checkpoints_and_says_what_it_lacks(capsys: Capture, saved: Path) -> None:
    b = other(saved, "b")
    assert run("merge", saved, b, "--out", saved.parent / "m", "--weights", "last-k", "--k", 1) == 0
    assert ask(capsys, "diff", saved.parent / "m", b, "--common", "--tensors-only", "--abs", "0")["counts"] == {
        "same": 21
    }
    assert "--values or --metric" in complaint(
        capsys, "merge", saved, b, "--out", saved.parent / "n", "--weights", "score-power", code=1
    )
    assert "two or more" in complaint(capsys, "merge", saved, "--out", saved.parent / "n", code=1)


def test_a_merge_goes_into_any_format(capsys: Capture, saved: Path) -> None:
    b = other(saved, "b")
    assert run("merge", saved, b, "--out", saved.parent / "hf", "--to", "hf") == 0
    assert run("merge", saved, b, "--out", saved.parent / "m") == 0
    found = ask(capsys, "diff", saved.parent / "m", saved.parent / "hf", "--tensors-only")
    assert found["same"]


def test_pruning_a_checkpoint_leaves_out_the_optimizer_and_keeps_the_old_one(capsys: Capture, saved: Path) -> None:
    assert run("prune", saved, saved.parent / "small", "--drop", "optimizer,masters") == 0
    found = ask(capsys, "inspect", saved.parent / "small")
    assert [s["state"] for s in found["states"]] == ["weight"]
    assert (found["groups"], found["steps"], found["completeness"]["optimizer"]) == ([], {}, "absent")
    assert ask(capsys, "verify", saved)["ok"]


def test_pruning_a_run_keeps_the_newest_the_best_and_what_latest_names(capsys: Capture, tmp_path: Path) -> None:
    tensors = models.states("w", (2, 2))
    for step, loss in ((1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0)):
        models.save(tmp_path / f"s{step}", tensors, models.details(tensors, step, loss=loss))
    (tmp_path / "notes").mkdir()
    write_latest(tmp_path, "s3")
    words = ("prune", tmp_path, "--keep-last", 1, "--keep-best", 1, "--metric", "loss")
    assert ask(capsys, *words, "--dry-run")["removed"] == ["s1"]
    assert (tmp_path / "s1").exists()
    assert ask(capsys, *words)["removed"] == ["s1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "notes", "s2", "s3", "s4"]
    assert "newest checkpoint always stays" in complaint(capsys, "prune", tmp_path, "--keep-last", 0, code=1)


def test_repair_rebuilds_what_a_copy_proves(capsys: Capture, saved: Path) -> None:
    copy = saved.parent / "copy"
    shutil.copytree(saved, copy)
    whole = {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    path, start = payload(saved, "exp_avg")
    damage(path, start)
    damage(path, 20)
    gone, cut = payload(saved, "fp32")[0], payload(saved, "exp_avg_sq")[0]
    gone.unlink()
    os.truncate(cut, 3000)
    assert len(ask(capsys, "repair", saved, code=2)["lost"]) > 1
    assert ask(capsys, "repair", saved, "--from", copy, "--dry-run")["rebuilt"] > 1
    found = ask(capsys, "repair", saved, "--from", copy)
    assert found["ok"]
    assert {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()} == whole


def test_repair_takes_tensors_from_a_copy_of_another_layout(capsys: Capture, saved: Path) -> None:
    assert run("reshard", saved, saved.parent / "z3", "--to", "deepspeed:zero3,dp=3") == 0
    for state in ("exp_avg", "fp32"):
        path, start = payload(saved, state)
        damage(path, start)
    assert ask(capsys, "repair", saved, "--from", saved.parent / "z3")["rebuilt"] == 2


def test_repair_rounds_the_master_copy_where_that_gives_the_digest(capsys: Capture, saved: Path) -> None:
    path, start = payload(saved, "weight")
    damage(path, start)
    assert ask(capsys, "repair", saved)["rebuilt"] == 1
    assert ask(capsys, "verify", saved)["ok"]


def test_repair_never_takes_bytes_that_are_not_the_same(capsys: Capture, saved: Path) -> None:
    b = other(saved, "b")
    path, start = payload(saved, "exp_avg")
    damage(path, start)
    damaged = path.read_bytes()
    assert ask(capsys, "repair", saved, "--from", b, code=2)["rebuilt"] == 0
    assert path.read_bytes() == damaged


def test_repair_puts_a_damaged_manifest_back_from_the_same_save_only(capsys: Capture, saved: Path) -> None:
    copy, b = saved.parent / "copy", other(saved, "b")
    shutil.copytree(saved, copy)
    damage(saved / "MANIFEST.json", 100)
    complaint(capsys, "repair", saved, "--from", b, code=2)
    assert ask(capsys, "repair", saved, "--from", copy)["ok"]

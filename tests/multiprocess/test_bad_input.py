"""What a user gets wrong is one line with what is wrong, and exit code 2, within seconds: no traceback, no retry.

Mistakes in a script are in helpers/scripts/bad.py, by name. Most are shown in this process, where the trainer
raises ConfigError itself; those that a real job could tell differently (several ranks, an error in the middle of
a step, other ranks waiting) are shown as jobs.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import jobs  # noqa: E402

from holdfast.proto.errors import ConfigError  # noqa: E402

BAD = ROOT / "tests" / "helpers" / "scripts" / "bad.py"
PRETRAIN = ROOT / "examples" / "pretrain.py"
SECONDS_MAX = 30.0


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(run: jobs.Ended, *words: str) -> None:
    """One line on stderr that has all words, exit code 2, nobody replaced."""
    assert run.code == 2, run.err
    # torch's own agent logs, at level W, that it ends the processes.
    lines = [line for line in run.err.strip().splitlines() if "torch/distributed/elastic" not in line]
    assert len(lines) == 1, run.err
    assert lines[0].startswith("holdfast: error: ")
    for word in words:
        assert word in lines[0]
    assert all(count == 1 for count in run.started().values())


# ---- in this process ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("batch", "batch_size 7 is not divisible by microbatch_size 2"),
        ("empty", "the dataset is empty"),
        ("data", "data must be a map-style dataset .* got builtins.generator"),
        ("both", "either microbatches .* or batch_size"),
        ("grid", "1 ranks do not divide into replicas of 3 stages: use 3 ranks"),
        ("missing", "Trainer: missing 1 required keyword-only argument: 'loss'"),
        ("input", r"layer 0 \(Embedding\) does not take the dataset's input \(float32\[2, 4\]\)"),
        ("output", "layers exchange a tensor or a tuple of tensors, got builtins.dict"),
        ("layer", r"layers\[2\] is a str"),
        ("factory", "layer 2 is neither a module nor a function that returns one"),
        ("broken factory", "layer 1 cannot be built: RuntimeError: .*negative dimension"),
        ("lazy", r"layer 2 \(LazyLinear\) has lazy parameters"),
        ("complex", "cannot capture 2.weight: its type is torch.complex64"),
        ("loss number", "the loss must return a scalar tensor"),
        ("loss fails", r"the loss does not take what the last layer gives \(float32\[2, 4\]\)"),
        ("loss detached", "the loss does not depend on any parameter that is trained"),
        ("optimizer instance", "optimizer is a function of a list of parameters"),
        ("optimizer fails", "the optimizer cannot be made: ValueError: Invalid learning rate"),
        ("optimizer none", "the optimizer function must return a torch optimizer, got NoneType"),
        ("plateau", "ReduceLROnPlateau needs a metric"),
        ("scheduler", "cannot capture scheduler.factor .*builtins.function"),
        ("state lambda", r"cannot capture user.mine.held.deep\[0\] .*builtins.function"),
        ("state set", r"cannot capture user.mine.held.deep\[0\] .*builtins.set"),
        ("state complex", r"cannot capture user.mine.held.deep\[0\]: its type is torch.complex64"),
        ("state none", r"state\['mine'\] has no state_dict and load_state_dict"),
        ("empty stream", "the data stream gives nothing"),
        ("data shape", r"a sample of the dataset must be a pair \(input, target\), got builtins.int"),
        ("data pair", r"a sample of the dataset must be a pair \(input, target\), got builtins.list of 1"),
        ("validation", "validate_every is set but no validation data"),
        ("validation kind", "data must be a map-style dataset .* got builtins.int"),
        ("clip", "clip_norm must be above 0, got 0.0"),
        ("schedule", "schedule is '1f1b' or 'gpipe', got 'zigzag'"),
        ("split", "split names 2 parts, the plan has 1"),
        ("interleave", "interleave needs at least 2 stages"),
        ("device", "device is 'cpu' or 'cuda', got 'tpu'"),
        ("autocast", "autocast is torch.bfloat16 or torch.float16, got 'bf16'"),
        ("scale", "loss_scale is a number above 0 or 'dynamic', got 'auto'"),
    ],
)
def test_a_mistake_is_said_before_or_in_the_first_step(
    mistake: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "HOLDFAST_AGENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["bad.py", mistake])
    with pytest.raises(ConfigError, match=message) as caught:
        load(BAD).main()
    assert "\n" not in str(caught.value)


def test_the_same_script_without_a_mistake_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bad.py", "none"])
    load(BAD).main()


def test_several_ranks_without_an_agent_are_told_to_use_holdfast_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bad.py", "none"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("HOLDFAST_AGENT", raising=False)
    with pytest.raises(ConfigError, match="2 ranks without a Holdfast agent: start the script with `holdfast run`"):
        load(BAD).main()


# ---- as jobs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("stages", ["2 stages need at least 2 layers, the model has 1"]),
        ("replicas", ["2 replicas need at least 2 microbatches a step, there are 1"]),
        ("argument", ["Trainer:", "unexpected keyword argument 'microbatchsize'"]),
        ("shape", ["layer 2 (Linear) does not take what layer 1 gives (float32[2, 4])"]),
        ("loss", ["the loss must return a scalar tensor"]),
        ("state socket", ["cannot capture user.mine.held.deep[0]", "socket"]),
    ],
)
def test_a_mistake_ends_the_whole_job_with_one_line(mistake: str, words: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    refused(jobs.job(tmp_path, 2, BAD, mistake), *words)
    assert time.monotonic() - started < SECONDS_MAX


def test_the_example_is_refused_with_one_line_too(tmp_path: Path) -> None:
    run = jobs.job(tmp_path, 2, PRETRAIN, "--preset", "tiny", "--steps", "3", "--interleave", "9", "--context", "16")
    refused(run, "18 stages need at least 18 layers")


def test_what_is_wrong_with_the_command_is_one_line(tmp_path: Path) -> None:
    refused(jobs.job(tmp_path / "script", 2, tmp_path / "absent.py"), "no such script")
    refused(jobs.job(tmp_path / "option", 2, BAD, "none", options=("--standbies", "3")), "did you mean --standbys?")
    refused(jobs.job(tmp_path / "fault", 2, BAD, "none", faults=["rank=0,at=lunch"]), "--faults", "'lunch'")


def test_the_example_under_torchrun_is_told_to_use_holdfast_run(tmp_path: Path) -> None:
    command = [sys.executable, str(PRETRAIN), "--preset", "tiny", "--steps", "3"]
    run = jobs.execute(tmp_path, command, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert run.code == 2
    assert run.err == (
        "pretrain: 2 ranks without a Holdfast agent: start the script with `holdfast run` instead of torchrun\n"
    )


def test_a_taken_coordinator_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = jobs.job(tmp_path, 2, BAD, "none", options=("--coordinator-bind", f"127.0.0.1:{port}"))
    refused(run, f"127.0.0.1:{port}", "in use")


def test_a_rank_with_a_wrong_token_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "stranger.py"
    script.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.environ['HOLDFAST_TOKEN'] = 'guessed'\n"
        f"runpy.run_path({str(BAD)!r}, run_name='__main__')\n"
    )
    run = jobs.job(tmp_path, 2, script, "none")
    refused(run, "wrong job token")


def test_a_fault_for_a_rank_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(jobs.job(tmp_path, 2, BAD, "none", faults=["rank=7,step=1,at=user,kind=kill"]), "rank 7", "2 ranks")


def test_nothing_of_this_leaves_a_process_behind() -> None:
    """The jobs above were children in sessions of their own: none of their scripts runs any more."""
    mine = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(BAD).encode() in (path / "cmdline").read_bytes() and int(path.name) != os.getpid():
                mine.append(path.name)
        except OSError:
            continue
    assert mine == []

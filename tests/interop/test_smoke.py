"""The short half of the interoperability tests, for every change: out of each framework, into our format, and back.

    DeepSpeed ZeRO-1, 2, 3 ─┐                                       ┌─▶ the framework loads it: the same bits, steps
    AutoTP on two ranks ────┼─▶ our format on disk, verified ───────┼─▶ and groups, and trains on with the same losses
    FSDP2 with DCP ─────────┘                                       └─▶ every other layout: the same bits

make interop-smoke; the long half (make test-interop) has other worlds, models and layouts. Names say what is compared
with what: the losses of the run that was never interrupted, digit for digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.ckpt.cli import main as ckpt
from holdfast.ckpt.formats import open_any
from holdfast.ckpt.tensors import load
from holdfast.ckpt.universal.verify import verify

LAYOUTS = [f"deepspeed:zero{stage},dp={dp}" for stage in (1, 3) for dp in (1, 2, 3, 4)]
LAYOUTS += ["deepspeed-universal", "dcp:dp=3", "fsdp2:dp=4"]


def saved(lab: Any, stage: int) -> tuple[Path, dict[str, Any]]:
    """What DeepSpeed saved at step 3 of 6, and what it reported."""
    found: tuple[Path, dict[str, Any]] = lab.once(
        f"smoke-zero{stage}", lambda at: lab.deepspeed(2, stage=stage, dump=True, save={"3": at})
    )
    return found


def there_and_back(lab: Any, name: str, source: Path, target: str) -> Path:
    """`source` in our format, and that as `target`; the folder of the latter."""

    def make(at: Path) -> None:
        at.mkdir()
        assert ckpt(["convert", str(source), str(at / "ours")]) == 0
        assert verify(at / "ours") == []
        assert ckpt(["reshard", str(at / "ours"), str(at / "back"), "--to", target]) == 0

    return lab.once(name, make)[0] / "back"


def check(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """What the framework holds after loading our files is what it held when it saved its own."""
    for name, states in expected["states"].items():
        for state, value in states.items():
            assert torch.equal(value, found["states"][name][state]), (name, state)
    assert found["hyper"] == expected["hyper"]


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_goes_on_from_what_went_through_our_format(lab: Any, stage: int) -> None:
    folder, report = saved(lab, stage)
    ours = there_and_back(lab, f"smoke-zero{stage}-back", folder, f"deepspeed:zero{stage},dp=2")
    found = lab.deepspeed(2, stage=stage, dump=True, load=ours)
    check(report["dump"], found["dump"])
    assert found["dump"]["steps"] == report["dump"]["steps"]
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_layout_holds_the_bits_that_deepspeed_held(lab: Any, stage: int, tmp_path: Path) -> None:
    folder, report = saved(lab, stage)
    held, source = report["dump"]["states"], open_any(folder)
    assert ckpt(["convert", str(folder), str(tmp_path / "ours")]) == 0
    for number, target in enumerate(LAYOUTS):
        there = tmp_path / str(number)
        lossy = ["--allow-lossy"] if source.metadata["source"]["stage"] < 3 else []  # rounded weights, made again
        assert ckpt(["reshard", str(tmp_path / "ours"), str(there), "--to", target, *lossy]) == 0
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            plain = state == "fp32" and target.startswith(("dcp", "fsdp2"))
            found = load(there, state="weight" if plain else state)
            for name, states in held.items():
                assert torch.equal(states[state], found[name]), (target, name, state)
        other = open_any(there)
        assert (other.steps, other.groups, other.aliases) == (source.steps, source.groups, source.aliases), target
    assert ckpt(["export", str(tmp_path / "ours"), str(tmp_path / "hf"), "--masters"]) == 0
    exported = load(tmp_path / "hf")
    assert all(torch.equal(states["fp32"], exported[name]) for name, states in held.items())


def tensor_parallel(lab: Any, stage: int) -> tuple[Path, dict[str, Any]]:
    """What DeepSpeed's AutoTP saved on two ranks at step 3 of 6, and what it reported."""
    found: tuple[Path, dict[str, Any]] = lab.once(
        f"smoke-tp-zero{stage}", lambda at: lab.autotp(2, stage=stage, save={"3": at})
    )
    return found


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [1, 3])
def test_parts_of_tensor_parallel_ranks_are_put_together_as_deepspeeds_own_converter_does(
    lab: Any, stage: int, tmp_path: Path
) -> None:
    folder, _ = tensor_parallel(lab, stage)
    lab.to_universal(folder, tmp_path)
    theirs, ours = open_any(tmp_path), open_any(folder)
    assert ours.metadata["source"]["mesh"] == {"dp": 1, "pp": 1, "tp": 2}
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        one, other = load(folder, state=state), load(tmp_path, state=state)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert ours.groups == theirs.groups
    assert ours.steps == theirs.steps


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    ("stage", "target", "options"),
    [
        (1, "deepspeed:zero1,dp=1,tp=2", {}),
        (3, "deepspeed:zero3,dp=1,tp=2", {}),
        (1, "deepspeed-universal", {"universal": True}),
    ],
)
def test_tensor_parallel_ranks_go_on_from_what_went_through_our_format(
    lab: Any, stage: int, target: str, options: dict[str, Any]
) -> None:
    folder, report = tensor_parallel(lab, stage)
    ours = there_and_back(lab, f"smoke-tp-{stage}-{len(options)}", folder, target)
    found = lab.autotp(2, stage=stage, load=ours, **options)
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}


def test_fsdp2_goes_on_from_what_went_through_our_format(lab: Any) -> None:
    folder, report = lab.once("smoke-fsdp2", lambda at: lab.fsdp(2, flat=False, save={"3": at}))
    found = lab.fsdp(2, load=there_and_back(lab, "smoke-fsdp2-back", folder, "fsdp2:dp=2"))
    check(report["dump"], found["dump"])
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}

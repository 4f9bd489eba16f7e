"""The short half of the interoperability tests, for every change: out of each framework, into our format, and back.

    DeepSpeed ZeRO-1, 2, 3 ─┐                                       ┌─▶ the framework loads it: the same bits, steps
    FSDP2 with DCP ─────────┴─▶ our format on disk, verified ───────┴─▶ and groups, and trains on with the same losses

make interop-smoke; the long half (make test-interop) has other worlds, models and layouts. Names say what is compared
with what: the losses of the run that was never interrupted, digit for digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.ckpt.cli import main as ckpt
from holdfast.ckpt.universal.verify import verify


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
    options = {"stage": stage, "dump": True}
    folder, report = lab.once(f"smoke-zero{stage}", lambda at: lab.deepspeed(2, **options, save={"3": at}))
    ours = there_and_back(lab, f"smoke-zero{stage}-back", folder, f"deepspeed:zero{stage},dp=2")
    found = lab.deepspeed(2, **options, load=ours)
    check(report["dump"], found["dump"])
    assert found["dump"]["steps"] == report["dump"]["steps"]
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}


def test_fsdp2_goes_on_from_what_went_through_our_format(lab: Any) -> None:
    folder, report = lab.once("smoke-fsdp2", lambda at: lab.fsdp(2, flat=False, save={"3": at}))
    found = lab.fsdp(2, load=there_and_back(lab, "smoke-fsdp2-back", folder, "fsdp2:dp=2"))
    check(report["dump"], found["dump"])
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}

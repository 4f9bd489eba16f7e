"""FSDP2 and torch.distributed.checkpoint themselves save and load; and DeepSpeed goes on where FSDP2 stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.ckpt.formats import open_any, write_as
from holdfast.ckpt.universal.read import Reader


def made(lab: Any, *, flat: bool = False) -> tuple[Path, dict[str, Any]]:
    name = "fsdp2-flat" if flat else "fsdp2"
    folder, report = lab.once(name, lambda at: lab.fsdp(2, flat=flat, save={"3": at}))
    return folder, report


def written(lab: Any, source: Path, target: str, name: str) -> Path:
    def make(at: Path) -> None:
        with Reader(open_any(source)) as reader:
            write_as(target, reader, at)

    return lab.once(name, make)[0]


def check(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name, states in expected.items():
        for state, value in states.items():
            other = found[name].get(state)
            if other is None:
                other = found[name]["fp32" if state == "weight" else "weight"] if state in ("weight", "fp32") else None
            if other is not None:
                assert torch.equal(value, other.reshape(value.shape)), (name, state)


@pytest.mark.parametrize("flat", [False, True])
def test_what_we_read_is_what_fsdp_holds(lab: Any, flat: bool) -> None:
    folder, report = made(lab, flat=flat)
    reader = Reader(open_any(folder))
    for name, states in report["dump"]["states"].items():
        for state, value in states.items():
            if state == "step":
                assert reader.checkpoint.steps[name] == value.item()
            else:
                assert bytes(reader.read(name, state)) == value.detach().numpy().tobytes(), (name, state)
    assert reader.checkpoint.states["scale", "buffer"].role == "buffer"
    assert [group.hyper["lr"] for group in reader.checkpoint.groups] == [0.01, 0.03]


@pytest.mark.parametrize(
    ("target", "world", "options"),
    [
        ("fsdp2:dp=2", 2, {}),
        ("fsdp2:dp=3,dim=1", 2, {}),
        ("fsdp2:dp=2,flat=true", 2, {"flat": True}),
        ("fsdp2:dp=4", 4, {}),
        ("fsdp2:dp=3", 1, {}),
    ],
)
def test_fsdp_goes_on_from_our_files(lab: Any, target: str, world: int, options: dict[str, Any]) -> None:
    folder, report = made(lab)
    found = lab.fsdp(world, load=written(lab, folder, target, f"as-{target}".replace(":", "-")), **options)
    check(report["dump"]["states"], found["dump"]["states"])
    assert found["dump"]["hyper"] == report["dump"]["hyper"]
    for step in (3, 4, 5):
        if world == 2:
            assert found["losses"][step] == report["losses"][step]
        else:
            assert found["losses"][step] == pytest.approx(report["losses"][step], rel=1e-6)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(("target", "stage"), [("deepspeed:zero1,dp=2", 1), ("deepspeed:zero3,dp=2", 3)])
def test_deepspeed_goes_on_where_fsdp_stopped_with_fsdps_losses(lab: Any, target: str, stage: int) -> None:
    folder, report = made(lab)
    ours = written(lab, folder, target, f"fsdp-as-zero{stage}")
    # The FSDP job has no scheduler and no clipping, and calls its step by another name.
    same = {"dtype": "fp32", "next": 3, "clip": 0, "constant": True, "dump": True}
    found = lab.deepspeed(2, stage=stage, load=ours, **same)
    check(report["dump"]["states"], found["dump"]["states"])
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(("stage", "dtype"), [(2, "bf16"), (3, "fp32")])
def test_fsdp_holds_deepspeeds_bits_and_goes_on(lab: Any, stage: int, dtype: str) -> None:
    name = f"for-fsdp-{stage}"
    folder, report = lab.once(name, lambda at: lab.deepspeed(2, stage=stage, dtype=dtype, dump=True, save={"3": at}))
    found = lab.fsdp(3, load=written(lab, folder, "fsdp2:dp=3", f"{name}-as-fsdp2"), next=3)
    check(report["dump"]["states"], found["dump"]["states"])
    assert [h["lr"] for h in found["dump"]["hyper"]] == [h["lr"] for h in report["dump"]["hyper"]]
    assert found["losses"][3] == pytest.approx(report["losses"][3], rel=1e-6 if dtype == "fp32" else 1e-3)

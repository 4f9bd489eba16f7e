"""DeepSpeed itself trains, saves and loads: what we read is what it holds, and it goes on from what we write.

"Goes on" means: bit-equal master copies and moments inside of DeepSpeed's optimizer right after loading, the right
step and hyper-parameters in each group, and then the losses of its own resume, digit for digit, where the world
is the same. In another world sums are taken in another order; there DeepSpeed's own universal path, or float32
and a tolerance of a few units in the last place, is what we compare with.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.ckpt.formats import open_any, write_as
from holdfast.ckpt.universal.read import Reader

pytestmark = pytest.mark.usefixtures("deepspeed")

SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "z0": (2, {"stage": 0}),
    "z1": (2, {"stage": 1, "dump": True}),
    "z2": (2, {"stage": 2, "dump": True}),
    "z3": (2, {"stage": 3, "dump": True}),
    "z2 on 3": (3, {"stage": 2, "dump": True}),
    "z3 on 3": (3, {"stage": 3, "dump": True}),
    "z3 sub-groups": (2, {"stage": 3, "dump": True, "zero": {"sub_group_size": 400}}),
    "z2 aligned": (2, {"stage": 2, "dump": True, "zero": {"parameter_alignment": True}}),
    "z2 round robin": (2, {"stage": 2, "zero": {"round_robin_gradients": True}}),
    "z1 fp32": (2, {"stage": 1, "dump": True, "dtype": "fp32"}),
    "z3 fp32": (2, {"stage": 3, "dump": True, "dtype": "fp32"}),
    "z2 frozen": (2, {"stage": 2, "dump": True, "model": "frozen"}),
    "z3 frozen": (2, {"stage": 3, "dump": True, "model": "frozen", "dtype": "fp32"}),
    "z2 tied": (2, {"stage": 2, "dump": True, "model": "tied"}),
    "z3 tied": (2, {"stage": 3, "dump": True, "model": "tied", "dtype": "fp32"}),
    "pipeline": (4, {"stage": 1, "model": "pipe", "pp": 2, "dtype": "fp32"}),
    "moe": (2, {"stage": 2, "model": "moe", "ep": 2, "dtype": "fp32"}),
}


def made(lab: Any, name: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint at step 3 of a run that went on to step 6, and what the run reported."""
    world, options = SOURCES[name]
    folder, report = lab.once(name.replace(" ", "-"), lambda at: lab.deepspeed(world, **options, save={"3": at}))
    return folder, report


def settings(name: str) -> dict[str, Any]:
    """The options of a source that a job resuming from it has as well."""
    return {k: v for k, v in SOURCES[name][1].items() if k in ("model", "dtype", "pp", "ep", "dump")}


def tensor(reader: Reader, name: str, state: str) -> torch.Tensor:
    found = reader.checkpoint.tensor(name, state)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[found.dtype]
    return torch.frombuffer(bytearray(reader.read(name, state)), dtype=dtype).reshape(found.shape)


def converted(lab: Any, source: str, target: str) -> Path:
    folder, _ = made(lab, source)
    name = f"{source} as {target}".replace(" ", "-").replace(":", "-").replace("=", "")

    def make(at: Path) -> None:
        with Reader(open_any(folder)) as reader:
            write_as(target, reader, at)

    return lab.once(name, make)[0]


def check_dump(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """What DeepSpeed holds after loading our files is what it held when it saved its own."""
    for name, states in expected["states"].items():
        for state, value in states.items():
            assert torch.equal(value, found["states"][name][state]), (name, state)
    assert found["hyper"] == expected["hyper"]
    assert found["steps"] == expected["steps"]


@pytest.mark.parametrize("name", [name for name, (_, options) in SOURCES.items() if options.get("dump")])
def test_what_we_read_is_what_deepspeed_holds(lab: Any, name: str) -> None:
    folder, report = made(lab, name)
    checkpoint = open_any(folder)
    reader = Reader(checkpoint)
    for parameter, states in report["dump"]["states"].items():
        for state, value in states.items():
            assert torch.equal(tensor(reader, parameter, state), value), (parameter, state)
    assert set(checkpoint.steps.values()) == {int(step) for step in report["dump"]["steps"]}
    assert [g.hyper["weight_decay"] for g in checkpoint.groups] == [h["weight_decay"] for h in report["dump"]["hyper"]]
    if "tied" in name:
        assert checkpoint.aliases == {"head.weight": "embed.weight"}
    assert {n for (n, _), t in checkpoint.states.items() if t.role == "frozen"} == (
        {"blocks.0.up.weight", "blocks.1.norm.bias"} if "frozen" in name else set()
    )


@pytest.mark.parametrize("name", [name for name in SOURCES if "z3" not in name])
def test_a_weight_is_its_master_copy_rounded(lab: Any, name: str) -> None:
    # Catches any state that is given to the wrong parameter, where DeepSpeed shows no tensors by name, or, with
    # round_robin_gradients, shows the wrong ones itself.
    reader = Reader(open_any(made(lab, name)[0]))
    pairs = [
        n for n, state in reader.checkpoint.states if state == "fp32" and (n, "weight") in reader.checkpoint.states
    ]
    assert len(pairs) >= 10
    for parameter in pairs:
        weight = tensor(reader, parameter, "weight")
        assert torch.equal(weight, tensor(reader, parameter, "fp32").to(weight.dtype)), parameter


def test_deepspeeds_own_resume_is_the_uninterrupted_run(lab: Any) -> None:
    folder, report = made(lab, "z3")
    own = lab.deepspeed(2, stage=3, load=folder)
    assert own["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}


SAME_WORLD = [
    ("z1", "deepspeed:zero1,dp=2", 1, {}),
    ("z2", "deepspeed:zero1,dp=2", 1, {}),
    ("z1", "deepspeed:zero2,dp=2", 2, {}),
    ("z3", "deepspeed:zero3,dp=2", 3, {}),
    ("z3 sub-groups", "deepspeed:zero3,dp=2", 3, {"zero": {"sub_group_size": 400}}),
    ("z1 fp32", "deepspeed:zero3,dp=2", 3, {}),
    ("z3 fp32", "deepspeed:zero1,dp=2", 1, {}),
    ("z2 frozen", "deepspeed:zero2,dp=2", 2, {}),
    ("z3 frozen", "deepspeed:zero1,dp=2", 1, {}),
    ("z2 tied", "deepspeed:zero2,dp=2", 2, {}),
    ("z3 tied", "deepspeed:zero2,dp=2", 2, {}),
    ("pipeline", "deepspeed:zero1,dp=2", 1, {}),
    ("moe", "deepspeed:zero2,dp=2", 2, {}),
    ("moe", "deepspeed:zero2,dp=2,ep=1", 2, {"ep": 1}),
    ("z0", "deepspeed:zero1,dp=2", 1, {}),
]


@pytest.mark.parametrize(("source", "target", "stage", "more"), SAME_WORLD)
def test_it_goes_on_from_our_files_with_the_losses_of_its_own_resume(
    lab: Any, source: str, target: str, stage: int, more: dict[str, Any]
) -> None:
    _, report = made(lab, source)
    options = {**settings(source), "stage": stage, **more}
    found = lab.deepspeed(SOURCES[source][0], **options, load=converted(lab, source, target))
    if options.get("dump"):
        check_dump(report["dump"], found["dump"])
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}


OTHER_WORLD = [
    ("z2", "deepspeed:zero3,dp=1", 1, 3, {}, 1e-3),
    ("z2", "deepspeed:zero3,dp=4", 4, 3, {}, 1e-3),
    ("z3", "deepspeed:zero1,dp=3", 3, 1, {}, 1e-3),
    ("z3 fp32", "deepspeed:zero3,dp=3", 3, 3, {}, 1e-6),
    ("z3 fp32", "deepspeed:zero1,dp=1", 1, 1, {}, 1e-6),
    ("z3 frozen", "deepspeed:zero1,dp=3", 3, 1, {}, 1e-6),
    ("pipeline", "deepspeed:zero1,dp=1", 2, 1, {}, 1e-6),
    ("moe", "deepspeed:zero1,dp=4,ep=4", 4, 1, {"ep": 4}, 1e-6),
]


@pytest.mark.parametrize(("source", "target", "world", "stage", "more", "within"), OTHER_WORLD)
def test_it_goes_on_in_another_world_from_the_same_bits(
    lab: Any, source: str, target: str, world: int, stage: int, more: dict[str, Any], within: float
) -> None:
    _, report = made(lab, source)
    options = {**settings(source), "stage": stage, **more}
    found = lab.deepspeed(world, **options, load=converted(lab, source, target))
    if options.get("dump"):
        check_dump(report["dump"], found["dump"])
    for step in (3, 4, 5):
        assert found["losses"][step] == pytest.approx(report["losses"][step], rel=within)


# ---- its universal folders --------------------------------------------------------------------------------------


def universal(lab: Any, source: str) -> Path:
    """What ds_to_universal makes of a checkpoint."""
    folder, _ = made(lab, source)

    def make(at: Path) -> None:
        at.mkdir()
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += [
            "--input_folder",
            str(folder / "global_step3"),
            "--output_folder",
            str(at / "global_step3_universal"),
        ]
        subprocess.run(command, check=True, capture_output=True, cwd=at, timeout=300)

    return lab.once(f"{source}-by-ds_to_universal".replace(" ", "-"), make)[0]


@pytest.mark.parametrize("source", ["z1", "z3", "z2 frozen", "pipeline"])
def test_its_universal_folder_holds_what_its_own_files_hold(lab: Any, source: str) -> None:
    own, other = Reader(open_any(made(lab, source)[0])), Reader(open_any(universal(lab, source)))
    assert other.checkpoint.format == "deepspeed:universal"
    for key in other.checkpoint.states:
        assert bytes(other.read(*key)) == bytes(own.read(*key)), key
    assert (other.checkpoint.groups, other.checkpoint.steps) == (own.checkpoint.groups, own.checkpoint.steps)


@pytest.mark.parametrize("source", ["z1", "z3"])
def test_one_universal_folder_of_ours_serves_other_worlds_and_stages(lab: Any, source: str) -> None:
    _, report = made(lab, source)
    folder = converted(lab, source, "deepspeed-universal")
    for world, stage in ((3, 2), (2, 3)):
        found = lab.deepspeed(world, stage=stage, dump=True, load=folder, universal=True)
        for name, states in report["dump"]["states"].items():
            for state, value in states.items():
                assert torch.equal(value, found["dump"]["states"][name][state]), (name, state)


def test_in_another_world_our_files_and_its_own_universal_path_give_the_same_losses(lab: Any) -> None:
    own = lab.deepspeed(3, stage=2, load=universal(lab, "z1"), universal=True)["losses"]
    ours = lab.deepspeed(3, stage=2, load=converted(lab, "z1", "deepspeed-universal"), universal=True)["losses"]
    native = lab.deepspeed(3, stage=2, load=converted(lab, "z1", "deepspeed:zero2,dp=3"))["losses"]
    assert native == own
    assert ours == own

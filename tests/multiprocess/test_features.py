"""Every feature of the trainer under kills: the job ends with the bits of one process that nothing happened to.

    reference: one process, no agent ──┐
    job: other layout, scripted kills ─┴─▶ parameters, buffers, optimizer state, losses, norms: all equal

So each test shows two things at once: that the layout does not show, and that the failures do not.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import jobs  # noqa: E402

FEATURES = ROOT / "tests" / "helpers" / "scripts" / "features.py"
PRETRAIN = ROOT / "examples" / "pretrain.py"


def assert_equal(run: jobs.Ended, reference: jobs.Ended) -> None:
    found, expected = run.state(), reference.state()
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:4]}"


def assert_survived(run: jobs.Ended, faults: list[str]) -> None:
    """Ended well; each fault fired once, and nobody else was replaced."""
    assert run.code == 0, run.err
    hit = Counter(int(fault.partition(",")[0].removeprefix("rank=")) for fault in faults)
    assert run.started() == {rank: 1 + hit[rank] for rank in run.started()}, run.err


def check(folder: Path, ranks: int, case: str, faults: list[str], *layout: str, steps: int = 12) -> jobs.Ended:
    """The case in one process and as a job with faults: same state, and rank 0 is told the same of each step."""
    common = (case, "--steps", str(steps))
    reference = jobs.reference(folder / "reference", FEATURES, *common)
    out = folder / "job"
    run = jobs.job(out, ranks, FEATURES, *common, "--out", str(out / "out"), *layout, faults=faults)
    assert_survived(run, faults)
    assert_equal(run, reference)
    if all("rank=0" not in fault for fault in faults):
        assert run.told() == reference.told()
    return run


def test_tuples_buffers_dropout_streams_and_user_state_survive_kills_in_every_stage(tmp_path: Path) -> None:
    faults = [
        "rank=2,step=3,at=backward:1,kind=kill",
        "rank=0,step=5,at=forward:3,kind=kill",
        "rank=1,step=7,at=optimizer,kind=kill",
        "rank=2,step=9,at=applied,kind=kill",
        "rank=1,step=11,at=forward:5,kind=kill",
    ]
    check(tmp_path, 3, "odd", faults)

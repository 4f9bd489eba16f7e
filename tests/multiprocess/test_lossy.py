"""Stages lost without a snapshot of the last step: every job ends with the bits of one plain process that did by hand
what the rung should have done, and everything that is not exact is said to be so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from jobs import Ended, job, reference  # noqa: E402

SCRIPT = HELPERS / "scripts" / "lossy.py"


def kill(rank: int, step: int, at: str) -> str:
    return f"rank={rank},step={step},at={at},kind=kill"


def recoveries(ended: Ended) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    return [event for event in ended.events if event["event"] == "recovery"]


def told(ended: Ended) -> list[dict[str, Any]]:
    """What a rank that was never replaced was told."""
    ranks = range(len(list((ended.folder / "out").glob("*.json"))))
    return max((ended.told(rank) for rank in ranks), key=len)


def assert_as_if_by_hand(ended: Ended, folder: Path, surgery: list[dict[str, Any]], *arguments: str) -> None:
    plain = reference(folder / "plain", SCRIPT, "--plain", json.dumps(surgery), *arguments)
    found, expected = ended.state(), plain.state()
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert different == [], f"{len(different)} of {len(found)} tensors"
    assert [(one["loss"], one["lr"]) for one in told(ended)] == [(one["loss"], one["lr"]) for one in told(plain)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """No failure, exact mode without snapshots: what a healthy step of another mode is compared with."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended = job(folder, 4, SCRIPT, "--steps", "13", "--out", str(folder / "out"), options=("--snapshots", "off"))
    assert ended.code == 0, ended.err
    return ended


def test_inner_stages_lost_at_every_point_are_rebuilt_from_their_neighbours(tmp_path: Path, unbroken: Ended) -> None:
    faults = [
        kill(2, 4, "forward:1"),
        kill(1, 6, "backward:2"),
        kill(2, 8, "applied"),  # at the boundary: some survivors have applied the step, all have it ready
        kill(2, 11, "forward:0"),
        kill(1, 10, "restore"),  # during the recovery of stage 2: two stages beside each other
    ]
    arguments = ["--steps", "13"]
    # Stage 1 does not hear the end of the second barrier either, which nobody dies of.
    ended = job(
        tmp_path, 4, SCRIPT, *arguments, "--cut", "1:2", "--out", str(tmp_path / "out"),
        faults=faults, options=("--recovery", "neighbours"),
    )  # fmt: skip
    found = recoveries(ended)
    assert [event["exact"] for event in found] == [True, False, False, False, False]
    assert found[0]["sources"].keys() == {"live", "ready"}
    assert found[0]["resume_step"] == 2, "the others had applied it"
    steps = [event["resume_step"] for event in found]
    assert (steps[1], steps[2], steps[4]) == (3, 5, 10)
    assert steps[3] in (7, 8)
    surgery = [
        {"step": steps[1], "stage": 2, "how": "average"},
        {"step": steps[2], "stage": 1, "how": "average"},
        {"step": steps[3], "stage": 2, "how": "average"},
        {"step": 10, "stage": 1, "how": "depth", "from": [0, 3]},
        {"step": 10, "stage": 2, "how": "depth", "from": [0, 3]},
    ]
    assert_as_if_by_hand(ended, tmp_path, surgery, *arguments)
    assert_said(ended, found, since=4, last="stage 1 rebuilt from its neighbours; stage 2 rebuilt from its neighbours")
    healthy = [(a["sent"], b["sent"]) for a, b in zip(told(ended), told(unbroken), strict=True) if not a["recovered"]]
    assert len(healthy) > 5
    assert {a - b for a, b in healthy[1:]} == {0}, "a healthy step sends nothing more than without recovery"


def assert_said(ended: Ended, found: list[dict[str, Any]], since: int, last: str) -> None:
    lossy = [event for event in found if not event["exact"]]
    lines = [line for line in ended.err.splitlines() + ended.out.splitlines() if line.startswith("[holdfast] ")]
    assert sum("NOT exact: stage" in line for line in lines) == len(lossy)
    assert lines[-1] == (
        f"[holdfast] done, NOT exact since step {since}; {len(lossy)} recoveries were not, the last: {last}"
    )
    texts = [text for one in told(ended) for text in one["recovered"]]
    assert sum("; NOT exact: stage" in text for text in texts) == len(lossy)
    for event in lossy:
        assert all(one["how"] for one in event["inexact"].values())


def test_ends_and_stages_lost_together_are_rebuilt_from_what_is_left(tmp_path: Path) -> None:
    faults = [
        kill(1, 3, "user"), kill(3, 3, "user"),
        kill(0, 5, "forward:0"),
        kill(5, 7, "backward:1"),
    ]  # fmt: skip
    arguments = ["--steps", "8", "--split", "1,1,1,1,1,1"]
    ended = job(
        tmp_path, 6, SCRIPT, *arguments, "--out", str(tmp_path / "out"),
        faults=faults, options=("--recovery", "neighbours", "--standbys", "2"),
    )  # fmt: skip
    found = recoveries(ended)
    assert [sorted(event["inexact"]) for event in found] == [["1", "3"], ["0"], ["5"]]
    surgery = [
        {"step": 2, "stage": 1, "how": "average"},
        {"step": 2, "stage": 3, "how": "average"},
        {"step": 4, "stage": 0, "how": "copy", "of": 1},
        {"step": 6, "stage": 5, "how": "copy", "of": 4},
    ]
    assert_as_if_by_hand(ended, tmp_path, surgery, *arguments)


def test_a_lost_stage_alone_goes_back_to_its_older_copy_also_that_of_the_embedding(tmp_path: Path) -> None:
    arguments = ["--steps", "9", "--model", "edges", "--split", "2,1,1,2"]
    ended = job(
        tmp_path, 4, SCRIPT, *arguments, "--out", str(tmp_path / "out"),
        faults=[kill(0, 6, "forward:2"), kill(2, 9, "commit")],
        options=("--recovery", "stale", "--stale-every", "3"),
    )  # fmt: skip
    found = recoveries(ended)
    assert [event["resume_step"] for event in found] == [5, 8]
    assert [event["inexact"] for event in found] == [
        {
            "0": {
                "rung": "stale",
                "stage": 0,
                "step": 3,
                "age": 2,
                "how": "stage 0 went back alone to step 3 (2 steps old)",
            }
        },
        {
            "2": {
                "rung": "stale",
                "stage": 2,
                "step": 6,
                "age": 2,
                "how": "stage 2 went back alone to step 6 (2 steps old)",
            }
        },
    ]
    surgery = [
        {"step": 5, "stage": 0, "how": "older", "from": 3},
        {"step": 8, "stage": 2, "how": "older", "from": 6},
    ]
    assert_as_if_by_hand(ended, tmp_path, surgery, *arguments)
    assert_said(ended, found, since=6, last="stage 2 went back alone to step 6 (2 steps old)")


def test_the_embedding_without_another_holder_ends_the_job_with_a_line_that_names_it(tmp_path: Path) -> None:
    ended = job(
        tmp_path, 4, SCRIPT, "--model", "edges", "--split", "2,1,1,2",
        faults=[kill(0, 3, "forward:0")], options=("--recovery", "neighbours"),
    )  # fmt: skip
    assert ended.code == 1
    (line,) = ended.errors
    assert (
        "state after step 2 is lost. stage 0 (rank 0): no live rank has layer 0, nor a layer of the same kind." in line
    )
    assert "What helps: " in line
    assert "Traceback" not in ended.err


def test_a_replica_is_exact_and_when_all_of_a_stage_are_lost_they_are_rebuilt_alike(tmp_path: Path) -> None:
    arguments = ["--steps", "7", "--split", "1,1"]
    ended = job(
        tmp_path, 4, SCRIPT, *arguments, "--replicas", "2", "--out", str(tmp_path / "out"),
        faults=[kill(1, 3, "forward:0"), kill(1, 5, "user"), kill(3, 5, "user")],
        options=("--recovery", "neighbours", "--standbys", "2"),
    )  # fmt: skip
    found = recoveries(ended)
    assert [event["exact"] for event in found] == [True, False]
    assert_as_if_by_hand(ended, tmp_path, [{"step": 4, "stage": 1, "how": "copy", "of": 0}], *arguments)


def test_auto_stays_exact_as_long_as_snapshots_are_there(tmp_path: Path, unbroken: Ended) -> None:
    ended = job(
        tmp_path, 4, SCRIPT, "--steps", "13", "--cut", "1:3", "--out", str(tmp_path / "out"),
        faults=[kill(2, 3, "applied"), kill(0, 7, "backward:1")], options=("--recovery", "auto"),
    )  # fmt: skip
    found = recoveries(ended)
    assert all(event["exact"] for event in found)
    assert "NOT exact" not in ended.err + ended.out
    state, expected = ended.state(), unbroken.state()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []

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
sys.path[:0] = [str(HELPERS.parents[1] / "benchmarks"), str(HELPERS)]

from host_losses import is_protected, steps_of  # noqa: E402
from hosts import Hosts, start_job, wait_for  # noqa: E402
from jobs import Ended, job, reference  # noqa: E402

SCRIPT = HELPERS / "scripts" / "lossy.py"


def kill(rank: int, step: int, at: str) -> str:
    """In a backward, or later: by then every rank has applied the step before."""
    return f"rank={rank},step={step},at={at},kind=kill"


def recoveries(ended: Ended) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    return [event for event in ended.events if event["event"] == "recovery"]


def told(ended: Ended) -> list[dict[str, Any]]:
    """What every process that lived to the end was told."""
    ranks = range(len(list((ended.folder / "out").glob("*.json"))))
    return [one for rank in ranks for one in ended.told(rank)]


def assert_as_if_by_hand(ended: Ended, folder: Path, surgery: list[dict[str, Any]], *arguments: str) -> None:
    plain = reference(folder / "plain", SCRIPT, "--plain", json.dumps(surgery), *arguments)
    found, expected = ended.state(), plain.state()
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert different == [], f"{len(different)} of {len(found)} tensors"
    by_step = {one["step"]: (one["loss"], one["lr"]) for one in told(plain)}
    assert [one["step"] for one in told(ended) if by_step[one["step"]] != (one["loss"], one["lr"])] == []


def test_stages_lost_at_every_point_alone_and_together_are_rebuilt_from_what_is_left(tmp_path: Path) -> None:
    faults = [
        kill(2, 4, "forward:1"),
        kill(3, 6, "backward:2"),
        kill(2, 8, "applied"),  # at the boundary: some survivors have applied the step, all have it ready
        kill(1, 10, "backward:0"), kill(3, 9, "join"),  # two that are not adjacent
        kill(0, 12, "backward:0"),
        kill(5, 13, "backward:1"),
        kill(3, 15, "backward:0"), kill(4, 14, "restore"),  # during the recovery of the stage beside it
    ]  # fmt: skip
    arguments = ["--steps", "16", "--split", "1,1,1,1,1,1"]
    # Stage 1 does not hear the end of the second barrier either, which nobody dies of.
    ended = job(
        tmp_path, 6, SCRIPT, *arguments, "--cut", "1:2", "--out", str(tmp_path / "out"),
        faults=faults, options=("--recovery", "neighbours", "--standbys", "2"), deadline_s=240.0,
    )  # fmt: skip
    found = recoveries(ended)
    assert [event["exact"] for event in found] == [True] + [False] * 7
    assert found[0]["sources"].keys() == {"live", "ready"}
    assert [sorted(event["inexact"]) for event in found[1:]] == [
        ["2"], ["3"], ["2"], ["1", "3"], ["0"], ["5"], ["3", "4"],
    ]  # fmt: skip
    steps = [event["resume_step"] for event in found]
    assert steps[0] == 2, "the others had applied it"
    assert steps[3] in (7, 8)
    assert [*steps[1:3], *steps[4:]] == [3, 5, 9, 11, 12, 14]
    surgery = [
        {"step": steps[1], "stage": 2, "how": "average"},
        {"step": steps[2], "stage": 3, "how": "average"},
        {"step": steps[3], "stage": 2, "how": "average"},
        {"step": steps[4], "stage": 1, "how": "average"},
        {"step": steps[4], "stage": 3, "how": "average"},
        {"step": steps[5], "stage": 0, "how": "copy", "of": 1},
        {"step": steps[6], "stage": 5, "how": "copy", "of": 4},
        {"step": steps[7], "stage": 3, "how": "depth", "from": [2, 5]},
        {"step": steps[7], "stage": 4, "how": "depth", "from": [2, 5]},
    ]
    assert_as_if_by_hand(ended, tmp_path, surgery, *arguments)
    assert_said(ended, found, since=4, last="stage 3 rebuilt from its neighbours; stage 4 rebuilt from its neighbours")


def assert_said(ended: Ended, found: list[dict[str, Any]], since: int, last: str) -> None:
    lossy = [event for event in found if not event["exact"]]
    lines = [line for line in ended.err.splitlines() + ended.out.splitlines() if line.startswith("[holdfast] ")]
    assert sum("NOT exact: stage" in line for line in lines) == len(lossy)
    assert lines[-1] == (
        f"[holdfast] done, NOT exact since step {since}; {len(lossy)} recoveries were not, the last: {last}"
    )
    exact = {f"generation {event['generation']}": event["exact"] for event in found}
    texts = [text for one in told(ended) for text in one["recovered"] if text.partition(":")[0] in exact]
    assert texts
    assert all(("; NOT exact: stage" in text) != exact[text.partition(":")[0]] for text in texts)
    for event in lossy:
        assert all(one["how"] for one in event["inexact"].values())


def test_a_lost_stage_alone_goes_back_to_its_older_copy_also_that_of_the_embedding(tmp_path: Path) -> None:
    arguments = ["--steps", "9", "--model", "edges", "--split", "2,1,1,2"]
    ended = job(
        tmp_path, 4, SCRIPT, *arguments, "--out", str(tmp_path / "out"),
        faults=[kill(0, 6, "backward:0"), kill(2, 9, "commit")],
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


@pytest.mark.skipif(Hosts.available() is not None, reason=f"no namespaces: {Hosts.available()}")
def test_hosts_of_adjacent_stages_lost_together_find_both_copies_on_hosts_that_are_left(tmp_path: Path) -> None:
    arguments = ["--steps", "24"]
    with Hosts(4) as hosts:
        options = ["--recovery", "stale", "--stale-every", "3", "--lease-min", "4", "--host-lease", "5"]
        job = start_job(hosts, SCRIPT, [*arguments, "--step-seconds", "0.3"], options=options)
        wait_for(lambda: is_protected(job) and steps_of(job) > 3, 90.0, "copies on other hosts")
        # Each host's output names its rank, and a rank is a stage here.
        host_of = {int((job.folder / f"host{i}" / "run.out").read_text().split()[2]): i for i in range(4)}
        for rank in (1, 2):
            hosts[host_of[rank]].kill()
        ended = job.wait(90.0, only={host_of[0], host_of[3]})
        found = recoveries(ended)
        lost = [(event["resume_step"], rank, one) for event in found for rank, one in event["inexact"].items()]
        assert {(rank, one["rung"]) for _, rank, one in lost} == {("1", "stale"), ("2", "stale")}
        surgery = [{"step": at, "stage": one["stage"], "how": "older", "from": one["step"]} for at, _, one in lost]
        assert_as_if_by_hand(ended, tmp_path, surgery, *arguments)


def test_the_embedding_without_another_holder_ends_the_job_with_a_line_that_names_it(tmp_path: Path) -> None:
    ended = job(
        tmp_path, 4, SCRIPT, "--model", "edges", "--split", "2,1,1,2",
        faults=[kill(0, 3, "backward:0")], options=("--recovery", "neighbours"),
    )  # fmt: skip
    assert ended.code == 1
    (line,) = ended.errors
    assert (
        "state after step 2 is lost. stage 0 (rank 0): no live rank has layer 0, nor a layer of the same kind." in line
    )
    assert "What helps: " in line
    assert "Traceback" not in ended.err


def test_auto_stays_exact_as_long_as_snapshots_are_there(tmp_path: Path) -> None:
    ended = job(
        tmp_path, 4, SCRIPT, "--steps", "9", "--cut", "1:3", "--out", str(tmp_path / "out"),
        faults=[kill(2, 3, "applied"), kill(0, 7, "backward:1")], options=("--recovery", "auto"),
    )  # fmt: skip
    found = recoveries(ended)
    assert all(event["exact"] for event in found)
    assert "NOT exact" not in ended.err + ended.out
    assert_as_if_by_hand(ended, tmp_path, [], "--steps", "9")

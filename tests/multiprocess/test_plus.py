"""CheckFree+ with real kills: edges come back exactly, ends from their partners, and what is not exact is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from jobs import job, reference  # noqa: E402

SCRIPT = HELPERS / "scripts" / "lossy.py"
STAGES = 6


def kill(rank: int, step: int, at: str) -> str:
    return f"rank={rank},step={step},at={at},kind=kill"


def test_ends_and_their_partners_are_lost_and_the_edges_are_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """One plain process in the same order, where blocks are copied by hand and edges are left alone, ends the same."""
    faults = [
        kill(0, 3, "forward:1"),  # S1, with the embedding
        kill(1, 5, "backward:2"),  # S2, with its shadow
        kill(5, 7, "backward:0"), kill(0, 6, "join"),  # both ends at once: the first before it can report
        kill(2, 9, "forward:0"),  # a stage in the middle
    ]  # fmt: skip
    arguments = ["--model", "edges", "--split", "2,1,1,1,1,2", "--steps", "11"]
    ended = job(
        tmp_path, STAGES, SCRIPT, *arguments, "--out", str(tmp_path / "out"),
        faults=faults, options=("--recovery", "neighbours+", "--standbys", "2"),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = [event for event in ended.events if event["event"] == "recovery"]
    assert [(event["resume_step"], sorted(event["inexact"])) for event in found] == [
        (2, ["0"]),
        (4, ["1"]),
        (6, ["0", "5"]),
        (8, ["2"]),
    ]
    assert "layer 0 taken from rank 1" in found[0]["inexact"]["0"]["how"]
    surgery = [
        {"step": 2, "stage": 0, "how": "copy", "of": 1},
        {"step": 4, "stage": 1, "how": "copy", "of": 0},
        {"step": 6, "stage": 0, "how": "copy", "of": 1},
        {"step": 6, "stage": 5, "how": "copy", "of": 4},
        {"step": 8, "stage": 2, "how": "average"},
    ]
    plain = reference(tmp_path / "plain", SCRIPT, "--plain", json.dumps(surgery), "--swapped", *arguments)
    state, expected = ended.state(), plain.state()  # of what two ranks hold, both are compared
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    held = ended.state_by_rank()
    assert all(f"rank-{rank}.safetensors 0.weight@exp_avg" in held for rank in (0, 1))
    assert all(f"rank-{rank}.safetensors 7.weight@exp_avg" in held for rank in (4, 5))


def test_a_checkpoint_of_swapped_stages_with_shadows_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Edges are in it once, though two ranks hold them; both have them again."""
    arguments = ["--model", "edges", "--split", "2,1,1,2", "--steps", "8"]
    saving = ("--checkpoint-dir", str(tmp_path / "checkpoints"), "--checkpoint-every", "4")
    plus = ("--recovery", "neighbours+")
    out = ("--out", str(tmp_path / "whole" / "out"))
    whole = job(tmp_path / "whole", 4, SCRIPT, *arguments, *out, options=(*plus, *saving))
    assert whole.code == 0, whole.err
    begin = ("--resume", str(tmp_path / "checkpoints" / "step-00000004"))
    out = ("--out", str(tmp_path / "resumed" / "out"))
    resumed = job(tmp_path / "resumed", 4, SCRIPT, *arguments, *out, options=(*plus, *begin))
    assert resumed.code == 0, resumed.err
    assert resumed.told() == [row for row in whole.told() if row["step"] > 4]
    held, expected = resumed.state_by_rank(), whole.state_by_rank()
    assert held.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(held[name], expected[name])] == []

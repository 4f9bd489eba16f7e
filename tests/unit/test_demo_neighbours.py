"""The demo of recovery from neighbours: whom it kills, and the chart it draws. No job is started."""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

curve = importlib.import_module("curve")
demo = importlib.import_module("demo_neighbours")

SVG = "{http://www.w3.org/2000/svg}"


def test_neighbours_spare_the_holders_of_embedding_and_head_and_the_other_modes_do_not() -> None:
    hit = {
        mode: {r for seed in range(20) for _, r in demo.plan_kills(seed, mode, 200, 5)}
        for mode in ("neighbours", "auto")
    }
    assert hit == {"neighbours": {1, 2}, "auto": {0, 1, 2, 3}}


def test_kills_have_steps_of_their_own_in_the_middle_of_the_run() -> None:
    steps = [step for step, _ in demo.plan_kills(3, "auto", 80, 10)]
    assert steps == sorted(set(steps))
    assert len(steps) == 10
    assert 10 <= steps[0] <= steps[-1] < 70
    assert len(demo.plan_kills(3, "auto", 16, 100)) == 12


def test_a_redone_step_counts_once_and_the_mean_is_of_the_last_steps(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    log.write_text(
        "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in ((1, 1.0), (2, 9.0), (2, 3.0), (3, 5.0)))
    )
    assert demo.losses(log, width=2) == [(1, 1.0), (2, 2.0), (3, 4.0)]


def test_the_chart_is_well_formed_and_holds_all_lines_and_marks_inside() -> None:
    lines = [
        curve.Line("killed <live>", [(1.0, 5.5), (100.0, 2.5)]),
        curve.Line("left alone", [(1.0, 5.5), (100.0, 2.4)]),
    ]
    text = curve.svg("a & b", lines, [(50.0, "S2")], "step", "loss", "SIGKILL")
    assert text == curve.svg("a & b", lines, [(50.0, "S2")], "step", "loss", "SIGKILL")
    root = ElementTree.fromstring(text)
    drawn = [[tuple(map(float, p.split(","))) for p in e.get("points").split()] for e in root.iter(f"{SVG}polyline")]
    assert len(drawn) == 2
    for x, y in (point for points in drawn for point in points):
        assert curve.LEFT <= x <= curve.WIDTH - curve.RIGHT
        assert curve.TOP <= y <= curve.HEIGHT - curve.BOTTOM
    assert drawn[0][0][1] < drawn[0][1][1], "a smaller loss is drawn lower"
    said = [element.text for element in root.iter(f"{SVG}text")]
    assert {"a & b", "killed <live>", "left alone", "S2", "step", "loss", "SIGKILL"} <= set(said)


def test_ticks_are_few_round_and_inside() -> None:
    assert curve.ticks(1.93, 2.88) == [2.0, 2.2, 2.4, 2.6, 2.8]
    assert curve.ticks(1.0, 240.0) == [50.0, 100.0, 150.0, 200.0]
    assert curve.ticks(3.0, 3.0) == [3.0]


def test_words_of_kills_close_together_stand_above_each_other() -> None:
    assert curve.levels([(10, 20), (25, 20), (50, 20), (28, 20), (70, 20)]) == [0, 1, 0, 2, 0]
    assert curve.levels([]) == []

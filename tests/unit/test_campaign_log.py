"""What a campaign of lost hosts says that it has shown, over several interrupted runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from host_losses import Clock, Log, combinations  # noqa: E402
from table import Report  # noqa: E402


def result(lost: list[list[int]], wrong: list[str] | None = None, policy: str = "wait") -> dict[str, Any]:
    whole = {"recoveries": len(lost), "exact": True, "back_s": [1.0] * len(lost), "restore_ms": [20.0] * len(lost)}
    return {"code": "2+1", "policy": policy, "lost": lost, "wrong": wrong or [], **whole}


def test_a_combination_is_shown_only_by_a_job_of_its_policy_that_ended_right(tmp_path: Path) -> None:
    log = Log("wait", tmp_path / "out", False, Clock(time.monotonic()))
    log.add(result([[0]]))
    log.add(result([[1]], ["w differs"]))
    log.add(result([[2]], policy="spread"))
    assert log.shown("2+1") == {(0,)}
    assert log.says("2+1") == "1 of 3 combinations shown, 1 jobs wrong"


def test_a_resumed_campaign_knows_what_was_shown_and_a_new_one_forgets(tmp_path: Path) -> None:
    out, clock = tmp_path / "out", Clock(time.monotonic())
    Log("wait", out, False, clock).add(result([[0], [2]]))
    resumed = Log("wait", out, True, clock)
    assert resumed.shown("2+1") == {(0,), (2,)}
    resumed.add(result([[1]]))
    assert Log("wait", out, True, clock).shown("2+1") == set(combinations(3, 1))
    assert Log("wait", out, False, clock).shown("2+1") == set()


def test_a_budget_allows_no_loss_that_would_end_after_it() -> None:
    assert not Clock(time.monotonic() + 9.0, job_s=10.0, losses=[7.0]).has_time(job=False)
    assert Clock(time.monotonic() + 12.0, job_s=10.0, losses=[7.0]).has_time(job=False)
    assert not Clock(time.monotonic() + 12.0, job_s=10.0, losses=[7.0]).has_time(job=True)


def test_a_table_names_the_machine_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py", "--rounds", "2", "--markdown", str(path)])
    report = Report(path, "A claim")
    report.line({"ratio": 0.5})
    report.table(["ratio"], [[0.5]], "A note.")
    report.close()
    text = path.read_text()
    assert text.startswith("## A claim\n\n`python benchmarks/x.py --rounds 2`\n\n")
    assert "| ratio |\n| --- |\n| 0.5 |\n\nA note.\n\n```json\n" in text
    assert str(tmp_path) not in text
    assert capsys.readouterr().out == '{"ratio": 0.5}\n'

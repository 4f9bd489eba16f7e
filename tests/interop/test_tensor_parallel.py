"""DeepSpeed's AutoTP on two and four ranks: what we read of its parts, and that it goes on from what we write.

"Its own" is what ds_to_universal makes of the same checkpoint, and the losses of DeepSpeed's own resume from that.
The short half of this is in test_smoke.py.
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

pytestmark = pytest.mark.usefixtures("deepspeed")

SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "z1": (4, {"stage": 1}),
    "z2": (4, {"stage": 2}),
    "z3": (4, {"stage": 3}),
    "z1 frozen": (2, {"stage": 1, "frozen": True}),
    "z2 frozen": (2, {"stage": 2, "frozen": True}),
    "z1 on 4": (4, {"stage": 1, "tp": 4}),
}


def made(lab: Any, name: str) -> tuple[Path, dict[str, Any]]:
    world, options = SOURCES[name]
    found: tuple[Path, dict[str, Any]] = lab.once(
        f"tp-{name}".replace(" ", "-"), lambda at: lab.autotp(world, **options, save={"3": at})
    )
    return found


def there(lab: Any, name: str, target: str, to: Path) -> Path:
    """Through our format on disk, verified, to `target`."""
    folder, _ = made(lab, name)
    assert ckpt(["convert", str(folder), str(to / "ours")]) == 0
    assert verify(to / "ours") == []
    assert ckpt(["reshard", str(to / "ours"), str(to / "out"), "--to", target]) == 0
    return to / "out"


@pytest.mark.parametrize("name", SOURCES)
def test_the_wholes_are_those_of_its_own_converter(lab: Any, name: str, tmp_path: Path) -> None:
    folder, _ = made(lab, name)
    assert verify(open_any(folder)) == [], "its ranks hold equal copies"
    lab.to_universal(folder, tmp_path)
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        ours, theirs = load(folder, state=state), load(tmp_path, state=state)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", SOURCES)
def test_it_goes_on_from_our_files_with_the_losses_of_the_uninterrupted_run(
    lab: Any, name: str, tmp_path: Path
) -> None:
    world, options = SOURCES[name]
    _, report = made(lab, name)
    tp = options.get("tp", 2)
    ours = there(lab, name, f"deepspeed:zero{options['stage']},dp={world // tp},tp={tp}", tmp_path)
    found = lab.autotp(world, **options, load=ours)
    assert found["losses"] == {step: report["losses"][step] for step in (3, 4, 5)}


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (4, 4)])
def test_other_ranks_go_on_with_the_losses_of_its_own_universal_path(
    lab: Any, world: int, tp: int, tmp_path: Path
) -> None:
    folder, _ = made(lab, "z1")
    ours = there(lab, "z1", f"deepspeed:zero1,dp={world // tp},tp={tp}", tmp_path)
    lab.to_universal(folder, tmp_path / "theirs")
    found = lab.autotp(world, stage=1, tp=tp, load=ours)
    theirs = lab.autotp(world, stage=1, tp=tp, universal=True, load=tmp_path / "theirs")
    assert found["losses"] == theirs["losses"]
    assert found["losses"].keys() == {3, 4, 5}

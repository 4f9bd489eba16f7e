"""Runs jobs of the real frameworks, each rank a process of its own, and gives back what they report.

    lab.deepspeed(2, model="plain", stage=2, steps=6, save={"3": FOLDER})  ──▶  {"losses": {...}, "dump": {...}}

These are minutes of real training, so they run only when asked for (make test-interop), and a framework that is
not installed skips its tests, with the reason. Checkpoints that several tests use are made once a session.
Nothing here converts anything.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"
RUN_S = 400
"""The first DeepSpeed job of a machine compiles a communication operator, which takes a minute or two."""


class Lab:
    """A folder to work in, and the frameworks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        self.made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        """What `make` leaves in a folder of this name, made at the first call."""
        folder = self.root / name
        if name not in self.made:
            self.made[name] = make(folder)
        return folder, self.made[name]

    def deepspeed(self, world: int, **options: Any) -> dict[str, Any]:
        return self._run("deepspeed_run.py", world, {"model": "plain", "dtype": "bf16", "steps": 6, **options})

    def autotp(self, world: int, **options: Any) -> dict[str, Any]:
        return self._run("autotp_run.py", world, {"tp": 2, "steps": 6, **options})

    def to_universal(self, folder: Path, to: Path) -> None:
        """DeepSpeed's own converter; a strict one takes the patterns of frozen parameters for mistakes."""
        tag = (folder / "latest").read_text().strip()
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder / tag)]
        command += ["--output_folder", str(to / tag), "--num_extract_workers", "1", "--num_merge_workers", "1"]
        command += ["--no_strict"]
        subprocess.run(command, env=_environment(), check=True, stdin=subprocess.DEVNULL, timeout=RUN_S)
        (to / "latest_universal").write_text(tag)

    def fsdp(self, world: int, **options: Any) -> dict[str, Any]:
        return self._run("fsdp_run.py", world, {"steps": 6, **options})

    def _run(self, script: str, world: int, options: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        work = self.root / f"run-{self.count}"
        work.mkdir()
        options = {**options, "rendezvous": str(work / "rendezvous"), "report": str(work / "report")}
        for key in ("load",):
            if key in options:
                options[key] = str(options[key])
        if "save" in options:
            options["save"] = {step: str(folder) for step, folder in options["save"].items()}
        logs = [open(work / f"rank-{rank}.log", "wb") for rank in range(world)]  # noqa: SIM115
        ranks = [
            subprocess.Popen(
                [sys.executable, str(FIXTURES / script), json.dumps(options)],
                env={**_environment(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
                cwd=work,
                stdin=subprocess.DEVNULL,
                stdout=logs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]
        try:
            codes = [rank.wait(RUN_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            for log in logs:
                log.close()
        if any(codes):
            tail = "\n".join((work / "rank-0.log").read_text(errors="replace").splitlines()[-25:])
            pytest.fail(f"{script} {options} ended with {codes}\n{tail}", pytrace=False)
        return torch.load(work / "report", weights_only=True)


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    if os.environ.get("HOLDFAST_INTEROP") != "1":
        pytest.skip("runs jobs of real frameworks for minutes: make test-interop")
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def deepspeed() -> None:
    """A test that asks for this needs DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: make test-interop")

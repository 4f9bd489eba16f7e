"""Whole jobs as subprocesses, each in a folder of its own, with deadlines; for the multiprocess tests.

    reference(folder, script, ...)   one process without an agent: what every other run must equal
    job(folder, nproc, script, ...)  `holdfast run`

Nothing in here decides what is right. A job that does not end by its deadline is terminated and fails the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE_S = 90.0


@dataclass(frozen=True, slots=True)
class Ended:
    """What a run left."""

    code: int
    out: str
    err: str
    events: list[dict[str, Any]]
    folder: Path

    @property
    def errors(self) -> list[str]:
        """Lines for the operator."""
        return [line for line in self.err.splitlines() if "holdfast: error:" in line]

    def state(self) -> dict[str, Any]:
        """Final state by name; what several ranks hold must be equal, what each holds a part of is put together."""
        from safetensors.torch import load_file

        paths = sorted((self.folder / "out").glob("*.safetensors"))
        return put_together(item for path in paths for item in load_file(path).items())

    def state_by_rank(self) -> dict[str, Any]:
        """Final state by file and name."""
        from safetensors.torch import load_file

        paths = sorted((self.folder / "out").glob("*.safetensors"))
        return {f"{path.name} {name}": tensor for path in paths for name, tensor in load_file(path).items()}

    def told(self, rank: int = 0) -> list[dict[str, Any]]:
        """What the script on `rank` was told of each step."""
        told: list[dict[str, Any]] = json.loads((self.folder / "out" / f"rank-{rank}.json").read_text())
        return told

    def started(self) -> dict[int, int]:
        """Rank -> how many processes it had."""
        counts: dict[int, int] = {}
        for event in self.events:
            if event["event"] == "rank_started":
                counts[event["rank"]] = counts.get(event["rank"], 0) + 1
        return counts


def put_together(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Whole tensors by name, of tensors that may come several times (equal then) or in parts `name[start:stop]`."""
    import torch

    whole: dict[str, Any] = {}
    parts: dict[str, list[tuple[int, Any]]] = {}
    for name, tensor in named:
        base, _, region = name.partition("[")
        if region:
            parts.setdefault(base, []).append((int(region.partition(":")[0]), tensor))
        else:
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"replicas differ in {name}"
    for name, found in parts.items():
        shape = whole[name.partition("@")[0]].shape
        whole[name] = torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])]).view(shape)
    return whole


def execute(
    folder: Path, command: list[str], *, env: dict[str, str] | None = None, deadline_s: float = DEADLINE_S
) -> Ended:
    """Run `command` in `folder` to its end, or fail."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "XDG_RUNTIME_DIR": str(folder),
        **(env or {}),
    }
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            out, err = process.communicate(timeout=15.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        raise AssertionError(f"no end within {deadline_s:.0f} s: {command}\n{out[-2000:]}\n{err[-4000:]}") from None
    log = folder / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Ended(process.returncode, out, err, events, folder)


def reference(folder: Path, script: Path, *arguments: str, deadline_s: float = DEADLINE_S) -> Ended:
    """The script in plain Python, on one rank."""
    ended = execute(
        folder, [sys.executable, str(script), *arguments, "--out", str(folder / "out")], deadline_s=deadline_s
    )
    assert ended.code == 0, ended.err
    return ended


def job(
    folder: Path,
    ranks: int,
    script: Path,
    *arguments: str,
    faults: list[str] | None = None,
    options: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Ended:
    """`holdfast run` of the script, with scripted faults."""
    command = [
        sys.executable, "-m", "holdfast.launcher.cli", "run", "--nproc-per-node", str(ranks), "--standbys", "1",
        "--lease-min", "1.0", "--events", str(folder / "events.jsonl"),
    ]  # fmt: skip
    command += ["--faults", ";".join(faults)] if faults else []
    command += [*options, str(script), *arguments]
    return execute(folder, command, env=env, deadline_s=deadline_s)

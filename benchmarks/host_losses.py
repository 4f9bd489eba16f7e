"""Losses of whole hosts, in network namespaces; every run must end with the bits of the unbroken one.

    python benchmarks/host_losses.py [--codes 1+1,2+1,3+1,4+2,6+2] [--policy wait|spread] [--out results.json]

For each code k+m a job of one rank a host on k+m hosts, one pipeline stage each. `wait`: in one long job *every*
combination of 1..m hosts is lost, one after another: all processes of those hosts are killed at the same moment, the
hosts come back as new machines with empty memory, their ranks' state is decoded there from what the others hold, and
once parity is complete again the next combination follows. `spread`: a job for each sampled combination, whose ranks
go on on the hosts that are left. Checked: exit codes, parameters and optimizer state torch.equal to a run of one
process without failures, a recovery for each loss. Prints a line per loss and a JSON summary. Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from hosts import HostJob, Hosts, start_job, wait_for
from jobs import reference

SCRIPT = ROOT / "tests" / "helpers" / "scripts" / "hostjob.py"
SECRET = "host-losses"
START_S, RECOVER_S, END_S = 240.0, 180.0, 240.0
STEPS_PER_LOSS = 14


def combinations(hosts: int, most: int) -> list[tuple[int, ...]]:
    """Every set of 1..most hosts, in an order in which neighbours differ."""
    found = [lost for count in range(1, most + 1) for lost in itertools.combinations(range(hosts), count)]
    random.Random(hosts).shuffle(found)
    return found


def steps_of(job: HostJob) -> int:
    """The newest step that any rank has said."""
    newest = 0
    for index in job.processes:
        path = job.folder / f"host{index}" / "run.out"
        if path.exists():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 400))
                words = file.read().decode(errors="replace").split("\n")
            newest = max([newest, *(int(w.rsplit(" ", 1)[1]) for w in words[1:-1] if w.startswith("hostjob: rank"))])
    return newest


def count(job: HostJob, event: str) -> int:
    """Events of that kind so far."""
    return sum(one["event"] == event for one in job.events())


def protected_placement(job: HostJob) -> int:
    """Number of the newest placement whose parity is complete."""
    return max((one["placement"] for one in job.events() if one["event"] == "protected"), default=0)


def newest_placement(job: HostJob) -> int:
    """Number of the newest placement."""
    return max((one["placement"] for one in job.events() if one["event"] == "placement"), default=0)


def is_protected(job: HostJob) -> bool:
    """Whether the newest placement's parity is complete."""
    return 0 < newest_placement(job) == protected_placement(job)


def leader(job: HostJob, lost: tuple[int, ...]) -> str:
    """Address of the coordinator in charge, from the registry of a host that was not lost; '' for none yet."""
    newest: tuple[float, str] = (0.0, "")
    for index, process in job.processes.items():
        if process.poll() is None and index not in lost:
            for path in Path(job.hosts[index].environment()["XDG_RUNTIME_DIR"]).glob("holdfast-*/*.json"):
                newest = max(newest, (path.stat().st_mtime, json.loads(path.read_text())["coordinator"]))
    gone = {job.hosts[index].address for index in lost}
    return "" if newest[1].rpartition(":")[0] in gone else newest[1]


def come_back(job: HostJob, index: int, coordinator: str) -> None:
    """A host that was lost starts again, as a new machine, and asks to join."""
    job.hosts[index].kill()
    job.hosts[index].power_on()
    command = job._command(index)
    position = command.index("run") + 1
    command[position:position] = ["--join", coordinator]
    folder = job.folder / f"host{index}"
    job.processes[index] = job.hosts[index].popen(
        command, env=job._env, cwd=folder, stdout=folder / "run.out", stderr=folder / "run.err"
    )


def options_of(code: str, policy: str, lease_s: float = 5.0) -> list[str]:
    """Options of `holdfast run` for a code."""
    return ["--redundancy", f"rs:{code}", "--lost-host", policy, "--host-lease", str(lease_s), "--lease-min", "4"]


def compare(ended: Any, expected: Any) -> list[str]:
    """What differs from the unbroken run."""
    import torch

    state, wanted = ended.state(), expected.state()
    if state.keys() != wanted.keys():
        return [f"other tensors: {sorted(state.keys() ^ wanted.keys())[:4]}"]
    return [f"{name} differs" for name, tensor in wanted.items() if not torch.equal(state[name], tensor)][:4]


def wait_campaign(code: str, folder: Path, chosen: list[tuple[int, ...]], step_s: float) -> dict[str, Any]:
    """All of `chosen` in one job; hosts come back after each loss."""
    k, m = map(int, code.split("+"))
    size, steps = k + m, STEPS_PER_LOSS * len(chosen) + 12
    arguments = ["--steps", str(steps), "--step-seconds", str(step_s)]
    expected = reference(folder / "reference", SCRIPT, "--steps", str(steps), deadline_s=300.0)
    result: dict[str, Any] = {"code": code, "policy": "wait", "losses": len(chosen), "steps": steps, "wrong": []}
    times: list[float] = []
    with Hosts(size) as hosts:
        env = {"HOLDFAST_TOKEN": SECRET}
        # Starting machines take the cores of all: hosts that live must not be taken for silent ones.
        job = start_job(hosts, SCRIPT, arguments, options=options_of(code, "wait", lease_s=20.0), env=env)
        try:
            for number, lost in enumerate(chosen):
                wait_for(lambda: is_protected(job), START_S if not number else RECOVER_S, "parity")
                before, step = count(job, "recovery"), steps_of(job)
                wait_for(lambda step=step: steps_of(job) > step, RECOVER_S, "a step")
                began = time.monotonic()
                for index in lost:
                    hosts[index].kill()
                coordinator = wait_for(lambda lost=lost: leader(job, lost), RECOVER_S, "a coordinator in charge")
                for index in lost:
                    come_back(job, index, coordinator)
                wait_for(lambda before=before: count(job, "recovery") > before, RECOVER_S, f"recovery from {lost}")
                times.append(time.monotonic() - began)
                print(f"{code} lost {lost} at step {step}: back after {times[-1]:.1f} s", flush=True)
            ended = job.wait(END_S + steps * step_s * 2)
        except AssertionError as error:
            said = [event for event in job.events() if "rank_started" not in event["event"]][-12:]
            result["wrong"].append(f"{str(error)[:1500]}\n{job.tails()[-3000:]}\n{said}")
            job.kill()
            return result
        result["wrong"] += compare(ended, expected) if ended.code == 0 else [f"exit {ended.codes}"]
        recoveries = [one for one in ended.events if one["event"] == "recovery"]
        result["recoveries"] = len(recoveries)
        result["sources"] = sorted({rung for one in recoveries for rung in one["sources"]})
        result["exact"] = all(one["exact"] for one in recoveries)
        result["restore_ms"] = statistics.median(one["restore_ms"] for one in recoveries)
        result["back_s"] = statistics.median(times)
    return result


def spread_campaign(code: str, folder: Path, chosen: list[tuple[int, ...]], step_s: float) -> list[dict[str, Any]]:
    """A job for each of `chosen`; the ranks of lost hosts go on on the others."""
    k, m = map(int, code.split("+"))
    steps = 40
    expected = reference(folder / "reference", SCRIPT, "--steps", str(steps))
    results = []
    for lost in chosen:
        with Hosts(k + m) as hosts:
            arguments = ["--steps", str(steps), "--step-seconds", str(step_s)]
            job = start_job(hosts, SCRIPT, arguments, options=options_of(code, "spread"))
            result: dict[str, Any] = {"code": code, "policy": "spread", "lost": lost, "wrong": []}
            try:
                wait_for(lambda job=job: is_protected(job) and steps_of(job) > 8, START_S, "parity")  # type: ignore[misc]
                for index in lost:
                    hosts[index].kill()
                ended = job.wait(END_S, only=set(range(k + m)) - set(lost))
                good = ended.code == 0
                result["wrong"] += compare(ended, expected) if good else [f"exit {ended.codes} {ended.err[-800:]}"]
                recoveries = [one for one in ended.events if one["event"] == "recovery"]
                result["recovery_ms"] = [one["total_ms"] for one in recoveries]
                result["sources"] = sorted({rung for one in recoveries for rung in one["sources"]})
            except AssertionError as error:
                result["wrong"].append(str(error)[-3000:])
                job.kill()
        print(json.dumps({**result, "lost": list(lost)}), flush=True)
        results.append(result)
    return results


def main() -> int:
    """Run the campaign; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", default="1+1,2+1,3+1,4+2,6+2")
    parser.add_argument("--policy", choices=("wait", "spread"), default="wait")
    parser.add_argument("--sample", type=int, default=0, help="so many combinations of each code (default: all)")
    parser.add_argument("--step-seconds", type=float, default=0.2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    reason = Hosts.available()
    if reason is not None:
        print(f"not run: {reason}")
        return 2
    results: list[dict[str, Any]] = []
    for code in arguments.codes.split(","):
        k, m = map(int, code.split("+"))
        chosen = combinations(k + m, m)[: arguments.sample or None]
        with tempfile.TemporaryDirectory() as folder:
            if arguments.policy == "wait":
                results.append(wait_campaign(code, Path(folder), chosen, arguments.step_seconds))
                print(json.dumps(results[-1]), flush=True)
            else:
                results += spread_campaign(code, Path(folder), chosen, arguments.step_seconds)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any(result["wrong"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Losses of whole hosts, in network namespaces; every run must end with the bits of the unbroken one.

    python benchmarks/host_losses.py [--codes 1+1,2+1,3+1,4+2,6+2] [--out FILE --resume] [--budget-s S] [--per-job 8]
                                     [--policy wait|spread|beyond] [--sample N]

For each code k+m jobs of one rank a host on k+m hosts, one pipeline stage each. --policy wait: *every* combination of
1..m hosts is lost, --per-job of them one after another in a job: all processes of those hosts are killed at the same
moment, the hosts come back as new machines with empty memory, their ranks' state is decoded there from what the others
hold, and once parity is complete again the next combination follows. --policy spread: a job for each combination, whose
ranks go on on the hosts that are left. Checked: exit codes, parameters and optimizer state torch.equal to a run of one
process without failures, a recovery for each loss. --policy beyond: a job for each combination of m+1 hosts, or for
--sample of them, which must end in seconds with one line that says whose state is lost. A combination counts as shown
when its job ended right.

It tests what is true, not how fast: leases are long, so that on a busy machine nobody is taken for lost who is not.
--out has a JSON line for each job that ended, and --resume leaves out what these show; --budget-s begins nothing that
would end later. Prints a line per loss, and how many combinations of how many are shown. Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from hosts import HostJob, Hosts, HostsEnded, start_job, wait_for
from jobs import Ended, reference
from table import Report, add_markdown, shown, spread

SCRIPT = ROOT / "tests" / "helpers" / "scripts" / "hostjob.py"
SECRET = "host-losses"
START_S, RECOVER_S, END_S = 240.0, 180.0, 240.0
STEPS_PER_LOSS, STEPS_MORE = 24, 16
"""While a job is not hurried: at half a second a step, twelve seconds of training for each loss."""
HOST_LEASE_S, RANK_LEASE_S = 15.0, 10.0
JOB_S = 60.0
"""About what the start and the end of a job take, until one has shown it."""
WAVE = 2
"""Hosts that start at once: each imports torch three times, and these machines have two cores."""


def combinations(hosts: int, most: int) -> list[tuple[int, ...]]:
    """Every set of 1..most hosts, in an order in which neighbours differ."""
    found = [lost for count in range(1, most + 1) for lost in itertools.combinations(range(hosts), count)]
    random.Random(hosts).shuffle(found)
    return found


def sets_of(k: int, m: int, policy: str) -> list[tuple[int, ...]]:
    """What is lost under a policy: 1..m hosts, or m+1 that leave somebody to say so."""
    if policy != "beyond":
        return combinations(k + m, m)
    return [lost for lost in combinations(k + m, m + 1) if len(lost) == m + 1 < k + m]


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


def options_of(code: str, policy: str, lease_s: float = 5.0, rank_lease_s: float = 4.0) -> list[str]:
    """Options of `holdfast run` for a code."""
    leases = ["--host-lease", str(lease_s), "--lease-min", str(rank_lease_s)]
    return ["--redundancy", f"rs:{code}", "--lost-host", policy, *leases]


def compare(ended: Any, expected: Any) -> list[str]:
    """What differs from the unbroken run."""
    import torch

    state, wanted = ended.state(), expected.state()
    if state.keys() != wanted.keys():
        return [f"other tensors: {sorted(state.keys() ^ wanted.keys())[:4]}"]
    return [f"{name} differs" for name, tensor in wanted.items() if not torch.equal(state[name], tensor)][:4]


def start_in_waves(hosts: Hosts, arguments: list[str], options: list[str]) -> HostJob:
    """The job on all hosts, a few at a time."""
    job = start_job(hosts, SCRIPT, arguments, options=options, env={"HOLDFAST_TOKEN": SECRET}, on=[])
    for first in range(0, len(hosts), WAVE):
        wave = range(first, min(first + WAVE, len(hosts)))
        for index in wave:
            job.start(index)
        records = [job.folder / f"host{index}" / "events.jsonl" for index in wave]
        with contextlib.suppress(AssertionError):  # some write none until all are there
            wait_for(lambda records=records: all(path.exists() for path in records), 4.0)  # type: ignore[misc]
    return job


def lose(job: HostJob, lost: tuple[int, ...]) -> float:
    """Kill these hosts at the same moment, and have them come back; seconds until training went on."""
    before, placement, step = count(job, "recovery"), newest_placement(job), steps_of(job)
    wait_for(lambda: steps_of(job) > step, RECOVER_S, "a step")
    began = time.monotonic()
    for index in lost:
        job.hosts[index].kill()
    coordinator = wait_for(lambda: leader(job, lost), RECOVER_S, "a coordinator in charge")
    for index in lost:
        come_back(job, index, coordinator)
    wait_for(lambda: count(job, "recovery") > before, RECOVER_S, f"recovery from {lost}")
    seconds = time.monotonic() - began
    # The hosts that came back are new ones, so there is another placement: the old one's parity was theirs too.
    wait_for(lambda: newest_placement(job) > placement and is_protected(job), RECOVER_S, f"parity after {lost}")
    return seconds


@dataclass
class Clock:
    """How long a job and a loss take, for the budget and for the time that is left."""

    until: float
    job_s: float = JOB_S
    losses: list[float] = field(default_factory=list)

    @property
    def loss_s(self) -> float:
        """Of one combination, until its parity is complete."""
        return statistics.median(self.losses) if self.losses else 20.0

    def has_time(self, *, job: bool) -> bool:
        """For one more combination and the end of its job, or for a job with it."""
        return time.monotonic() + self.loss_s + self.job_s * (1.0 if job else 0.4) < self.until


def wait_job(code: str, chosen: list[tuple[int, ...]], step_s: float, expected: Ended, clock: Clock) -> dict[str, Any]:
    """As many of `chosen` as there is time for, in one job; hosts come back after each loss."""
    k, m = map(int, code.split("+"))
    result: dict[str, Any] = {"code": code, "policy": "wait", "lost": [], "wrong": [], "back_s": [], "whole_s": []}
    began, losing = time.monotonic(), 0.0
    with Hosts(k + m) as hosts:
        hurry = hosts.folder / "hurry"
        steps = ["--steps", str(steps_for(len(chosen))), "--step-seconds", str(step_s), "--hurry", str(hurry)]
        job = start_in_waves(hosts, steps, [*options_of(code, "wait", HOST_LEASE_S, RANK_LEASE_S), "--standbys", "0"])
        try:
            wait_for(lambda: is_protected(job), START_S, "parity")
            for lost in chosen:
                if result["lost"] and not clock.has_time(job=False):
                    break
                started = time.monotonic()
                result["lost"].append(list(lost))
                result["back_s"].append(round(lose(job, lost), 2))
                clock.losses.append(time.monotonic() - started)
                result["whole_s"].append(round(clock.losses[-1], 2))
                losing += clock.losses[-1]
                print(f"{code} lost {lost}: back after {result['back_s'][-1]} s", file=sys.stderr, flush=True)
            hurry.touch()
            ended = job.wait(END_S)
        except AssertionError as error:
            said = [event for event in job.events() if "rank_started" not in event["event"]][-12:]
            result["wrong"].append(f"{str(error)[:1500]}\n{job.tails()[-3000:]}\n{said}")
            job.kill()
            return result
        result["wrong"] += compare(ended, expected) if ended.code == 0 else [f"exit {ended.codes}"]
        recoveries = [one for one in ended.events if one["event"] == "recovery"]
        if len(recoveries) < len(result["lost"]):
            result["wrong"].append(f"{len(recoveries)} recoveries for {len(result['lost'])} losses")
        result["recoveries"] = len(recoveries)
        result["sources"] = sorted({rung for one in recoveries for rung in one["sources"]})
        result["exact"] = all(one["exact"] for one in recoveries)
        result["restore_ms"] = [one["restore_ms"] for one in recoveries]
    clock.job_s = time.monotonic() - began - losing
    result["job_s"] = round(time.monotonic() - began, 1)
    return result


def steps_for(losses: int) -> int:
    """Of a job with so many losses."""
    return STEPS_PER_LOSS * losses + STEPS_MORE


def wait_campaign(code: str, open_: list[tuple[int, ...]], arguments: argparse.Namespace, log: Log) -> None:
    """Jobs until all of `open_` were lost, or there is no time for another."""
    clock = log.clock
    with tempfile.TemporaryDirectory() as folder:
        expected: dict[int, Ended] = {}
        while open_ and clock.has_time(job=True):
            chosen, open_ = open_[: arguments.per_job], open_[arguments.per_job :]
            steps = steps_for(len(chosen))
            if steps not in expected:
                place = Path(folder, str(steps))
                expected[steps] = reference(place, SCRIPT, "--steps", str(steps), deadline_s=300.0)
            result = wait_job(code, chosen, arguments.step_seconds, expected[steps], clock)
            open_ = chosen[len(result["lost"]) :] + open_
            log.add(result)
            left = len(open_) * clock.loss_s + -(-len(open_) // arguments.per_job) * clock.job_s
            print(f"{code}: {log.says(code)}; {left / 60:.1f} min to go", file=sys.stderr, flush=True)


def for_good_campaign(code: str, open_: list[tuple[int, ...]], arguments: argparse.Namespace, log: Log) -> None:
    """A job for each of `open_`, whose hosts do not come back: ranks go on on the others, or nothing goes on."""
    k, m = map(int, code.split("+"))
    steps = 400 if arguments.policy == "beyond" else 40
    with tempfile.TemporaryDirectory() as folder:
        expected = None if arguments.policy == "beyond" else reference(Path(folder), SCRIPT, "--steps", str(steps))
        for lost in open_:
            if not log.clock.has_time(job=True):
                return
            began = time.monotonic()
            with Hosts(k + m) as hosts:
                words = ["--steps", str(steps), "--step-seconds", str(arguments.step_seconds)]
                job = start_in_waves(hosts, words, options_of(code, "spread", HOST_LEASE_S, RANK_LEASE_S))
                result = {"code": code, "policy": arguments.policy, "lost": [list(lost)], "wrong": []}
                log.add({**result, **lose_for_good(job, lost, expected)})
            log.clock.job_s = time.monotonic() - began
            print(f"{code}: {log.says(code)}", file=sys.stderr, flush=True)


def lose_for_good(job: HostJob, lost: tuple[int, ...], expected: Ended | None) -> dict[str, Any]:
    """Lose these hosts of a running job, and see how it ends; `expected` None: in one line."""
    try:
        wait_for(lambda: is_protected(job) and steps_of(job) > 8, START_S, "parity")
        began = time.monotonic()
        for index in lost:
            job.hosts[index].kill()
        ended = job.wait(END_S, only=set(range(len(job.hosts))) - set(lost))
    except AssertionError as error:
        job.kill()
        return {"wrong": [str(error)[-3000:]]}
    seconds = round(time.monotonic() - began, 2)
    return stopped(ended, seconds) if expected is None else went_on(ended, expected)


def went_on(ended: HostsEnded, expected: Ended) -> dict[str, Any]:
    """Of a job that should have ended with the bits of the unbroken run."""
    good = ended.code == 0
    recoveries = [one for one in ended.events if one["event"] == "recovery"]
    return {
        "wrong": compare(ended, expected) if good else [f"exit {ended.codes} {ended.err[-800:]}"],
        "recoveries": len(recoveries),
        "exact": all(one["exact"] for one in recoveries),
        "back_s": [round(one["total_ms"] / 1e3, 2) for one in recoveries],
        "restore_ms": [one["restore_ms"] for one in recoveries],
        "sources": sorted({rung for one in recoveries for rung in one["sources"]}),
    }


def stopped(ended: HostsEnded, seconds: float) -> dict[str, Any]:
    """Of a job that should have ended with one line that says whose state is lost."""
    lines = {line for text in ended.errs.values() for line in text.splitlines() if "holdfast: error:" in line}
    said = sorted(line for line in lines if "the state of rank" in line)
    wrong = []
    if set(ended.codes.values()) != {1} or len(said) != 1:
        wrong.append(f"exit {ended.codes}, said {sorted(lines)}")
    if any(event["event"] == "recovery" for event in ended.events):
        wrong.append("a generation went on without the lost state")
    return {"wrong": wrong, "said": said[:1], "back_s": [seconds], "recoveries": 0, "exact": True, "restore_ms": []}


class Log:
    """What jobs have shown, now and in earlier runs of the campaign."""

    def __init__(self, policy: str, out: Path | None, resume: bool, clock: Clock) -> None:
        self.clock = clock
        self._policy = policy
        self._out = out
        self.results: list[dict[str, Any]] = []
        if out is not None and out.exists():
            if resume:
                self.results = [json.loads(line) for line in out.read_text().splitlines()]
            else:
                out.unlink()

    def add(self, result: dict[str, Any]) -> None:
        """One job is over."""
        self.results.append(result)
        print(json.dumps(result), flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(json.dumps(result) + "\n")

    def of(self, code: str, *, right: bool) -> list[dict[str, Any]]:
        """Jobs of a code that ended as they should, or did not."""
        mine = [one for one in self.results if (one["code"], one["policy"]) == (code, self._policy)]
        return [one for one in mine if right == (not one["wrong"])]

    def shown(self, code: str) -> set[tuple[int, ...]]:
        """Combinations whose job ended right."""
        return {tuple(lost) for one in self.of(code, right=True) for lost in one["lost"]}

    def says(self, code: str) -> str:
        """How many of how many."""
        k, m = map(int, code.split("+"))
        whole = len(sets_of(k, m, self._policy))
        return f"{len(self.shown(code))} of {whole} combinations shown, {len(self.of(code, right=False))} jobs wrong"

    def row(self, code: str) -> list[object]:
        """Of a table."""
        k, m = map(int, code.split("+"))
        right = self.of(code, right=True)
        back = [seconds for one in right for seconds in one["back_s"]]
        restore = [ms for one in right for ms in one["restore_ms"]]
        return [
            code,
            f"{len(self.shown(code))} of {len(sets_of(k, m, self._policy))}",
            len(right),
            len(self.of(code, right=False)),
            sum(one["recoveries"] for one in right),
            all(one["exact"] for one in right),
            shown(spread(back, 2)) if back else "",
            shown(spread(restore, 0)) if restore else "",
        ]


CAMPAIGNS = {"wait": wait_campaign, "spread": for_good_campaign, "beyond": for_good_campaign}


def main() -> int:
    """Run the campaign; exit code 1 if anything went wrong, 3 if there was no time for all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", default="1+1,2+1,3+1,4+2,6+2")
    parser.add_argument("--policy", choices=tuple(CAMPAIGNS), default="wait")
    parser.add_argument("--sample", type=int, default=0, help="so many combinations of each code (default: all)")
    parser.add_argument("--step-seconds", type=float, default=0.5)
    parser.add_argument("--per-job", type=int, default=8, help="combinations in one job, if hosts come back (8)")
    parser.add_argument("--out", type=Path, help="a JSON line for each job")
    parser.add_argument("--resume", action="store_true", help="leave out what --out shows already")
    parser.add_argument("--budget-s", type=float, default=1e9, help="end within about so many seconds")
    add_markdown(parser)
    arguments = parser.parse_args()
    reason = Hosts.available()
    if reason is not None:
        print(f"not run: {reason}")
        return 2
    report = Report(arguments.markdown, "Losses of whole hosts")
    log = Log(arguments.policy, arguments.out, arguments.resume, Clock(time.monotonic() + arguments.budget_s))
    codes = arguments.codes.split(",")
    complete = True
    for code in codes:
        k, m = map(int, code.split("+"))
        chosen = sets_of(k, m, arguments.policy)[: arguments.sample or None]
        CAMPAIGNS[arguments.policy](code, [lost for lost in chosen if lost not in log.shown(code)], arguments, log)
        complete &= log.shown(code) >= set(chosen)
        print(f"{code}: {log.says(code)}", flush=True)
    columns = ["code", "combinations", "jobs right", "jobs wrong", "recoveries", "exact", "back s", "restore ms"]
    note = "A combination is shown when its job ended with every tensor torch.equal to the unbroken run."
    report.table(columns, [log.row(code) for code in codes], note)
    report.close()
    if any(log.of(code, right=False) for code in codes):
        return 1
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())

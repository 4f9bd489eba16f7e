"""The campaign: which runs there are, in order of worth; each is appended to a JSON-lines file when it is done.

    jobs() ─▶ those not in the file yet ─▶ Run ─▶ {"kind": "run", suite, rate, method, seed, losses, validation, ...}
                                         └▶ impulses ─▶ {"kind": "impulse", method, seed, stage, right after, ...}

One process, one core. Runs of one seed and order of stages are the same up to the first failure: the unbroken run's
states (every 50 steps) are kept beside the file, and a run begins at the newest one before its first failure, which is
exact. A run whose line is in the file is not run again; lines of other sizes or another text are left alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from .methods import ABLATIONS, METHODS, Method
from .settings import STAGES, Settings, corpus_digest
from .simulator import LANDING, STEADY_WINDOWS, Checkpoint, Curve, Run, Simulator
from .trace import RATES, Failure, Trace, draw

HIGHEST: Final = "16 %"
KEEP_EVERY: Final = 50
IMPULSE_AT: Final = 500
IMPULSE_AFTER: Final = (0, 10, 40)
IMPULSE_METHODS: Final = ("random", "copy", "checkfree", "checkfree+", "stale-50")
LOSSY: Final = ("stale-50", "checkfree", "checkfree+", "random", "copy", "uniform", "stale-10")
EXECUTED: Final = ("rollback-100", "rollback-50", "rollback-10")


@dataclass(frozen=True, slots=True)
class Job:
    """One run, or the impulses of a seed (suite "impulse")."""

    suite: str
    label: str
    method: str
    seed: int


def jobs(seeds: Sequence[int]) -> list[Job]:
    """All of it, what matters most first."""
    each: list[Job] = []
    for seed in seeds:
        each += [Job("all", "0", "none", seed)]
        each += [Job("all", HIGHEST, method, seed) for method in LOSSY[:3]]
    each += [Job("all", "0", "swap-only", seed) for seed in seeds]
    each += [Job("all", HIGHEST, LOSSY[3], seed) for seed in seeds]
    each += [Job("impulse", "", "", seeds[0])]
    each += [Job("all", HIGHEST, method, seed) for method in LOSSY[4:] for seed in seeds]
    each += [Job("impulse", "", "", seed) for seed in seeds[1:]]
    each += [Job("all", HIGHEST, method, seeds[0]) for method in EXECUTED]
    each += [Job("all", label, method, seed) for label in ("10 %", "5 %") for method in LOSSY[:3] for seed in seeds]
    each += [Job("interior", HIGHEST, method, seed) for method in ("checkfree", "copy", "random") for seed in seeds]
    each += [Job("all", HIGHEST, method, seed) for method in EXECUTED for seed in seeds[1:]]
    each += [Job("interior", HIGHEST, method, seed) for method in ("uniform", "stale-50") for seed in seeds]
    each += [Job("all", HIGHEST, method, seed) for method in ABLATIONS for seed in seeds]
    return each


def trace_of(job: Job, settings: Settings) -> Trace:
    """The failures that a job meets."""
    if job.label not in RATES:
        return ()
    return draw(job.seed, RATES[job.label], STAGES, settings.iterations, interior=job.suite == "interior")


@cache
def fingerprint(settings: Settings) -> str:
    """Of sizes and text: lines of another one are of another campaign."""
    sizes = {name: value for name, value in asdict(settings).items() if name != "final_windows"}
    text = json.dumps([sizes, corpus_digest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(path: Path, settings: Settings | None = None) -> list[dict[str, Any]]:
    """Whole lines of the file, of these settings (None: of any)."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if settings is None or line["fingerprint"] == fingerprint(settings)]


class Campaign:
    """Runs what is missing."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self._unbroken: dict[tuple[int, bool], tuple[Curve, dict[int, Checkpoint]]] = {}

    def run(self, wanted: Sequence[Job]) -> None:
        """Run every job that the file does not have, in order."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        done = {
            Job(line["suite"], line["label"], line["method"], line["seed"]) for line in read(self.path, self.settings)
        }
        for number, job in enumerate(wanted):
            if job in done:
                continue
            lines = list(self.impulses(job)) if job.suite == "impulse" else [self.single(job)]
            with self.path.open("a") as file:
                for line in lines:
                    file.write(json.dumps({"fingerprint": fingerprint(self.settings), **asdict(job), **line}) + "\n")
            told = f"final {lines[0]['final']:.4f}, {lines[0]['cpu_s']:.0f} CPU-s" if "final" in lines[0] else ""
            print(f"{number + 1}/{len(wanted)} {job.suite} {job.label} {job.method} {job.seed} {told}", flush=True)

    def single(self, job: Job) -> dict[str, Any]:
        """One run, as a line."""
        method, trace = METHODS[job.method], trace_of(job, self.settings)
        if method.kind == "none":
            curve, trace = self.unbroken(job.seed, method)[0], ()
        else:
            start, prefix = self._start(job.seed, method, trace)
            curve = Run(self.settings, job.seed, method, trace, start=start, prefix=prefix).all()
        return {"kind": "run", **asdict(curve), "failures": [[f.iteration, f.stage] for f in trace]}

    def unbroken(self, seed: int, method: Method) -> tuple[Curve, dict[int, Checkpoint]]:
        """The run without failures in this order of stages, and its states; made once, then from memory or disk."""
        key = (seed, method.swapped)
        if key not in self._unbroken:
            plain, aside = METHODS["swap-only" if method.swapped else "none"], self._aside(seed, method)
            if not aside.exists():
                states: dict[int, Checkpoint] = {}

                def keep(simulator: Simulator, iteration: int) -> None:
                    if iteration % KEEP_EVERY == 0:
                        states[iteration] = simulator.capture()

                curve = Run(self.settings, seed, plain, ()).all(keep)
                torch.save([asdict(curve), {step: asdict(state) for step, state in states.items()}], aside)
            values, kept = torch.load(aside, weights_only=True)
            self._unbroken[key] = Curve(**values), {step: Checkpoint(**state) for step, state in kept.items()}
        return self._unbroken[key]

    def _aside(self, seed: int, method: Method) -> Path:
        name = "swap-only" if method.swapped else "none"
        return self.path.with_name(f"states-{fingerprint(self.settings)}-{name}-{seed}.pt")

    def _start(self, seed: int, method: Method, trace: Trace) -> tuple[Checkpoint | None, Curve | None]:
        """Where a run may begin: late enough that what it keeps of the past is there too."""
        if (seed, method.swapped) not in self._unbroken and not self._aside(seed, method).exists():
            return None, None
        curve, states = self.unbroken(seed, method)
        latest = min((failure.iteration for failure in trace), default=self.settings.iterations) - 1 - LANDING
        step = max((at for at in states if at <= latest and at % max(method.every, 1) == 0), default=0)
        return states.get(step), curve if step else None

    def impulses(self, job: Job) -> Iterator[dict[str, Any]]:
        """One loss at a fixed step, for each stage and method: how far the loss jumps, and how fast it is back."""
        for name in IMPULSE_METHODS:
            method = METHODS[name]
            _, states = self.unbroken(job.seed, method)
            begin = states[IMPULSE_AT]
            for stage in (-1, *range(STAGES)):
                # -1: the same without a loss, on the same windows.
                trace = (Failure(IMPULSE_AT + 1, stage),) if stage >= 0 else ()
                if stage < 0 and name not in ("checkfree", "checkfree+"):
                    continue
                values = self._impulse(job.seed, method, trace, begin, states)
                yield {"kind": "impulse", "of": name, "stage": stage, "at": IMPULSE_AT, "values": values}

    def _impulse(
        self, seed: int, method: Method, trace: Trace, begin: Checkpoint, states: dict[int, Checkpoint]
    ) -> list[float]:
        settings = replace(self.settings, iterations=begin.step + IMPULSE_AFTER[-1])
        run = Run(settings, seed, method, trace, start=begin, prefix=Curve())
        if method.kind == "stale":
            run.kept = {begin.step - method.every: states[begin.step - method.every]}
        run.fail(begin.step + 1)
        values = [run.simulator.validate(STEADY_WINDOWS)]
        for iteration in range(begin.step + 1, settings.iterations + 1):
            run.simulator.train_step()
            if iteration - begin.step in IMPULSE_AFTER:
                values.append(run.simulator.validate(STEADY_WINDOWS))
        return values


def main(path: Path, settings: Settings, seeds: Sequence[int]) -> None:
    """Run the whole campaign, or what is left of it."""
    print(f"text {corpus_digest()}, sizes and text {fingerprint(settings)}", file=sys.stderr, flush=True)
    Campaign(path, settings).run(jobs(seeds))

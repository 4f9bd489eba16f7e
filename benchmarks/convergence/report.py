"""Tables in Markdown, from the lines of a campaign and of the multi-process part; plots.py draws. Decides nothing.

runs.jsonl, real.jsonl ─▶ Results ─▶ report.md, *.png          what is not there yet has no row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from . import measure, plots, timing
from .campaign import HIGHEST, IMPULSE_AFTER, IMPULSE_AT, jobs, read, trace_of
from .campaign import Job as Key
from .methods import ABLATIONS, MAIN, METHODS, Method
from .settings import STAGES, Settings, corpus_digest
from .trace import RATES

TIME_TARGET: Final = measure.TARGETS[1]
CASE_OF: Final = {"none": "no failure", "stale": "stale k=11", "average": "CheckFree", "rollback": "exact"}
"""Which measured case stands for a kind of method in the measured column."""


@dataclass(frozen=True, slots=True)
class Results:
    """Lines by what they are of."""

    settings: Settings
    runs: Mapping[Key, Mapping[str, Any]]
    impulses: Sequence[Mapping[str, Any]]
    real: Sequence[Mapping[str, Any]]

    @staticmethod
    def of(folder: Path, settings: Settings) -> Results:
        """Everything in the folder of these settings."""
        lines = read(folder / "runs.jsonl", settings)
        runs = {
            Key(line["suite"], line["label"], line["method"], line["seed"]): line
            for line in lines
            if line["kind"] == "run"
        }
        impulses = [line for line in lines if line["kind"] == "impulse"]
        real = {line["case"]: line for line in read(folder / "real.jsonl")}
        return Results(settings, runs, impulses, list(real.values()))

    @property
    def seeds(self) -> list[int]:
        """Seeds whose run without failures is there: all is measured against it."""
        return sorted(key.seed for key in self.runs if key.method == "none")

    def unbroken(self, seed: int) -> Mapping[str, Any]:
        """The run without failures."""
        return self.runs[Key("all", "0", "none", seed)]

    def line(self, suite: str, label: str, method: Method, seed: int) -> Mapping[str, Any] | None:
        """One run; of a rollback that was not executed, what the run without failures says it gives."""
        key = Key(suite, "0" if method.kind == "none" else label, method.name, seed)
        found = self.runs.get(key)
        if found is None and method.kind == "rollback":
            failures = [[f.iteration, f.stage] for f in trace_of(key, self.settings)]
            return measure.replayed(self.unbroken(seed), failures, method.every, self.settings.iterations)
        return found

    def failures(self, seed: int) -> list[list[int]]:
        """Of the highest rate, all stages."""
        trace = trace_of(Key("all", HIGHEST, "checkfree", seed), self.settings)
        return [[failure.iteration, failure.stage] for failure in trace]

    def lines(self, suite: str, label: str, method: Method) -> list[Mapping[str, Any] | None]:
        """Of all seeds."""
        return [self.line(suite, label, method, seed) for seed in self.seeds]


def write(folder: Path, settings: Settings) -> dict[str, Any]:
    """report.md and the plots; what was written."""
    results = Results.of(folder, settings)
    (folder / "report.md").write_text("\n".join(report(results)) + "\n")
    return {"report": str(folder / "report.md"), "runs": len(results.runs), "plots": plots.draw(results, folder)}


def report(results: Results) -> Iterator[str]:
    """The whole file."""
    yield from _what(results)
    if not results.seeds:
        return
    yield from _losses(results, "all", HIGHEST, MAIN, f"All stages may fail, {HIGHEST} (p = {RATES[HIGHEST]})")
    yield from _targets(results)
    yield from _times(results)
    for label in ("10 %", "5 %"):
        names = ("none", "stale-50", "checkfree", "checkfree+", "rollback-100", "rollback-50", "rollback-10")
        yield from _losses(results, "all", label, names, f"All stages may fail, {label} (p = {RATES[label]})")
    names = ("none", "checkfree", "copy", "uniform", "random", "stale-50")
    yield from _losses(results, "interior", HIGHEST, names, f"Interior stages only, {HIGHEST}")
    yield from _impulses(results)
    names = ("checkfree", "uniform", *ABLATIONS[:5], "stale-10", "stale-50", *ABLATIONS[5:])
    yield from _losses(results, "all", HIGHEST, names, f"Ablations, all stages, {HIGHEST}")
    yield from _real(results)
    yield from _missing(results)


def _missing(results: Results) -> Iterator[str]:
    """What the campaign would still run."""
    left: dict[str, list[int]] = {}
    impulses = {line["seed"] for line in results.impulses}
    for job in jobs(results.seeds):
        if job not in results.runs and not (job.suite == "impulse" and job.seed in impulses):
            name = "impulses" if job.suite == "impulse" else f"{METHODS[job.method].title} ({job.suite}, {job.label})"
            left.setdefault(name, []).append(job.seed)
    if left:
        listed = "; ".join(f"{name}: {', '.join(map(str, seeds))}" for name, seeds in left.items())
        yield f"\n### Not run yet, by seed\n\n{listed}."


def _what(results: Results) -> Iterator[str]:
    settings = {k: v for k, v in asdict(results.settings).items() if v is not None}
    yield "Sizes: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + "."
    yield f"Text: SHA-256 `{corpus_digest()}`."
    for label in RATES:
        counts = []
        for seed in results.seeds:
            failures = trace_of(Key("all", label, "checkfree", seed), results.settings)
            ends = sum(failure.stage in (0, STAGES - 1) for failure in failures)
            counts.append(f"seed {seed}: {len(failures)} ({ends} at an end)")
        yield f"Failures at {label}: {'; '.join(counts)}."


def _losses(results: Results, suite: str, label: str, names: Sequence[str], title: str) -> Iterator[str]:
    rows = []
    baseline = {seed: results.unbroken(seed)["final"] for seed in results.seeds}
    for name in names:
        method = METHODS[name]
        lines = results.lines(suite, label, method)
        if not any(lines):
            continue
        finals = [line["final"] if line else None for line in lines]
        above = [f - baseline[s] if f is not None else None for f, s in zip(finals, results.seeds, strict=True)]
        tails = [measure.tail(line["validation"]) - measure.tail(results.unbroken(seed)["validation"]) if line else None
                 for line, seed in zip(lines, results.seeds, strict=True)]  # fmt: skip
        note = " (some read off)" if any(line and line.get("replayed") for line in lines) else ""
        rows.append(
            f"| {method.title}{note} | {measure.cell(finals)} | {_signed(above)} | {_signed([measure.mean(above)])} "
            f"| {_signed(tails)} | {_signed([measure.mean(tails)])} |"
        )
    if len(rows) < 2:
        return
    seeds = " / ".join(map(str, results.seeds))
    yield f"\n### {title}: final validation loss\n"
    tail = f"last {measure.TAIL} points of the curve, above"
    yield f"| method | loss, seeds {seeds} | above no failure | mean | {tail} | mean |"
    yield "|---|---|---|---|---|---|"
    yield from rows


def _signed(values: Sequence[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:+.3f}" for value in values)


def _targets(results: Results) -> Iterator[str]:
    yield f"\n### Iterations to a validation loss, all stages, {HIGHEST}\n"
    yield "| method | " + " | ".join(f"{target}, seeds" for target in measure.TARGETS) + " |"
    yield "|---" * (1 + len(measure.TARGETS)) + "|"
    for name in MAIN:
        lines = results.lines("all", HIGHEST, METHODS[name])
        if any(lines):
            cells = [_reached(lines, target) for target in measure.TARGETS]
            yield f"| {METHODS[name].title} | " + " | ".join(measure.cell(cell, 0) for cell in cells) + " |"


def _reached(lines: Sequence[Mapping[str, Any] | None], target: float) -> list[int | None]:
    return [measure.first_at(line["validation"], target) if line else None for line in lines]


def _times(results: Results) -> Iterator[str]:
    """Three columns: iterations, the formula with the paper's constants, and with what was measured here."""
    real = {line["case"]: line for line in results.real}
    yield f"\n### Time to a validation loss of {TIME_TARGET}, {HIGHEST}, mean over seeds\n"
    yield "| method | iterations | failures | modelled h (paper's constants) | measured s (this machine) |"
    yield "|---|---|---|---|---|"
    rows: list[tuple[str, Method, float | None]] = [(METHODS[n].title, METHODS[n], None) for n in MAIN]
    rows[1:1] = [
        ("redundant computation, o = 0.654", METHODS["none"], timing.REDUNDANT_PAPER),
        ("redundant computation, o = 0.33", METHODS["none"], timing.REDUNDANT_COMPUTE),
    ]
    for title, method, redundant in rows:
        lines = results.lines("all", HIGHEST, method)
        reached = _reached(lines, TIME_TARGET)
        iterations = measure.mean(reached)
        if iterations is None:
            if any(lines):
                yield f"| {title} | {measure.cell(reached, 0)} | - | - | - |"
            continue
        failing = [results.failures(seed) for seed in results.seeds] if redundant is not None else None
        failures = measure.mean(
            [
                float(measure.failures_until(failing[i] if failing else line["failures"], at))  # type: ignore[index,arg-type]
                for i, (line, at) in enumerate(zip(lines, reached, strict=True))
            ]
        )
        assert failures is not None
        share = redundant if redundant is not None else timing.overhead(method.kind, method.every)
        hours = timing.modelled_h(round(iterations), round(failures), share)
        measured = None if redundant is not None else _measured(method, real, iterations, failures)
        seconds = "-" if measured is None else f"{measured:.1f}"
        yield f"| {title} | {iterations:.0f} | {failures:.1f} | {hours:.1f} | {seconds} |"


def _measured(
    method: Method, real: Mapping[str, Mapping[str, Any]], iterations: float, failures: float
) -> float | None:
    case = real.get("CheckFree+" if method.swapped else CASE_OF.get(method.kind, "CheckFree"))
    if case is None:
        return None
    recovery = case["recovery_ms"]
    each = sum(recovery) / len(recovery) / 1e3 if recovery else 0.0
    return timing.measured_s(round(iterations), round(failures), case["step_s"], each)


def _impulses(results: Results) -> Iterator[str]:
    if not results.impulses:
        return
    after = ", ".join(f"+{count}" for count in IMPULSE_AFTER)
    yield f"\n### Impulse response: one loss after step {IMPULSE_AT}, validation loss at {after}, mean over seeds\n"
    stages = sorted({line["stage"] for line in results.impulses})
    yield "| method | " + " | ".join("no loss" if stage < 0 else f"S{stage + 1}" for stage in stages) + " |"
    yield "|---" * (1 + len(stages)) + "|"
    for name in dict.fromkeys(line["of"] for line in results.impulses):
        cells = []
        for stage in stages:
            values = [line["values"] for line in results.impulses if (line["of"], line["stage"]) == (name, stage)]
            means = [sum(column) / len(column) for column in zip(*values, strict=True)]
            cells.append(" / ".join(f"{value:.3f}" for value in means) or "as without")
        yield f"| {METHODS[name].title} | " + " | ".join(cells) + " |"
    yield f"\nSeeds: {sorted({line['seed'] for line in results.impulses})}."


def _real(results: Results) -> Iterator[str]:
    if not results.real:
        return
    yield "\n### Six ranks, real SIGKILLs, against the simulator\n"
    yield "| case | steps | killed | losses equal to the bit | largest difference | step | recoveries | wall |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in results.real:
        times = sorted(line["recovery_ms"])
        recoveries = f"{len(times)}: {times[0]} / {times[len(times) // 2]} / {times[-1]} ms" if times else "-"
        yield (
            f"| {line['case']} | {line['iterations']} | {len(line['killed'])} | {line['steps_equal']} | "
            f"{line['largest_difference']:.1e} | {line['step_s'] * 1e3:.0f} ms | {recoveries} | {line['wall_s']} s |"
        )

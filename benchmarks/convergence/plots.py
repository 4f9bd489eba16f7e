"""Plots of a campaign as PNG: curves with failures marked, the same over time, final losses, impulse responses.

matplotlib is wanted here and nowhere else; without it the tables are written and the plots are not. Colours are Okabe
and Ito's, which the colour-blind can tell apart, and no line is told by its colour alone: each has a dash pattern too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import measure, timing
from .campaign import HIGHEST, IMPULSE_AFTER, IMPULSE_AT
from .methods import MAIN, METHODS
from .settings import STAGES
from .trace import RATES

if TYPE_CHECKING:
    from .report import Results

STYLE: Final[Mapping[str, tuple[str, Any, float]]] = {
    "none": ("#000000", "-", 1.8),
    "swap-only": ("#000000", (0, (1, 1.5)), 1.5),
    "stale-50": ("#0072B2", "-", 2.0),
    "stale-10": ("#0072B2", (0, (4, 1.5)), 1.5),
    "checkfree": ("#E69F00", "-", 1.8),
    "checkfree+": ("#D55E00", (0, (5, 1.5)), 1.8),
    "copy": ("#56B4E9", (0, (3, 1, 1, 1)), 1.5),
    "uniform": ("#009E73", (0, (2, 1)), 1.5),
    "random": ("#CC79A7", (0, (1, 1)), 1.8),
    "rollback-10": ("#999999", (0, (4, 1.5)), 1.3),
    "rollback-50": ("#777777", (0, (2, 1)), 1.3),
    "rollback-100": ("#777777", "-", 1.5),
}
CURVES: Final = ("none", "stale-50", "checkfree", "checkfree+", "random", "rollback-100", "rollback-10")
MARKERS: Final = ("o", "s", "D", "^", "v")


def draw(results: Results, folder: Path) -> list[str]:
    """All plots that there are results for; their file names. None without matplotlib, which is said."""
    try:
        import matplotlib
    except ImportError:
        print("convergence: no plots: they need matplotlib (pip install matplotlib)", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "savefig.dpi": 110,
            "figure.constrained_layout.use": True,
        }
    )
    made = []
    for name, make in (("curves", curves), ("time", over_time), ("final", finals), ("impulse", impulses)):
        figure = make(pyplot, results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
            pyplot.close(figure)
            made.append(f"{name}.png")
    return made


def curves(pyplot: Any, results: Results) -> Any:
    """Validation loss over iterations, a panel a seed; below each, who was lost when."""
    if not results.seeds:
        return None
    figure, axes = pyplot.subplots(
        2, len(results.seeds), figsize=(4.0 * len(results.seeds), 4.6), sharex=True, sharey="row", squeeze=False,
        gridspec_kw={"height_ratios": [5, 1]},
    )  # fmt: skip
    for column, seed in enumerate(results.seeds):
        axis, below = axes[0][column], axes[1][column]
        for name in CURVES:
            line = results.line("all", HIGHEST, METHODS[name], seed)
            if line is not None:
                _line(axis, name, *zip(*line["validation"], strict=True))
        failures = results.failures(seed)
        _mark(axis, below, failures)
        axis.set_title(f"seed {seed}: {len(failures)} stages lost", loc="left")
        below.set_xlabel("iteration")
    _scale(axes[0][0], results)
    axes[0][0].set_ylabel("validation loss (nats per byte)")
    axes[1][0].set_ylabel("lost stage")
    _legend(figure, axes[0][0])
    figure.suptitle(f"All stages may fail, {HIGHEST} (p = {RATES[HIGHEST]} per stage and iteration)", fontsize=10)
    return figure


def over_time(pyplot: Any, results: Results) -> Any:
    """One seed's curves over modelled hours, and the multi-process jobs' losses over seconds that were measured."""
    if not results.seeds:
        return None
    seed = max(results.seeds, key=lambda one: len(results.failures(one)))
    figure, axes = pyplot.subplots(
        1, 2 if results.real else 1, figsize=(11.5 if results.real else 6.5, 4.6), squeeze=False
    )
    left = axes[0][0]
    for name in CURVES:
        method = METHODS[name]
        line = results.line("all", HIGHEST, method, seed)
        if line is not None:
            share = timing.overhead(method.kind, method.every)
            _line(left, name, *_modelled(line, share))
            _strike(left, name, line, share)
    none = {**results.unbroken(seed), "failures": results.failures(seed)}
    for share, dash in ((timing.REDUNDANT_PAPER, (0, (6, 2))), (timing.REDUNDANT_COMPUTE, (0, (2, 2)))):
        hours, losses = _modelled(none, share)
        left.plot(hours, losses, color="#009E73", dashes=dash[1], linewidth=1.4, label=f"redundant, o = {share}")
    _scale(left, results)
    left.set_xlabel("modelled hours (91.3 s an iteration, 30 s a recovery; paper's constants)")
    left.set_ylabel("validation loss (nats per byte)")
    left.set_title(f"modelled: seed {seed}, {HIGHEST}; | = a stage lost", loc="left")
    left.legend(fontsize=8)
    if results.real:
        _measured(axes[0][1], results)
    return figure


def _modelled(line: Mapping[str, Any], share: float) -> tuple[list[float], list[float]]:
    points = line["validation"]
    lost = [measure.failures_until(line["failures"], at) for at, _ in points]
    hours = [timing.modelled_h(at, count, share) for (at, _), count in zip(points, lost, strict=True)]
    return hours, [loss for _, loss in points]


def _strike(axis: Any, name: str, line: Mapping[str, Any], share: float) -> None:
    """A tick on the curve at each failure."""
    at = [iteration for iteration, _ in line["failures"]]
    hours = [timing.modelled_h(i, measure.failures_until(line["failures"], i), share) for i in at]
    losses = [measure.at_step(line["validation"], i) for i in at]
    axis.plot(hours, losses, "|", color=STYLE[name][0], markersize=7, markeredgewidth=1.0)


def _measured(axis: Any, results: Results) -> None:
    """Training loss (mean of ten steps) of real jobs of six processes; a mark where processes were killed."""
    names = {
        "no failure": "none",
        "exact": "rollback-10",
        "stale k=11": "stale-10",
        "CheckFree": "checkfree",
        "CheckFree+": "checkfree+",
    }
    for line in results.real:
        color, dash, width = STYLE[names[line["case"]]]
        losses = measure.smoothed(line["losses"], 10)
        axis.plot(line["at_s"], losses, color=color, linestyle=dash, linewidth=width, label=line["case"])
        at = sorted({iteration for iteration, _ in line["killed"]})
        times, values = [line["at_s"][i - 1] for i in at], [losses[i - 1] for i in at]
        axis.plot(times, values, "x", color=color, markersize=6, markeredgewidth=1.6)
    axis.set_xlabel("measured seconds (six processes on this machine)")
    axis.set_ylabel("training loss, mean of ten steps")
    axis.set_title("measured: real processes, x = SIGKILL", loc="left")
    axis.legend(fontsize=8)


def finals(pyplot: Any, results: Results) -> Any:
    """Final validation loss above no failure, every seed a mark."""
    names = [name for name in MAIN[1:] if any(results.lines("all", HIGHEST, METHODS[name]))]
    if not names:
        return None
    figure, axis = pyplot.subplots(figsize=(7.5, 0.36 * len(names) + 1.4))
    for row, name in enumerate(reversed(names)):
        for number, seed in enumerate(results.seeds):
            line = results.line("all", HIGHEST, METHODS[name], seed)
            if line is not None:
                above = line["final"] - results.unbroken(seed)["final"]
                axis.plot(above, row, MARKERS[number], color=STYLE[name][0], markersize=7, markerfacecolor="none",
                          markeredgewidth=1.6)  # fmt: skip
    for number, seed in enumerate(results.seeds):
        axis.plot([], [], MARKERS[number], color="#444444", markerfacecolor="none", label=f"seed {seed}")
    axis.axvline(0.0, color="black", linewidth=1)
    axis.axvline(0.03, color="#0072B2", linewidth=1, linestyle=":", label="goal of stale k=50: 0.03")
    axis.set_yticks(range(len(names)), [METHODS[name].title for name in reversed(names)])
    axis.set_xscale("symlog", linthresh=0.1, linscale=1.5)
    ticks = [0.0, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"final validation loss above no failure (nats; linear to 0.1, then logarithmic), {HIGHEST}")
    axis.margins(x=0.06)
    figure.legend(loc="outside upper center", ncols=len(results.seeds) + 1, fontsize=8)
    return figure


def impulses(pyplot: Any, results: Results) -> Any:
    """How far the loss jumps when each stage is lost, and what is left of it after 10 and 40 iterations."""
    if not results.impulses:
        return None
    names = list(dict.fromkeys(line["of"] for line in results.impulses))
    figure, axes = pyplot.subplots(1, len(IMPULSE_AFTER), figsize=(11.5, 3.6), sharey=True)
    for panel, (axis, after) in enumerate(zip(axes, IMPULSE_AFTER, strict=True)):
        for number, name in enumerate(names):
            points = [(line["stage"], _jump(results, line, panel)) for line in results.impulses if line["of"] == name]
            for stage, jump in points:
                if stage >= 0 and jump is not None:
                    at = stage + 1 + 0.13 * (number - 2)
                    axis.plot(at, max(jump, 1e-3), color=STYLE[name][0], markeredgewidth=1.3, **_hollow(number))
        axis.set_title("right after" if not after else f"{after} iterations later", loc="left")
        axis.set_yscale("log")
        axis.set_xticks(range(1, STAGES + 1), [f"S{stage}" for stage in range(1, STAGES + 1)])
    axes[0].set_ylabel("validation loss above no loss (nats)\nbelow 0.001 drawn there")
    for number, name in enumerate(names):
        axes[-1].plot([], [], color=STYLE[name][0], label=METHODS[name].title, **_hollow(number))
    axes[-1].legend(fontsize=8)
    figure.suptitle(f"One stage lost after step {IMPULSE_AT}, every seed a mark", fontsize=10)
    return figure


def _hollow(number: int) -> dict[str, Any]:
    return {"marker": MARKERS[number % len(MARKERS)], "linestyle": "none", "markerfacecolor": "none", "markersize": 5}


def _jump(results: Results, line: Mapping[str, Any], panel: int) -> float | None:
    """Above the same model without the loss: the swapped one for CheckFree+, the plain one for all others."""
    plain = "checkfree+" if METHODS[line["of"]].swapped else "checkfree"
    for other in results.impulses:
        if (other["of"], other["stage"], other["seed"]) == (plain, -1, line["seed"]):
            return float(line["values"][panel] - other["values"][panel])
    return None


# ---- shared ------------------------------------------------------------------------------------------------


def _line(axis: Any, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    color, dash, width = STYLE[name]
    axis.plot(x, y, color=color, linestyle=dash, linewidth=width, label=METHODS[name].title)


def _mark(axis: Any, below: Any, failures: Sequence[Sequence[int]]) -> None:
    """A faint line through the curves at each failure, and in the strip below a mark at the stage's height."""
    for at, _ in failures:
        axis.axvline(at, color="#bbbbbb", linewidth=0.7, zorder=0)
    below.plot([at for at, _ in failures], [stage + 1 for _, stage in failures], "kx", markersize=4.5)
    below.set_ylim(STAGES + 0.6, 0.4)
    below.set_yticks([1, STAGES], ["S1", f"S{STAGES}"])


def _scale(axis: Any, results: Results) -> None:
    """From just below the best curve to where learning has begun: the first iterations are not the point."""
    unbroken = [loss for seed in results.seeds for _, loss in results.unbroken(seed)["validation"]]
    axis.set_ylim(min(unbroken) - 0.05, min(max(unbroken), min(unbroken) + 1.1))


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8.5)

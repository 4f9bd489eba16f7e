"""(f) Conversion, adoption, export, resharded loads, saves, loads and verification of checkpoints, against the peers.

    python benchmarks/checkpoints.py [--only convert export ...] [--rounds 5] [--scale 4] [--work FOLDER] [--out FILE]

The state is that of a GPT of 84 M parameters with AdamW in bf16: 1.01 GB of master copies and moments, 0.17 GB of
weights, as two ranks of DeepSpeed save it. Commands are measured as whole processes, from fork to exit, interpreter
and imports included; both sides take turns in each round. CPU is user + system of a process and its children, memory
the sum of resident sets (and of proportional ones) over the process tree, sampled. Sources are in the page cache, and
nothing is left to be written back when a command starts. We write digests and fsync everything; DeepSpeed's tools
fsync nothing. `ratio` compares with them as they are, `ratio_durable` adds the time that fsync of their files takes;
`unsynced` is our --no-sync: neither side waits for the disk.
Outputs are compared to the bit. One JSON line a claim, then a table; a claim whose peer is not installed is skipped,
and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from checkpoint_peers import fixtures
from checkpoint_peers.measure import Spent, durable, of, run, settle, spread, warm

from holdfast.ckpt.formats import open_any
from holdfast.ckpt.universal.read import Reader

COMMAND = Path(sys.executable).with_name("holdfast")
OURS = (*([str(COMMAND)] if COMMAND.exists() else [sys.executable, "-m", "holdfast.launcher.cli"]), "ckpt")
FIGURES = ("wall", "cpu", "rss", "sum_rss", "sum_pss")
Line = dict[str, Any]


class NotInstalled(Exception):
    """A peer that a claim needs."""


@dataclass(frozen=True)
class Setting:
    """Where, how often, and with whose interpreter."""

    work: Path
    rounds: int
    scale: int
    deepspeed: Path | None

    def peer(self, *beside: str) -> Path:
        """DeepSpeed's interpreter. NotInstalled: there is none, or it has not what must be beside it."""
        if self.deepspeed is None:
            raise NotInstalled("DeepSpeed is not installed: make bench-checkpoints, or --deepspeed-python")
        for module in beside:
            if not has(self.deepspeed, module):
                raise NotInstalled(f"{module} is not installed beside DeepSpeed, whose tool needs it")
        return self.deepspeed

    def command(self, *words: str | Path) -> Spent:
        """One of our verbs."""
        environment = fixtures.environment(Path(sys.executable))
        return run([*OURS, *map(str, words)], log=self.work / "ours.log", env=environment, cwd=self.work)

    def tool(self, *words: str | Path) -> Spent:
        """One of DeepSpeed's."""
        python = self.peer()
        environment = fixtures.environment(python)
        return run([str(python), *map(str, words)], log=self.work / "peer.log", env=environment, cwd=self.work)


def goal(value: float, limit: float, *, at_least: bool) -> Line:
    """A figure and what it had to be."""
    met = value >= limit if at_least else value <= limit
    return {"value": round(value, 4), "goal": f"{'>=' if at_least else '<='} {limit:g}", "met": met}


def over(one: list[float], other: list[float]) -> dict[str, float]:
    """How many times `other` takes as long as `one`: of the medians, and the spread over rounds."""
    rounds = spread(b / a for a, b in zip(one, other, strict=True))
    medians = spread(other)["median"] / spread(one)["median"]
    return {"ratio": round(medians, 3), "min": rounds["min"], "max": rounds["max"]}


def compare(ours: list[Spent], theirs: list[Spent], synced: list[float]) -> Line:
    """All figures of two commands that ran in turn."""
    line: Line = {
        "ours": {what: of(ours, what) for what in FIGURES},
        "peer": {what: of(theirs, what) for what in FIGURES},
    }
    mine, others = [one.wall for one in ours], [one.wall for one in theirs]
    line["ratio"] = over(mine, others)
    line["ratio_durable"] = over(mine, [a + b for a, b in zip(others, synced, strict=True)])
    line["share"] = {
        what: round(line["ours"][what]["median"] / line["peer"][what]["median"], 4)
        for what in FIGURES
        if line["peer"][what]["median"]
    }
    return line


# ---- DeepSpeed's checkpoints ----------------------------------------------------------------------------------


def to_universal(setting: Setting, source: Path, target: Path) -> Spent:
    """ds_to_universal with its own defaults: 4 workers extract, 2 merge."""
    words = ["--inject_missing_state", "--input_folder", source / "step", "--output_folder", target]
    return setting.tool("-m", "deepspeed.checkpoint.ds_to_universal", *words)


def same(one: Path, other: Path, names: Mapping[str, str]) -> None:
    """Every state in `names` has the same bits in both, whatever formats they are of."""
    with Reader(open_any(one)) as a, Reader(open_any(other)) as b:
        pairs = [key for key in a.checkpoint.states if key[1] in names]
        assert pairs, "nothing to compare"
        for name, state in pairs:
            if bytes(a.read(name, state)) != bytes(b.read(name, names[state])):
                raise SystemExit(f"outputs differ: {name} {state}")


def convert(setting: Setting) -> Iterator[Line]:
    source = fixtures.deepspeed(setting.work, setting.peer(), 2, setting.scale)
    outputs = {"convert": "converted", "unsynced": "converted-unsynced", "adopt": "adopted", "digest": "adopted-digest"}
    outputs["peer"] = "universal/step"
    paths = {side: setting.work / name for side, name in outputs.items()}
    paths["peer"].parent.mkdir(exist_ok=True)
    sides: dict[str, Callable[[], Spent]] = {
        "convert": lambda: setting.command("convert", source, paths["convert"]),
        "unsynced": lambda: setting.command("convert", source, paths["unsynced"], "--no-sync"),
        "adopt": lambda: setting.command("adopt", source, "--out", paths["adopt"]),
        "digest": lambda: setting.command("adopt", source, "--digest", "--out", paths["digest"]),
        "peer": lambda: to_universal(setting, source, paths["peer"]),
    }
    spent: dict[str, list[Spent]] = {side: [] for side in sides}
    synced: list[float] = []
    for turn in range(setting.rounds):
        for side, act in sides.items():
            warm(source)
            settle(paths[side])
            spent[side].append(act())
        synced.append(durable(paths["peer"]))
        if turn == 0:
            for side in ("convert", "unsynced"):
                same(paths["peer"].parent, paths[side], {state: state for state in fixtures.STATES})
    settle(*paths.values())
    line = compare(spent["convert"], spent["peer"], synced)
    line["unsynced"] = compare(spent["unsynced"], spent["peer"], synced)
    line["goals"] = {
        "wall, neither waits for the disk": goal(line["unsynced"]["ratio"]["ratio"], 5, at_least=True),
        "wall, we alone wait for it": goal(line["ratio"]["ratio"], 5, at_least=True),
        "cpu": goal(line["share"]["cpu"], 0.2, at_least=False),
        "memory": goal(line["share"]["sum_rss"], 0.05, at_least=False),
    }
    yield {"claim": "ZeRO-2 to universal, against ds_to_universal", **line}
    line = compare(spent["adopt"], spent["peer"], synced)
    line["with_digests"] = compare(spent["digest"], spent["peer"], synced)
    line["goals"] = {"wall": goal(line["ratio"]["ratio"], 50, at_least=True)}
    yield {"claim": "adopt ZeRO-2 (index only), against ds_to_universal", **line}


def flat(setting: Setting) -> Iterator[Line]:
    """Ours alone: files that our own writer of DeepSpeed's format emits, at scale 1 and 4."""
    sources = {scale: fixtures.emitted(setting.work, scale) for scale in (1, 4)}
    spent: dict[int, list[Spent]] = {scale: [] for scale in sources}
    target = setting.work / "converted"
    for _ in range(setting.rounds):
        for scale, source in sources.items():
            warm(source)
            settle(target)
            spent[scale].append(setting.command("convert", source, target))
    settle(target)
    sizes = {f"scale {scale}": {what: of(rounds, what) for what in FIGURES} for scale, rounds in spent.items()}
    grown = (sizes["scale 4"]["rss"]["median"] - sizes["scale 1"]["rss"]["median"]) * 1e6
    added = warm(sources[4]) - warm(sources[1])
    yield {
        "claim": "memory of ZeRO-2 to universal when the model grows 4x",
        "sizes": sizes,
        # Names, places and digests are held, and nothing else: a few bytes for each thousand of the model.
        "goals": {"memory per byte added": goal(grown / added, 0.005, at_least=False)},
    }


def export(setting: Setting) -> Iterator[Line]:
    python = setting.peer("safetensors", "huggingface_hub")
    source = fixtures.deepspeed(setting.work, python, 3, setting.scale)
    ours, theirs = setting.work / "exported", setting.work / "exported-peer"
    tool = source / "zero_to_fp32.py"
    mine: list[Spent] = []
    others: list[Spent] = []
    synced: list[float] = []
    for turn in range(setting.rounds):
        warm(source)
        settle(ours)
        # zero_to_fp32 writes the master copies, so we do: the same bytes.
        mine.append(setting.command("export", source, ours, "--masters"))
        warm(source)
        settle(theirs)
        others.append(setting.tool(tool, source, theirs, "--safe_serialization"))
        synced.append(durable(theirs))
        if turn == 0:
            same(theirs, ours, {"weight": "weight"})
    settle(ours, theirs)
    line = compare(mine, others, synced)
    line["goals"] = {"wall": goal(line["ratio"]["ratio"], 3, at_least=True)}
    yield {"claim": "ZeRO-3 to Hugging Face, against zero_to_fp32", **line}


# ---- loads and saves of a job ---------------------------------------------------------------------------------


def reshard(setting: Setting) -> Iterator[Line]:
    saved, ours = fixtures.dcp(setting.work)
    report = setting.work / "report.json"
    warm(saved)
    warm(ours)
    options = {"do": "load", "folder": str(saved), "ours": str(ours), "rounds": setting.rounds, "report": str(report)}
    fixtures.run_ranks(Path(sys.executable), "rank.py", 4, options, setting.work)
    rows = json.loads(report.read_text())
    for dim in (0, 1):
        line: Line = {}
        walls: dict[str, list[float]] = {}
        for side in ("dcp", "same_files", "ours"):
            mine = [row for row in rows if (row["dim"], row["side"]) == (dim, side)]
            walls[side] = [row["wall"] for row in mine]
            line[side] = {what: spread(row[what] for row in mine) for what in ("wall", "cpu", "amplification")}
        # Along dim 0 both read the very files that DCP wrote; along dim 1 we have tiles, and verify them.
        mine_is = "same_files" if dim == 0 else "ours"
        line["ratio"] = over(walls[mine_is], walls["dcp"])
        line["ratio_verified"] = over(walls["ours"], walls["dcp"])
        share = spread(walls[mine_is])["median"] / spread(walls["dcp"])["median"]
        amplification = line[mine_is]["amplification"]["median"]
        line["goals"] = {
            "wall": goal(share, 0.5, at_least=False),
            "amplification": goal(amplification, 1.05 if dim == 0 else 1.25, at_least=False),
        }
        yield {"claim": f"resharded load from 2 to 4 ranks along dim {dim}, against dcp.load", **line}


def alone(setting: Setting, do: str) -> dict[str, list[float]]:
    """Seconds of each side, all in one process of its own."""
    report = setting.work / "report.json"
    options = {"do": do, "work": str(setting.work), "rounds": setting.rounds, "report": str(report)}
    script = Path(__file__).resolve().parent / "checkpoint_peers" / "alone.py"
    environment = fixtures.environment(Path(sys.executable))
    run([sys.executable, str(script), json.dumps(options)], log=setting.work / "alone.log", env=environment)
    found: dict[str, list[float]] = json.loads(report.read_text())
    return found


def save(setting: Setting) -> Iterator[Line]:
    spent = alone(setting, "save")
    line: Line = {side: spread(seconds) for side, seconds in spent.items()}
    ratios = {f"over_{peer}": over(spent["ours"], spent[peer]) for peer in ("safetensors", "torch", "dcp", "bare")}
    goals = {
        "safetensors": goal(ratios["over_safetensors"]["ratio"], 1.0, at_least=True),
        "dcp": goal(ratios["over_dcp"]["ratio"], 2.0, at_least=True),
    }
    yield {"claim": "save of 0.5 GB with digests and fsync", "seconds": line, **ratios, "goals": goals}


def load(setting: Setting) -> Iterator[Line]:
    spent = alone(setting, "load")
    line: Line = {side: spread(seconds) for side, seconds in spent.items()}
    ratios = {f"over_{peer}": over(spent["ours"], spent[peer]) for peer in ("torch", "safetensors", "dcp", "bare")}
    ratios["two_jobs_over_torch"] = over(spent["ours_2_jobs"], spent["torch"])
    ratios["in_place_over_torch"] = over(spent["ours_in_place"], spent["torch_in_place"])
    goals = {
        "torch, 2 threads": goal(ratios["two_jobs_over_torch"]["ratio"], 1.5, at_least=True),
        "torch, into a model": goal(ratios["in_place_over_torch"]["ratio"], 1.5, at_least=True),
    }
    yield {"claim": "full verified load of 0.5 GB, warm", "seconds": line, **ratios, "goals": goals}


def verify(setting: Setting) -> Iterator[Line]:
    spent = alone(setting, "verify")
    line: Line = {side: spread(seconds) for side, seconds in spent.items()}
    goals = {}
    for jobs in (1, 2):
        raw = [side for side in spent if side.startswith(f"bare_{jobs}_")]
        best = min(raw, key=lambda side: spread(spent[side])["median"])
        speed = over(spent[f"ours_{jobs}"], spent[best])
        line[f"share_of_bare_{jobs}"] = {"of": best, **speed}
        goals[f"{jobs} thread{'s' * (jobs > 1)}"] = goal(speed["ratio"], 0.8, at_least=True)
    yield {"claim": "verify --full of 0.5 GB, against bare reads, warm", "seconds": line, "goals": goals}


CLAIMS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "convert": convert,
    "flat": flat,
    "export": export,
    "reshard": reshard,
    "save": save,
    "load": load,
    "verify": verify,
}


# ---- the command ----------------------------------------------------------------------------------------------


def has(python: str | Path, module: str) -> bool:
    """Whether an interpreter is there, and finds the module."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    with contextlib.suppress(OSError):
        return subprocess.run([python, "-c", probe], check=False, capture_output=True).returncode == 0
    return False


def python_with_deepspeed(given: str) -> Path | None:
    """The interpreter that has DeepSpeed: the given one, this one, or that of `make test-interop`."""
    places = (
        [given] if given else [sys.executable, str(Path(__file__).resolve().parents[1] / ".venv/interop/bin/python")]
    )
    return next((Path(place) for place in places if has(place, "deepspeed")), None)


def rows(line: Line) -> Iterator[str]:
    """The claim's goals as rows of a table."""
    if "skipped" in line:
        yield f"| {line['claim']} | | | | skipped: {line['skipped']} |"
    for what, found in line.get("goals", {}).items():
        verdict = "met" if found["met"] else "not met"
        yield f"| {line['claim']} | {what} | {found['value']:g} | {found['goal']} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CLAIMS), default=list(CLAIMS), metavar="CLAIM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=int, choices=(1, 4), default=1, help="of convert and export: 84 or 336 M")
    parser.add_argument("--work", type=Path, help="keep fixtures here; without, they are made and removed")
    parser.add_argument("--deepspeed-python", default="", metavar="PYTHON", help="an interpreter that has DeepSpeed")
    parser.add_argument("--out", type=Path, help="write the JSON lines there, too")
    arguments = parser.parse_args()
    lines: list[Line] = []
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-checkpoints-")))
        work.mkdir(parents=True, exist_ok=True)
        python = python_with_deepspeed(arguments.deepspeed_python)
        setting = Setting(work.resolve(), arguments.rounds, arguments.scale, python)
        for name in arguments.only:
            try:
                for line in CLAIMS[name](setting):
                    lines.append({"benchmark": "checkpoints", "rounds": setting.rounds, "scale": setting.scale, **line})
                    print(json.dumps(lines[-1]), flush=True)
            except NotInstalled as reason:
                lines.append({"benchmark": "checkpoints", "claim": name, "skipped": str(reason)})
                print(json.dumps(lines[-1]), flush=True)
    print("\n| claim | figure | value | goal | |\n|---|---|---|---|---|")
    print("\n".join(row for line in lines for row in rows(line)))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

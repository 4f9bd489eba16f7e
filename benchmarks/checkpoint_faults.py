"""Faults of checkpoints, seeded: what is damaged is found at its place, and what is killed leaves all or nothing.

    damage    flipped bits, truncated, missing, duplicated, renamed files, files of another step ─▶ verify, and a reader
    kill      SIGKILL at a seeded call to the disk, of a save and of `holdfast ckpt convert`      ─▶ --resume
    full      the disk is full from a seeded call on; and a real file system that is too small
    hostile   pickles that would run code, in every kind of file that has pickles; headers and manifests with any bytes

    python benchmarks/checkpoint_faults.py [--seed S] [--only SECTION] [--damage N] [--kill N] [--full N] [--hostile N]
                                           [--scale N] [--out FILE]

Prints a JSON line for each case that is not as it should be, and one a section; closes with a table. With --out every
case's verdict is appended to FILE, and a case that is there already is not run again: an interrupted campaign goes on.
Cases follow from seed, section and number, so one can be run again alone. Exit code 1 if any case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import universal as helpers
from spoil import KINDS, bomb, mutated, small_disk, spoil, zipped

from holdfast.ckpt.cli import main as ckpt
from holdfast.ckpt.universal import write
from holdfast.ckpt.universal.disk import Disk
from holdfast.ckpt.universal.errors import CheckpointError, StorageError
from holdfast.ckpt.universal.manifest import commit_bytes
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.staging import BLOCK_BYTES
from holdfast.ckpt.universal.verify import Finding, verify
from holdfast.ckpt.universal.write import WriteOptions, Writer

SECTIONS = {"damage": 1000, "kill": 200, "full": 100, "hostile": 600}
PIECE = 40_000
REDONE_MAX = 0.05
"""Of the payload; one block of the writer (4 MiB) in a checkpoint of less than 84 MB."""
EXECUTED: list[str] = []
WATCHED = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "os.remove", "os.fork")

Case = Callable[[Path, random.Random], dict[str, Any]]


class Wrong(AssertionError):
    """What a case found that must not be."""


def must(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


# ---- checkpoints ------------------------------------------------------------------------------------------------


class Made:
    """Checkpoints that all cases start from, made once."""

    def __init__(self, root: Path, scale: int) -> None:
        self.root = root
        self.scale = scale
        self.plain = helpers.save(root / "plain", options=WriteOptions(fsync=False, id="a" * 32)).root
        self.archive = helpers.save(root / "archive", options=WriteOptions(fsync=False, archive=True, id="a" * 32)).root
        self.later = helpers.save(root / "later", seed=1, options=WriteOptions(fsync=False, id="b" * 32)).root
        self.large = helpers.save(root / "large", scale=scale, options=WriteOptions(fsync=False, id="0" * 32)).root
        self.deepspeed, self.dcp, self.torch = root / "deepspeed", root / "dcp", root / "torch.pt"
        for target, spec in ((self.deepspeed, "deepspeed:zero2,dp=2"), (self.dcp, "dcp:dp=2"), (self.torch, "torch")):
            done = cli("reshard", self.large, target, "--to", spec, "--allow-lossy")
            must(done[0] == 0, f"{spec}: {done[1]}")
        cli("convert", self.dcp, root / "from-dcp")
        self.from_dcp = root / "from-dcp"


def cli(*words: object) -> tuple[int, str, str]:
    """`holdfast ckpt` in this process: exit code, stderr, stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = ckpt([str(word) for word in words])
    return code, err.getvalue(), out.getvalue()


def content(path: Path) -> dict[tuple[str, str], bytes]:
    """Every tensor's bytes, verified."""
    with Reader(open_checkpoint(path)) as reader:
        return {key: bytes(reader.read(*key)) for key in reader.checkpoint.states}


def readable(path: Path) -> bool:
    """Whether a reader takes it for a checkpoint."""
    try:
        return bool(content(path))
    except CheckpointError:
        return False


def hidden_of(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{target.name}.*"))


# ---- damage -----------------------------------------------------------------------------------------------------


def case_damage(made: Made) -> Case:
    expected = {made.plain: content(made.plain), made.archive: content(made.archive)}

    def case(work: Path, chance: random.Random) -> dict[str, Any]:
        kind = chance.choice(KINDS)
        source = made.plain if kind == "mixed-step" or chance.random() < 0.7 else made.archive
        home = Path(shutil.copytree(source, work / "c"))
        spoilt = spoil(home, kind, chance, made.later)
        file, at, where = spoilt.file, spoilt.at, spoilt.tensor
        found: list[Finding] = verify(home)
        must(found, f"{kind} of {file}: nothing found")
        named = [one for one in found if one.file == file]
        must(named, f"{kind} of {file}: told of {found[0].file}")
        if at >= 0 and file not in ("MANIFEST.json", "COMMIT"):
            hit = [one for one in named if one.start <= at < one.stop and (one.name, one.state) == where]
            must(len(found) == 1 and hit, f"{kind} of {file} at {at} ({where}): {found}")
        must(all("\n" not in one.message for one in found), "more than one line")
        try:
            read = content(home)
        except CheckpointError as error:
            must("\n" not in str(error), "more than one line")
        else:
            must(read == expected[source], f"{kind} of {file}: a reader was given other bytes")
        return {"kind": kind, "file": file}

    return case


# ---- kill -------------------------------------------------------------------------------------------------------


class Killer(helpers.FaultyDisk):
    """Dies at a call; what it wrote of the payload by then is in shared memory."""

    def __init__(self, at: int, shared: mmap.mmap) -> None:
        super().__init__(at, die=True)
        self._shared = shared

    def pwrite(self, fd: int, data: memoryview, offset: int) -> None:
        super().pwrite(fd, data, offset)
        done = int.from_bytes(self._shared[:8], "little") + data.nbytes
        self._shared[:8] = done.to_bytes(8, "little")


def save(target: Path, disk: Disk, scale: int) -> int:
    """The large checkpoint, taken up if it was interrupted; payload bytes written now."""
    found = helpers.tensors(0, scale)
    with Writer(target, WriteOptions(resume=True, id="0" * 32, fsync=False), disk) as writer:
        writer.begin(helpers.plans(found))
        for (name, state), (_, array) in found.items():
            flat = array.reshape(-1)
            for start, stop in writer.missing(name, state):
                for low in range(start, stop, PIECE):
                    high = min(low + PIECE, stop)
                    writer.put(name, state, flat[low:high].data.cast("B"), (low, high))
        written = writer.bytes_written
        writer.commit(helpers.DETAILS)
    return written


def convert(source: Path, target: Path, disk: Disk) -> int:
    """`holdfast ckpt convert --resume`; payload bytes written now."""
    kept = write.Disk
    write.Disk = lambda: disk  # type: ignore[assignment, misc]
    try:
        code, err, out = cli("convert", source, target, "--resume", "--jobs", "1", "--json")
    finally:
        write.Disk = kept  # type: ignore[misc]
    if code == 6:
        must(err.count("\n") == 1, f"more than one line: {err}")
        raise StorageError(err.strip())
    must(code == 0, err)
    return int(json.loads(out)["bytes_written"])


def fork(work: Callable[[], object]) -> int:
    """Run it in a child; the signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] & 0x7F


def case_kill(made: Made) -> Case:
    ways: list[tuple[str, Callable[[Path, Disk], int], dict[tuple[str, str], bytes]]] = [
        ("save", lambda target, disk: save(target, disk, made.scale), content(made.large)),
        ("convert", lambda target, disk: convert(made.dcp, target, disk), content(made.from_dcp)),
    ]
    calls, totals = {}, {}
    for name, way, _ in ways:
        counting = helpers.FaultyDisk()
        totals[name] = way(made.root / f"counted-{name}", counting)
        calls[name] = counting.calls

    def case(work: Path, chance: random.Random) -> dict[str, Any]:
        name, way, expected = chance.choice(ways)
        target, shared = work / "c", mmap.mmap(-1, 4096)
        at = chance.randrange(1, calls[name] + 1)
        must(fork(lambda: way(target, Killer(at, shared))) == signal.SIGKILL, f"{name}: not killed at call {at}")
        for folder in [target, *hidden_of(target)] if target.exists() else hidden_of(target):
            committed = (folder / "COMMIT").is_file()
            try:
                read = content(folder)
            except CheckpointError:
                continue
            must(committed and read == expected, f"{name} killed at {at}: {folder.name} is readable and wrong")
        before = int.from_bytes(shared[:8], "little")
        again = 0 if target.exists() else way(target, Disk())
        must(content(target) == expected and verify(target) == [], f"{name} killed at {at}: resumed to something else")
        must(hidden_of(target) == [] or not again, f"{name} killed at {at}: left {hidden_of(target)}")
        twice = max(0, before + again - totals[name]) if again else 0
        must(twice <= max(REDONE_MAX * totals[name], BLOCK_BYTES), f"{name} killed at {at}: {twice} bytes twice")
        return {"kind": name, "at": at, "redone": round(twice / totals[name], 4)}

    return case


# ---- full -------------------------------------------------------------------------------------------------------


def case_full(made: Made) -> Case:
    ways: list[tuple[str, Callable[[Path, Disk], int]]] = [
        ("save", lambda target, disk: save(target, disk, made.scale)),
        ("convert", lambda target, disk: convert(made.dcp, target, disk)),
    ]
    calls = {}
    for name, way in ways:
        counting = helpers.FaultyDisk()
        way(made.root / f"counted-full-{name}", counting)
        calls[name] = counting.calls

    def case(work: Path, chance: random.Random) -> dict[str, Any]:
        name, way = chance.choice(ways)
        target = work / "c"
        at = chance.randrange(1, calls[name] - 3)
        try:
            way(target, helpers.FaultyDisk(at))
        except CheckpointError as error:
            must("no space left" in str(error) and "\n" not in str(error), f"{name} full at {at}: {error}")
            must(not target.exists(), f"{name} full at {at}: something is there under its name")
            for folder in hidden_of(target):
                must(not readable(folder), f"{name} full at {at}: {folder.name} is readable")
        else:
            must(target.exists(), f"{name} full at {at}: neither error nor checkpoint")
        return {"kind": name, "at": at}

    return case


def really_full(made: Made, work: Path) -> str:
    """Save and convert into a file system that is too small, the check of free space switched off for the second."""
    work.mkdir(parents=True)
    with small_disk(work, 4) as place:
        if place is None:
            return "no small file system can be mounted here"
        try:
            save(place / "c", Disk(), made.scale)
            raise Wrong("a save of more than the disk holds did not fail")
        except StorageError as error:
            must("no space left" in str(error), str(error))
        code, err, _ = cli("convert", made.dcp, place / "d")
        must(code == 6 and err.count("\n") == 1, f"{code}: {err}")
        must(not (place / "c").exists() and not (place / "d").exists(), "something is there under a target's name")
    return "refused in one line, exit code 6"


# ---- hostile ----------------------------------------------------------------------------------------------------


def case_hostile(made: Made) -> Case:
    def case(work: Path, chance: random.Random) -> dict[str, Any]:
        kind = chance.choice(("torch", "deepspeed", "dcp", "header", "manifest", "commit", "topic"))
        canary = work / "canary"
        if kind == "torch":
            path = work / "a.pt"
            data = zipped(bomb(chance, canary)) if chance.random() < 0.8 else bomb(chance, canary)
            path.write_bytes(data)
        elif kind in ("deepspeed", "dcp"):
            path = Path(shutil.copytree(made.deepspeed if kind == "deepspeed" else made.dcp, work / "c"))
            names = path.rglob("*.pt") if kind == "deepspeed" else path.glob(".metadata")
            file = chance.choice(sorted(names))
            file.write_bytes(zipped(bomb(chance, canary)) if kind == "deepspeed" else bomb(chance, canary))
        else:
            path = Path(shutil.copytree(made.plain, work / "c"))
            payload = "optim/exp_avg-00001-of-00001.safetensors"
            name = {"header": payload, "manifest": "MANIFEST.json", "commit": "COMMIT", "topic": "state/trainer.json"}
            file = path / name[kind]
            data = file.read_bytes()
            head = 8 + int.from_bytes(data[:8], "little") if kind == "header" else len(data)
            file.write_bytes(mutated(data[:head], chance) + data[head:])
            if kind == "manifest":  # a hostile writer gets its COMMIT right
                (path / "COMMIT").write_bytes(commit_bytes(file.read_bytes()))
        began = time.monotonic()
        EXECUTED.clear()
        for verb in ("inspect", "verify"):
            code, err, _ = cli(verb, path)
            must(code in range(8), f"{kind}: exit code {code}")
            must(err.count("\n") <= 1 or verb == "verify", f"{kind}: {verb} said more than one line: {err[:300]}")
            must("Traceback" not in err, err)
            must(kind not in ("torch", "deepspeed", "dcp") or code or not EXECUTED, f"{kind}: {EXECUTED}")
        must(not canary.exists() and not EXECUTED, f"{kind}: something was executed: {EXECUTED}")
        must(time.monotonic() - began < 10.0, f"{kind}: took {time.monotonic() - began:.0f} s")
        return {"kind": kind}

    return case


# ---- the campaign -----------------------------------------------------------------------------------------------


def run(section: str, number: int, case: Case, root: Path, seed: int, done: dict[str, Any], out: Any) -> dict[str, Any]:
    """All cases of a section; what they came to."""
    kinds: dict[str, int] = {}
    worst, wrong, began = 0.0, [], time.monotonic()
    for at in range(number):
        key = f"{seed}/{section}/{at}"
        told = done.get(key)
        if told is None:
            with tempfile.TemporaryDirectory(dir=root) as work:
                try:
                    told = case(Path(work), random.Random(key))
                except Exception as error:  # whatever a case meets is its verdict
                    told = {"wrong": f"{type(error).__name__}: {error}"[:2000]}
            if out is not None:
                print(json.dumps({"case": key, **told}), file=out, flush=True)
        if "wrong" in told:
            wrong.append(at)
            print(json.dumps({"case": key, **told}), flush=True)
        kinds[told.get("kind", "?")] = kinds.get(told.get("kind", "?"), 0) + 1
        worst = max(worst, told.get("redone", 0.0))
    line = {"section": section, "cases": number, "wrong": wrong, "kinds": dict(sorted(kinds.items()))}
    line |= {"redone_max": worst} if section == "kill" else {}
    line["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(line), flush=True)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description="Seeded faults of checkpoints.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=int, default=16, help="size of what is killed: 0.36 MB times this (default 16)")
    parser.add_argument("--only", choices=list(SECTIONS))
    for section, number in SECTIONS.items():
        parser.add_argument(f"--{section}", type=int, default=number, metavar="N", help=f"cases (default {number})")
    parser.add_argument("--out", type=Path, help="append every verdict here, and skip what is there")
    arguments = parser.parse_args()
    done = {}
    if arguments.out is not None and arguments.out.exists():
        for line in arguments.out.read_text().splitlines():
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                done[told.pop("case")] = told
    cases = {"damage": case_damage, "kill": case_kill, "full": case_full, "hostile": case_hostile}
    lines = []
    with tempfile.TemporaryDirectory(prefix="holdfast-faults-") as root, contextlib.ExitStack() as stack:
        (Path(root) / "made").mkdir()
        made = Made(Path(root) / "made", arguments.scale)
        out = stack.enter_context(arguments.out.open("a")) if arguments.out is not None else None
        sys.addaudithook(lambda event, args: EXECUTED.append(event) if event in WATCHED else None)
        for section, make in cases.items():
            if arguments.only in (None, section):
                number = getattr(arguments, section)
                lines.append(run(section, number, make(made), Path(root), arguments.seed, done, out))
                if section == "full":
                    print(json.dumps({"section": "a small file system", "told": really_full(made, Path(root) / "r")}))
    print("\n| section | cases | wrong | kinds |\n|---|---|---|---|")
    for line in lines:
        kinds = ", ".join(f"{name} {count}" for name, count in line["kinds"].items())
        print(f"| {line['section']} | {line['cases']} | {len(line['wrong'])} | {kinds} |")
    return 1 if any(line["wrong"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())

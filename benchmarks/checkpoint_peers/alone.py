"""Saves and loads of a whole state in one process, all sides in turn: 84 M parameters in float32 and in bf16, 0.5 GB.

    save     our writer: digests, fsync    safetensors + fsync    torch.save + fsync    DCP (fsyncs)    bare pwrite
    load     our Reader, verifying         torch.load             safetensors           DCP             bare preadv
             into new memory; and into tensors that are there, which torch.load needs a copy for
    verify   every chunk against its digest                       the same files, bare preadv, as many threads

Every save is to a new name on a disk that has nothing left to write; every load is of warm files into new memory, and
each in a process of its own, forked when all is imported.
Prints {"side": [seconds, ...]} as JSON. Loaded values are compared to the bit once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from measure import warm
from state import shapes

from holdfast.ckpt.tensors import load
from holdfast.ckpt.universal.save import Part, save_universal
from holdfast.ckpt.universal.verify import verify
from holdfast.ckpt.universal.write import WriteOptions

BLOCK = 4 << 20
Sides = dict[str, Callable[[], Any]]
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes(1).items()}
    return found | {f"{name}.bf16": value.bfloat16() for name, value in found.items()}


def raw(value: torch.Tensor) -> memoryview:
    return value.reshape(-1).view(torch.uint8).numpy().data


def apart(act: Callable[[], float]) -> float:
    """What it returns, in a forked process: everything is imported, and no side finds memory that another has freed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, repr(act()).encode())
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("a side failed; see above")
    return float(text)


def fsync(path: Path) -> None:
    for one in (path, path.parent):
        fd = os.open(one, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


# ---- saves --------------------------------------------------------------------------------------------------


def save_ours(tensors: dict[str, torch.Tensor], path: Path, *, direct: bool = False) -> None:
    parts = [Part(n, "weight", DTYPES[t.dtype], tuple(t.shape), 0, t.numel(), raw(t)) for n, t in tensors.items()]
    save_universal(path, parts, options=WriteOptions(direct=direct))


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    safetensors.torch.save_file(tensors, path)
    fsync(path)


def save_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)
    fsync(path)


def save_dcp(tensors: dict[str, torch.Tensor], path: Path) -> None:
    dcp.save({"model": tensors}, checkpoint_id=path, no_dist=True)


def save_bare(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb", buffering=0) as out:
        for tensor in tensors.values():
            view = raw(tensor)
            for start in range(0, view.nbytes, BLOCK):
                out.write(view[start : start + BLOCK])
        os.fsync(out.fileno())


SAVES: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    "ours": save_ours,
    "ours_direct": lambda tensors, path: save_ours(tensors, path, direct=True),
    "safetensors": save_safetensors,
    "torch": save_torch,
    "dcp": save_dcp,
    "bare": save_bare,
}


def saves(work: Path) -> Sides:
    tensors = state()

    def one(side: str) -> float:
        path = work / f"saved-{side}"
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        os.sync()

        def timed() -> float:
            started = time.perf_counter()
            SAVES[side](tensors, path)
            return time.perf_counter() - started

        return apart(timed)

    return {side: lambda side=side: one(side) for side in SAVES}


# ---- loads --------------------------------------------------------------------------------------------------


def into_ours(path: Path, live: dict[str, torch.Tensor]) -> None:
    """Into a model that is there, as a job that resumes does it."""
    load(path, into=live)


def into_torch(path: Path, live: dict[str, torch.Tensor]) -> None:
    for name, tensor in torch.load(path, weights_only=True).items():
        live[name].copy_(tensor)


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """With its bytes: load_file() maps the file, and nothing is read before it is touched."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def load_dcp(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    dcp.load({"model": found}, checkpoint_id=path, no_dist=True)
    return found


def load_bare(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    with open(path, "rb", buffering=0) as source:
        for tensor in found.values():
            view = raw(tensor)
            while view.nbytes:
                view = view[source.readinto(view) :]
    return found


def loads(work: Path) -> Sides:
    tensors = state()
    paths = {side: work / f"loaded-{side}" for side in SAVES if side != "ours_direct"}
    for side, path in paths.items():
        if not path.exists():
            SAVES[side](tensors, path)
    compared: set[str] = set()
    sides: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "ours": lambda: load(paths["ours"], jobs=1),
        "ours_2_jobs": lambda: load(paths["ours"]),
        "torch": lambda: torch.load(paths["torch"], weights_only=True),
        "safetensors": lambda: load_safetensors(paths["safetensors"]),
        "dcp": lambda: load_dcp(paths["dcp"], tensors),
        "bare": lambda: load_bare(paths["bare"], tensors),
    }
    into = {"ours_in_place": ("ours", into_ours), "torch_in_place": ("torch", into_torch)}

    def in_place(side: str) -> float:
        source, act = into[side]

        def timed() -> float:
            live = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
            started = time.perf_counter()
            act(paths[source], live)
            spent = time.perf_counter() - started
            assert all(torch.equal(tensors[name], live[name]) for name in tensors), side
            return spent

        warm(paths[source])
        return apart(timed)

    def one(side: str) -> float:
        def timed() -> float:
            started = time.perf_counter()
            found = sides[side]()
            spent = time.perf_counter() - started
            if side not in compared:
                assert all(torch.equal(tensors[name], found[name]) for name in tensors), side
            return spent

        warm(paths[side.removesuffix("_2_jobs")])
        spent = apart(timed)
        compared.add(side)
        return spent

    timed = {side: lambda side=side: one(side) for side in sides}
    return timed | {side: lambda side=side: in_place(side) for side in into}


# ---- verification -------------------------------------------------------------------------------------------


def read_bare(path: Path, jobs: int, block: int) -> None:
    """All payload files, each thread every jobs-th block."""

    def work(index: int) -> None:
        buffer = memoryview(bytearray(block))
        for file in sorted(path.rglob("*.safetensors")):
            with open(file, "rb", buffering=0) as source:
                for at in range(index * block, os.fstat(source.fileno()).st_size, jobs * block):
                    os.preadv(source.fileno(), [buffer], at)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def verifications(work: Path) -> Sides:
    path = work / "loaded-ours"
    if not path.exists():
        save_ours(state(), path)

    def one(act: Callable[[], object]) -> float:
        def timed() -> float:
            started = time.perf_counter()
            found = act()
            spent = time.perf_counter() - started
            assert not found, found
            return spent

        warm(path)
        return apart(timed)

    sides: Sides = {}
    for jobs in (1, 2):
        sides[f"ours_{jobs}"] = lambda jobs=jobs: one(lambda: verify(path, jobs=jobs))
        for block in (1 << 18, 1 << 20, 1 << 22, 1 << 23):
            sides[f"bare_{jobs}_{block >> 10}k"] = lambda j=jobs, b=block: one(lambda: read_bare(path, j, b))
    return sides


def main() -> None:
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    work = Path(options["work"])
    sides = {"save": saves, "load": loads, "verify": verifications}[options["do"]](work)
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(-1, options["rounds"]):
        for side, act in sides.items():
            seconds = act()
            if turn >= 0:
                spent[side].append(seconds)
    for path in work.glob("saved-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path(options["report"]).write_text(json.dumps(spent))


if __name__ == "__main__":
    main()

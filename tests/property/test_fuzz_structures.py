"""Files that unpickle well and say something impossible: any value in any place ends in one clear line of ours.

    a whole checkpoint ─▶ one value of one file replaced, taken out, or made another type ─▶ open, read, write again

test_fuzz_parsers.py changes bytes, most of which no longer unpickle; this changes what a reader finds when they do.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.ckpt.formats import open_any, write_as
from holdfast.ckpt.formats.deepspeed import NAMES
from holdfast.ckpt.formats.inert import Instance
from holdfast.ckpt.formats.pickling import Construct
from holdfast.ckpt.formats.torchwrite import Tensor, write_torch
from holdfast.ckpt.formats.torchzip import Stored, read_torch
from holdfast.ckpt.universal.errors import CheckpointError
from holdfast.ckpt.universal.read import Reader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from tensor_parallel import saved  # noqa: E402

ODD: list[Any] = [
    None,
    True,
    0,
    3,
    -1,
    1.5,
    10**13,
    10**30,
    "x",
    "",
    b"y",
    [],
    {},
    (),
    [1],
    {"a": 1},
    {0: [None]},
    [[]],
]
EDITS = 100
Path_ = tuple[Any, ...]


def writable(value: Any, folder: Path) -> Any:
    """What was read, as what can be written: tensors with their bytes, stand-ins as objects."""
    if isinstance(value, Stored):
        with open(folder / value.file, "rb") as file:
            file.seek(value.offset)
            data = file.read(value.nbytes)
        return Tensor(value.dtype, value.shape, lambda: [data])
    if isinstance(value, Instance):
        args = tuple(writable(item, folder) for item in value.args)
        return Construct(value.cls, args, writable(value.state, folder), new=value.state is not None)
    if isinstance(value, dict):
        return {key: writable(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(writable(item, folder) for item in value)
    return value


def places(value: Any, at: Path_ = ()) -> list[Path_]:
    """Where something may be changed."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [] if not at else [at]
    for key, item in inner:
        found += places(item, (*at, key))
    return found


def changed(value: Any, at: Path_, make: Callable[[Any], Any]) -> Any:
    """A copy with `make` of what is at one place; `make` returning ... takes it out."""
    if not at:
        return make(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    new = changed(copy[at[0]], at[1:], make)
    if new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = new
    return copy


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wholes")
    source = saved(folder / "source")
    targets = {"zero1": "deepspeed:zero1,dp=1,tp=2", "zero3": "deepspeed:zero3,dp=2,tp=1",
               "universal": "deepspeed-universal", "torch": "torch"}  # fmt: skip
    for name, target in targets.items():
        write_as(target, source, folder / name)
    return {name: folder / name for name in targets}


def use(path: Path, scratch: Path) -> None:
    """What people do with it."""
    checkpoint = open_any(path)
    with Reader(checkpoint) as reader:
        for name, state in checkpoint.states:
            reader.read(name, state)
        for target in ("deepspeed:zero1,dp=2", "deepspeed-universal", "torch"):
            with contextlib.suppress(CheckpointError):
                write_as(target, reader, scratch / target)


@pytest.mark.parametrize("name", ["zero1", "zero3", "universal", "torch"])
def test_any_value_in_any_place_ends_in_one_line(wholes: dict[str, Path], tmp_path: Path, name: str) -> None:
    chance, whole = random.Random(7), wholes[name]
    files = sorted(whole.rglob("*.pt")) if whole.is_dir() else [whole]
    known = {file: writable(read_torch(file.parent, file.name, names=NAMES), file.parent) for file in files}
    for number in range(EDITS):
        file = chance.choice(files)
        spots = places(known[file])
        if not spots:
            continue
        at = chance.choice(spots)
        odd = chance.choice([*ODD, ...])
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy) if whole.is_dir() else shutil.copy(whole, copy)
        target = copy / file.relative_to(whole) if whole.is_dir() else copy
        target.unlink()
        with contextlib.suppress(TypeError, ValueError):  # what no pickle of ours can hold
            write_torch(target, changed(known[file], at, lambda value, odd=odd: odd))
        try:
            use(copy, tmp_path / f"{number}-again")
        except CheckpointError:
            continue
        except Exception as error:
            raise AssertionError(f"{file.name}: {at} = {odd!r}: {type(error).__name__}: {error}") from error

"""What may happen to a checkpoint's files, seeded: damage, pickles that would run code, bytes that a fuzzer makes.

    spoil(home, kind, chance, other) ─▶ Spoilt: which file, which byte, whose tensor
    bomb(chance, canary)             ─▶ a pickle that makes the file `canary` if anything in it is ever called
    mutated(data, chance)            ─▶ bytes changed, removed, doubled, put in; numbers made enormous
    small_disk(work, megabytes)      ─▶ a file system that fills up

Shared by tests and by benchmarks/checkpoint_faults.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.ckpt.universal.open import open_checkpoint

KINDS = ("flip", "flip", "truncate", "missing", "duplicated", "renamed", "mixed-step")


def owner(path: Path, file: str, offset: int) -> tuple[str, str]:
    for tensor in open_checkpoint(path).states.values():
        for slab in tensor.slabs:
            if slab.span.file == file and slab.span.offset <= offset < slab.span.stop:
                return tensor.key
    return "", ""


@dataclass(frozen=True, slots=True)
class Spoilt:
    """What was done to which file; `at`: to which byte, -1 for the file as a whole; `tensor`: that has this byte."""

    file: str
    at: int = -1
    tensor: tuple[str, str] = ("", "")


def spoil(home: Path, kind: str, chance: random.Random, other: Path) -> Spoilt:
    """Break something in the checkpoint `home`; `other`: of the same plan, from another step."""
    files = sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())
    payload = [name for name in files if name.endswith(".safetensors")]
    name = chance.choice(files if kind in ("flip", "truncate", "missing") else payload)
    path = home / name
    if kind == "flip":
        bit = chance.randrange(path.stat().st_size * 8)
        where = ("", "") if name in ("MANIFEST.json", "COMMIT") else owner(home, name, bit // 8)
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        return Spoilt(name, bit // 8, where)
    if kind == "truncate":
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif kind == "missing":
        path.unlink()
    elif kind == "renamed":
        path.rename(path.with_name("renamed.safetensors"))
    elif kind == "duplicated":
        shutil.copyfile(home / chance.choice([one for one in payload if one != name]), path)
    else:
        shutil.copyfile(other / name, path)
    return Spoilt(name)


class Call:
    """Pickles to a call of `function`, which leaves a file if it is ever made."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.call = (function, given)

    def __reduce__(self) -> Any:
        return self.call


def bomb(chance: random.Random, canary: Path) -> bytes:
    """A pickle that would create the canary, spelt in one of many ways, and perhaps damaged as well."""
    text = f"open({str(canary)!r}, 'w')"
    calls = (Call(os.system, f"touch {canary}"), Call(eval, text), Call(exec, text), Call(open, str(canary), "w"))
    value: Any = chance.choice(calls)
    wraps: tuple[Callable[[Any], Any], ...] = (
        lambda v: v,
        lambda v: [1, v],
        lambda v: {"w": v},
        lambda v: ({}, {1: v}),
    )
    data = pickle.dumps(chance.choice(wraps)(value), protocol=chance.randrange(6))
    if chance.random() < 0.3:
        touch = f"touch {canary}".encode()
        data = chance.choice(
            [
                b"(cos\nsystem\nX" + len(touch).to_bytes(4, "little") + touch + b"o.",
                b"(X" + len(touch).to_bytes(4, "little") + touch + b"ios\nsystem\n.",
                b"\x80\x04\x8c\x05posix\x8c\x06system\x93X" + len(touch).to_bytes(4, "little") + touch + b"\x85R.",
                b"\x80\x02cposix\nsystem\n)\x81.",
            ]
        )
    if chance.random() < 0.5:
        at = chance.randrange(len(data))
        data = data[:at] + chance.randbytes(chance.randrange(3)) + data[at + chance.randrange(3) :]
    return data


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, removed, doubled or put in; numbers made enormous."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(changed) or 1)
        way = chance.randrange(5)
        if way == 0 and changed:
            changed[at] = chance.randrange(256)
        elif way == 1:
            del changed[at : at + chance.randrange(1, 40)]
        elif way == 2:
            changed[at:at] = changed[at : at + chance.randrange(1, 40)]
        elif way == 3:
            changed[at:at] = chance.randbytes(8)
        else:
            digits = [i for i, byte in enumerate(changed) if 48 <= byte < 58]
            if digits:
                changed[chance.choice(digits)] = 57
                changed[at:at] = b"9" * chance.randrange(20)
    return bytes(changed)


@contextlib.contextmanager
def small_disk(work: Path, megabytes: int) -> Iterator[Path | None]:
    """A file system of that size; None where none can be mounted."""
    place = work / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    done = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield place if done else None
    finally:
        if done:
            subprocess.run(["umount", str(place)], capture_output=True, check=False)

"""Real text without a download: the source of Python's own standard library, or the user's files, as bytes.

    files ── scan (path, size, mtime) ──▶ key ──▶ <cache>/corpus-<key>.bin ── mmap ──▶ tokens uint8 [bytes]
                                                     absent: concatenate, write aside, rename

A rank may be started many times in a job and recovery waits for it, so a start costs one scan and one mmap.
Not here: shuffling and batching (the runtime's), tokenisers (a byte is a token), anything remote. The default
text depends on the Python version: over several hosts give --data, or install the same Python on all.

Invariants: tokens are a function of the files alone, not of the cache; a cache file appears whole or not at
all; train and validation share no byte, and both are the same on every rank.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, NoReturn

import torch
from torch import Tensor

DEFAULT_BYTES_MAX: Final = 8 << 20
"""Of the standard library; enough that a byte model never sees it twice in a short run."""
VALIDATION_EVERY: Final = 20
"""One window in so many is held out."""
_SKIPPED_FOLDERS: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, slots=True, order=True)
class SourceFile:
    """One file of the corpus as the scan saw it."""

    path: str
    size: int
    mtime_ns: int


class TextDataset:
    """Windows of `context` tokens and their successors: item i is (x int64 [context], y int64 [context]).

    The text is cut in windows of context + 1 bytes that do not overlap; a permutation that depends only on
    the seed and the number of windows holds one in VALIDATION_EVERY out. Exits with code 2 if the text is too
    short for both splits.
    """

    def __init__(self, tokens: Tensor, context: int, split: Literal["train", "validation"], seed: int = 0) -> None:
        if tokens.dtype != torch.uint8 or tokens.dim() != 1:
            raise ValueError(f"tokens are a uint8 vector, got {tokens.dtype} {list(tokens.shape)}")
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        windows = tokens.numel() // (context + 1)
        if windows < 2:
            _refuse(f"{tokens.numel()} bytes are {windows} windows of {context + 1}; at least 2 are needed")
        held_out = max(1, windows // VALIDATION_EVERY)
        # A generator of its own: the split must not move with whatever else the script draws.
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
        chosen = order[:held_out] if split == "validation" else order[held_out:]
        self.tokens = tokens
        self.context = context
        self.windows = chosen.sort().values
        """Index of each item's window, in the order of the text."""

    def __len__(self) -> int:
        return self.windows.numel()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        start = int(self.windows[index]) * (self.context + 1)
        window = self.tokens[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def load_tokens(data: str | None = None, cache: Path | None = None) -> Tensor:
    """The text as uint8 [bytes], mapped from disk where possible. Must not be written to.

    `data` is a file or a glob pattern (** crosses folders); None takes the standard library's source. `cache`
    is the folder for the concatenated text. Exits with code 2 and one line if there is no text. A single file
    is mapped where it lies, so it must not be cut short during the run.
    """
    files = scan_pattern(data) if data is not None else scan_library(Path(sysconfig.get_paths()["stdlib"]))
    limit = sum(file.size for file in files)
    if data is None:
        limit = min(limit, DEFAULT_BYTES_MAX)
    if limit == 0:
        _refuse(f"no text: {len(files)} files match {data or 'the standard library'!r}, all of them empty")
    try:
        if len(files) == 1:
            return _mapped(Path(files[0].path), limit)
        return _cached(files, limit, cache if cache is not None else default_cache())
    except (OSError, ValueError) as error:
        _refuse(f"cannot read the text: {error}")


def default_cache() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/holdfast"""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "holdfast"


def scan_pattern(pattern: str) -> list[SourceFile]:
    """Files that match, by name. A file whose name looks like a pattern is taken as it is."""
    names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    found = [_seen(name, os.stat(name)) for name in names if os.path.isfile(name)]
    if not found:
        _refuse(f"no text: {pattern!r} is no file, and no pattern that matches one (such as 'books/**/*.txt')")
    return sorted(found)


def scan_library(root: Path) -> list[SourceFile]:
    """Python files under `root`, by name; tests and installed packages left out.

    Entries that cannot be read are skipped, not refused: a library's folder is not the user's to mend.
    """
    found: list[SourceFile] = []
    folders = [str(root)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name not in _SKIPPED_FOLDERS:
                            folders.append(entry.path)
                    elif entry.name.endswith(".py") and entry.is_file():
                        found.append(_seen(entry.path, entry.stat()))
        except OSError as error:
            print(f"text: skipped: {error}", file=sys.stderr)
    if not found:
        _refuse(f"no text: no Python source under {root}; give --data FILE_OR_GLOB")
    return sorted(found)


def _seen(path: str, status: os.stat_result) -> SourceFile:
    return SourceFile(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def _cached(files: Sequence[SourceFile], limit: int, cache: Path) -> Tensor:
    """The concatenation: from the cache, or written there first, or (no room, no right) read into memory."""
    listing = "\n".join(f"{file.path}\0{file.size}\0{file.mtime_ns}" for file in files)
    key = hashlib.sha256(f"{limit}\n{listing}".encode(errors="surrogateescape")).hexdigest()[:24]
    path = cache / f"corpus-{key}.bin"
    try:
        return _mapped(path, limit)
    except (OSError, ValueError):
        pass  # absent, or cut short by a crash of the machine: write it anew
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache, prefix=f"{path.name}.")
    except OSError:
        return _read(files, limit)
    try:
        with os.fdopen(handle, "wb") as target:
            written = _concatenate(files, limit, target)
        if written != limit:
            return _read(files, limit)  # a file changed since the scan: the key would name other bytes
        # The rename is the commit point. Ranks that race here write the same bytes, so any winner will do.
        os.replace(temporary, path)
        return _mapped(path, limit)
    except OSError:
        return _read(files, limit)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _concatenate(files: Iterable[SourceFile], limit: int, target: BinaryIO) -> int:
    """Write the first `limit` bytes of the files' concatenation; returns how many there were."""
    written = 0
    for file in files:
        with open(file.path, "rb") as source:
            if file.size <= limit - written:
                shutil.copyfileobj(source, target)
            else:
                target.write(source.read(limit - written))
        written = target.tell()
        if written >= limit:
            break
    return written


def _read(files: Iterable[SourceFile], limit: int) -> Tensor:
    chunks = []
    for file in files:
        if limit <= 0:
            break
        chunk = Path(file.path).read_bytes()[:limit]
        chunks.append(chunk)
        limit -= len(chunk)
    return torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.uint8)


def _mapped(path: Path, size: int) -> Tensor:
    """Map `size` bytes read-only (private copy on write). Raises ValueError if the file has another size."""
    actual = path.stat().st_size
    if actual != size:
        raise ValueError(f"{path} has {actual} bytes, not {size}")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def _refuse(reason: str) -> NoReturn:
    print(f"text: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(2)

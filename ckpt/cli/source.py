"""Opening what the user names: a checkpoint of any format, a run's folder with `latest`, or an adopted one.

    PATH ─▶ ours? adopted? latest? ─▶ a reader of some format ─▶ Reader ─▶ (--layout) Mapped

The readers of foreign formats are imported only if the path is not ours. Opens headers; reads no tensor.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..universal.adopt import default_home
from ..universal.errors import UsageError
from ..universal.latest import POINTER, committed, read_latest
from ..universal.model import Checkpoint, safe_path
from ..universal.open import is_ours, open_checkpoint
from .arguments import variables

if TYPE_CHECKING:
    from ..universal.read import Reader

CACHE_BYTES: Final = 256 << 20
CACHE_BYTES_MIN: Final = 16 << 20
"""Blocks that a mapping keeps: permuted reads come back to them."""


def resolve(text: str | Path, *, adopted: bool = True) -> tuple[Path, bool]:
    """The path that is meant, and whether it is a folder of our format: a run's folder stands for its `latest`.

    `adopted`: prefer the manifest beside foreign files, whose digests it has.
    """
    path = Path(text)
    if not path.exists():
        raise UsageError("no such file or folder", path=str(path))
    if path.is_dir() and is_ours(path):
        return path, True
    named = _pointed_to(path) if path.is_dir() else None
    if named is not None and committed(named):
        return read_latest(path), True
    homes = [home_of(one) for one in (path, named) if one is not None]
    return next(((home, True) for home in homes if adopted and committed(home)), (path, False))


def home_of(path: Path) -> Path:
    """Where the manifest of an adopted file or folder is."""
    return default_home(path.absolute())


def open_path(text: str | Path, *, adopted: bool = True) -> Checkpoint:
    """The checkpoint at a path, whatever its format."""
    path, ours = resolve(text, adopted=adopted)
    if ours:
        return open_checkpoint(path)
    from ..formats.registry import open_any

    return open_any(path)


def _pointed_to(folder: Path) -> Path | None:
    """What a folder's `latest` names: a checkpoint of ours, or one of DeepSpeed's tags."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return None
    name = pointer.read_bytes()[:4096].decode("utf-8", "replace").strip()
    return folder / name if safe_path(name) and "/" not in name else None


def open_reader(arguments: argparse.Namespace, path: str) -> Reader:
    """A reader of the checkpoint at `path`, seen through each --layout in turn. The caller closes it."""
    from ..universal.read import Reader

    verify = not getattr(arguments, "no_verify", False)
    reader = Reader(open_path(path), verify=verify)
    layouts: list[str] = getattr(arguments, "layout", [])
    if not layouts:
        return reader
    try:
        limit: int = getattr(arguments, "max_memory", 0)
        cache = min(CACHE_BYTES, max(limit // 4, CACHE_BYTES_MIN)) if limit else CACHE_BYTES
        return mapped(reader, layouts, variables(arguments.set), cache)
    except BaseException:
        reader.close()
        raise


def mapped(reader: Reader, layouts: list[str], given: dict[str, int], cache: int = CACHE_BYTES) -> Reader:
    """The checkpoint under the names and shapes of mapping files; "NAME:reverse" is one backwards."""
    from ..universal.mapping import Mapped, load_layout

    steps = [load_layout(text.removesuffix(":reverse")) for text in layouts]
    unknown = sorted(given.keys() - {name for layout in steps for name in layout.variables})
    if unknown:
        known = sorted({name for layout in steps for name in layout.variables})
        raise UsageError("a variable that no mapping has", variable=unknown[0], known=known)
    for text, layout in zip(layouts, steps, strict=True):
        values = {name: value for name, value in given.items() if name in layout.variables}
        reader = Mapped(reader, layout, values, reverse=text.endswith(":reverse"), cache=cache)
    return reader

"""Which format a path is of, and what a target's spelling means.

    "deepspeed:zero3,dp=6"  ──▶ Target("deepspeed", "zero3", {"dp": 6})  ──▶ deepspeed_write.write(...)
    kind : variant , option=value ...

Detection looks at names and first bytes, never at data. A format's module is imported when it is asked or written:
importing all of them takes longer than to adopt a checkpoint of one. Invariants: an unknown kind, variant or option
is a UsageError that lists the known ones, before anything is opened for writing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..collecting import uncollected
from ..universal.errors import CorruptError, UsageError
from ..universal.model import Box, Checkpoint
from ..universal.open import is_ours, open_checkpoint

if TYPE_CHECKING:
    from ..universal.read import Reader

Detect = Callable[[Path], bool]
Open = Callable[..., Checkpoint]
Wanted = Callable[[str, str, tuple[int, ...], Box], bool]
"""Whether a part of a tensor is: its name, state, whole shape, and the box."""


def _late(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a sibling module, which is imported at the first call."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(*args, **options)

    return call


FORMATS: Final[tuple[tuple[str, Detect, Open], ...]] = (
    ("holdfast", is_ours, open_checkpoint),
    ("deepspeed universal", _late("deepspeed_universal", "detect"), _late("deepspeed_universal", "open")),
    ("deepspeed", _late("deepspeed", "detect"), _late("deepspeed", "open")),
    ("dcp", _late("dcp", "detect"), _late("dcp", "open")),
    ("torch", _late("torch_file", "detect"), _late("torch_file", "open")),
    ("safetensors", _late("safetensors", "detect"), _late("safetensors", "open")),
)
"""In the order in which they are asked. Ours first: a folder of ours holds safetensors too."""


def detect(path: Path | str) -> str | None:
    """The name of the format, or None."""
    return next((name for name, knows, _ in FORMATS if knows(Path(path))), None)


@uncollected()
def open_any(path: Path | str, wanted: Wanted | None = None) -> Checkpoint:
    """The checkpoint at `path`, whatever its format.

    `wanted` says which parts of which tensors will be read. Where that saves time (DCP, whose parts are archives each)
    others are left out of their tensors: to read one is an IncompleteError then.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError("no such file or folder", path=str(path))
    for name, knows, opens in FORMATS:
        if knows(path):
            try:
                return opens(path, wanted) if name == "dcp" else opens(path)
            except (TypeError, AttributeError, LookupError, ValueError, OverflowError) as error:
                # A list where all writers put a dictionary: readers check what they count on, this is for the rest.
                raise CorruptError(
                    f"a structure that no writer of {name} leaves: {type(error).__name__}: {error}", path=str(path)
                ) from error
    raise UsageError("not a checkpoint of a format known here", path=str(path), known=[name for name, *_ in FORMATS])


@dataclass(frozen=True, slots=True)
class Target:
    """What to write."""

    kind: str
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of target: how it is written, and what it may be told."""

    write: Callable[..., None]
    variants: tuple[str, ...] = ("",)
    options: Mapping[str, type] = field(default_factory=dict)
    about: str = ""


DCP_OPTIONS: Final[Mapping[str, type]] = {
    "dp": int,
    "dim": int,
    "model": str,
    "optim": str,
    "flat": bool,
    "masters": bool,
}

TARGETS: Final[Mapping[str, Kind]] = {
    "deepspeed": Kind(
        _late("deepspeed_write", "write"),
        ("zero1", "zero2", "zero3"),
        {"dp": int, "tp": int, "ep": int, "dtype": str, "tag": str, "sub_group": int},
        "native files for dp x tp ranks",
    ),
    "deepspeed-universal": Kind(
        _late("deepspeed_universal_write", "write"), ("",), {"tag": str}, "folder for load_universal"
    ),
    "dcp": Kind(
        _late("dcp_write", "write"), ("",), DCP_OPTIONS, "PyTorch distributed checkpoint: model and optimizer by name"
    ),
    "fsdp2": Kind(_late("dcp_write", "write"), ("",), DCP_OPTIONS, "the same, as fully_shard's state dicts ask for it"),
    "hf": Kind(
        _late("safetensors", "write"), ("",), {"dtype": str, "file_bytes": int}, "Hugging Face folder, weights only"
    ),
    "torch": Kind(_late("torch_file", "write"), ("",), {"masters": bool}, "one file of torch.save"),
}


def parse_target(text: str) -> Target:
    """A target from its spelling: kind[:variant][,option=value ...]; the colon may also introduce options."""
    kind, _, rest = text.partition(":")
    known = TARGETS.get(kind)
    if known is None:
        raise UsageError("an unknown target", target=kind, known=sorted([*TARGETS, "holdfast"]))
    variant, options = "", {}
    for word in filter(None, rest.split(",")):
        name, equals, value = word.partition("=")
        if not equals and not variant:
            variant = name
        elif name in known.options and equals:
            options[name] = _value(name, value, known.options[name])
        else:
            raise UsageError("an unknown option of the target", option=word, known=sorted(known.options))
    if variant not in known.variants:
        raise UsageError("an unknown variant of the target", variant=variant, known=list(known.variants))
    return Target(kind, variant, options)


def _value(name: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is int and text.isascii() and text.isdigit() and len(text) < 16:
        return int(text)
    raise UsageError("an option of the wrong kind", option=name, value=text, wanted=kind.__name__)


def write_as(target: str | Target, reader: Reader, path: Path | str, *, allow_lossy: bool = False, **more: Any) -> None:
    """Write what `reader` reads to `path`, natively. Nothing is at `path` unless all of it is.

    `more` goes to the format's writer (such as `disk`). Our own format has its own Writer, in ckpt/universal.
    Raises LossyError if the source has copies that differ, but for `allow_lossy`.
    """
    from ..universal.copies import agree  # which opening a checkpoint does not need

    agree(reader, allow_lossy=allow_lossy)
    wanted = parse_target(target) if isinstance(target, str) else target
    options = {**wanted.options, **more}
    if wanted.variant:
        options["variant"] = wanted.variant
    if wanted.kind == "fsdp2":
        options["fsdp2"] = True
    TARGETS[wanted.kind].write(reader, Path(path), **options)

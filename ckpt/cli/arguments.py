"""What verbs have in common on the command line: options, sizes, and errors that keep our exit codes.

    holdfast ckpt VERB PATH ... [--json] [--dry-run] [--max-memory 256M] [--jobs 2] [--layout map.toml] ...

Reads nothing and opens nothing. Invariant: every refusal is a UsageError, exit code 1; argparse's own 2 would
say "corrupt".
"""

from __future__ import annotations

import argparse
import re
from typing import Final, NoReturn

from ..universal.errors import UsageError

_SIZE: Final = r"(\d{1,15})(?:\.(\d{1,3}))?\s*([KMGT]?)i?B?"
_POWER: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
JOBS_MAX: Final = 256


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, next=f"{self.prog} --help")


def make_parser(verb: str, about: str, examples: str) -> Parser:
    """The parser of a verb, with what all verbs have."""
    parser = Parser(
        prog=f"holdfast ckpt {verb}",
        description=f"{verb}: {about}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common = parser.add_argument_group("common options")
    common.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    common.add_argument("--no-progress", action="store_true", help="no progress bar, even on a terminal")
    common.add_argument("--jobs", type=jobs, default=2, metavar="N", help="threads that read and write (2)")
    return parser


def add_layout(parser: Parser) -> None:
    """Options that say how names and shapes change."""
    group = parser.add_argument_group("mapping")
    group.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="MAP",
        help="mapping file, or the name of a shipped one; MAP:reverse applies it backwards; may be given again",
    )
    group.add_argument("--set", action="append", default=[], metavar="NAME=N", help="a variable of the mapping")


def add_writing(parser: Parser) -> None:
    """Options of every verb that writes a checkpoint."""
    group = parser.add_argument_group("writing")
    group.add_argument("--dry-run", action="store_true", help="say what would be done: bytes, time, memory, losses")
    group.add_argument("--max-memory", type=size, default=0, metavar="256M", help="stay below this, or refuse")
    group.add_argument("--resume", action="store_true", help="take up an interrupted write; target in our format only")
    group.add_argument("--allow-lossy", action="store_true", help="agree to the losses that --dry-run lists")
    group.add_argument("--no-sync", action="store_true", help="do not wait for the disk: its faults are not seen")
    group.add_argument("--no-verify", action="store_true", help="do not check the digests of what is read")
    group.add_argument("--archive", action="store_true", help="compress (our format only; needs zstandard)")
    group.add_argument("--tile", action="store_true", help="store large optimizer tensors as tiles along dim 1")


def size(text: str) -> int:
    """Bytes from "256M", "1.5GiB", "4096"; K is 1024."""
    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (like 256M or 1.5G)")
    whole, part, unit = match.groups()
    return int(float(f"{whole}.{part or 0}") * 1024 ** _POWER[unit.upper()])


def jobs(text: str) -> int:
    """A number of threads."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= JOBS_MAX:
        raise argparse.ArgumentTypeError(f"from 1 to {JOBS_MAX}, not {text!r}")
    return int(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and at most 1, not {text!r}")
    return value


def floats(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers separated by commas, not {text!r}") from None


def variables(pairs: list[str]) -> dict[str, int]:
    """--set NAME=N, one or more times."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(r"-?\d{1,18}", value):
            raise UsageError("--set takes NAME=N, a whole number", got=pair)
        found[name] = int(value)
    return found

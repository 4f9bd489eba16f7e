"""A pickle reader that builds plain values and inert stand-ins, and never calls anything it reads about.

    bytes ──▶ loads(data, allowed=ALLOWED, persistent=...) ──▶ dict, list, tuple, str, int, Global, Instance ...
                        │
                        └─ a global outside of the list: UnsafeError naming it, before anything is built from it

A pickle is a program: GLOBAL names a callable, REDUCE calls it, BUILD sets its attributes. Here GLOBAL makes a
`Global` (two strings), REDUCE and NEWOBJ make an `Instance` (a Global and its arguments) and BUILD writes into
that Instance. The few names that stand for plain data (OrderedDict, torch.Size, set ...) are mapped onto plain
data by functions of this file, looked up in a table of this file. This module imports nothing by name and holds
no reference to eval, getattr or __import__; it does not know torch. It does not decide what a value means.

Invariants:

* every object that leaves is of a type in the list above; no attribute, item or method of a class that the
  input names is ever looked up;
* memory is at most a constant times the input; the memo, the stack and the marks are capped; the result has no
  cycle, is at most DEPTH_MAX deep, and has at most NODES_MAX nodes when shared parts are counted each time they
  appear, so that whoever walks it without care still ends;
* dictionary keys are scalars or short tuples of scalars: hashing a key is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from ..universal.errors import CorruptError
from .inert import PLAIN, Make, measure
from .machine import Machine, Persistent
from .opcodes import OPERATIONS

BYTES_MAX: Final = 1 << 30
"""A pickle longer than this is refused; the metadata of a checkpoint with 5 million chunks is about this long."""
MALFORMED: Final = (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError, TypeError, OverflowError)
"""What decoding bytes that are no pickle can raise in the machine below."""


def loads(
    data: bytes | memoryview,
    *,
    allowed: frozenset[tuple[str, str]],
    persistent: Persistent | None = None,
    make: Mapping[tuple[str, str], Make] | None = None,
    where: str = "pickle",
) -> Any:
    """The value that `data` describes.

    `allowed` may be named and becomes Global or Instance; `make` adds names that our own functions turn into
    values, besides PLAIN; `persistent` gives the value of a persistent id. `where` is for errors.
    """
    if len(data) > BYTES_MAX:
        raise CorruptError("a pickle longer than any checkpoint's", file=where, nbytes=len(data))
    machine = Machine(bytes(data), allowed, persistent, {**PLAIN, **(make or {})}, where)
    try:
        value = machine.run(OPERATIONS)
        measure(value, where)
    except MALFORMED as error:
        raise CorruptError("not a pickle that can be read", file=where, at=machine.at, why=str(error)) from error
    return value


def named(data: bytes | memoryview, *, where: str = "pickle") -> tuple[str, ...]:
    """Every global that `data` names, sorted, allowed or not; for people who look before they trust."""
    machine = Machine(bytes(data), None, lambda pid: None, PLAIN, where)
    try:
        machine.run(OPERATIONS)
    except (*MALFORMED, CorruptError):
        machine.seen.add("(and the rest cannot be read)")
    return tuple(sorted(machine.seen))

"""What a pickle may become: plain values and inert stand-ins, and the limits that keep them harmless. Pure.

    Global("torch", "Size")        a name, nothing behind it
    Instance(Global, args, state)  what would have been an object of that class
    PLAIN                          the few names that stand for plain data, and our functions that make it

Nothing here imports, calls or looks up anything that an input names. Invariants:

* a key is a scalar or a short tuple of scalars (or an Instance, by identity): hashing it is cheap;
* what `measure` lets pass has no cycle, is at most DEPTH_MAX deep, and has at most NODES_MAX nodes when shared
  parts are counted each time they appear: whoever walks it without care still ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from ..universal.errors import CorruptError

Make = Callable[[tuple[Any, ...]], object]

DEPTH_MAX: Final = 200
NODES_MAX: Final = 50_000_000
SMALL_NODES: Final = 1_000_000
KEY_TUPLE_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something in somebody's Python module. Only a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Instance:
    """What would have been an object: the name of its class, its arguments, its state. Hashed by identity."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the state, as pickled."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


CONTAINERS: Final = (dict, list, tuple, set, frozenset, Instance)


def _ordered(args: tuple[Any, ...]) -> object:
    made: dict[Any, Any] = {}
    if args:
        if len(args) != 1 or not isinstance(args[0], (list, tuple)):
            raise CorruptError("an OrderedDict made from something else than a list of pairs")
        for pair in args[0]:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise CorruptError("an OrderedDict made from something else than a list of pairs")
            made[key_of(pair[0])] = pair[1]
    return made


def _sequence(args: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(args) > 1 or (args and not isinstance(args[0], (list, tuple))):
        raise CorruptError("a sequence made from something else than a sequence")
    return tuple(args[0]) if args else ()


def _set(args: tuple[Any, ...]) -> object:
    return frozenset(key_of(item) for item in _sequence(args))


def _latin1(args: tuple[Any, ...]) -> object:
    """_codecs.encode(text, "latin1"): how protocol 2 spells bytes."""
    if not args or not isinstance(args[0], str) or args[1:] not in ((), ("latin1",), ("latin-1",)):
        raise CorruptError("_codecs.encode of something else than latin1 text")
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError as error:
        raise CorruptError("_codecs.encode of text that is not latin1") from error


def _bytes(args: tuple[Any, ...]) -> object:
    if args:
        raise CorruptError("bytes made from arguments")
    return b""


def _defaults(args: tuple[Any, ...]) -> object:
    return {}


def _path(args: tuple[Any, ...]) -> object:
    if not all(isinstance(part, str) for part in args):
        raise CorruptError("a path made from something else than text")
    return "/".join(args)


PLAIN: Final[Mapping[tuple[str, str], Make]] = MappingProxyType(
    {
        ("collections", "OrderedDict"): _ordered,
        ("collections", "defaultdict"): _defaults,
        ("torch", "Size"): _sequence,
        ("builtins", "set"): _set,
        ("builtins", "frozenset"): _set,
        ("__builtin__", "set"): _set,
        ("__builtin__", "frozenset"): _set,
        ("builtins", "list"): lambda args: list(_sequence(args)),
        ("__builtin__", "list"): lambda args: list(_sequence(args)),
        ("builtins", "bytes"): _bytes,
        ("__builtin__", "bytes"): _bytes,
        ("_codecs", "encode"): _latin1,
        ("pathlib", "PosixPath"): _path,
        ("pathlib", "Path"): _path,
        ("pathlib._local", "PosixPath"): _path,
    }
)
"""Names that stand for plain data, and what we make of their arguments."""


def key_of(key: object) -> Any:
    """`key`, if hashing it is safe and cheap."""
    if isinstance(key, tuple):
        if len(key) > KEY_TUPLE_MAX or not all(_scalar(item) for item in key):
            raise CorruptError("a key that is a long or nested tuple")
        return key
    if not _scalar(key) and not isinstance(key, (Instance, Global)):
        raise CorruptError("a key of a kind that no checkpoint has", kind=type(key).__name__)
    return key


def _scalar(value: object) -> bool:
    # Integers are capped because a few thousand multiples of 2**61 - 1 all hash alike.
    if isinstance(value, int):
        return -(1 << 64) < value < 1 << 64
    return value is None or isinstance(value, (str, bytes, float))


LEAVES: Final = frozenset((str, int, float, bool, bytes, type(None), Global))
"""What most values are, told without walking through CONTAINERS."""


def _children(value: object) -> list[Any] | tuple[Any, ...]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, Instance):
        return (value.args, value.state, value.items)
    return ()


def measure(root: object, where: str) -> None:
    """Refuse a result with a cycle, too deep, or too large when written out."""
    if not _is_small(root):
        _measure(root, where)


def _is_small(root: object) -> bool:
    """Whether a walk level by level, shared parts as often as they appear, ends early: it does for all but a few."""
    level, nodes = [root], 1
    for _ in range(DEPTH_MAX):
        below: list[Any] = []
        for value in level:
            children = value if isinstance(value, (tuple, list)) else _children(value)
            nodes += len(children)
            if nodes > SMALL_NODES:  # one part in many places may unfold into anything
                return False
            below += [child for child in children if type(child) not in LEAVES]
        if not below:
            return True
        level = below
    return False


def _measure(root: object, where: str) -> None:
    """The same for any value; visits each object once."""
    done: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()
    # A value, and once it is entered: its children that are containers, and how many children there are.
    waiting: list[tuple[Any, list[Any] | None, int]] = [(root, None, 0)]
    while waiting:
        value, inner, count = waiting.pop()
        depth, nodes = 0, 1 + count
        if inner is None:
            if id(value) in done or not _contains(value):
                continue
            if id(value) in open_:
                raise CorruptError("a pickle that contains itself", file=where)
            children = _children(value)
            inner = [child for child in children if type(child) not in LEAVES and _contains(child)]
            if inner:
                open_.add(id(value))
                waiting.append((value, inner, len(children)))
                waiting += [(child, None, 0) for child in inner if id(child) not in done]
                continue
            nodes = 1 + len(children)
        for child in inner:
            below = done[id(child)]
            depth, nodes = max(depth, below[0]), nodes + below[1]
        open_.discard(id(value))
        if depth + 1 > DEPTH_MAX or nodes > NODES_MAX:
            raise CorruptError("a pickle that unfolds into too much", file=where, depth=depth + 1, nodes=nodes)
        done[id(value)] = (depth + 1, nodes)


def _contains(value: object) -> bool:
    return isinstance(value, CONTAINERS)

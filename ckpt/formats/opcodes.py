"""The opcodes of pickle protocols 0 to 5, as operations on our machine. See unpickle.py.

Left out on purpose: NEXT_BUFFER and READONLY_BUFFER (out-of-band data has no place in a file). The extension
registry is refused as unsafe: it names things out of the reader's sight.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from ..universal.errors import CorruptError, UnsafeError
from .inert import Instance, key_of
from .machine import Machine

Operation = Callable[[Machine], None]

INTEGER_BYTES_MAX: Final = 1024


def _integer(data: bytes) -> int:
    if len(data) > INTEGER_BYTES_MAX:
        raise CorruptError("an integer that is longer than any", nbytes=len(data))
    return int.from_bytes(data, "little", signed=True)


def _int_line(m: Machine) -> None:
    text = m.line()
    m.push({"00": False, "01": True}.get(text) if text in ("00", "01") else _decimal(text))


def _decimal(text: str) -> int:
    if len(text) > INTEGER_BYTES_MAX:
        raise CorruptError("an integer that is longer than any", nbytes=len(text))
    return int(text.rstrip("L"))


def _quoted(m: Machine) -> None:
    text = m.line()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
        raise CorruptError("a protocol 0 string that is not plain", file=m.where, at=m.at)
    m.push(text[1:-1])


def _frame(m: Machine) -> None:
    m.number("Q")


def _protocol(m: Machine) -> None:
    version = m.byte()
    if version > 5:
        raise CorruptError("a pickle of a protocol that is not known", file=m.where, protocol=version)


def _tuple(count: int) -> Operation:
    return lambda m: m.push(tuple(m.last(count)))


def _constant(make: Callable[[], object]) -> Operation:
    return lambda m: m.push(make())


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    m.name(module, name)


def _global(m: Machine) -> None:
    module = m.line()
    m.name(module, m.line())


def _inst(m: Machine) -> None:
    module = m.line()
    m.name(module, m.line())
    cls = m.pop()
    m.construct(cls, tuple(m.since_mark()))


def _obj(m: Machine) -> None:
    cls, *args = m.since_mark()
    m.construct(cls, tuple(args))


def _reduce(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.construct(cls, args)


def _newobj_ex(m: Machine) -> None:
    keywords, args, cls = m.pop(), m.pop(), m.pop()
    if not isinstance(keywords, dict):
        raise CorruptError("keyword arguments that are no dictionary", file=m.where, at=m.at)
    m.construct(cls, args)
    made = m.top()
    if keywords:
        if not isinstance(made, Instance):
            raise CorruptError("keyword arguments for a plain value", file=m.where, at=m.at)
        made.state = keywords


def _dictionary(m: Machine) -> None:
    items = m.since_mark()
    m.push({})
    m.set_items(items)


def _add_items(m: Machine) -> None:
    items = m.since_mark()
    target = m.top()
    if not isinstance(target, set):
        raise CorruptError("a pickle that adds to no set", file=m.where, at=m.at)
    target.update(key_of(item) for item in items)


def _extension(m: Machine) -> None:
    raise UnsafeError("a pickle uses the extension registry, which names things out of sight", file=m.where)


def _pop_mark(m: Machine) -> None:
    m.since_mark()


def _pop(m: Machine) -> None:
    # Popping a mark is legal in protocol 0, and nothing else can lie on top of it.
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


OPERATIONS: Final[Mapping[int, Operation]] = MappingProxyType(
    {
        ord(code): operation
        for code, operation in {
            "(": lambda m: m.mark(),
            "0": _pop,
            "1": _pop_mark,
            "2": lambda m: m.push(m.top()),
            "N": _constant(lambda: None),
            "\x88": _constant(lambda: True),
            "\x89": _constant(lambda: False),
            "I": _int_line,
            "J": lambda m: m.push(m.number("i")),
            "K": lambda m: m.push(m.byte()),
            "M": lambda m: m.push(m.number("H")),
            "L": lambda m: m.push(_decimal(m.line())),
            "\x8a": lambda m: m.push(_integer(m.take(m.byte()))),
            "\x8b": lambda m: m.push(_integer(m.take(m.number("i")))),
            "F": lambda m: m.push(float(m.line())),
            "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
            "S": _quoted,
            "T": lambda m: m.push(m.take(m.number("i")).decode("latin-1")),
            "U": lambda m: m.push(m.take(m.byte()).decode("latin-1")),
            "B": lambda m: m.push(m.take(m.number("I"))),
            "C": lambda m: m.push(m.take(m.byte())),
            "\x8e": lambda m: m.push(m.take(m.number("Q"))),
            "\x96": lambda m: m.push(m.take(m.number("Q"))),
            "V": lambda m: m.push(m.line()),
            "X": lambda m: m.push(m.take(m.number("I")).decode("utf-8", "surrogatepass")),
            "\x8c": lambda m: m.push(m.take(m.byte()).decode("utf-8", "surrogatepass")),
            "\x8d": lambda m: m.push(m.take(m.number("Q")).decode("utf-8", "surrogatepass")),
            "]": _constant(list),
            "}": _constant(dict),
            ")": _constant(tuple),
            "\x8f": _constant(set),
            "\x85": _tuple(1),
            "\x86": _tuple(2),
            "\x87": _tuple(3),
            "t": lambda m: m.push(tuple(m.since_mark())),
            "l": lambda m: m.push(m.since_mark()),
            "d": _dictionary,
            "a": lambda m: m.append([m.pop()]),
            "e": lambda m: m.append(m.since_mark()),
            "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
            "u": lambda m: m.set_items(m.since_mark()),
            "\x90": _add_items,
            "\x91": lambda m: m.push(frozenset(key_of(item) for item in m.since_mark())),
            "p": lambda m: m.put(_decimal(m.line())),
            "q": lambda m: m.put(m.byte()),
            "r": lambda m: m.put(m.number("I")),
            "\x94": lambda m: m.put(len(m.memo)),
            "g": lambda m: m.get(_decimal(m.line())),
            "h": lambda m: m.get(m.byte()),
            "j": lambda m: m.get(m.number("I")),
            "c": _global,
            "\x93": _stack_global,
            "i": _inst,
            "o": _obj,
            "R": _reduce,
            "\x81": _reduce,
            "\x92": _newobj_ex,
            "b": lambda m: m.build(),
            "P": lambda m: m.persist(m.line()),
            "Q": lambda m: m.persist(m.pop()),
            "\x82": _extension,
            "\x83": _extension,
            "\x84": _extension,
            "\x80": _protocol,
            "\x95": _frame,
        }.items()
    }
)

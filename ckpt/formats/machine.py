"""The stack machine under the pickle reader: a stack, marks, a memo, and refusals. See unpickle.py.

    bytes ─▶ Machine.run(operations) ─▶ one value        operations: opcodes.py

It never calls what it reads about: `name` makes a Global or refuses, `construct` makes an Instance or a plain
value by a function of ours, `build` and the others write only into what this machine has made.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..universal.errors import CorruptError, UnsafeError
from .inert import Global, Instance, Make, key_of

Persistent = Callable[[object], object]

STOP, MARK, MEMOIZE, BINGET, LONG_BINGET = b".(\x94hj"
EMPTY_TUPLE, TUPLE1, TUPLE2, EMPTY_DICT, SETITEMS = b")\x85\x86}u"
NEWOBJ, REDUCE, BUILD = b"\x81Rb"
BININT1, BININT2, SHORT_BINUNICODE = b"KM\x8c"
FORMS: Final = {form: struct.Struct("<" + form) for form in "BHIiQ"}
STACK_MAX: Final = 20_000_000
CALL: Final = (NEWOBJ, REDUCE)
ONLY_TEXT: Final = frozenset((str,))
CHECK_BYTES: Final = 1 << 20
"""How often the stack is measured: it grows by one value for each byte at most."""
MARKS_MAX: Final = 1000


class Machine:
    """The stack machine of pickle protocols 0 to 5. One use; `seen` are the globals met so far."""

    def __init__(
        self,
        data: bytes,
        allowed: frozenset[tuple[str, str]] | None,
        persistent: Persistent | None,
        make: Mapping[tuple[str, str], Make],
        where: str,
    ) -> None:
        self.data = data
        self.at = 0
        self.allowed = allowed
        self.persistent = persistent
        self.make = make
        self.where = where
        self.seen: set[str] = set()
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, operations: Mapping[int, Callable[[Machine], None]]) -> Any:
        while True:
            at = self._often()
            if len(self.stack) > STACK_MAX:
                raise CorruptError("a pickle that stacks too much", file=self.where, at=at)
            code = self.data[at]
            self.at = at + 1
            if code == STOP:
                break
            operation = operations.get(code)
            if operation is None:
                raise CorruptError("a pickle opcode that no checkpoint has", file=self.where, opcode=code, at=at + 1)
            operation(self)
        if len(self.stack) != 1 or self.marks:
            raise CorruptError("a pickle that does not end with one value", file=self.where)
        return self.stack[0]

    def _often(self) -> int:
        """What most of a checkpoint's metadata consists of, as the operations do it, without their calls.

        Gives the place of the first opcode that is not among it, or is unusual in any way: its operation does it, or
        says what is wrong with it. Comes back in time to measure the stack.
        """
        data, stack, marks, memo = self.data, self.stack, self.marks, self.memo
        push, at, floor, limit = stack.append, self.at, marks[-1] if marks else 0, self.at + CHECK_BYTES
        try:
            while at < limit:
                code = data[at]
                if code == MEMOIZE and len(stack) > floor:
                    memo[len(memo)] = stack[-1]
                elif code == BINGET and data[at + 1] in memo:
                    push(memo[data[at + 1]])
                    at += 1
                elif code == LONG_BINGET and (index := int.from_bytes(data[at + 1 : at + 5], "little")) in memo:
                    push(memo[index])
                    at += 4
                elif code == TUPLE1 and len(stack) > floor:
                    stack[-1] = (stack[-1],)
                elif code == MARK and len(marks) < MARKS_MAX:
                    floor = len(stack)
                    marks.append(floor)
                elif code == EMPTY_TUPLE:
                    push(())
                elif code in CALL and len(stack) > floor + 1:
                    args, self.at = stack.pop(), at + 1
                    self.construct(stack.pop(), args)
                elif code == BUILD and len(stack) > floor + 1 and self._builds(*stack[-2:]):
                    stack.pop()
                elif code == BININT2:
                    push(data[at + 1] | data[at + 2] << 8)
                    at += 2
                elif code == EMPTY_DICT:
                    push({})
                elif code == SETITEMS and self._set_texts():
                    floor = marks[-1] if marks else 0
                elif code == BININT1:
                    push(data[at + 1])
                    at += 1
                elif code == SHORT_BINUNICODE and at + 2 + data[at + 1] <= len(data):
                    size = data[at + 1]
                    push(data[at + 2 : at + 2 + size].decode("utf-8", "surrogatepass"))
                    at += 1 + size
                elif code == TUPLE2 and len(stack) > floor + 1:
                    last = stack.pop()
                    stack[-1] = (stack[-1], last)
                else:
                    break
                at += 1
        finally:
            self.at = at  # for who is told what went wrong here
        return at

    @staticmethod
    def _builds(target: object, state: object) -> bool:
        """Give a stand-in its state, if it is a plain dictionary, and say so."""
        if type(target) is Instance and type(state) is dict:
            target.state = state
            return True
        return False

    def _set_texts(self) -> bool:
        """Put the items since the last mark into the dictionary below it, if all their keys are text, and say so."""
        stack, marks = self.stack, self.marks
        start, below = marks[-1] if marks else 0, marks[-2] if len(marks) > 1 else 0
        keys = stack[start::2]
        if start <= below or (len(stack) - start) & 1 or type(stack[start - 1]) is not dict:
            return False
        if not ONLY_TEXT.issuperset(map(type, keys)):
            return False
        stack[start - 1].update(zip(keys, stack[start + 1 :: 2], strict=True))
        del stack[start:], marks[-1]
        return True

    # ---- reading arguments -----------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise CorruptError("a pickle that ends too early", file=self.where, at=self.at)
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def byte(self) -> int:
        """As number("B"), which most numbers are."""
        at = self.at
        self.at = at + 1
        return self.data[at]  # beyond the end: an IndexError, which the caller explains

    def number(self, form: str) -> Any:
        known, at = FORMS[form], self.at
        self.at = at + known.size
        return known.unpack_from(self.data, at)[0]  # beyond the end: a struct.error

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        if end - self.at > 1 << 20:
            raise CorruptError("a line in a pickle that is too long", file=self.where, at=self.at)
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    # ---- the stack -------------------------------------------------------------------------------------

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise CorruptError("a pickle that takes from an empty stack", file=self.where, at=self.at)
        return self.stack.pop()

    def mark(self) -> None:
        if len(self.marks) >= MARKS_MAX:
            raise CorruptError("a pickle that stacks too much", file=self.where, at=self.at)
        self.marks.append(len(self.stack))

    def top(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise CorruptError("a pickle that looks at an empty stack", file=self.where, at=self.at)
        return self.stack[-1]

    def last(self, count: int) -> list[Any]:
        """Take the last values, oldest first."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise CorruptError("a pickle that takes from an empty stack", file=self.where, at=self.at)
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise CorruptError("a pickle without the mark that it looks for", file=self.where, at=self.at)
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # ---- names, and what would have been calls ----------------------------------------------------------

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise CorruptError("a global whose name is not text", file=self.where, at=self.at)
        self.seen.add(f"{module}.{name}")
        known = self.allowed is None or (module, name) in self.allowed or (module, name) in self.make
        if not known:
            raise UnsafeError("a pickle names something that is not data", name=f"{module}.{name}", file=self.where)
        self.push(Global(module, name))

    def construct(self, cls: object, args: object) -> None:
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            raise UnsafeError("a pickle calls something that is not a known name", at=self.at, file=self.where)
        make = self.make.get((cls.module, cls.name))
        self.push(make(args) if make is not None else Instance(cls, args))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Instance):
            if isinstance(state, tuple) and len(state) == 2 and all(s is None or isinstance(s, dict) for s in state):
                # (None, {slots}): how objects with __slots__ are pickled.
                state = {**(state[0] or {}), **(state[1] or {})}
            target.state = state
        elif not isinstance(target, (dict, tuple)) or not isinstance(state, (dict, type(None))):
            # An OrderedDict of torch carries `_metadata` this way: about its modules, not about its values.
            raise CorruptError("a pickle that sets the state of a plain value", file=self.where, at=self.at)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if len(items) % 2:
            raise CorruptError("a pickle with half an item", file=self.where, at=self.at)
        pairs = [(key_of(items[i]), items[i + 1]) for i in range(0, len(items), 2)]
        if isinstance(target, Instance):
            target.items += pairs
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise CorruptError("a pickle that puts items into no dictionary", file=self.where, at=self.at)

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Instance):
            target.items += items
        elif isinstance(target, list):
            target += items
        else:
            raise CorruptError("a pickle that appends to no list", file=self.where, at=self.at)

    def put(self, index: int) -> None:
        # The memo's index is the input's choice, its size is not: one entry for each opcode that put it there.
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CorruptError("a pickle that recalls what it never stored", file=self.where, at=self.at)
        self.stack.append(self.memo[index])

    def persist(self, pid: object) -> None:
        if self.persistent is None:
            raise CorruptError("a pickle with persistent ids where none belong", file=self.where, at=self.at)
        self.push(self.persistent(pid))

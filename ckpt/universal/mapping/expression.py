"""Whole-number arithmetic over $variables: what sizes in a mapping file are written in. No eval, no calls.

    sum   = product  (("+" | "-") product)*          "$heads * $head_dim / 2"  with heads=8, head_dim=64  ──▶ 256
    product = unary  (("*" | "/" | "//" | "%") unary)*
    unary = "-" unary | number | "$" name | "(" sum ")"

Invariants: "/" is exact, or an error; results and depth are bounded; a name that is not known is an error that
says how to give it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ..errors import MappingError

VALUE_MAX: Final = 1 << 60
DEPTH_MAX: Final = 32
LENGTH_MAX: Final = 512
_TOKEN: Final = re.compile(r"\s*(?:(\d{1,19})|\$([A-Za-z_]\w*)|(//|[-+*/%()]))")

Expression = int | str


def evaluate(expression: Expression, values: Mapping[str, int]) -> int:
    """The value of an expression; a plain number is its own."""
    if isinstance(expression, bool) or not isinstance(expression, (int, str)):
        raise MappingError("not an expression", expression=repr(expression)[:60])
    if isinstance(expression, int):
        return _bounded(expression, str(expression))
    parser = _Parser(expression, values)
    value = parser.sum(0)
    if parser.tokens:
        raise MappingError("an expression that goes on after its end", expression=expression, at=parser.tokens[0][1])
    return value


def names(expression: Expression) -> set[str]:
    """The variables that an expression needs; MappingError if it is none."""
    if not isinstance(expression, str):
        return set()
    return {text for kind, text in _tokens(expression) if kind == "name"}


def _tokens(text: str) -> list[tuple[str, str]]:
    if len(text) > LENGTH_MAX:
        raise MappingError("an expression too long to be meant", expression=text[:60])
    found: list[tuple[str, str]] = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise MappingError("an expression that cannot be read", expression=text, at=text[at:].strip()[:20])
        number, name, sign = match.groups()
        found.append(("number", number) if number else ("name", name) if name else ("sign", sign))
        at = match.end()
    return found


class _Parser:
    def __init__(self, text: str, values: Mapping[str, int]) -> None:
        self._text = text
        self._values = values
        self.tokens = _tokens(text)

    def _take(self, *signs: str) -> str:
        if self.tokens and self.tokens[0][0] == "sign" and self.tokens[0][1] in signs:
            return self.tokens.pop(0)[1]
        return ""

    def sum(self, depth: int) -> int:
        if depth > DEPTH_MAX:
            raise MappingError("an expression nested too deeply", expression=self._text)
        value = self._product(depth)
        while sign := self._take("+", "-"):
            other = self._product(depth)
            value = _bounded(value + other if sign == "+" else value - other, self._text)
        return value

    def _product(self, depth: int) -> int:
        value = self._unary(depth)
        while sign := self._take("*", "/", "//", "%"):
            other = self._unary(depth)
            if sign == "*":
                value = _bounded(value * other, self._text)
                continue
            if other == 0:
                raise MappingError("a division by zero", expression=self._text)
            if sign == "/" and value % other:
                raise MappingError("a division that leaves a rest", expression=self._text, value=f"{value}/{other}")
            value = value % other if sign == "%" else value // other
        return value

    def _unary(self, depth: int) -> int:
        if self._take("-"):
            return -self._unary(depth + 1) if depth < DEPTH_MAX else self.sum(depth + 1)
        if self._take("("):
            value = self.sum(depth + 1)
            if not self._take(")"):
                raise MappingError("a bracket that is not closed", expression=self._text)
            return value
        if not self.tokens or self.tokens[0][0] == "sign":
            raise MappingError("an expression that ends too early", expression=self._text)
        kind, text = self.tokens.pop(0)
        if kind == "number":
            return _bounded(int(text), self._text)
        if text not in self._values:
            hint = f"--set {text}=N"
            raise MappingError("a variable without a value", variable=text, expression=self._text, next=hint)
        return self._values[text]


def _bounded(value: int, text: str) -> int:
    if abs(value) > VALUE_MAX:
        raise MappingError("a number beyond every size", expression=text[:60])
    return value

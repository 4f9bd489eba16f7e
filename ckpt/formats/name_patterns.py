"""Regular expressions out of somebody's file, matched against names; what could be matched for ever is refused.

    Patterns(["^a\\.b$", "layers\\.\\d+\\.bias"]).match("layers.3.bias") ──▶ "layers\\.\\d+\\.bias"

Most are whole names, escaped: they are looked up. A few repeats and alternatives are allowed in the others, none of
them of a group, and names are short, so matching takes a limited time, whatever the file says.
"""

from __future__ import annotations

import re
from typing import Final

from ..universal.errors import CorruptError, MappingError

PATTERN_MAX: Final = 512
NAME_MAX: Final = 256
CHOICES_MAX: Final = 3
"""Of repeats and alternatives in one pattern: matching a name of n letters takes n to that power at most."""


class Patterns:
    """A list of regular expressions, as `re.match` takes them; most are whole names, escaped, and are looked up."""

    def __init__(self, patterns: object, what: str) -> None:
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            raise CorruptError("patterns that are no list of texts", key=what)
        self._what = what
        self._names: dict[str, str] = {}
        self._expressions: dict[str, re.Pattern[str]] = {}
        for pattern in patterns:
            name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
            if pattern == rf"^{re.escape(name)}$":
                self._names[name] = pattern
            else:
                self._expressions[pattern] = _compiled(pattern, what)
        self.unused = {*self._names.values(), *self._expressions}

    def match(self, name: str) -> str | None:
        """The pattern that names it; None if there is none. Raises MappingError if there are several."""
        found = [self._names[name]] if name in self._names else []
        if self._expressions and len(name) > NAME_MAX:
            raise MappingError("a name too long for patterns", key=self._what, name=name[:80])
        found += [pattern for pattern, expression in self._expressions.items() if expression.match(name)]
        self.unused.difference_update(found)
        if len(found) > 1:
            raise MappingError("two patterns for one parameter", key=self._what, name=name, patterns=found[:2])
        return found[0] if found else None


def _compiled(pattern: str, what: str) -> re.Pattern[str]:
    """Raises MappingError for what does not compile, or might be matched for ever."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    choices = len(re.findall(r"[*+?|]|\{", plain.replace("(?:", "(")))
    if len(pattern) > PATTERN_MAX or choices > CHOICES_MAX or re.search(r"\)\s*[*+?{]|\(\?[^:]", plain):
        raise MappingError("a pattern that might be matched for ever", key=what, pattern=pattern[:80])
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise MappingError(
            "a pattern that is no regular expression", key=what, pattern=pattern[:80], why=error
        ) from None

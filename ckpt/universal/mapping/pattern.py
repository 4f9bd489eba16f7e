"""Names with gaps: "model.layers.{i}.mlp.{gate,up}_proj.weight", "*.norm.weight".

    {i}      one or more characters without a dot; the same text wherever {i} stands
    {a,b}    alternatives: the pattern stands for several, in this order
    *        any text, dots and all; the first * of one side is the first of the other

Only matches and substitutes. Invariant: what a pattern matches, substitute() with those bindings gives back.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from ..errors import MappingError

ALTERNATIVES_MAX: Final = 256
STARS_MAX: Final = 3
_PART: Final = re.compile(r"\{([^{}]*)\}|(\*)")
_NAME: Final = re.compile(r"[A-Za-z_]\w*\Z")

Bindings = Mapping[str, str]


@dataclass(frozen=True)
class Pattern:
    """One pattern without alternatives."""

    text: str

    @cached_property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """(literal, False) and (placeholder, True), in order; stars are "*0", "*1", .."""
        found: list[tuple[str, bool]] = []
        at = stars = 0
        for match in _PART.finditer(self.text):
            found.append((self.text[at : match.start()], False))
            at = match.end()
            if match.group(2):
                found.append((f"*{stars}", True))
                stars += 1
            elif _NAME.match(match.group(1)):
                found.append((match.group(1), True))
            else:
                raise MappingError("not a placeholder", pattern=self.text, at=match.group(0))
        found.append((self.text[at:], False))
        if stars > STARS_MAX:
            raise MappingError("more stars than can be matched in time", pattern=self.text)
        if any(set("{}") & set(text) for text, gap in found if not gap):
            raise MappingError("a brace that is not closed", pattern=self.text)
        return tuple(found)

    @property
    def placeholders(self) -> set[str]:
        return {text for text, gap in self.parts if gap}

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str], dict[str, str]]:
        """The regular expression, and its group of each gap."""
        groups: dict[str, str] = {}
        out = []
        for text, gap in self.parts:
            if not gap:
                out.append(re.escape(text))
            elif text in groups:
                out.append(f"(?P={groups[text]})")
            else:
                groups[text] = f"p{len(groups)}"
                out.append(f"(?P<{groups[text]}>{'.*' if text.startswith('*') else '[^.]+'})")
        return re.compile("".join(out), re.DOTALL), groups

    def match(self, name: str) -> dict[str, str] | None:
        """What the gaps hold, if the name fits."""
        regex, groups = self._compiled
        found = regex.fullmatch(name)
        return None if found is None else {text: found[group] for text, group in groups.items()}

    def substitute(self, bindings: Bindings) -> str:
        """The name with the gaps filled."""
        return "".join(bindings[text] if gap else text for text, gap in self.parts)


def expand(texts: str | list[str]) -> tuple[Pattern, ...]:
    """The patterns that one or several texts stand for, alternatives spelt out."""
    found: list[Pattern] = []
    for text in [texts] if isinstance(texts, str) else texts:
        if not isinstance(text, str) or not text:
            raise MappingError("not a pattern of names", pattern=repr(text)[:60])
        choices: list[list[str]] = []
        at = 0
        for match in re.finditer(r"\{([^{}]*,[^{}]*)\}", text):
            choices += [[text[at : match.start()]], match.group(1).split(",")]
            at = match.end()
        choices.append([text[at:]])
        total = 1
        for choice in choices:
            total *= len(choice)
        if total + len(found) > ALTERNATIVES_MAX:
            raise MappingError("more alternatives than can be meant", pattern=text)
        found += [Pattern("".join(chosen)) for chosen in itertools.product(*choices)]
    return tuple(found)

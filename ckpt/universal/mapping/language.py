"""Mapping files as values: TOML in, checked rules out; nothing of a checkpoint is needed for that.

    [layout]     name, about, otherwise = "error" | "keep" | "drop"
    [variables]  heads = { config = "num_attention_heads" }    head_dim = "$hidden / $heads"    vocab = 32000
    [[rule]]     match, to, op and what it is told; over, optional, lossy, about

Invariants of a Layout: every operation is known and has been told what it needs, and nothing else; names on
both sides have the same gaps; every variable is declared; a rule is invertible, or says lossy = true.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from ..disk import explained
from ..errors import MappingError, UsageError
from .expression import names
from .operations import CHECKS, EACH, INVERSES, JOIN, KEYS, SPLIT, Op, inverse, lossy
from .pattern import Pattern, expand

FILE_BYTES_MAX: Final = 1 << 20
RULES_MAX: Final = 10_000
Otherwise = Literal["error", "keep", "drop"]
_RULE_KEYS: Final = ("match", "to", "op", "over", "optional", "lossy", "about")


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of the tensors that `sources` match."""

    label: str
    sources: tuple[Pattern, ...]
    targets: tuple[Pattern, ...]
    op: Op
    over: str = ""
    """The placeholder that runs over the several sides of a join or a split."""
    optional: bool = False
    lossy: bool = False

    def inverted(self) -> Rule | None:
        """The rule backwards; None for one that makes nothing."""
        if self.op.kind == "drop":
            return None
        if self.op.kind == "tie":  # the tied name comes back by the pattern it was matched by
            return replace(self, sources=self.targets, targets=self.sources, optional=True)
        return replace(self, sources=self.targets, targets=self.sources, op=inverse(self.op))


@dataclass(frozen=True, slots=True)
class Layout:
    """A mapping file."""

    name: str
    rules: tuple[Rule, ...]
    variables: Mapping[str, Any] = field(default_factory=dict)
    otherwise: Otherwise = "error"
    about: str = ""

    def inverted(self) -> Layout:
        """The mapping backwards."""
        rules = [rule.inverted() for rule in self.rules]
        return replace(self, name=f"{self.name} backwards", rules=tuple(rule for rule in rules if rule is not None))


def shipped() -> list[str]:
    """Names of the mapping files that come with us."""
    folder = resources.files("holdfast.ckpt") / "maps"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_layout(text: str) -> Layout:
    """A mapping file by its path, or a shipped one by its name."""
    path = Path(text)
    if path.suffix == ".toml" or path.is_file():
        with explained(path, "reading a mapping file"):
            if path.stat().st_size > FILE_BYTES_MAX:
                raise MappingError("a mapping file larger than any", file=text)
            return parse_layout(path.read_bytes().decode("utf-8", "replace"), text)
    known = shipped()
    if text not in known:
        near = difflib.get_close_matches(text, known, n=1)
        raise UsageError("no such mapping file, and no shipped one of this name", layout=text, known=near or known)
    return parse_layout((resources.files("holdfast.ckpt") / "maps" / f"{text}.toml").read_text("utf-8"), text)


def parse_layout(text: str, label: str = "mapping") -> Layout:
    """The rules in some TOML; MappingError naming rule and key for what cannot be meant."""
    try:
        value = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise MappingError("not TOML", file=label, reason=str(error)[:200]) from error
    _known(value, ("layout", "variables", "rule"), label)
    head, variables, rules = value.get("layout", {}), value.get("variables", {}), value.get("rule", [])
    if not isinstance(head, dict) or not isinstance(variables, dict) or not isinstance(rules, list) or not rules:
        raise MappingError("a mapping file has [layout], [variables] and at least one [[rule]]", file=label)
    if len(rules) > RULES_MAX:
        raise MappingError("more rules than can be meant", file=label, rules=len(rules))
    _known(head, ("name", "about", "otherwise", "source", "target"), label)
    otherwise = head.get("otherwise", "error")
    if otherwise not in ("error", "keep", "drop"):
        raise MappingError("otherwise is error, keep or drop", file=label, found=otherwise)
    _check_variables(variables, label)
    parsed = tuple(_rule(item, index + 1, label, variables) for index, item in enumerate(rules))
    return Layout(str(head.get("name", label)), parsed, variables, otherwise, str(head.get("about", "")))


def _known(value: Mapping[str, Any], known: tuple[str, ...], label: str) -> None:
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise MappingError("an unknown key", file=label, key=key, known=near or list(known))


def _check_variables(variables: Mapping[str, Any], label: str) -> None:
    for name, value in variables.items():
        if isinstance(value, dict):
            _known(value, ("config", "shape", "default"), f"{label} variable {name}")
        elif isinstance(value, bool) or not isinstance(value, (int, str)):
            raise MappingError("a variable is a number, an expression or a table", file=label, variable=name)
        for other in names(value) if isinstance(value, str) else ():
            if other not in variables:
                raise MappingError("a variable that is not declared", file=label, variable=other, used_by=name)


def _rule(item: Any, number: int, file: str, variables: Mapping[str, Any]) -> Rule:
    if not isinstance(item, dict):
        raise MappingError("a rule is a table", file=file, rule=number)
    kind = item.get("op", "rename")
    match = item.get("match")
    label = f"{file} rule {number} ({match if isinstance(match, str) else kind})"
    if kind not in KEYS:
        near = difflib.get_close_matches(str(kind), KEYS, n=1)
        raise MappingError("an unknown operation", rule=label, op=kind, known=near or sorted(KEYS))
    words = KEYS[kind].split()
    _known(item, (*_RULE_KEYS, *(word.rstrip("?") for word in words)), label)
    for word in words:
        if not word.endswith("?") and word not in item:
            raise MappingError("an operation that was not told all", rule=label, op=kind, missing=word)
    told = {key: item[key] for key in (word.rstrip("?") for word in words) if key in item}
    if match is None:
        raise MappingError("a rule without match", rule=label)
    sources = expand(match)
    targets = expand(item["to"]) if "to" in item else () if kind == "drop" else sources if kind in EACH else ()
    rule = Rule(
        label,
        sources,
        targets,
        Op(kind, told),
        over=str(item.get("over", "")),
        optional=_flag(item, "optional", label),
        lossy=_flag(item, "lossy", label),
    )
    _check_told(rule, variables)
    _check_sides(rule)
    why = lossy(rule.op)
    if why and not rule.lossy:
        raise MappingError(f"a rule that {why} cannot be undone: say lossy = true", rule=label)
    return rule


def _flag(item: Mapping[str, Any], key: str, label: str) -> bool:
    value = item.get(key, False)
    if not isinstance(value, bool):
        raise MappingError("true or false", rule=label, key=key, found=value)
    return value


def _check_told(rule: Rule, variables: Mapping[str, Any]) -> None:
    """Types of what the operation was told, and its variables."""
    for key, value in rule.op.told.items():
        listed = value if isinstance(value, list) else [value]
        if key in ("sizes", "view", "shape", "order") and (not isinstance(value, list) or not value):
            raise MappingError("a list belongs here", rule=rule.label, key=key, found=value)
        if key == "order" and sorted(map(repr, listed)) != sorted(map(repr, range(len(listed)))):
            raise MappingError("an order holds each axis once", rule=rule.label, order=value)
        if key == "check" and value not in CHECKS:
            raise MappingError("check is equal, first or mean", rule=rule.label, found=value)
        if key in ("sizes", "view", "shape", "groups", "size", "padded", "block", "parts") or (
            key == "by" and not isinstance(value, float)
        ):
            for expression in listed:
                if isinstance(expression, bool) or not isinstance(expression, (int, str)):
                    raise MappingError("a number or an expression belongs here", rule=rule.label, key=key, found=value)
                for name in sorted(names(expression) - variables.keys()):
                    raise MappingError("a variable that is not declared", rule=rule.label, variable=name)
    if rule.op.kind == "permute" and len(rule.op.told["view"]) != len(rule.op.told["order"]):
        raise MappingError("view and order of different lengths", rule=rule.label)
    powers = rule.op.told.get("powers", {})
    if not isinstance(powers, dict) or not all(isinstance(power, int) for power in powers.values()):
        raise MappingError("powers are whole numbers by state", rule=rule.label, found=powers)


def _check_sides(rule: Rule) -> None:
    """How many names on each side, and that both have the same gaps."""
    kind, ones, others = rule.op.kind, len(rule.sources), len(rule.targets)
    several = bool(rule.over)
    if rule.over and kind not in (*JOIN, *SPLIT):
        raise MappingError("over is for operations with several sides", rule=rule.label, op=kind)
    fits = (
        (kind in JOIN and others == 1 and (ones > 1 or several))
        or (kind in SPLIT and ones == 1 and (others > 1 or several))
        or (kind in EACH and ones == others)
        or (kind == "drop" and others == 0)
        or (kind == "tie" and ones == others == 1)
    )
    if not fits:
        counts = {"match": ones, "to": others}
        raise MappingError("another number of names than the operation takes", rule=rule.label, op=kind, **counts)
    if kind == "drop":
        return
    gaps = [pattern.placeholders for pattern in rule.sources]
    wanted = [pattern.placeholders for pattern in rule.targets]
    if rule.over:
        side = gaps if kind in JOIN else wanted
        if any(rule.over not in held for held in side) or any(
            rule.over in held for held in (wanted if kind in JOIN else gaps)
        ):
            raise MappingError("over names a placeholder of the side with several", rule=rule.label, over=rule.over)
    plain = {rule.over}
    if len({frozenset(held - plain) for held in (*gaps, *wanted)}) > 1:
        raise MappingError("names with different gaps on the two sides", rule=rule.label, match=gaps, to=wanted)
    assert kind == "tie" or kind in INVERSES

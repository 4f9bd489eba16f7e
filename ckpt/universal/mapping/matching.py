"""Which rule takes which tensors, and what the variables of a mapping are worth: from names and shapes alone.

    names of a checkpoint x patterns of rules ─▶ Set(rule, gaps, names in order, names to make)

Invariants, or MappingError with the names of what is in the way: every name is taken by exactly one rule, every
rule takes something (unless it is optional), every set is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import MappingError
from ..model import Checkpoint
from .expression import evaluate
from .language import Layout, Rule
from .operations import JOIN, SPLIT, Op
from .pattern import Pattern

SHOWN_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Set:
    """Tensors that a rule takes together, in the order of its sources."""

    rule: Rule
    bindings: Mapping[str, str]
    names: tuple[str, ...]
    targets: tuple[str, ...] = ()
    """Empty if only the tensor can tell how many there are."""


def variables(layout: Layout, checkpoint: Checkpoint, given: Mapping[str, int]) -> dict[str, int]:
    """Values of what can be known; an expression says which one it lacks."""
    for name in given:
        if name not in layout.variables:
            known = sorted(layout.variables)
            raise MappingError("a variable that the mapping does not have", variable=name, known=known)
    values = dict(given)
    config = checkpoint.metadata.get("model_config")
    waiting: dict[str, str] = {}
    for name, value in layout.variables.items():
        if name in values:
            continue
        if isinstance(value, str):
            if value:
                waiting[name] = value
        elif isinstance(value, dict):
            found = _looked_up(value, config if isinstance(config, Mapping) else {}, checkpoint)
            if isinstance(found, str):
                waiting[name] = found
            elif found is not None:
                values[name] = found
        else:
            values[name] = int(value)
    for _ in range(len(waiting)):  # each round settles one at least, or none can be settled
        for name, text in list(waiting.items()):
            try:
                values[name] = evaluate(text, values)
            except MappingError as error:
                if error.fields.get("variable") is None:
                    raise
                continue
            del waiting[name]
    return values


def _looked_up(value: Mapping[str, Any], config: Mapping[str, Any], checkpoint: Checkpoint) -> int | str | None:
    """From the model's config, from the shape of a tensor, or the default."""
    key = value.get("config")
    if isinstance(key, str) and isinstance(config.get(key), int):
        return int(config[key])
    match value.get("shape"):
        case [*candidates, int(axis)]:  # names on either side of the mapping
            shapes = [t.shape for (name, _), t in checkpoint.states.items() if name in candidates and t.shape]
            if shapes and -len(shapes[0]) <= axis < len(shapes[0]):
                return shapes[0][axis]
    default = value.get("default")
    return default if isinstance(default, (int, str)) and not isinstance(default, bool) else None


def mapped_names(checkpoint: Checkpoint) -> list[str]:
    """Names that a mapping is about: parameters and buffers, tied ones too."""
    own = [name for (name, state), t in checkpoint.states.items() if t.role != "opaque" and state != "rng"]
    return list(dict.fromkeys([*own, *checkpoint.aliases]))


def match(layout: Layout, checkpoint: Checkpoint) -> tuple[list[Set], list[str]]:
    """Complete sets in the order of the checkpoint; and names that no rule takes but that are kept."""
    taken: dict[tuple[int, tuple[tuple[str, str], ...]], dict[tuple[str, int], str]] = {}
    unmatched: list[str] = []
    for name in mapped_names(checkpoint):
        found = [
            (number, side, bindings)
            for number, rule in enumerate(layout.rules)
            for side, pattern in enumerate(rule.sources)
            if (bindings := pattern.match(name)) is not None
        ]
        if not found:
            unmatched.append(name)
            continue
        number, side, bindings = found[0]
        if len(found) > 1:
            labels = [layout.rules[number].label for number, _, _ in found[:2]]
            raise MappingError("two rules take one tensor", tensor=name, one=labels[0], other=labels[1])
        over = bindings.pop(layout.rules[number].over, "") if layout.rules[number].op.kind in JOIN else ""
        key = (number, tuple(sorted(bindings.items())))
        taken.setdefault(key, {})[over, side] = name
    sets: list[Set] = []
    for (number, items), members in taken.items():
        sets += _complete(layout.rules[number], dict(items), members)
    used = {number for number, _ in taken}
    for number, rule in enumerate(layout.rules):
        if number not in used and not rule.optional:
            raise MappingError("a rule that takes nothing: a name is wrong, or say optional = true", rule=rule.label)
    if unmatched and layout.otherwise == "error":
        shown = unmatched[:SHOWN_MAX]
        raise MappingError("tensors that no rule takes", count=len(unmatched), tensors=shown, layout=layout.name)
    if unmatched and layout.otherwise == "drop":
        names = ", ".join(unmatched[:SHOWN_MAX])
        dropped = Rule(f"{len(unmatched)} tensors that no rule takes: {names}", (), (), Op("drop"), lossy=True)
        return [*sets, Set(dropped, {}, tuple(unmatched))], []
    return sets, unmatched


def _complete(rule: Rule, bindings: dict[str, str], members: Mapping[tuple[str, int], str]) -> list[Set]:
    """The members of a join in order: counted off by `over`, and for each by side; or each by itself."""
    overs = sorted({over for over, _ in members}, key=lambda text: (len(text), text))
    if rule.over and rule.op.kind in JOIN and overs != [str(at) for at in range(len(overs))]:
        shown = overs[:SHOWN_MAX]
        raise MappingError("parts that are not numbered from 0 on", rule=rule.label, over=rule.over, found=shown)
    joins = rule.op.kind in JOIN
    names = []
    for over in overs:
        for side, pattern in enumerate(rule.sources):
            name = members.get((over, side))
            if name is not None:
                names.append(name)
            elif joins:
                wanted = pattern.substitute({**bindings, rule.over: over})
                has = next(iter(members.values()))
                raise MappingError("a part is missing", rule=rule.label, missing=wanted, has=has)
    if joins or rule.op.kind in (*SPLIT, "drop", "tie"):
        return [Set(rule, bindings, tuple(names), _targets(rule.targets, rule, bindings))]
    return [
        Set(rule, bindings, (name,), _targets([rule.targets[side]], rule, bindings))
        for (_, side), name in members.items()
    ]


def _targets(patterns: Sequence[Pattern], rule: Rule, bindings: Mapping[str, str]) -> tuple[str, ...]:
    if rule.over and rule.op.kind in SPLIT:
        return ()  # how many there are, the tensor tells
    return tuple(pattern.substitute(bindings) for pattern in patterns)

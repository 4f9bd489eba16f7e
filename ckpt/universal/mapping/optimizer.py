"""Groups and steps follow their parameters through a mapping. Pure.

    group 0: [q, k, v], step 7 each  ──▶  group 0: [qkv], step 7

Invariant: parameters that become one agree on their step and hyper-parameters, or the rule is lossy; then the
first one's are taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import MappingError
from ..model import Checkpoint, Group


def follow(
    checkpoint: Checkpoint, became: Mapping[str, tuple[str, ...]], rules: Mapping[str, tuple[str, bool]]
) -> tuple[tuple[Group, ...], dict[str, int | float]]:
    """Groups and steps under the new names. `rules`: who took a name, and whether that may lose something."""
    steps: dict[str, int | float] = {}
    for name, step in checkpoint.steps.items():
        for target in became.get(name, ()):
            if steps.setdefault(target, step) != step:
                _refuse("parameters at different steps become one", name, target, rules, one=steps[target], other=step)
    placed: dict[str, int] = {}
    groups: list[Group] = []
    for group in checkpoint.groups:
        members: dict[str, None] = {}
        for name in group.params:
            for target in became.get(checkpoint.aliases.get(name, name), ()):
                at = placed.setdefault(target, group.index)
                if at == group.index:
                    members[target] = None
                elif checkpoint.groups[at].hyper != group.hyper:
                    _refuse("parameters of different groups become one", name, target, rules, one=at, other=group.index)
        groups.append(Group(group.index, group.hyper, tuple(members)))
    return tuple(groups), steps


def _refuse(
    message: str, name: str, target: str, rules: Mapping[str, tuple[str, bool]], *, one: object, other: object
) -> None:
    label, lossy = rules.get(name, ("", False))
    if not lossy:
        raise MappingError(message, rule=label, tensor=target, one=one, other=other)

"""What a rank that lost its state takes from a live one besides tensors: the step that the job is at.

    of the present, from a live rank    step's report, scaler, data position, scheduler, settings of the groups (lr)
    its own                             user's objects, generators: as the script made them, or of its older snapshot

Groups are matched by their settings, as a rank may have other groups than the one that it asks (with and without
weight decay, say). Values only. Invariant: what all ranks must agree on (Engine.gate) comes from the live rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .remap import merge_scheduler

SCHEDULED: Final = frozenset({"lr", "momentum", "betas"})
"""Settings that a scheduler changes: of two groups that differ in these alone, each can stand for the other."""


def present_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a live rank's metadata that another one takes."""
    taken = ("report", "scaler", "data", "scheduler", "groups", "lossy")
    return {key: metadata[key] for key in taken if key in metadata} | {"born": metadata["origin"]["generation"]}


def compose_present(
    own: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], present: Mapping[str, Any]
) -> dict[str, Any]:
    """The metadata with which a rank becomes one of the present step.

    `own`: its own, of an older step or as the script made it; `groups`: as the script made them, with names.
    """
    meta = {**own, **{key: present[key] for key in ("report", "scaler", "data")}}
    meta["origin"] = {**own["origin"], "generation": present["born"]}
    theirs = present.get("groups", [])
    if groups and theirs:
        chosen = match_groups(groups, theirs)
        meta["groups"] = [
            {**theirs[index], "names": group["names"]} for group, index in zip(groups, chosen, strict=True)
        ]
        if "scheduler" in present:
            meta["scheduler"] = merge_scheduler({0: present["scheduler"]}, [(0, index) for index in chosen])
    return meta


def match_groups(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each of my groups the one of theirs that has the same settings; failing that, the one in the same place."""
    return [_match(group, index, theirs) for index, group in enumerate(mine)]


def _match(group: Mapping[str, Any], index: int, theirs: Sequence[Mapping[str, Any]]) -> int:
    alike = [i for i, other in enumerate(theirs) if _settings(other) == _settings(group)]
    if index in alike:
        return index
    return alike[0] if alike else min(index, len(theirs) - 1)


def _settings(group: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in group.items() if key != "names" and key not in SCHEDULED}
    return repr(sorted(kept.items()))

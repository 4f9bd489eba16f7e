"""Where every element goes in DeepSpeed's partitions, for a target world. Pure but for the streams it hands out.

    Layout ── local(group, stage, rank) ──▶ the names that a rank's group has, in their order
           └─ flat_group(...)  ZeRO-1, 2: one run, padded to 2 x dp, cut in dp parts
           └─ shard_group(...) ZeRO-3: each parameter cut in dp parts, padded by itself

The same rules as in deepspeed_zero.py, the other way round. Invariants:

* parts of all ranks hold each element of each parameter once;
* a rank's local names of experts count from 0, as DeepSpeed's do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..universal.errors import UsageError
from ..universal.model import Checkpoint, Group
from ..universal.read import Reader
from .deepspeed_experts import LOCAL
from .source import MASTER, master_of, stream, zeros
from .torch_file import hyper_of
from .torchwrite import Bytes, Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, stop) of the name at `index`, then `pad` zeros."""

    index: int
    start: int
    stop: int
    pad: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's flat tensor."""

    runs: tuple[Run, ...]
    tail: int
    """Zeros at the end."""
    fragments: tuple[tuple[str, int, int], ...] = ()
    """(name, elements, where in the part), for param_slice_mappings."""

    @property
    def padding(self) -> int:
        return self.tail

    @property
    def elements(self) -> int:
        return sum(run.stop - run.start + run.pad for run in self.runs)

    def tensor(
        self, reader: Reader, names: Sequence[str], state: str, *, padded: bool = True, dtype: str = ""
    ) -> Tensor:
        """The part as a flat tensor of one state; `padded` with the zeros at its end."""
        tail = self.tail if padded else 0
        first = master_of(reader.checkpoint, names[0]) if state == MASTER and names else None
        found = dtype or ("F32" if first is not None or not names else reader.checkpoint.tensor(names[0], state).dtype)
        item = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(found, 4)

        def fill() -> Iterator[Bytes]:
            for run in self.runs:
                name = names[run.index]
                own = master_of(reader.checkpoint, name).state if state == MASTER else state
                yield from stream(reader, name, own, run.start, run.stop, dtype=found)
                yield from zeros(run.pad * item)
            yield from zeros(tail * item)

        return Tensor(found, (self.elements + tail,), fill)


def flat_group(names: Sequence[str], sizes: Sequence[int], world: int, rank: int) -> Part:
    """ZeRO-1 and 2."""
    total = sum(sizes)
    size = -(-total // (2 * world)) * 2 * world // world
    low, high = rank * size, (rank + 1) * size
    runs, fragments, at = [], [], 0
    for index, count in enumerate(sizes):
        start, stop = max(low - at, 0), min(high - at, count)
        if start < stop:
            runs.append(Run(index, start, stop))
            fragments.append((names[index], stop - start, at + start - low))
        at += count
    tail = size - sum(run.stop - run.start for run in runs)
    return Part(tuple(runs), tail, tuple(fragments))


def shard_group(names: Sequence[str], sizes: Sequence[int], world: int, rank: int) -> Part:
    """ZeRO-3."""
    runs = []
    for index, count in enumerate(sizes):
        share = -(-count // world)
        start, stop = min(rank * share, count), min((rank + 1) * share, count)
        runs.append(Run(index, start, stop, share - (stop - start)))
    return Part(tuple(runs), 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """A target world: data-parallel ranks, pipeline stages, expert-parallel ranks."""

    dp: int
    pp: int
    ep: int
    groups: tuple[Group, ...]
    sizes: Mapping[str, int]
    sub_group: int
    stages: tuple[frozenset[str], ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, Mapping[int, list[str]]] = field(default_factory=dict)
    """Prefix of a layer of experts -> expert -> its parameters."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, dp: int, ep: int, sub_group: int) -> Layout:
        """For the checkpoint's groups, as many pipeline stages as the source had."""
        if dp < 1:
            raise UsageError("at least one data-parallel rank", dp=dp)
        source = checkpoint.metadata.get("source") or {}
        stages = tuple(frozenset(names) for names in source.get("stages") or ())
        names = [name for group in checkpoint.groups for name in group.params]
        experts: dict[str, dict[int, list[str]]] = {}
        for name in names:
            if match := LOCAL.fullmatch(name):
                experts.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
        experts = {prefix: dict(sorted(found.items())) for prefix, found in experts.items()}
        counts = {len(found) for found in experts.values()}
        ep = ep or (_source_ep(checkpoint, counts) if dp % max(_source_ep(checkpoint, counts), 1) == 0 else 1)
        if experts and (dp % ep or any(count % ep for count in counts)):
            raise UsageError("experts and ranks do not divide by ep", ep=ep, dp=dp, experts=sorted(counts))
        sizes = {name: math.prod(master_of(checkpoint, name).shape) for name in names}
        layers = dict(source.get("layers") or {})
        if stages and not layers:
            raise UsageError("a pipeline whose layer files are not in the source: which layer is tied cannot be told")
        return cls(dp, max(len(stages), 1), ep, checkpoint.groups, sizes, sub_group, stages, layers, experts)

    @property
    def num_experts(self) -> list[int]:
        return [len(found) for found in self.experts.values()]

    def is_experts(self, group: Group) -> bool:
        return any(LOCAL.fullmatch(name) for name in group.params)

    def place(self, group: Group, rank: int) -> tuple[int, int]:
        """How many ranks share the group, and which of them this one is."""
        return (self.dp // self.ep, rank // self.ep) if self.is_experts(group) else (self.dp, rank)

    def local(self, group: Group, stage: int, rank: int) -> list[str]:
        """Names of the group on a rank, in DeepSpeed's order: of its stage, tied modules first; of its experts."""
        names = list(group.params)
        if self.stages:
            names = [name for name in names if name in self.stages[stage]]
            return sorted(names, key=lambda name: not name.startswith("tied_modules."))
        if not self.is_experts(group):
            return names
        first, mine = rank % self.ep, set(names)
        found = []
        for prefix, experts in self.experts.items():
            each = len(experts) // self.ep
            for expert in list(experts)[first * each : (first + 1) * each]:
                local = f"{prefix}.{expert - first * each}."
                found += [n.replace(f"{prefix}.{expert}.", local, 1) for n in experts[expert] if n in mine]
        return found

    def model_name(self, name: str, rank: int = 0) -> str:
        """The model's name of a rank's local name."""
        match = LOCAL.fullmatch(name)
        if match is None or match[1] not in self.experts:
            return name
        each = len(self.experts[match[1]]) // self.ep
        return f"{match[1]}.{int(match[2]) + (rank % self.ep) * each}.{match[3]}"

    def hyper(self, group: Group) -> dict[str, Any]:
        """The group's hyper-parameters; a group of experts is named after ep."""
        hyper = hyper_of(group.hyper)
        if self.is_experts(group) and str(hyper.get("name", "")).startswith("ep_size_"):
            hyper["name"] = f"ep_size_{self.ep}"
        return hyper

    def all_sub_groups(self) -> list[tuple[int, list[str]]]:
        """(group, names) of each sub-group, in DeepSpeed's order."""
        return [(i, part) for i, group in enumerate(self.groups) for part in self.sub_groups(group)]

    def sub_groups(self, group: Group) -> list[list[str]]:
        """ZeRO-3: a group cut where sub_group_size elements of a rank are reached, as DeepSpeed does."""
        found: list[list[str]] = []
        now: list[str] = []
        reached = 0
        for name in group.params:
            now.append(name)
            reached += -(-self.sizes[name] // self.dp)
            if reached >= self.sub_group:
                found.append(now)
                now, reached = [], 0
        return [*found, now] if now else found


def _source_ep(checkpoint: Checkpoint, counts: set[int]) -> int:
    for group in checkpoint.groups:
        name = str(group.hyper.get("name", ""))
        if name.startswith("ep_size_") and name.removeprefix("ep_size_").isdigit():
            return int(name.removeprefix("ep_size_"))
    return 1

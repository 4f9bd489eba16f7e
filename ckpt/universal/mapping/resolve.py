"""Rules x the names of a checkpoint: which rule takes which tensors, and the checkpoint that comes out.

    names ─▶ one rule each ─▶ sets (rule, gaps) ─▶ every state of a set through the operation ─▶ new tensors
                                                   steps, groups, ties follow their parameters

Reads headers and no tensor. Invariants, or MappingError with the names of what is in the way:

* no two tensors come out under one name; what was tied stays tied, or the rule is lossy;
* parameters that become one were at one step and in groups with equal hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import MappingError
from ..model import Checkpoint, TensorState
from ..read import Reader
from .expression import evaluate
from .language import Layout, Rule
from .matching import Set, match, variables
from .nodes import Blocks, Leaf, Node, Same
from .operations import JOIN, PLAIN, SPLIT, Context, Part, apply
from .optimizer import follow

Key = tuple[str, str]


@dataclass(slots=True)
class Resolved:
    """What comes out."""

    checkpoint: Checkpoint
    nodes: dict[Key, Node]
    losses: tuple[str, ...]


@dataclass(slots=True)
class _Out:
    """Collected while resolving."""

    nodes: dict[Key, Node] = field(default_factory=dict)
    states: dict[Key, TensorState] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    became: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name before -> names after: for groups and steps."""


def resolve(layout: Layout, reader: Reader, given: Mapping[str, int], blocks: Blocks) -> Resolved:
    """The checkpoint under the layout's names and shapes."""
    checkpoint = reader.checkpoint
    values = variables(layout, checkpoint, given)
    sets, kept = match(layout, checkpoint)
    out = _Out()
    context = _Resolver(checkpoint, reader, blocks, values, out)
    shadows = [found for found in sets if found.rule.op.kind != "tie" and _is_shadow(found, checkpoint)]
    ties = [found for found in sets if found.rule.op.kind == "tie"]
    special = {id(found) for found in (*shadows, *ties)}
    for found in sets:
        if id(found) not in special:
            context.set(found)
    for name in kept:
        context.keep(name)
    for found in shadows:
        context.shadow(found, sets)
    for found in ties:
        context.tie(found)
    groups, steps = follow(checkpoint, out.became, _mergers(sets))
    metadata = {**checkpoint.metadata}
    result = replace(
        checkpoint,
        states=out.states,
        aliases=out.aliases,
        groups=groups,
        steps=steps,
        metadata=metadata,
        files={},
        own_files={},
        home=None,
        format=f"{checkpoint.format} as {layout.name}",
    )
    return Resolved(result, out.nodes, tuple(dict.fromkeys(out.losses)))


def _is_shadow(found: Set, checkpoint: Checkpoint) -> bool:
    return bool(found.names) and all(name in checkpoint.aliases for name in found.names)


def _mergers(sets: Sequence[Set]) -> dict[str, tuple[str, bool]]:
    """Name before -> the rule that took it, and whether that may lose something: for errors."""
    return {name: (found.rule.label, found.rule.lossy) for found in sets for name in found.names}


# ---- what comes out -------------------------------------------------------------------------------------------


class _Resolver:
    def __init__(
        self, checkpoint: Checkpoint, reader: Reader, blocks: Blocks, values: Mapping[str, int], out: _Out
    ) -> None:
        self._checkpoint, self._reader, self._blocks, self._values, self._out = checkpoint, reader, blocks, values, out
        self._of: dict[str, list[TensorState]] = {}
        for tensor in checkpoint.states.values():
            self._of.setdefault(tensor.name, []).append(tensor)
        for tensor in checkpoint.states.values():  # not parameters: they keep their names
            if tensor.role == "opaque" or tensor.state == "rng":
                self._emit(tensor.name, tensor, Part(self._leaf(tensor), tensor.dtype), "")

    def _leaf(self, tensor: TensorState) -> Leaf:
        return Leaf(self._reader, tensor, self._blocks)

    def _states(self, name: str) -> dict[str, TensorState]:
        owner = self._checkpoint.aliases.get(name, name)
        return {t.state: t for t in self._of.get(owner, ()) if t.role != "opaque" and t.state != "rng"}

    def set(self, found: Set) -> None:
        """All states of a set through its operation."""
        rule = found.rule
        if rule.op.kind == "drop":
            gone = [name for name in found.names if name not in self._checkpoint.aliases]
            if gone:
                self._out.losses.append(f"{rule.label}: drops {len(gone)} tensors, such as {gone[0]}")
            return
        if rule.lossy:
            self._out.losses.append(f"{rule.label}: {rule.op.kind} may lose something")
        tied = [name for name in found.names if name in self._checkpoint.aliases]
        if tied and not rule.lossy:
            owner = self._checkpoint.aliases[tied[0]]
            raise MappingError("a tied parameter would come apart", rule=rule.label, tied=tied[0], owner=owner)
        targets = found.targets
        for state, tensors in self._by_state(found):
            if not targets:
                targets = tuple(self._over(found, tensors[0], state))
            self._state(found, state, tensors, targets)
        for name in found.names:
            self._out.became[name] = targets

    def _by_state(self, found: Set) -> Iterator[tuple[str, list[TensorState]]]:
        held = [self._states(name) for name in found.names]
        if found.rule.op.kind in JOIN:
            for state in held[0]:
                yield state, [self._need(found, name, state) for name in found.names]
            for name, states in zip(found.names, held, strict=True):
                for state in states.keys() - held[0].keys():
                    self._need(found, found.names[0], state, because=name)
            return
        for state in dict.fromkeys(state for states in held for state in states):
            yield state, [states[state] for states in held if state in states]

    def _need(self, found: Set, name: str, state: str, because: str = "") -> TensorState:
        tensor = self._states(name).get(state)
        if tensor is None:
            has = because or found.names[0]
            where = {"rule": found.rule.label, "state": state, "has": has, "lacks": name}
            raise MappingError("a state that only some of the parts have", **where)
        return tensor

    def _over(self, found: Set, tensor: TensorState, state: str) -> Iterator[str]:
        """Names of a split whose number the tensor, or the rule, tells."""
        rule = found.rule
        count = evaluate(rule.op.told["parts"], self._values) if "parts" in rule.op.told else 0
        if not count and rule.op.kind == "unstack" and tensor.shape:
            count = tensor.shape[rule.op.told.get("axis", 0)] * len(rule.targets)
        if count <= 0 or count % len(rule.targets):
            where = {"rule": rule.label, "tensor": tensor.name, "state": state}
            raise MappingError("how many parts is not said: write parts", **where)
        for at in range(count // len(rule.targets)):
            for pattern in rule.targets:
                yield pattern.substitute({**found.bindings, rule.over: str(at)})

    def _state(self, found: Set, state: str, tensors: list[TensorState], targets: tuple[str, ...]) -> None:
        rule = found.rule
        label = f"{rule.label}: {tensors[0].name}"
        context = Context(self._values, state, label, len(targets), rule.lossy)
        parts = [Part(self._leaf(tensor), tensor.dtype) for tensor in tensors]
        if rule.op.kind not in (*JOIN, *SPLIT):
            (name,), (tensor,), (part,) = targets, tensors, parts
            done = part if self._other_shape(tensor) else apply(rule.op, [part], context)[0]
            self._emit(name, tensor, done, rule.label)
            return
        if any(self._other_shape(tensor) for tensor in tensors):
            made = self._whole(rule, tensors, parts, len(targets), context)
        else:
            made = apply(rule.op, parts, context)
        for name, part in zip(targets, made, strict=True):
            self._emit(name, tensors[0], part, rule.label)

    def _other_shape(self, tensor: TensorState) -> bool:
        """A state that is not of its parameter's shape, such as a counter: it goes along whole."""
        states = self._states(tensor.name)
        value = states.get("weight") or states.get("buffer") or states.get("fp32")
        return value is not None and value.shape != tensor.shape

    def _whole(
        self, rule: Rule, tensors: list[TensorState], parts: list[Part], count: int, context: Context
    ) -> list[Part]:
        if any(tensor.shape != () for tensor in tensors):
            shape = tensors[0].shape
            raise context.fail("a state of another shape than its parameter cannot be joined or split", shape=shape)
        if rule.op.kind in SPLIT:
            return [parts[0]] * count
        return [Part(Same([part.node for part in parts], context.label, parts[0].dtype, "equal", 0.0), parts[0].dtype)]

    def _emit(self, name: str, like: TensorState, part: Part, label: str) -> None:
        known = self._out.made_by.setdefault(name, label)
        key = (name, like.state)
        if known != label or key in self._out.nodes:
            raise MappingError("two rules make one tensor", tensor=name, state=like.state, one=known, other=label)
        self._out.nodes[key] = part.node
        self._out.states[key] = TensorState(name, like.state, part.dtype, part.node.shape, (), like.role)

    def keep(self, name: str) -> None:
        """A name that no rule takes."""
        owner = self._checkpoint.aliases.get(name)
        if owner is not None:
            self._alias(name, owner, (owner,), "otherwise = keep")
            return
        for tensor in self._states(name).values():
            self._emit(name, tensor, Part(self._leaf(tensor), tensor.dtype), "otherwise = keep")
        self._out.became[name] = (name,)

    # ---- tied parameters --------------------------------------------------------------------------------------

    def shadow(self, found: Set, sets: Sequence[Set]) -> None:
        """A set of tied names: what comes of it is tied to what comes of their owners."""
        if found.rule.op.kind == "drop":  # the owner keeps the value
            return
        owners = tuple(self._checkpoint.aliases[name] for name in found.names)
        source = next((one for one in sets if one.names == owners), None)
        op = found.rule.op
        same = source is not None and (
            source.rule.op.signature == op.signature or (op.kind in PLAIN and source.rule.op.kind in PLAIN)
        )
        if not same and op.kind in PLAIN:  # the owner was kept as it is
            same = all(self._out.became.get(owner) == (owner,) for owner in owners)
        if not same:
            if not found.rule.lossy:
                label = source.rule.label if source is not None else "no rule of its owner"
                where = {"rule": found.rule.label, "tied": found.names[0], "owner": owners[0], "other": label}
                raise MappingError("a tied parameter would come apart", **where)
            self.set(found)
            return
        made = [name for owner in owners for name in self._out.became.get(owner, ())]
        made = list(dict.fromkeys(made))
        for alias, owner in zip(found.targets, made, strict=True):
            self._alias(alias, found.names[0], (owner,), found.rule.label)

    def _alias(self, alias: str, before: str, owners: tuple[str, ...], label: str) -> None:
        if alias in self._out.made_by:
            raise MappingError("two rules make one tensor", tensor=alias, one=self._out.made_by[alias], other=label)
        self._out.made_by[alias] = label
        self._out.aliases[alias] = owners[0]

    def tie(self, found: Set) -> None:
        """A tensor that is a copy of another: tied from now on; that it is equal is checked as it is read."""
        rule, name = found.rule, found.names[0]
        owner = str(rule.op.told["of"])
        for placeholder, text in found.bindings.items():
            owner = owner.replace(f"{{{placeholder}}}", text)
        if owner not in self._out.made_by:
            owner = next(iter(self._out.became.get(owner, ())), owner)  # backwards, it is a name before the mapping
        mine = [key for key in self._out.nodes if key[0] == owner]
        if not mine:
            raise MappingError("tied to a tensor that does not come out", rule=rule.label, tensor=name, of=owner)
        if name not in self._checkpoint.aliases:
            for state, tensor in self._states(name).items():
                made = self._out.states.get((owner, state))
                if made is None or made.shape != tensor.shape or made.dtype != tensor.dtype:
                    where = {"rule": rule.label, "tensor": name, "state": state, "of": owner}
                    raise MappingError("not equal to what it should be tied to", **where)
                nodes = [self._out.nodes[owner, state], self._leaf(tensor)]
                self._out.nodes[owner, state] = Same(nodes, f"{name} tied to {owner}", tensor.dtype, "equal", 0.0)
        self._alias(found.targets[0], name, (owner,), rule.label)

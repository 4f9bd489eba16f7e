"""What a rule does to the tensors it takes: each operation, and its inverse.

    join    concat  concat_grouped  interleave  stack  same          several become one
    split   split   split_grouped   deinterleave  unstack  replicate one becomes several
    each    rename  permute  transpose  pad  unpad  cast  scale  require   one by one
    other   drop  tie                                                (resolve.py)

An operation is built of the nodes of nodes.py for one state of the parameters at a time. Invariants:

* inverse(op) undoes op bit for bit, for every op that is not lossy();
* sizes that are written down are checked against the tensors, in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from ..convert import NUMPY, lossless
from ..errors import MappingError
from .expression import evaluate
from .nodes import Cast, Concat, Factor, Merge, Node, Pad, Same, Scale, Shape, Slice, Transpose, Unpadded

INVERSES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "rename": "rename", "require": "require", "transpose": "transpose", "permute": "permute", "cast": "cast",
        "scale": "scale", "pad": "unpad", "unpad": "pad", "concat": "split", "split": "concat",
        "concat_grouped": "split_grouped", "split_grouped": "concat_grouped", "interleave": "deinterleave",
        "deinterleave": "interleave", "stack": "unstack", "unstack": "stack", "replicate": "same", "same": "replicate",
    }
)  # fmt: skip
JOIN: Final = ("concat", "concat_grouped", "interleave", "stack", "same")
SPLIT: Final = ("split", "split_grouped", "deinterleave", "unstack", "replicate")
EACH: Final = ("rename", "require", "permute", "transpose", "pad", "unpad", "cast", "scale")
OTHER: Final = ("drop", "tie")
PLAIN: Final = ("rename", "require")
"""The tensor is untouched."""

KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "rename": "", "require": "shape?", "transpose": "order?", "permute": "axis view order", "cast": "dtype from?",
        "scale": "by powers?", "pad": "axis padded size?", "unpad": "axis size padded?", "concat": "axis sizes? parts?",
        "split": "axis sizes? parts?", "concat_grouped": "axis groups sizes", "split_grouped": "axis groups sizes",
        "interleave": "axis block? parts?", "deinterleave": "axis block? parts?", "stack": "axis? parts?",
        "unstack": "axis? parts?", "replicate": "parts?", "same": "check? tolerance? parts?", "drop": "", "tie": "of",
    }
)  # fmt: skip
"""What each operation may be told; "?" where it may be left out."""

POWERS: Final[Mapping[str, int]] = MappingProxyType(
    {"weight": 1, "buffer": 1, "fp32": 1, "exp_avg": -1, "momentum_buffer": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
)
"""If a weight is multiplied by s, its gradient is divided by s, and so is the first moment; the second by s * s."""

CHECKS: Final = ("equal", "first", "mean")


@dataclass(frozen=True, slots=True)
class Op:
    """An operation and what it was told."""

    kind: str
    told: Mapping[str, Any] = field(default_factory=dict)
    backwards: bool = False
    """The inverse of a cast or a scale: the same numbers, used the other way round."""

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for operations that do the same."""
        return self.kind, self.backwards, repr(sorted((key, repr(value)) for key, value in self.told.items()))


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of one state, on its way."""

    node: Node
    dtype: str


@dataclass(frozen=True, slots=True)
class Context:
    """What an operation needs to know besides its tensors."""

    values: Mapping[str, int]
    state: str
    label: str
    """For errors: which rule, which tensor."""
    targets: int
    lossy: bool
    """The rule says that it may lose something."""

    def fail(self, message: str, **fields: object) -> MappingError:
        return MappingError(message, rule=self.label, state=self.state, **fields)


def inverse(op: Op) -> Op:
    """What undoes the operation."""
    told = dict(op.told)
    if op.kind == "transpose" and "order" in told:
        told["order"] = _argsort(told["order"])
    if op.kind == "permute":
        told["view"] = [told["view"][at] for at in told["order"]]
        told["order"] = _argsort(told["order"])
    if op.kind == "replicate":
        told["check"] = "equal"
    if op.kind == "same":
        told.pop("check", None)
        told.pop("tolerance", None)
    return Op(INVERSES[op.kind], told, backwards=(not op.backwards) if op.kind in ("cast", "scale") else False)


def lossy(op: Op) -> str:
    """Why the operation cannot be undone exactly, as far as that can be told without tensors; "" if it can."""
    told = op.told
    if op.kind == "drop":
        return "drops tensors"
    if op.kind == "pad" and "size" not in told:
        return "pads without saying the size before it (size)"
    if op.kind == "unpad" and "padded" not in told:
        return "removes padding without saying the size with it (padded)"
    if op.kind == "same" and (told.get("check", "equal") != "equal" or told.get("tolerance", 0)):
        return "takes one of several tensors that may differ"
    if op.kind == "cast" and not ("from" in told and lossless(str(told["from"]), str(told["dtype"]))):
        return "converts to another dtype without naming one that fits into it (from)"
    if op.kind == "scale" and not _power_of_two(told["by"]):
        return "multiplies by what is not a power of two"
    return ""


def _power_of_two(by: object) -> bool:
    return isinstance(by, (int, float)) and by > 0 and math.isfinite(by) and math.frexp(by)[0] == 0.5


def apply(op: Op, parts: Sequence[Part], context: Context) -> list[Part]:
    """The tensors that come out, in the order of the rule's targets."""
    if op.kind in JOIN:
        return [_join(op, parts, context)]
    if op.kind in SPLIT:
        return _split(op, parts[0], context)
    return [_each(op, part, context) for part in parts]


# ---- joining and splitting ----------------------------------------------------------------------------------


def _join(op: Op, parts: Sequence[Part], context: Context) -> Part:
    if len({part.dtype for part in parts}) > 1:
        raise context.fail("tensors of several dtypes cannot become one", dtypes=[part.dtype for part in parts])
    dtype = parts[0].dtype
    nodes = [part.node for part in parts]
    if "parts" in op.told and evaluate(op.told["parts"], context.values) != len(nodes):
        raise context.fail("another number of parts than written", expected=op.told["parts"], found=len(nodes))
    if op.kind == "same":
        _alike(nodes, -1, context)
        check, tolerance = op.told.get("check", "equal"), float(op.told.get("tolerance", 0))
        return Part(Same(nodes, context.label, dtype, check, tolerance), dtype)
    if op.kind == "stack":
        _alike(nodes, -1, context)
        axis = _axis(op, len(nodes[0].shape) + 1, context, missing=0)
        return Part(Concat([_inserted(node, axis, context) for node in nodes], axis), dtype)
    axis = _axis(op, len(nodes[0].shape), context)
    _alike(nodes, axis, context)
    lengths = [node.shape[axis] for node in nodes]
    groups, sizes = _grouping(op, lengths, context)
    if lengths != [groups * size for size in sizes]:
        raise context.fail("parts of other sizes than written", expected=[groups * n for n in sizes], found=lengths)
    if groups == 1:
        return Part(Concat(nodes, axis), dtype)
    rows = [Factor(node, axis, groups, size) for node, size in zip(nodes, sizes, strict=True)]
    return Part(Merge(Concat(rows, axis + 1), axis), dtype)


def _grouping(op: Op, lengths: Sequence[int], context: Context) -> tuple[int, list[int]]:
    """How often the parts take turns along the axis, and how much of each at a time."""
    if op.kind == "interleave":
        block = evaluate(op.told.get("block", 1), context.values)
        if block <= 0 or lengths[0] % block or len(set(lengths)) > 1:
            raise context.fail("interleaving takes equal parts of whole blocks", found=list(lengths), block=block)
        return lengths[0] // block, [block] * len(lengths)
    sizes = _sizes(op, len(lengths), context)
    if op.kind == "concat_grouped":
        assert sizes is not None
        return evaluate(op.told["groups"], context.values), sizes
    if sizes is None and len(set(lengths)) > 1 and not context.lossy:
        raise context.fail("unequal parts cannot be told apart again: write their sizes", found=list(lengths))
    return 1, list(lengths) if sizes is None else sizes


def _split(op: Op, part: Part, context: Context) -> list[Part]:
    node, count = part.node, context.targets
    if op.kind == "replicate":
        return [part] * count
    axis = _axis(op, len(node.shape), context, missing=0 if op.kind == "unstack" else None)
    length = node.shape[axis]
    if op.kind == "unstack":
        if length != count:
            raise context.fail("another number of parts than there are names", expected=count, found=length)
        return [Part(_removed(Slice(node, axis, at, at + 1), axis, context), part.dtype) for at in range(count)]
    groups, sizes = _ungrouping(op, length, count, context)
    if groups <= 0 or groups * sum(sizes) != length:
        raise context.fail("sizes that do not add up to the tensor", expected=groups * sum(sizes), found=length)
    found: list[Part] = []
    at = 0
    rows = node if groups == 1 else Factor(node, axis, groups, sum(sizes))
    for size in sizes:
        if groups == 1:
            found.append(Part(Slice(node, axis, at, at + size), part.dtype))
        else:
            found.append(Part(Merge(Slice(rows, axis + 1, at, at + size), axis), part.dtype))
        at += size
    return found


def _ungrouping(op: Op, length: int, count: int, context: Context) -> tuple[int, list[int]]:
    if op.kind == "deinterleave":
        block = evaluate(op.told.get("block", 1), context.values)
        if block <= 0 or length % (block * count):
            raise context.fail("not a whole number of blocks for each", found=length, block=block, parts=count)
        return length // (block * count), [block] * count
    sizes = _sizes(op, count, context)
    groups = evaluate(op.told["groups"], context.values) if op.kind == "split_grouped" else 1
    if sizes is None:
        if length % count:
            raise context.fail("not a whole number for each part: write the sizes", found=length, parts=count)
        sizes = [length // count] * count
    return groups, sizes


def _sizes(op: Op, count: int, context: Context) -> list[int] | None:
    if "sizes" not in op.told:
        return None
    sizes = [evaluate(size, context.values) for size in op.told["sizes"]]
    if len(sizes) != count or min(sizes, default=0) < 0:
        raise context.fail("a size from 0 on for each part", expected=count, found=sizes)
    return sizes


def _alike(nodes: Sequence[Node], axis: int, context: Context) -> None:
    """All shapes are equal, but along `axis`."""

    def rest(shape: Shape) -> Shape:
        return tuple(n for at, n in enumerate(shape) if at != axis)

    for node in nodes[1:]:
        if len(node.shape) != len(nodes[0].shape) or rest(node.shape) != rest(nodes[0].shape):
            raise context.fail("shapes that do not fit together", one=nodes[0].shape, other=node.shape)


def _inserted(node: Node, axis: int, context: Context) -> Node:
    if not node.shape:
        raise context.fail("single numbers cannot be stacked")
    if axis == len(node.shape):
        return Factor(node, axis - 1, node.shape[-1], 1)
    return Factor(node, axis, 1, node.shape[axis])


def _removed(node: Node, axis: int, context: Context) -> Node:
    if len(node.shape) < 2:
        raise context.fail("a row of single numbers cannot be unstacked")
    return Merge(node, axis - 1 if axis == len(node.shape) - 1 else axis)


# ---- one by one ---------------------------------------------------------------------------------------------


def _each(op: Op, part: Part, context: Context) -> Part:
    node = part.node
    match op.kind:
        case "rename":
            return part
        case "require":
            if "shape" in op.told:
                expected = tuple(evaluate(size, context.values) for size in op.told["shape"])
                if expected != node.shape:
                    raise context.fail("not of the required shape", expected=expected, found=node.shape)
            return part
        case "transpose":
            order = op.told.get("order", [*range(len(node.shape))][::-1])
            if sorted(order) != [*range(len(node.shape))]:
                raise context.fail("not an order of the tensor's axes", order=order, shape=node.shape)
            return Part(Transpose(node, order), part.dtype)
        case "permute":
            return Part(_permuted(op, node, context), part.dtype)
        case "pad" | "unpad":
            return Part(_padded(op, node, part.dtype, context), part.dtype)
        case "cast":
            return _cast(op, part, context)
        case _:
            return _scaled(op, part, context)


def _permuted(op: Op, node: Node, context: Context) -> Node:
    axis = _axis(op, len(node.shape), context)
    length = node.shape[axis]
    view = [evaluate(size, context.values) for size in op.told["view"]]
    if view.count(-1) == 1:
        rest = -math.prod(view)
        view[view.index(-1)] = length // rest if rest > 0 else -1
    if min(view) <= 0 or math.prod(view) != length:
        raise context.fail("a view that does not fit the axis", view=view, found=length)
    for at in range(len(view) - 1):
        node = Factor(node, axis + at, view[at], math.prod(view[at + 1 :]))
    order = [axis + at for at in op.told["order"]]
    node = Transpose(node, [*range(axis), *order, *range(axis + len(view), len(node.shape))])
    for at in reversed(range(len(view) - 1)):
        node = Merge(node, axis + at)
    return node


def _padded(op: Op, node: Node, dtype: str, context: Context) -> Node:
    axis = _axis(op, len(node.shape), context)
    length = node.shape[axis]
    size = evaluate(op.told["size"], context.values) if "size" in op.told else length
    padded = evaluate(op.told["padded"], context.values) if "padded" in op.told else max(length, size)
    before, after = (size, padded) if op.kind == "pad" else (padded, size)
    if length != before or not 0 <= size <= padded:
        raise context.fail("not of the size that is written", expected=before, found=length, size=size, padded=padded)
    if op.kind == "pad":
        return Pad(node, axis, after, dtype)
    return Slice(node, axis, 0, after) if context.lossy else Unpadded(node, axis, after, context.label)


def _cast(op: Op, part: Part, context: Context) -> Part:
    """Of values of the model only: what the optimizer keeps has its own precision."""
    if context.state not in ("weight", "buffer"):
        return part
    source, target = (op.told.get("from", part.dtype), op.told["dtype"])
    if op.backwards:
        source, target = target, source
    if part.dtype != source:
        raise context.fail("not of the dtype that is written", expected=source, found=part.dtype)
    if source not in NUMPY or target not in NUMPY:
        raise context.fail("no conversion from or to this dtype", source=source, target=target)
    return Part(Cast(part.node, source, target), target)


def _scaled(op: Op, part: Part, context: Context) -> Part:
    powers = {**POWERS, **op.told.get("powers", {})}
    if context.state not in powers:
        raise context.fail("no power is known for this state: write it in powers", by=op.told["by"])
    if part.dtype not in ("BF16", "F16", "F32", "F64"):
        raise context.fail("only floats can be scaled", dtype=part.dtype)
    by = op.told["by"]
    factor = float(by if isinstance(by, float) else evaluate(by, context.values))
    power = powers[context.state] * (-1 if op.backwards else 1)
    if factor == 0 or not math.isfinite(factor):
        raise context.fail("a factor that is zero or no number", by=by)
    if not context.lossy and not _power_of_two(factor):
        raise context.fail("a factor that is not a power of two rounds: say lossy = true", by=by, value=factor)
    return Part(Scale(part.node, part.dtype, factor**power), part.dtype)


def _axis(op: Op, dims: int, context: Context, missing: int | None = None) -> int:
    axis = op.told.get("axis", missing)
    if not isinstance(axis, int) or not -dims <= axis < dims:
        raise context.fail("an axis that the tensor does not have", axis=axis, dims=dims)
    return axis % dims


def _argsort(order: Sequence[int]) -> list[int]:
    return [order.index(at) for at in range(len(order))]

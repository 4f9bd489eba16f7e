"""Whether an optimizer treats every element alone, found by trying: a whole example, and the same example in parts.

    example   ── optimizer over it ──────────────────────▶ weights, state ─┐
              ── one optimizer per holder over its part ─▶ weights, state ─┴─ the same bits? ▶ which states are cut

LAMB, Adafactor and Muon look at whole tensors, others at all of them together; and instructions for the elements that
are left over at the end of a tensor may round otherwise (cut.py). None of that can be read off a class, so it is
tried, with the optimizer's own settings, on this machine and with its threads. An example is small, odd in size, and
large enough that torch splits it over threads. Not a proof for what an optimizer does only after many steps.
Invariant: no random numbers of the process are drawn.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from holdfast.proto.errors import ConfigError

from .cut import Range, cut_unit

Shapes = tuple[tuple[int, ...], ...]

SHAPES: Final[Shapes] = ((257, 301), (19, 29), (5,))
"""Large enough for threads; cut at odd multiples of the grain; and one that leaves most holders without an element."""
HOLDERS: Final = 3
STEPS: Final = 8
"""One element in a few hundred differs in a step where instructions round otherwise; there are 77,000."""
SHAPES_AGAIN: Final[Shapes] = SHAPES[1:]
STEPS_AGAIN: Final = 2
"""For a replacement: the process before it has seen the rest, and a recovery is not to wait for it."""
_DIFFERS: Final = "gives other numbers on a part of a parameter than on the whole"


def prove(optimizer: torch.optim.Optimizer, *, again: bool = False) -> frozenset[str]:
    """Names of the states that have an element for each of the parameter's. Raises ConfigError with one line.

    `again`: it was seen before, on this machine; only the names are asked for.
    """
    found: frozenset[str] = frozenset()
    for group in optimizer.param_groups:
        for kind in sorted({(p.dtype, str(p.device)) for p in group["params"]}, key=str):
            try:
                found |= _prove(optimizer, group, *kind, again=again)
            except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
                what = f"cannot be tried on parts of parameters: {' '.join(str(error).split())}"
                raise ConfigError(_line(optimizer, what)) from error
    return found


def stand_in(
    optimizer: torch.optim.Optimizer,
    parts: Mapping[int, tuple[nn.Parameter, Range]],
    elementwise: frozenset[str] | None = None,
) -> None:
    """Replace parameters, given by id, by their parts, in the groups and in the state that there is already.

    `elementwise`: states that are cut; None: those that have the parameter's shape.
    """
    for group in optimizer.param_groups:
        group["params"] = [parts[id(p)][0] if id(p) in parts else p for p in group["params"]]
    for whole in [p for p in optimizer.state if id(p) in parts]:
        part, (start, stop) = parts[id(whole)]
        kept = optimizer.state.pop(whole)
        for name, value in kept.items():
            cut = (
                value.shape == whole.shape
                if elementwise is None and torch.is_tensor(value)
                else name in (elementwise or ())
            )
            kept[name] = value.reshape(-1)[start:stop].clone() if cut else value
        optimizer.state[part] = kept


def _prove(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dtype: torch.dtype, device: str, *, again: bool
) -> frozenset[str]:
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPES_AGAIN if again else SHAPES

    def drawn() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    start = drawn()
    ranges = cut_unit([tensor.numel() for tensor in start], HOLDERS)
    wholes = [nn.Parameter(tensor.clone()) for tensor in start]
    whole = _like(optimizer, group, wholes)
    holders: list[tuple[torch.optim.Optimizer, list[nn.Parameter]]] = []
    for holder in range(HOLDERS):
        copies = [nn.Parameter(tensor.clone()) for tensor in start]
        own = [nn.Parameter(p.detach().view(-1)[slice(*r[holder])]) for p, r in zip(copies, ranges, strict=True)]
        made = _like(optimizer, group, copies)
        stand_in(made, {id(p): (o, r[holder]) for p, o, r in zip(copies, own, ranges, strict=True)})
        holders.append((made, own))
    for number in range(STEPS_AGAIN if again else STEPS):
        gradients = [tensor * _scale(group, number) for tensor in drawn()]
        _step(whole, wholes, gradients)
        for holder, (made, own) in enumerate(holders):
            parts = [g.view(-1)[slice(*r[holder])] for g, r in zip(gradients, ranges, strict=True)]
            _step(made, own, parts)
    return _compare(optimizer, (whole, wholes), holders)


def _scale(group: Mapping[str, Any], number: int) -> float:
    """Of a step's gradients. Other roundings are seen best where an update weighs as much as what it is added to."""
    rate = abs(float(group.get("initial_lr", group.get("lr", 1.0))))
    return 1.0 if number % 2 else min(1.0 / max(rate, 1e-4), 1e4) * (0.03 if number % 4 else 1.0)


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Any]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def _compare(
    optimizer: torch.optim.Optimizer,
    whole: tuple[torch.optim.Optimizer, list[nn.Parameter]],
    holders: Sequence[tuple[torch.optim.Optimizer, list[nn.Parameter]]],
) -> frozenset[str]:
    elementwise: set[str] = set()
    for index, parameter in enumerate(whole[1]):
        if not _equal(parameter.detach(), [own[index].detach() for _, own in holders]):
            raise ConfigError(_line(optimizer, _DIFFERS))
        kept = whole[0].state.get(parameter, {})
        of_parts = [made.state.get(own[index], {}) for made, own in holders]
        if any(part.keys() != kept.keys() for part in of_parts):
            raise ConfigError(_line(optimizer, "keeps another state of a part of a parameter than of the whole"))
        for name, value in kept.items():
            parts = [part[name] for part in of_parts]
            if torch.is_tensor(value) and value.shape == parameter.shape:
                elementwise.add(str(name))
                same = _equal(value, parts)
            else:
                same = all(_same(value, part) for part in parts)
            if not same:
                raise ConfigError(_line(optimizer, f"{_DIFFERS}, in its {name}"))
    for number, group in enumerate(whole[0].param_groups):
        for made, _ in holders:
            other = made.param_groups[number]
            if any(not _same(value, other.get(key)) for key, value in group.items() if key != "params"):
                raise ConfigError(_line(optimizer, f"{_DIFFERS}, in the settings of its groups"))
    return frozenset(elementwise)


def _equal(whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Whether the parts, one after the other, are the whole, to the bit."""
    return _same(whole.reshape(-1), torch.cat([part.reshape(-1) for part in parts]))


def _same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one) and torch.is_tensor(other):
        bits = [value.reshape(-1).contiguous().view(torch.uint8) for value in (one, other)]
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*bits)
    return bool(type(one) is type(other) and one == other)


def _like(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """A fresh optimizer of the same kind with the settings of `group`."""
    kind: Any = type(optimizer)
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    if "initial_lr" in settings:
        settings["lr"] = settings["initial_lr"]  # a scheduler may begin at 0, where nothing could be seen
    taken = inspect.signature(kind).parameters
    try:
        made: torch.optim.Optimizer = kind(parameters, **{k: v for k, v in settings.items() if k in taken})
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
        # Its constructor wants what no group tells; what it was given otherwise is among its attributes.
        made = object.__new__(kind)
        made.__dict__.update(
            {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "state", "param_groups")}
        )
        made.state = defaultdict(dict)
        made.param_groups = [{**settings, "params": parameters}]
    return made


def _line(optimizer: torch.optim.Optimizer, what: str) -> str:
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    return (
        f"ZeRO-1 updates parameters in parts, but {kind} (torch with {torch.get_num_threads()} threads) {what}: "
        "choose an optimizer that treats each element alone, or leave out zero=1 (--zero 1)"
    )

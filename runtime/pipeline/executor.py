"""Runs one rank's action list of a step: forward, backward, and the transfers between them.

    for each action:  post the next receive ▸ wait for this one ▸ compute ▸ send

All state of a step is local to `run`: on any error (a fence above all) it is dropped, and nothing has to be
cleared. Gradients of each microbatch go into a dyadic sum per unit; nothing is scaled here. Not here: what
order the actions have (schedule.py), gradient exchange between replicas (exchange.py), the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from holdfast.proto.errors import ConfigError
from holdfast.proto.lease import Phase
from holdfast.proto.plan import Plan

from .. import rng
from ..comm.group import Group
from ..data import Source
from ..inject import Injector
from ..lease import Lease
from .dyadic import DyadicSum, SequentialSum
from .schedule import Action, RankSchedule
from .transfer import Pending, Tensors, Wire

LossFn = Callable[[Any, Any], Any]

LOSS = -1
"""Stands among the proven units for the loss function."""


@dataclass(frozen=True, slots=True)
class Numerics:
    """Options that decide bits."""

    seed: int
    exact: bool = True
    autocast: torch.dtype | None = None
    checkpoint_activations: bool = False


@dataclass(slots=True)
class Outcome:
    """What a step left on this rank: gradient sums per unit, losses by microbatch (value, count)."""

    sums: dict[int, DyadicSum | SequentialSum] = field(default_factory=dict)
    losses: dict[int, tuple[torch.Tensor, float]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Held:
    """One microbatch between its forward and its backward at one hop."""

    inputs: Tensors
    outputs: Tensors
    loss: torch.Tensor | None


class Executor:
    """One rank's share of every step of one generation."""

    def __init__(
        self,
        *,
        plan: Plan,
        schedule: RankSchedule,
        rank: int,
        modules: Mapping[int, nn.Module],
        loss: LossFn,
        numerics: Numerics,
        device: torch.device,
        lease: Lease,
        injector: Injector,
        proven: set[int],
    ) -> None:
        """`proven`: units whose forward has succeeded in this process; errors of others are the user's setup."""
        self._plan = plan
        self._schedule = schedule
        self._rank = rank
        self._modules = modules
        self._loss = loss
        self._numerics = numerics
        self._device = device
        self._lease = lease
        self._injector = injector
        self._proven = proven
        self._parameters = {
            unit: [p for p in module.parameters() if p.requires_grad] for unit, module in modules.items()
        }
        self._worked = plan.worked(rank)
        self._wire: Wire | None = None

    def attach(self, group: Group) -> None:
        """Use `group` from now on; shapes are agreed anew."""
        self._wire = Wire(group, self._plan, self._device)

    def run(
        self, step: int, source: Source, *, train: bool, loss_scale: float = 1.0, first: int | None = None
    ) -> Outcome:
        """Run this rank's actions. `train=False`: forward only, in evaluation mode, of the `first` microbatches.

        Raises Fenced, PeerLost, ConfigError, or what a user's layer raised.
        """
        run = _Run(self, step, source, train, loss_scale, first)
        for module in self._modules.values():
            module.train(train)
        with rng.preserved(self._device), torch.set_grad_enabled(train):
            return run.all()


class _Run:
    """The local state of one step."""

    def __init__(
        self, executor: Executor, step: int, source: Source, train: bool, loss_scale: float, first: int | None
    ) -> None:
        self.x = executor
        self.step = step
        self.source = source
        self.train = train
        self.loss_scale = loss_scale
        self.first = executor._plan.microbatches if first is None else first
        assert executor._wire is not None
        self.wire = executor._wire
        self.held: dict[tuple[int, int], Held] = {}
        self.receives: dict[Action, Pending] = {}
        self.sends: dict[int, Pending] = {}
        self.handed: dict[tuple[str, int, int], Tensors] = {}  # between consecutive hops on this rank
        self.outcome = Outcome()

    def all(self) -> Outcome:
        x = self.x
        actions = x._schedule.actions
        if not self.train:
            actions = tuple(a for a in actions if a.kind == "F" and a.microbatch < self.first)
        made: Callable[[], DyadicSum | SequentialSum] = DyadicSum if x._numerics.exact else SequentialSum
        if self.train:
            self.outcome.sums = {unit: made() for unit in x._worked}
        for index, action in enumerate(actions):
            self.post(action, wait=True)
            if index + 1 < len(actions):
                self.post(actions[index + 1], wait=False)
            if self.train:
                for earlier in x._schedule.reap[index]:
                    self.settle(earlier)
            if action.kind == "F":
                self.forward(index, action)
            else:
                self.backward(index, action)
        for index in sorted(self.sends):
            self.settle(index)
        return self.outcome

    # ---- transfers ----------------------------------------------------------------------------------

    def post(self, action: Action, *, wait: bool) -> None:
        """Post the receive that `action` needs, if it needs one and its shape is known."""
        if action in self.receives:
            return
        hops = self.x._plan.paths[action.microbatch].hops
        if action.kind == "F":
            if action.hop == 0 or hops[action.hop - 1].rank == self.x._rank:
                return
            src, hop = hops[action.hop - 1].rank, action.hop - 1
            if wait:
                self.x._lease.renew(Phase.WAITING)
            spec = self.wire.forward_spec(src, action.microbatch, hop, wait=wait)
            if spec is not None:
                self.receives[action] = self.wire.receive_forward(spec, src, self.step, action.microbatch, hop)
            return
        held = self.held.get((action.microbatch, action.hop))
        if action.hop == len(hops) - 1 or hops[action.hop + 1].rank == self.x._rank or held is None:
            return
        like = tuple(t for t in held.outputs if t.requires_grad)
        src = hops[action.hop + 1].rank
        self.receives[action] = self.wire.receive_backward(like, src, self.step, action.microbatch, action.hop + 1)

    def received(self, action: Action) -> Tensors:
        """Wait for what `action` needs."""
        self.x._lease.renew(Phase.WAITING)
        return self.wire.wait(self.receives.pop(action))

    def settle(self, index: int) -> None:
        """Wait for the send of an earlier action and let its tensors go."""
        pending = self.sends.pop(index, None)
        if pending is not None:
            self.x._lease.renew(Phase.WAITING)
            self.wire.wait(pending)

    # ---- compute ------------------------------------------------------------------------------------

    def forward(self, index: int, action: Action) -> None:
        x, microbatch = self.x, action.microbatch
        hops = x._plan.paths[microbatch].hops
        inputs = self.inputs(action)
        x._lease.renew(Phase.FORWARD if self.train else Phase.VALIDATE)
        if self.train:
            x._injector.at("forward", self.step, microbatch)
        dtype = x._numerics.autocast
        cast = torch.autocast(x._device.type, dtype=dtype) if dtype is not None else nullcontext()
        loss = None
        with cast:
            outputs = inputs
            for unit in hops[action.hop].units:
                outputs = self.unit_forward(unit, outputs, microbatch)
            if action.hop == len(hops) - 1:
                loss = self.loss(outputs, microbatch)
        if self.train:
            self.held[(microbatch, action.hop)] = Held(inputs, outputs if loss is None else (), loss)
        if loss is None:
            dst = hops[action.hop + 1].rank
            if dst == x._rank:
                self.handed[("F", microbatch, action.hop + 1)] = outputs
            else:
                self.sends[index] = self.wire.send_forward(outputs, dst, self.step, microbatch, action.hop)

    def inputs(self, action: Action) -> Tensors:
        """Inputs of a hop: the dataset's, or the previous hop's outputs as fresh leaves."""
        hops = self.x._plan.paths[action.microbatch].hops
        if action.hop == 0:
            self.x._lease.renew(Phase.USER)  # the dataset's code, with its own lease
            batch = self.source.microbatch(self.step, action.microbatch)[0]
            return tuple(t.to(self.x._device) for t in _tensors(batch))
        previous = hops[action.hop - 1].rank
        if previous == self.x._rank:
            crossing = self.handed.pop(("F", action.microbatch, action.hop))
            requires = [t.requires_grad for t in crossing]
        else:
            spec = self.wire.forward_spec(previous, action.microbatch, action.hop - 1, wait=False)
            assert spec is not None
            requires = [grad for _, _, grad in spec.tensors]
            crossing = self.received(action)
        return tuple(
            t.detach().requires_grad_(needed and self.train) for t, needed in zip(crossing, requires, strict=True)
        )

    def unit_forward(self, unit: int, inputs: Tensors, microbatch: int) -> Tensors:
        """Run one unit under its own random numbers."""
        x = self.x
        rng.seed_device(x._device, rng.key(x._numerics.seed, self.step, microbatch, unit))
        module = x._modules[unit]
        try:
            if x._numerics.checkpoint_activations and self.train:
                outputs = checkpoint(module, *inputs, use_reentrant=False)
            else:
                outputs = module(*inputs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if unit in x._proven or _is_out_of_memory(error):
                raise
            shapes = _shapes(inputs)
            origin = f"what layer {unit - 1} gives" if unit else "the dataset's input"
            raise ConfigError(
                f"layer {unit} ({type(module).__name__}) does not take {origin} ({shapes}): {_one_line(error)}"
            ) from None
        x._proven.add(unit)
        return _tensors(outputs)

    def loss(self, outputs: Tensors, microbatch: int) -> torch.Tensor:
        """The user's loss of a microbatch; remembers (sum, count) and returns what to differentiate."""
        self.x._lease.renew(Phase.USER)
        targets = self.source.microbatch(self.step, microbatch)[1]
        self.x._lease.renew(Phase.FORWARD if self.train else Phase.VALIDATE)
        targets = targets.to(self.x._device) if isinstance(targets, torch.Tensor) else targets
        try:
            result = self.x._loss(outputs[0] if len(outputs) == 1 else outputs, targets)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if LOSS in self.x._proven or _is_out_of_memory(error):
                raise
            shapes = _shapes(outputs)
            raise ConfigError(
                f"the loss does not take what the last layer gives ({shapes}): {_one_line(error)}"
            ) from None
        value, count = result if isinstance(result, tuple) else (result, 1.0)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise ConfigError("the loss must return a scalar tensor, or (sum, count); see Trainer's docstring")
        if self.train and not value.requires_grad:
            raise ConfigError("the loss does not depend on any parameter that is trained: is it detached?")
        self.x._proven.add(LOSS)
        self.outcome.losses[microbatch] = (value.detach(), float(count))
        self.outcome.tokens[microbatch] = targets.numel() if isinstance(targets, torch.Tensor) else int(count)
        return value

    def backward(self, index: int, action: Action) -> None:
        x, microbatch = self.x, action.microbatch
        hops = x._plan.paths[microbatch].hops
        gradients: Tensors = ()
        if action.hop < len(hops) - 1:
            if hops[action.hop + 1].rank == x._rank:
                gradients = self.handed.pop(("B", microbatch, action.hop))
            else:
                gradients = self.received(action)
        x._lease.renew(Phase.BACKWARD)
        x._injector.at("backward", self.step, microbatch)
        held = self.held.pop((microbatch, action.hop))
        if held.loss is not None:
            held.loss.backward(torch.full_like(held.loss, self.loss_scale) if self.loss_scale != 1.0 else None)
        else:
            torch.autograd.backward([t for t in held.outputs if t.requires_grad], list(gradients))
        self.collect(hops[action.hop].units, microbatch)
        if action.hop > 0:
            outgoing = tuple(
                t.grad if t.grad is not None else torch.zeros_like(t) for t in held.inputs if t.requires_grad
            )
            dst = hops[action.hop - 1].rank
            if dst == x._rank:
                self.handed[("B", microbatch, action.hop - 1)] = outgoing
            else:
                self.sends[index] = self.wire.send_backward(outgoing, dst, self.step, microbatch, action.hop)

    def collect(self, units: Sequence[int], microbatch: int) -> None:
        """Move the gradients of one microbatch from the parameters into the sums."""
        for unit in units:
            parameters = self.x._parameters[unit]
            self.outcome.sums[unit].add(microbatch, [p.grad for p in parameters])
            for parameter in parameters:
                parameter.grad = None


def _tensors(value: Any) -> Tensors:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)) and value and all(isinstance(t, torch.Tensor) for t in value):
        return tuple(value)
    raise ConfigError(
        f"layers exchange a tensor or a tuple of tensors, got {type(value).__module__}.{type(value).__qualname__}"
    )


def _shapes(tensors: Tensors) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _is_out_of_memory(error: BaseException) -> bool:
    """Memory may be there for the next process; the set-up is not to blame."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""A rank's training state, named: modules by unit, parameters, optimizer, scheduler, and their entries.

    name   "3.attn.wq.weight"     unit index, then the parameter's path in its module
    state  "weight", "buffer", or the optimizer's own key ("exp_avg", "step", ...)

Building is layout-independent: each unit is built (if given as a factory) under generators seeded from
(seed, unit), so a rank builds only its own units and gets what any other layout would have got. Optimizer
state is read and written per parameter, so it can move with its layer.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from holdfast.proto.errors import ConfigError
from holdfast.proto.plan import Plan

from . import rng
from .pipeline.exchange import Tie
from .zero import Shards, make_shards

LayerSpec = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the state. `early`: may change before the next optimizer step (module buffers)."""

    name: str
    state: str
    tensor: torch.Tensor
    early: bool = False
    whole: tuple[int, ...] | None = None
    """Shape of the logical tensor, if `tensor` is a flat range of it (ZeRO-1), from element `start` on."""
    start: int = 0


def build_unit(layer: LayerSpec, unit: int, seed: int, device: torch.device) -> nn.Module:
    """The module of a unit, on its device. Factories run under generators seeded by (seed, unit)."""
    if isinstance(layer, nn.Module):
        return layer.to(device)
    with rng.seeded(device, rng.key(seed, 0x1A7E5, unit)):
        try:
            module = layer()
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"layer {unit} cannot be built: {_one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"layer {unit} is neither a module nor a function that returns one", got=type(module))
    return module.to(device)


def check_layers(layers: Sequence[Any]) -> list[LayerSpec]:
    """The user's ordered list of layers. Raises ConfigError naming the first that is none."""
    if not isinstance(layers, Iterable):
        raise ConfigError(f"layers is an ordered list of modules, or functions that return one; got {type(layers)}")
    listed = list(layers)
    for unit, layer in enumerate(listed):
        if not isinstance(layer, nn.Module) and not callable(layer):
            raise ConfigError(
                f"layers[{unit}] is a {type(layer).__qualname__}; give nn.Modules or functions that return one"
            )
    return listed


def find_ties(layers: Sequence[LayerSpec], modules: Mapping[int, nn.Module]) -> list[Tie]:
    """Ties declared by a module (`holdfast_ties = {"name": (unit, "name")}`) or by a shared Parameter.

    Declarations are read from every layer given as a module and from the hosted ones; a factory may carry
    the attribute too, so that ranks that do not host the unit know of the tie.
    """
    ties: set[tuple[int, str, int, str]] = set()
    owners: dict[int, tuple[int, str]] = {}
    for unit, layer in enumerate(layers):
        source = modules.get(unit, layer)
        declared = getattr(layer, "holdfast_ties", None) or getattr(source, "holdfast_ties", None) or {}
        for name, (other, other_name) in declared.items():
            ties.add((other, other_name, unit, name))
        if isinstance(layer, nn.Module):
            for name, parameter in layer.named_parameters():
                first = owners.setdefault(id(parameter), (unit, name))
                if first[0] != unit:
                    ties.add((*first, unit, name))
    return [Tie(*tie) for tie in sorted(ties)]


def equalise_ties(
    ties: Iterable[Tie], layers: Sequence[LayerSpec], modules: Mapping[int, nn.Module], seed: int, device: torch.device
) -> None:
    """Give every hosted copy of a tied parameter the first one's initial value."""
    built: dict[int, nn.Module] = dict(modules)
    for tie in ties:
        if tie.second_unit not in modules:
            continue
        if tie.first_unit not in built:
            built[tie.first_unit] = build_unit(layers[tie.first_unit], tie.first_unit, seed, device)
        first = built[tie.first_unit].get_parameter(tie.first)
        second = modules[tie.second_unit].get_parameter(tie.second)
        if first is second:
            # Two copies, kept equal by their gradients: what a rank hosts must not change what it computes.
            _split_shared(modules[tie.second_unit], tie.second)
            continue
        with torch.no_grad():
            second.copy_(first)


def _split_shared(module: nn.Module, name: str) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    setattr(owner, leaf, nn.Parameter(getattr(owner, leaf).detach().clone()))


class ModelState:
    """Everything of a rank that an optimizer step changes, by name."""

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        user: Mapping[str, Any],
    ) -> None:
        self.modules = dict(sorted(modules.items()))
        for unit, module in self.modules.items():
            if any(is_lazy(p) for p in [*module.parameters(), *module.buffers()]):
                raise ConfigError(
                    f"layer {unit} ({type(module).__name__}) has lazy parameters: give it its sizes, so that a "
                    "replacement can be built without data"
                )
        self.parameters: dict[tuple[int, str], nn.Parameter] = {
            (unit, name): parameter
            for unit, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.by_unit: dict[int, list[nn.Parameter]] = {
            unit: [p for (u, _), p in self.parameters.items() if u == unit] for unit in self.modules
        }
        self.shards: Shards | None = None
        self.trained = self.parameters  # what the optimizer updates: of parameters that are cut, the own parts
        self._names = self._named()
        self.optimizer = _make_optimizer(optimizer, list(self.parameters.values()))
        self.scheduler = scheduler(self.optimizer) if scheduler is not None and self.optimizer is not None else None
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError("ReduceLROnPlateau needs a metric in step(): give a scheduler of the step alone")
        self.user = dict(user)
        for name, value in self.user.items():
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise ConfigError(
                    f"state[{name!r}] has no state_dict and load_state_dict", got=type(value).__qualname__
                )

    def shard(self, plan: Plan, rank: int, *, proven: bool) -> None:
        """Have the optimizer update only this rank's parts of what has several holders (ZeRO-1).

        `proven`: the process before this one did the same. Raises ConfigError for an optimizer that would then compute
        other numbers.
        """
        self.shards = make_shards(plan, rank, self.parameters)
        if self.shards is not None and self.optimizer is not None:
            self.trained = self.shards.take_over(self.optimizer, self.parameters, proven=proven)
            self._names = self._named()

    def _named(self) -> dict[int, str]:
        return {id(p): f"{unit}.{name}" for (unit, name), p in self.trained.items()}

    # ---- capture ------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every tensor of the state, in a fixed order."""
        found = []
        for unit, module in self.modules.items():
            for name, parameter in module.named_parameters():
                found.append(Entry(f"{unit}.{name}", "weight", parameter.detach()))
                if parameter.requires_grad and self.optimizer is not None:
                    kept = self.optimizer.state.get(self.trained[unit, name], {})
                    found += [
                        self._entry((unit, name), str(key), value)
                        for key, value in kept.items()
                        if isinstance(value, torch.Tensor)
                    ]
            found += [Entry(f"{unit}.{name}", "buffer", buffer, early=True) for name, buffer in _persistent(module)]
        return found

    def _entry(self, key: tuple[int, str], state: str, tensor: torch.Tensor) -> Entry:
        """What the optimizer keeps of a parameter, or of this rank's part of it."""
        name = f"{key[0]}.{key[1]}"
        region = self.region(name, state)
        if region is None:
            return Entry(name, state, tensor)
        return Entry(name, state, tensor, whole=tuple(self.parameters[key].shape), start=region[0])

    def region(self, name: str, state: str) -> tuple[int, int] | None:
        """The elements of an optimizer's state that this rank keeps; None: all."""
        return self.shards.region(name, state) if self.shards is not None else None

    def future_entries(self) -> list[Entry]:
        """What the optimizer will keep after its first step, with examples; none if it cannot be told.

        A step is tried on a copy of one parameter of each shape, with zero gradients.
        """
        if self.optimizer is None:
            return []
        made: dict[tuple[torch.Size, torch.dtype], dict[str, torch.Tensor]] = {}
        found = []
        for key, parameter in self.trained.items():
            kind = (parameter.shape, parameter.dtype)
            if kind not in made:
                made[kind] = _tried(type(self.optimizer), self.optimizer.defaults, parameter)
            found += [self._entry(key, state, tensor) for state, tensor in made[kind].items()]
        return found

    def metadata(self) -> dict[str, Any]:
        """Everything of the state that is not an entry, as capturable values."""
        meta: dict[str, Any] = {"user": {name: value.state_dict() for name, value in self.user.items()}}
        if self.optimizer is not None:
            meta["groups"] = [
                {
                    **{key: value for key, value in group.items() if key not in ("params", "param_names")},
                    "names": [self._names[id(p)] for p in group["params"]],
                }
                for group in self.optimizer.param_groups
            ]
            meta["scalars"] = {
                self._names[id(p)]: {k: v for k, v in kept.items() if not isinstance(v, torch.Tensor)}
                for p, kept in self.optimizer.state.items()
                if id(p) in self._names
            }
        if self.scheduler is not None:
            meta["scheduler"] = self.scheduler.state_dict()
        return meta

    # ---- restore ------------------------------------------------------------------------------------

    def load(self, tensors: Mapping[tuple[str, str], torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Put a captured state in place. `tensors` maps (name, state) to tensors, which are copied.

        Raises ConfigError if a tensor is missing: the snapshot is of another model.
        """
        with torch.no_grad():
            for unit, module in self.modules.items():
                for name, parameter in module.named_parameters():
                    parameter.copy_(self._need(tensors, f"{unit}.{name}", "weight"))
                for name, buffer in _persistent(module):
                    buffer.copy_(self._need(tensors, f"{unit}.{name}", "buffer"))
        if self.optimizer is not None:
            self._load_optimizer(tensors, metadata)
        if self.scheduler is not None and "scheduler" in metadata:
            self.scheduler.load_state_dict(metadata["scheduler"])
        for name, value in self.user.items():
            value.load_state_dict(metadata["user"][name])

    def _load_optimizer(self, tensors: Mapping[tuple[str, str], torch.Tensor], metadata: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for (name, state), tensor in tensors.items():
            if state not in ("weight", "buffer"):
                by_name.setdefault(name, {})[state] = tensor
        scalars = metadata.get("scalars", {})
        for (unit, path), parameter in self.trained.items():
            name = f"{unit}.{path}"
            old = self.optimizer.state.get(parameter, {})
            kept: dict[str, Any] = dict(scalars.get(name, {}))
            for key, tensor in by_name.get(name, {}).items():
                tensor = tensor if self.region(name, key) is None else tensor.reshape(-1)
                current = old.get(key)
                if isinstance(current, torch.Tensor) and current.shape == tensor.shape:
                    kept[key] = current.copy_(tensor)
                else:
                    # Adam keeps `step` on the CPU whatever the parameter's device.
                    device = parameter.device if tensor.shape == parameter.shape else torch.device("cpu")
                    kept[key] = tensor.clone().to(device)
            if kept:
                self.optimizer.state[parameter] = kept
            else:
                self.optimizer.state.pop(parameter, None)
        for group, saved in zip(self.optimizer.param_groups, metadata.get("groups", []), strict=False):
            group.update({key: value for key, value in saved.items() if key != "names"})

    @staticmethod
    def _need(tensors: Mapping[tuple[str, str], torch.Tensor], name: str, state: str) -> torch.Tensor:
        tensor = tensors.get((name, state))
        if tensor is None:
            raise ConfigError(f"the snapshot has no {state} of {name}: it is of another model")
        return tensor

    def apply_gradients(self, gradients: Mapping[tuple[int, str], torch.Tensor | None]) -> None:
        """Set the gradients, step the optimizer and the scheduler, clear the gradients."""
        if self.optimizer is None:
            return
        for key, gradient in gradients.items():
            part = self.shards.part(key, gradient) if self.shards is not None else gradient
            self.trained[key].grad = part
        self.optimizer.step()
        for parameter in self.trained.values():
            parameter.grad = None
        if self.scheduler is not None:
            self.scheduler.step()

    def buffers(self, unit: int) -> list[torch.Tensor]:
        """Those that belong to the state: a forward may change them."""
        return [buffer for _, buffer in _persistent(self.modules[unit])]

    def keys(self, units: Iterable[int]) -> list[tuple[int, str]]:
        """The trained parameters of these units, in order."""
        wanted = set(units)
        return [key for key in self.parameters if key[0] in wanted]

    def names(self) -> list[str]:
        """Names of the trained parameters hosted here, in order."""
        return [f"{unit}.{name}" for unit, name in self.parameters]

    @property
    def learning_rate(self) -> float:
        """Of the first group; nan without parameters."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else float("nan")


def _make_optimizer(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer | None:
    """The user's optimizer over what this rank trains; None if that is nothing."""
    if not parameters:
        return None
    try:
        made: Any = make(parameters)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"the optimizer cannot be made: {_one_line(error)}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"the optimizer function must return a torch optimizer, got {type(made).__qualname__}")
    return made


def _tried(kind: type[torch.optim.Optimizer], defaults: Mapping[str, Any], like: nn.Parameter) -> dict[str, Any]:
    """What an optimizer of this kind keeps of a parameter like this one."""
    copy = nn.Parameter(torch.zeros_like(like))
    copy.grad = torch.zeros_like(like)
    try:
        taken = inspect.signature(kind).parameters
        optimizer: Any = kind([copy], **{name: value for name, value in defaults.items() if name in taken})
        optimizer.step()
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return {}
    return {str(name): value for name, value in optimizer.state[copy].items() if isinstance(value, torch.Tensor)}


def kind_of(module: nn.Module) -> str:
    """What a module's tensors are, as a short text; empty if it has none."""
    tensors = [(name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    tensors += [(name, buffer.shape, buffer.dtype, False) for name, buffer in _persistent(module)]
    return hashlib.sha256(repr(tensors).encode()).hexdigest()[:12] if tensors else ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _persistent(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Buffers that belong to the state: those that state_dict would save."""
    kept = module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]

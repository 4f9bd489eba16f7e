"""A rank's state by name: built the same in every layout, captured and restored bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.ckpt.memory import metadata as blob
from holdfast.proto.errors import ConfigError
from holdfast.runtime.data import make_source
from holdfast.runtime.state import ModelState, build_unit, check_layers, equalise_ties, find_ties
from holdfast.runtime.undo import Undo

CPU = torch.device("cpu")
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def make_state(make: Make, scheduler: Any = None, user: dict[str, Any] | None = None) -> ModelState:
    modules = {unit: build_unit(block, unit, 0, CPU) for unit in (4, 2)}
    return ModelState(modules, make, scheduler, user or {})


def train(state: ModelState, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for module in state.modules.values():
            module(torch.randn(5, 3, generator=generator))
        state.apply_gradients({k: torch.randn(p.shape, generator=generator) for k, p in state.parameters.items()})


def captured(state: ModelState) -> tuple[dict[tuple[str, str], torch.Tensor], Any]:
    """What a snapshot makes of it: copies, and metadata through the blob."""
    coded, extra = blob.encode(state.metadata(), is_tensor=lambda v: isinstance(v, torch.Tensor))
    tensors = {(e.name, e.state): e.tensor.clone() for e in state.entries()}
    return tensors, blob.decode(coded, [tensor.clone() for _, tensor in extra])


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd without state": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 1e-3}, {"params": p[1:]}], lr=1e-2),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
}
SCHEDULERS: dict[str, Any] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "multi step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3, 3, 5]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    "cosine restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fresh_process_that_loads_a_state_trains_on_with_the_same_bits(optimizer: str, scheduler: str) -> None:
    survivor = make_state(OPTIMIZERS[optimizer], SCHEDULERS[scheduler])
    train(survivor, 4, seed=1)
    tensors, metadata = captured(survivor)
    replacement = make_state(OPTIMIZERS[optimizer], SCHEDULERS[scheduler])
    replacement.load(tensors, metadata)
    for state in (survivor, replacement):
        train(state, 3, seed=2)
    expected, found = captured(survivor), captured(replacement)
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][key], expected[0][key]) for key in expected[0])
    assert str(found[1]) == str(expected[1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_survivor_that_is_taken_back_forgets_what_it_did_since(optimizer: str) -> None:
    state = make_state(OPTIMIZERS[optimizer])
    before = captured(state)  # no optimizer state yet: it must be gone again
    train(state, 2, seed=1)
    state.load(*before)
    after = captured(state)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])
    assert str(after[1]) == str(before[1])


def test_names_say_unit_path_and_kind() -> None:
    state = make_state(OPTIMIZERS["adamw"])
    train(state, 1, seed=1)
    named = {(entry.name, entry.state) for entry in state.entries()}
    assert {("2.0.weight", "weight"), ("2.0.weight", "exp_avg"), ("4.1.running_mean", "buffer")} <= named
    assert {entry.state for entry in state.entries() if entry.early} == {"buffer"}
    assert state.names()[0] == "2.0.weight", "in the order of the units, whatever the dict's was"


def test_a_unit_is_built_the_same_whatever_was_built_before_and_touches_no_generator() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    alone = build_unit(block, 3, 0, CPU)
    drawn = (torch.rand(1).item(), random.random(), np.random.random())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.random())
    build_unit(block, 2, 0, CPU)
    again = build_unit(block, 3, 0, CPU)
    assert torch.equal(alone.get_parameter("0.weight"), again.get_parameter("0.weight"))
    assert not torch.equal(again.get_parameter("0.weight"), build_unit(block, 4, 0, CPU).get_parameter("0.weight"))


def test_frozen_parameters_are_kept_but_not_trained_and_a_rank_may_have_nothing_to_train() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    state = ModelState({0: frozen, 1: nn.ReLU()}, OPTIMIZERS["adamw"], SCHEDULERS["step"], {})
    assert state.names() == []
    assert state.optimizer is state.scheduler is None
    assert state.learning_rate != state.learning_rate
    tensors, metadata = captured(state)
    assert set(tensors) == {("0.weight", "weight"), ("0.bias", "weight")}
    state.apply_gradients({})
    state.load({key: value + 1 for key, value in tensors.items()}, metadata)
    assert torch.equal(frozen.weight, tensors[("0.weight", "weight")] + 1)


def test_a_parameter_shared_between_layers_becomes_two_equal_ones() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    layers: list[Any] = [first, nn.ReLU(), second]
    modules = {0: first, 2: second}
    (tie,) = ties = find_ties(layers, modules)
    assert (tie.first_unit, tie.first, tie.second_unit, tie.second) == (0, "weight", 2, "weight")
    equalise_ties(ties, layers, modules, 0, CPU)
    assert second.weight is not first.weight
    assert torch.equal(second.weight, first.weight)


class Remembers:
    """A user's object that hands out what it goes on changing."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_an_unfinished_step_leaves_no_trace_in_buffers_objects_and_generators() -> None:
    mine = Remembers()
    state = make_state(OPTIMIZERS["adamw"], user={"mine": mine})
    before = copy.deepcopy(captured(state))
    source = make_source([(torch.zeros(3), 0)], microbatch_size=1, microbatches=1, seed=0)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    undo = Undo(state, source, CPU)
    drawn = (torch.rand(1).item(), random.random(), np.random.random())
    mine.seen.append(1)
    for module in state.modules.values():
        module(torch.randn(5, 3))
    assert not torch.equal(
        captured(state)[0][("2.1.running_mean", "buffer")], before[0][("2.1.running_mean", "buffer")]
    )
    undo.take_back()
    assert mine.seen == []
    assert (torch.rand(1).item(), random.random(), np.random.random()) == drawn
    assert all(torch.equal(tensor, before[0][key]) for key, tensor in captured(state)[0].items())


def test_a_snapshot_of_another_model_is_refused_by_name() -> None:
    state = make_state(OPTIMIZERS["adamw"])
    tensors, metadata = captured(state)
    del tensors[("4.0.bias", "weight")]
    with pytest.raises(ConfigError, match=r"the snapshot has no weight of 4\.0\.bias"):
        state.load(tensors, metadata)


def test_what_is_no_layer_is_named_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"layers\[1\] is a str"):
        check_layers([nn.ReLU(), "relu"])
    with pytest.raises(ConfigError, match="layers is an ordered list"):
        check_layers(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layer 5 is neither a module nor a function that returns one"):
        build_unit(lambda: 3, 5, 0, CPU)  # type: ignore[arg-type, return-value]

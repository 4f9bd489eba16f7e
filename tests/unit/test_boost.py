"""The learning rate of rebuilt layers, and what a rank keeps to go on without a snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.runtime.gather import Gathered, Kept
from holdfast.runtime.recovery.boost import Boosts
from holdfast.runtime.recovery.forward import Forward
from holdfast.runtime.recovery.neighbours import NeighbourOptions
from holdfast.runtime.recovery.present import compose_present, match_groups

SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
]


def parameters(units: int) -> dict[int, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    return {unit: [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(2)] for unit in range(units)}


def train(model: dict[int, list[nn.Parameter]], optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for step in range(steps):
        for unit, listed in model.items():
            for parameter in listed:
                parameter.grad = torch.sin(parameter.detach() * (unit + 2) + step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("stages", [4, 6, 12])
def test_rebuilt_layers_learn_as_if_in_a_group_with_a_higher_rate_under_any_scheduler(
    make: Callable[[torch.optim.Optimizer], Any], stages: int
) -> None:
    ours, plain = parameters(stages), parameters(stages)
    optimizer = torch.optim.AdamW([p for listed in ours.values() for p in listed], lr=0.1)
    boosts = Boosts(optimizer, ours, NeighbourOptions(lr_factor=1.5), lambda: 10)
    boosts.since = {1: 4, stages - 1: 9}
    whole = optimizer.param_groups
    scheduler = make(optimizer)
    train(ours, optimizer, scheduler, 6)
    rates = {}
    for unit, listed in plain.items():  # each stage with an optimizer of its own
        alone = torch.optim.AdamW(listed, lr=0.1)
        clock = make(alone)
        for step in range(6):
            for parameter in listed:
                parameter.grad = torch.sin(parameter.detach() * (unit + 2) + step)
            (group,) = alone.param_groups
            lr = group["lr"]
            group["lr"] = lr * 1.5 if unit in boosts.since else lr
            alone.step()
            group["lr"] = lr
            clock.step()
        rates[unit] = alone.param_groups[0]["lr"]
    assert all(torch.equal(a, b) for unit in ours for a, b in zip(ours[unit], plain[unit], strict=True))
    assert optimizer.param_groups is whole
    assert {whole[0]["lr"]} == set(rates.values()), "the script's rate is what it would have been"


def test_without_a_rebuilt_layer_the_groups_are_not_touched() -> None:
    model = parameters(2)
    optimizer = torch.optim.SGD([p for listed in model.values() for p in listed], lr=0.1)
    boosts = Boosts(optimizer, model, NeighbourOptions(lr_decay_steps=3), lambda: 7)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append(len(o.param_groups)))
    optimizer.step()
    boosts.since = {0: 4}  # over: 7 - 4 steps
    optimizer.step()
    boosts.since = {0: 5}
    optimizer.step()
    assert seen == [1, 1, 2]


def gathered(count: float = 4.0) -> Gathered:
    return Gathered(1.0, count, 8, 2.0, Kept())


def forward(clipped: bool = True) -> Forward:
    return Forward("neighbours", Boosts(None, {}, NeighbourOptions(), lambda: 0), clipped=clipped)


def test_the_norm_of_a_layer_is_that_of_its_mean_gradient_after_or_before_clipping() -> None:
    for clipped, scale in ((True, 0.05), (False, 0.25)):
        kept = forward(clipped)
        kept.measured({(0, "a"): 3.0, (0, "b"): 4.0, (2, "a"): 1.0})
        kept.applied(7, gathered(), 0.25, 0.05)
        assert kept.norms == pytest.approx({0: 5 * scale, 2: scale})
        assert kept.told_step == 7


def test_a_step_whose_gradients_are_not_finite_leaves_the_norms_of_the_one_before() -> None:
    kept = forward()
    kept.measured({(0, "a"): 3.0})
    kept.applied(7, gathered(), 1.0, 1.0)
    kept.measured({(0, "a"): math.inf})
    kept.applied(8, gathered(), 1.0, 1.0)
    assert kept.norms == {0: 3.0}


def test_an_exact_run_captures_nothing_more_and_an_inexact_one_says_so_when_it_is_loaded() -> None:
    kept, other = forward(), forward()
    assert kept.metadata() == {}
    kept.since, kept.boosts.since = 6, {3: 5}
    other.load(kept.metadata())
    assert (other.since, other.boosts.since) == (6, {3: 5})
    other.load({})
    assert (other.since, other.boosts.since) == (0, {})


def test_groups_are_matched_by_what_no_scheduler_changes() -> None:
    decay, plain = {"weight_decay": 0.1, "names": ["a"]}, {"weight_decay": 0.0, "names": ["b"]}
    theirs = [{**decay, "lr": 0.02, "names": ["x"]}, {**plain, "lr": 0.04, "names": ["y"]}]
    assert match_groups([{**plain, "lr": 0.4}], theirs) == [1]
    assert match_groups([{**decay, "lr": 0.2}, {**plain, "lr": 0.4}], theirs) == [0, 1]
    assert match_groups([{"weight_decay": 0.7, "names": []}] * 3, theirs) == [0, 1, 1], "no match: the same place"


def test_the_present_comes_from_the_live_rank_and_what_is_ones_own_stays() -> None:
    own = {
        "user": {"mine": 1}, "rng": "mine", "report": None, "scaler": {"scale": 9.0}, "data": 0,
        "origin": {"generation": 1, "hosted": [2]}, "groups": [{"lr": 1.0, "weight_decay": 0, "names": ["2.w"]}],
        "scheduler": {"last_epoch": 0, "base_lrs": [1.0]},
    }  # fmt: skip
    present = {
        "report": {"step": 5}, "scaler": {"scale": 2.0}, "data": 5, "born": 3,
        "groups": [{"lr": 7.0, "weight_decay": 1, "names": ["1.b"]}, {"lr": 0.5, "weight_decay": 0, "names": ["1.w"]}],
        "scheduler": {"last_epoch": 5, "base_lrs": [7.0, 1.0]},
    }  # fmt: skip
    assert compose_present(own, own["groups"], present) == {
        "user": {"mine": 1}, "rng": "mine", "report": {"step": 5}, "scaler": {"scale": 2.0}, "data": 5,
        "origin": {"generation": 3, "hosted": [2]}, "groups": [{"lr": 0.5, "weight_decay": 0, "names": ["2.w"]}],
        "scheduler": {"last_epoch": 5, "base_lrs": [1.0]},
    }  # fmt: skip

"""From Trainer's arguments to plans: blocks are found without building them, refusals are one line."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.proto.errors import ConfigError
from holdfast.runtime.config import TrainerConfig
from holdfast.runtime.layout import Layout, kinds_of
from holdfast.runtime.pipeline.planner import grid_plan
from holdfast.runtime.pipeline.swap import alone, swapped_plan

LAYERS = [lambda: nn.Embedding(9, 4), *[lambda: nn.Linear(4, 4)] * 8, lambda: nn.Linear(4, 9)]
SWAPPED: dict[str, Any] = {"units": 10, "blocks": range(1, 9), "stages": 4, "replicas": 1, "microbatches": 6}


def config(**arguments: Any) -> TrainerConfig:
    plain: dict[str, Any] = {"layers": LAYERS, "loss": print, "optimizer": torch.optim.SGD, "data": []}
    return TrainerConfig(**(plain | {"microbatch_size": 1, "microbatches": 6} | arguments))


def test_a_chain_is_laid_out_as_ever() -> None:
    layout = Layout.of(config(stages=2, interleave=2, schedule="gpipe"), LAYERS, 4, "exact")
    chain: dict[str, Any] = {"units": 10, "stages": 2, "replicas": 2, "interleave": 2, "schedule": "gpipe"}
    assert layout.training() == grid_plan(microbatches=6, **chain)
    assert layout.validation(3) == grid_plan(microbatches=3, **chain)
    assert layout.validation(1).microbatches == 2  # one for each replica at least
    assert layout.costs is None


def test_swapped_stages_validate_in_order_on_the_units_that_ranks_work_on() -> None:
    layout = Layout.of(config(swap=True, shadows=True), LAYERS, 4, "exact")
    assert layout.training() == swapped_plan(**SWAPPED, shadows=True)
    validation = layout.validation(5)
    assert {tuple(unit for hop in path.hops for unit in hop.units) for path in validation.paths} == {tuple(range(10))}
    assert [validation.hosted(r) for r in range(4)] == [layout.training().worked(r) for r in range(4)]
    assert layout.costs == (0, *[1] * 8, 0)


def test_neighbours_plus_swaps_and_shadows_whatever_the_script_says() -> None:
    layout = Layout.of(config(), LAYERS, 4, "neighbours+")
    assert layout.training() == swapped_plan(**SWAPPED, shadows=True)
    assert not Layout.of(config(), LAYERS, 4, "neighbours").swap
    with pytest.raises(ConfigError, match="4 stages are needed"):
        Layout.of(config(), LAYERS, 1, "neighbours+").training()


def test_one_process_runs_the_order_of_as_many_stages_as_it_is_told() -> None:
    layout = Layout.of(config(swap=True, shadows=True, stages=4), LAYERS, 1, "exact")
    assert layout.training() == alone(swapped_plan(**SWAPPED))
    assert layout.validation(6).world_size == 1
    with pytest.raises(ConfigError, match="4 stages are needed, so that both ends have two, not 1"):
        Layout.of(config(swap=True), LAYERS, 1, "exact").training()


def test_a_split_is_the_users() -> None:
    layout = Layout.of(config(swap=True, split=[2, 3, 2, 3]), LAYERS, 4, "exact")
    assert [layout.training().worked(rank) for rank in range(4)] == [(0, 1), (2, 3, 4), (5, 6), (7, 8, 9)]
    assert layout.validation(4).hosted(1) == (2, 3, 4)


def test_blocks_that_are_given_are_not_looked_for() -> None:
    def dear() -> nn.Module:
        raise AssertionError("called")

    layout = Layout.of(config(swap=True, blocks=(1, 8)), [dear] * 10, 4, "exact")
    assert layout.training() == swapped_plan(**SWAPPED)


@pytest.mark.parametrize(
    ("wrong", "world_size", "sentence"),
    [
        ({"swap": True, "blocks": (3, 10)}, 4, "got 3 and 10 of 10 layers"),
        ({"swap": True, "blocks": (3, 3)}, 4, "got 3 and 3 of 10 layers"),
        ({"swap": True, "interleave": 2}, 4, "swapped stages and interleave are two ways to visit the stages"),
        ({"shadows": True}, 4, "use swap=True with them"),
        ({"swap": True}, 3, "4 stages are needed"),
        ({"swap": True, "layers": [nn.Tanh] * 9}, 4, "the model has 0"),
        ({"swap": True, "stages": 4, "microbatches": 7}, 16, "every replica needs 2 microbatches"),
    ],
)
def test_what_cannot_be_swapped_is_refused_in_one_line(wrong: dict[str, Any], world_size: int, sentence: str) -> None:
    def plan() -> None:
        made = config(**wrong)
        Layout.of(made, made.layers, world_size, "exact").training()

    with pytest.raises(ConfigError) as refused:
        plan()
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- kinds


def test_kinds_tell_names_shapes_and_types_and_nothing_else() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(4, 4)), nn.Parameter(torch.rand(4))

    linear = nn.Linear(4, 4)
    alike = [linear, lambda: nn.Linear(4, 4), Named, lambda: Named()]
    other = [lambda: nn.Linear(4, 5), lambda: nn.Linear(4, 4, bias=False), lambda: nn.Linear(4, 4).bfloat16()]
    assert len(set(kinds_of(alike))) == 1
    assert len({*kinds_of(alike), *kinds_of(other)}) == 4
    assert kinds_of([nn.Tanh, nn.Tanh()]) == ["", ""]


def test_finding_kinds_takes_no_memory_and_leaves_all_generators_alone() -> None:
    def vast() -> nn.Module:
        random.random()
        return nn.Sequential(nn.Linear(1 << 14, 1 << 14), nn.Embedding(1 << 14, 1 << 14))  # 2 GiB

    before = torch.get_rng_state(), random.getstate()
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(set(kinds_of([vast, lambda: vast(), nn.Tanh]))) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken < 256 << 10
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_finding_kinds_loads_nothing_that_training_would_not() -> None:
    """On torch's meta device it would: its compiler, for a random fill or an arange."""
    script = """
import sys, torch
from torch import nn
from holdfast.runtime.layout import kinds_of
def layer():
    made = nn.Linear(3, 3)
    nn.init.normal_(made.weight)
    nn.init.xavier_normal_(tensor=made.weight)
    made.bias.data.exponential_()
    made.register_buffer("angles", torch.arange(0, 6, 2, dtype=torch.float32) / 6)
    return made
before = set(sys.modules)
kinds_of([layer])
print(len(set(sys.modules) - before))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 20


def test_a_function_is_called_once_for_all_its_places() -> None:
    calls: list[int] = []

    def layer() -> nn.Module:
        calls.append(1)
        return nn.Linear(2, 2)

    kinds_of([layer] * 24)
    assert len(calls) == 1


def test_shapes_may_depend_on_values() -> None:
    def by_value() -> nn.Module:
        return nn.Linear(int(torch.full((), 4.0).item()), 4)

    assert len(set(kinds_of([by_value, lambda: nn.Linear(4, 4)]))) == 1


def test_a_layer_that_cannot_be_built_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"layer 1 cannot be built: RuntimeError: .*") as refused:
        kinds_of([nn.Tanh, lambda: nn.Linear(-1, 2)])
    assert "\n" not in str(refused.value)

"""The engine against torch.distributed.pipelining and against one process: same bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ranks import Rank, run_ranks  # noqa: E402

HERE = str(Path(__file__).resolve())
DIM, CONTEXT, MICROBATCH = 16, 8, 2


def make_layers() -> list[Any]:
    import torch
    from torch import nn

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)
            self.norm = nn.LayerNorm(DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.linear(self.norm(x)))

    return [lambda: nn.Embedding(32, DIM), *[Mix] * 5, lambda: nn.Linear(DIM, 32)]


def batch(microbatches: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 32, (microbatches, MICROBATCH, CONTEXT), generator=generator)
    return x, torch.randint(0, 32, (microbatches, MICROBATCH, CONTEXT), generator=generator)


def loss(logits: Any, target: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def digest(parameters: Any) -> list[str]:
    import hashlib

    return [hashlib.sha256(p.grad.numpy().tobytes()).hexdigest()[:16] for p in parameters]


def ours(rank: Rank, plan_arguments: dict[str, Any], exact: bool, checkpoint: bool = False) -> dict[str, str]:
    """Name -> digest of the gradient of each parameter hosted here, after exchange."""
    import mmap

    import torch

    from holdfast.proto.lease import PAGE_BYTES, LeasePage
    from holdfast.runtime.inject import Injector
    from holdfast.runtime.lease import Lease
    from holdfast.runtime.pipeline.exchange import exchange, plan_exchanges
    from holdfast.runtime.pipeline.executor import Executor, Numerics
    from holdfast.runtime.pipeline.planner import grid_plan
    from holdfast.runtime.pipeline.schedule import make_schedule
    from holdfast.runtime.state import build_unit

    torch.set_num_threads(1)
    layers = make_layers()
    plan = grid_plan(units=len(layers), **plan_arguments)
    device = torch.device("cpu")
    modules = {u: build_unit(layers[u], u, 0, device) for u in plan.hosted(rank.rank)}
    x, y = batch(plan.microbatches)

    class Fixed:
        def begin(self, step: int) -> None: ...
        def microbatch(self, step: int, m: int) -> Any:
            return x[m], y[m]

        def state(self) -> None: ...
        def load_state(self, state: Any) -> None: ...

    group = rank.group()
    page = LeasePage(memoryview(mmap.mmap(-1, PAGE_BYTES)))
    executor = Executor(
        plan=plan, schedule=make_schedule(plan).ranks[rank.rank], rank=rank.rank, modules=modules, loss=loss,
        numerics=Numerics(0, exact=exact, checkpoint_activations=checkpoint), device=device, lease=Lease(page),
        injector=Injector(0, (), page), proven=set(),
    )  # fmt: skip
    executor.attach(group)
    parameters = {u: list(m.parameters()) for u, m in modules.items()}
    found: dict[str, str] = {}
    for number in (1, 2):  # twice: a step leaves nothing behind that changes the next
        outcome = executor.run(number, Fixed(), train=True)
        totals = exchange(
            group, plan_exchanges(plan, exact=exact), rank.rank, outcome.sums, parameters, plan.microbatches,
            exact=exact,
        )  # fmt: skip
        again = {}
        for unit, values in totals.items():
            for p, gradient in zip(parameters[unit], values, strict=True):
                p.grad = gradient
            again |= {f"{unit}.{i}": d for i, d in enumerate(digest(parameters[unit]))}
        for p in (p for ps in parameters.values() for p in ps):
            p.grad = None
        assert not found or found == again
        found = again
    return found


def theirs(rank: Rank, microbatches: int, gpipe: bool) -> dict[str, str]:
    """The same stage under torch's own schedule."""
    import torch
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    from holdfast.runtime.pipeline.planner import grid_plan
    from holdfast.runtime.state import build_unit

    torch.set_num_threads(1)
    layers = make_layers()
    plan = grid_plan(units=len(layers), stages=rank.world_size, replicas=1, microbatches=microbatches)
    modules = {u: build_unit(layers[u], u, 0, torch.device("cpu")) for u in plan.hosted(rank.rank)}
    stage = torch.nn.Sequential(*modules.values())
    pipe = PipelineStage(stage, rank.rank, rank.world_size, torch.device("cpu"), group=rank.torch_group())
    made = ScheduleGPipe if gpipe else Schedule1F1B
    schedule = made(pipe, microbatches, loss_fn=loss, scale_grads=False)
    x, y = (t.flatten(0, 1) for t in batch(microbatches))
    last = rank.rank == rank.world_size - 1
    schedule.step(*([x] if rank.rank == 0 else []), **({"target": y} if last else {}))
    return {f"{u}.{i}": d for u, m in modules.items() for i, d in enumerate(digest(m.parameters()))}


def merged(results: list[dict[str, str]]) -> dict[str, str]:
    """All ranks' parameters; replicas must agree."""
    whole: dict[str, str] = {}
    for result in results:
        for name, value in result.items():
            assert whole.setdefault(name, value) == value, f"replicas differ in {name}"
    return whole


def run_ours(world_size: int, *, exact: bool = True, checkpoint: bool = False, **plan: Any) -> dict[str, str]:
    arguments = {"plan_arguments": plan, "exact": exact, "checkpoint": checkpoint}
    return merged(run_ranks(f"{HERE}:ours", world_size, arguments))


@pytest.mark.parametrize("gpipe", [False, True])
def test_gradients_equal_torch_pipelining_bit_for_bit_with_plain_sums(gpipe: bool) -> None:
    mine = run_ours(4, exact=False, stages=4, replicas=1, microbatches=6, schedule="gpipe" if gpipe else "1f1b")
    assert mine == merged(run_ranks(f"{HERE}:theirs", 4, {"microbatches": 6, "gpipe": gpipe}))


def test_every_layout_gives_the_bits_of_one_process() -> None:
    reference = run_ours(1, stages=1, replicas=1, microbatches=6)
    layouts: list[dict[str, Any]] = [
        {"world_size": 3, "stages": 3, "replicas": 1, "split": [1, 4, 2]},
        {"world_size": 2, "stages": 2, "replicas": 1, "interleave": 3},
        {"world_size": 2, "stages": 2, "replicas": 1, "schedule": "gpipe"},
        {"world_size": 4, "stages": 2, "replicas": 2},
        {"world_size": 4, "stages": 1, "replicas": 4},
        {"world_size": 2, "stages": 2, "replicas": 1, "checkpoint": True},
    ]
    for layout in layouts:
        assert run_ours(microbatches=6, **layout) == reference, f"{layout} differs"


def test_plain_sums_do_depend_on_the_layout() -> None:
    """What the tree is for: without it the same layouts differ, so the test above can fail."""
    one = run_ours(1, exact=False, stages=1, replicas=1, microbatches=6)
    assert run_ours(4, exact=False, stages=1, replicas=4, microbatches=6) != one

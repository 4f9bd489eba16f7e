"""(e) The step of swapped stages (CheckFree+) against 1F1B on emulated devices, in one run.

    python benchmarks/swap.py [--stages 4] [--microbatches 16] [--hop-ms 20] [--steps 12]

A device is a process whose layers wait until a deadline with the GIL released: a block's forward takes --hop-ms, its
backward twice that, the embedding --embedding and the head --head of it. So two cores are enough for many devices, and
what is measured is order and communication. All variants live in the same processes and take turns step by step in
seeded random order: the chain under 1F1B; every other microbatch swapped, as it trains, with and without the shadows'
gradients; and for comparison the same orders in halves, as the greedy planner has them. Prints one JSON line a ratio,
with its spread and what the planner foretold. Goal: swapped_shadows / chain <= 1.05 with 4 stages, 16 microbatches.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine import ratio
from ranks import Rank, run_ranks

DIM, CONTEXT, WORDS = 32, 16, 64
WARM_UP = 2


def plans(stages: int, microbatches: int) -> dict[str, tuple[Any, Any]]:
    """Variant -> its plan and costs of the units for its schedule; one block a stage."""
    from holdfast.runtime.pipeline.planner import grid_plan
    from holdfast.runtime.pipeline.swap import swap_costs, swap_split, swapped_plan

    units, blocks = stages + 2, range(1, stages + 1)
    grid: dict[str, Any] = {"units": units, "stages": stages, "replicas": 1, "microbatches": microbatches}
    costs = swap_costs(units, blocks)
    chain = grid_plan(**grid, split=swap_split(units, blocks, stages))
    swapped = swapped_plan(**grid, blocks=blocks)
    halves = replace(swapped, paths=tuple(sorted(swapped.paths, key=lambda path: path != swapped.paths[0])))
    shadowed = swapped_plan(**grid, blocks=blocks, shadows=True)
    return {
        "chain": (chain, costs),
        "swapped": (swapped, costs),
        "swapped_shadows": (shadowed, costs),
        "halves": (halves, costs),
    }


def emulated(share: float, hop_s: float, layer: Callable[[], Any]) -> Callable[[], Any]:
    """The layer, on a device on which it takes `share` of a hop."""
    import torch
    from torch import nn

    def wait(started: float, span_s: float) -> None:
        left = started + span_s - time.monotonic()
        if left > 0:
            threading.Event().wait(left)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, started: float) -> torch.Tensor:
            wait(started, share * hop_s)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            wait(time.monotonic(), 2 * share * hop_s)
            return gradient, None

    class Device(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            started = time.monotonic()
            slow: torch.Tensor = Slow.apply(self.layer(x), started)
            return slow

    return Device


def rank_main(
    rank: Rank, stages: int, microbatches: int, steps: int, hop_s: float, embedding: float, head: float
) -> Any:
    import mmap

    import torch
    from torch import nn

    from holdfast.proto.lease import PAGE_BYTES, LeasePage
    from holdfast.runtime.inject import Injector
    from holdfast.runtime.lease import Lease
    from holdfast.runtime.pipeline.executor import Executor, Numerics
    from holdfast.runtime.pipeline.schedule import make_schedule
    from holdfast.runtime.pipeline.shadow import Shadows
    from holdfast.runtime.state import ModelState, build_unit

    torch.set_num_threads(1)
    device = torch.device("cpu")
    layers = [
        emulated(embedding, hop_s, lambda: nn.Embedding(WORDS, DIM)),
        *[emulated(1.0, hop_s, lambda: nn.Linear(DIM, DIM))] * stages,
        emulated(head, hop_s, lambda: nn.Linear(DIM, WORDS)),
    ]
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, WORDS, (microbatches, 2, CONTEXT), generator=generator)

    class Fixed:
        def begin(self, step: int) -> None: ...
        def microbatch(self, step: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
            return words[m], words[m]

        def state(self) -> None: ...
        def load_state(self, state: Any) -> None: ...

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    rank.torch_group()
    group = rank.group()
    page = LeasePage(memoryview(mmap.mmap(-1, PAGE_BYTES)))
    foretold: dict[str, float] = {}

    def variant(name: str, plan: Any, costs: Any) -> Callable[[int], None]:
        true = [embedding, *[1.0] * stages, head]
        schedule = make_schedule(plan, unit_costs=costs)
        foretold[name] = hop_s * makespan(plan, schedule, true)
        modules = {unit: build_unit(layers[unit], unit, 0, device) for unit in plan.hosted(rank.rank)}
        state = ModelState(modules, lambda p: torch.optim.SGD(p, lr=0.1), None, {})
        shadows = Shadows(plan, rank.rank, state)
        executor = Executor(
            plan=plan, schedule=schedule.ranks[rank.rank], rank=rank.rank, modules=modules, loss=loss,
            numerics=Numerics(0), device=device, lease=Lease(page), injector=Injector(0, (), page), proven=set(),
        )  # fmt: skip
        executor.attach(group)

        def step(number: int) -> None:
            sums = executor.run(number, Fixed(), train=True).sums
            flat = [g for unit in sorted(sums) for g in sums[unit].total(microbatches)]
            gradients = dict.fromkeys(state.parameters)
            gradients.update(zip(state.keys(sums), flat, strict=True))
            shadows.hand_on(group, gradients)

        return step

    variants = {name: variant(name, *made) for name, made in plans(stages, microbatches).items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for number in range(1, steps + WARM_UP + 1):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            torch.distributed.barrier()
            started = time.perf_counter()
            variants[name](number)
            torch.distributed.barrier()
            if number > WARM_UP:
                times[name].append(time.perf_counter() - started)
    return {"times": times, "foretold": foretold}


def makespan(plan: Any, schedule: Any, costs: list[float]) -> float:
    """How long the lists take if every action starts as soon as it can, on these costs of units."""
    ends: dict[tuple[str, int, int], float] = {}
    total = sum(len(mine.actions) for mine in schedule.ranks)
    while len(ends) < total:
        for mine in schedule.ranks:
            free = 0.0
            for action in mine.actions:
                key, hops = (action.kind, action.microbatch, action.hop), plan.paths[action.microbatch].hops
                if action.kind == "F":
                    need = ("F", action.microbatch, action.hop - 1) if action.hop else None
                elif action.hop + 1 < len(hops):
                    need = ("B", action.microbatch, action.hop + 1)
                else:
                    need = ("F", action.microbatch, action.hop)
                if need is not None and need not in ends:
                    break
                takes = sum(costs[unit] for unit in hops[action.hop].units) * (2 if action.kind == "B" else 1)
                ends[key] = free = max(free, ends[need] if need is not None else 0.0) + takes
    return max(ends.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--hop-ms", type=float, default=20.0)
    parser.add_argument("--embedding", type=float, default=0.02, metavar="SHARE")
    parser.add_argument("--head", type=float, default=0.05, metavar="SHARE")
    arguments = parser.parse_args()
    results = run_ranks(
        f"{Path(__file__).resolve()}:rank_main",
        arguments.stages,
        {
            "stages": arguments.stages,
            "microbatches": arguments.microbatches,
            "steps": arguments.steps,
            "hop_s": arguments.hop_ms / 1e3,
            "embedding": arguments.embedding,
            "head": arguments.head,
        },
    )
    times, foretold = results[0]["times"], results[0]["foretold"]
    for name in times:
        if name != "chain":
            line = {"benchmark": "swap", "ours": name, "peer": "chain", "goal": 1.05}
            line |= {"stages": arguments.stages, "microbatches": arguments.microbatches, "hop_ms": arguments.hop_ms}
            line |= {"wall": ratio(times[name], times["chain"])}
            line |= {"foretold": round(foretold[name] / foretold["chain"], 4)}
            line |= {"step_ms": round(statistics.median(times[name]) * 1e3, 1), "steps": arguments.steps}
            line |= {"chain_ms": round(statistics.median(times["chain"]) * 1e3, 1)}
            line |= {"chain_foretold_ms": round(foretold["chain"] * 1e3, 1)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

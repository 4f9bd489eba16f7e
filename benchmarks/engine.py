"""(c) Our pipeline engine against a hand-written 1F1B and torch.distributed.pipelining's, in one run.

    python benchmarks/engine.py [--preset small] [--steps 30]

All variants live in the same processes and take turns, step by step in seeded random order; compared are the
medians of each step's CPU time summed over ranks and of its wall time, as ratios with their spread (10th to
90th percentile of the per-turn ratios). Same stages, same data, one thread a rank, plain gradient sums for
torch and the hand-written one. Prints one JSON line per ratio. Goals: engine / hand <= 1.05, engine / torch <= 1.0.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ranks import Rank, run_ranks


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rank_main(rank: Rank, preset: str, steps: int, microbatches: int, microbatch_size: int) -> Any:
    import mmap

    import torch
    from model import PRESETS, build_layers, loss

    from holdfast.proto.lease import PAGE_BYTES, LeasePage
    from holdfast.runtime.inject import Injector
    from holdfast.runtime.lease import Lease
    from holdfast.runtime.pipeline.executor import Executor, Numerics
    from holdfast.runtime.pipeline.planner import grid_plan
    from holdfast.runtime.pipeline.schedule import make_schedule
    from holdfast.runtime.state import build_unit

    torch.set_num_threads(1)
    cfg = PRESETS[preset]
    layers = build_layers(cfg)
    plan = grid_plan(units=len(layers), stages=rank.world_size, replicas=1, microbatches=microbatches)
    device = torch.device("cpu")
    modules = {u: build_unit(layers[u], u, 0, device) for u in plan.hosted(rank.rank)}
    stage = torch.nn.Sequential(*modules.values())
    generator = torch.Generator().manual_seed(1)
    shape = (microbatches, microbatch_size, cfg.context)
    x = torch.randint(0, cfg.vocab, shape, generator=generator)
    y = torch.randint(0, cfg.vocab, shape, generator=generator)

    class Fixed:
        def begin(self, step: int) -> None: ...
        def microbatch(self, step: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
            return x[m], y[m]

        def state(self) -> None: ...
        def load_state(self, state: Any) -> None: ...

    world = rank.torch_group()
    group = rank.group()
    page = LeasePage(memoryview(mmap.mmap(-1, PAGE_BYTES)))

    def ours(exact: bool) -> Callable[[int], None]:
        executor = Executor(
            plan=plan, schedule=make_schedule(plan).ranks[rank.rank], rank=rank.rank, modules=modules, loss=loss,
            numerics=Numerics(0, exact=exact), device=device, lease=Lease(page), injector=Injector(0, (), page),
            proven=set(),
        )  # fmt: skip
        executor.attach(group)

        def step(number: int) -> None:
            outcome = executor.run(number, Fixed(), train=True)
            for unit, total in outcome.sums.items():
                values = total.total(microbatches)
                for p, g in zip(modules[unit].parameters(), values, strict=True):
                    p.grad = g

        return step

    hand = hand_written(rank, world, stage, loss, x, y, (microbatch_size, cfg.context, cfg.dim))
    peer = torch_1f1b(rank, world, stage, loss, x, y, microbatches)
    variants = {"engine": ours(True), "engine_plain_sum": ours(False), "hand": hand, "torch": peer}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    order = random.Random(0)
    for number in range(1, steps + 4):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            stage.zero_grad(set_to_none=True)
            torch.distributed.barrier()
            start_wall, start_cpu = time.perf_counter(), cpu_s()
            variants[name](number)
            cpu = cpu_s() - start_cpu
            torch.distributed.barrier()
            if number > 3:
                times[name].append((time.perf_counter() - start_wall, cpu))
    return {"times": times, "parameters": sum(p.numel() for p in stage.parameters())}


def hand_written(rank: Rank, world: Any, stage: Any, loss: Any, x: Any, y: Any, shape: Any) -> Callable[[int], None]:
    """The plainest 1F1B on isend/irecv that is right: what a careful person writes for one model."""
    import torch
    import torch.distributed as dist

    me, last, count = rank.rank, rank.world_size - 1, len(x)

    def step(number: int) -> None:
        saved: list[Any] = []
        sends: list[Any] = []
        posted: list[Any] = []

        def post_forward(m: int) -> None:
            if me > 0 and m < count:
                buffer = torch.empty(shape)
                posted.append((buffer, dist.irecv(buffer, me - 1, tag=2 * m)))

        def forward(m: int) -> None:
            if me > 0:
                buffer, work = posted.pop(0)
                work.wait()
                inputs = buffer.requires_grad_()
                post_forward(m + 1)
            else:
                inputs = x[m]
            output = stage(inputs)
            if me == last:
                output = loss(output, y[m])
            else:
                payload = output.detach()
                sends.append((dist.isend(payload, me + 1, tag=2 * m), payload))
            saved.append((inputs, output))

        def backward(m: int) -> None:
            inputs, output = saved.pop(0)
            if me == last:
                output.backward()
            else:
                gradient = torch.empty(shape)
                dist.recv(gradient, me + 1, tag=2 * m + 1)
                output.backward(gradient)
            if me > 0:
                sends.append((dist.isend(inputs.grad, me - 1, tag=2 * m + 1), inputs.grad))

        post_forward(0)
        warm = min(last - me, count)
        for m in range(warm):
            forward(m)
        for m in range(warm, count):
            forward(m)
            backward(m - warm)
        for m in range(count - warm, count):
            backward(m)
        for work, _ in sends:
            work.wait()

    return step


def torch_1f1b(
    rank: Rank, world: Any, stage: Any, loss: Any, x: Any, y: Any, microbatches: int
) -> Callable[[int], None]:
    """torch.distributed.pipelining with the same stage."""
    import torch
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    pipe = PipelineStage(stage, rank.rank, rank.world_size, torch.device("cpu"), group=world)
    schedule = Schedule1F1B(pipe, microbatches, loss_fn=loss, scale_grads=False)
    inputs, targets = x.flatten(0, 1), y.flatten(0, 1)

    def step(number: int) -> None:
        if rank.rank == 0:
            schedule.step(inputs)
        elif rank.rank == rank.world_size - 1:
            schedule.step(target=targets)
        else:
            schedule.step()

    return step


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratio of medians, and the spread of the per-turn ratios."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 4),
        "p10": round(pairs[len(pairs) // 10], 4),
        "p90": round(pairs[-1 - len(pairs) // 10], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--microbatch-size", type=int, default=2)
    arguments = parser.parse_args()
    results = run_ranks(
        f"{Path(__file__).resolve()}:rank_main",
        arguments.stages,
        {
            "preset": arguments.preset,
            "steps": arguments.steps,
            "microbatches": arguments.microbatches,
            "microbatch_size": arguments.microbatch_size,
        },
    )
    wall = {name: [t[0] for t in results[0]["times"][name]] for name in results[0]["times"]}
    cpu = {name: [sum(r["times"][name][i][1] for r in results) for i in range(len(wall[name]))] for name in wall}
    parameters = sum(r["parameters"] for r in results)
    for ours in ("engine", "engine_plain_sum"):
        for peer, goal in (("hand", 1.05), ("torch", 1.0)):
            line = {"benchmark": "engine", "ours": ours, "peer": peer, "goal": goal, "parameters": parameters}
            line |= {"wall": ratio(wall[ours], wall[peer]), "cpu": ratio(cpu[ours], cpu[peer])}
            line |= {"step_ms": round(statistics.median(wall[ours]) * 1e3, 2), "steps": arguments.steps}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

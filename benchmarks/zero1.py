"""ZeRO-1's optimizer step beside the whole one, in the same processes, in turn: time, and bytes of optimizer state.

    python benchmarks/zero1.py [--ranks 2] [--width 1024] [--units 8] [--rounds 12]

Every rank holds all units (data parallelism only). A round is one AdamW step over given gradients: whole on every rank,
or of this rank's parts with the gather of the weights behind it; a barrier before each. Not measured: forward, backward
and the exchange of gradients, which are the same. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))

from ranks import Rank, run_ranks


def measure(rank: Rank, width: int, units: int, rounds: int) -> dict[str, Any]:
    """Seconds of each round, and bytes of optimizer state, on one rank."""
    import torch
    from torch import nn

    from holdfast.runtime.pipeline.planner import grid_plan
    from holdfast.runtime.state import ModelState, build_unit

    torch.set_num_threads(1)
    plan = grid_plan(units=units, stages=1, replicas=rank.world_size, microbatches=rank.world_size)
    states: dict[str, ModelState] = {}
    for kind in ("whole", "zero1"):
        modules = {u: build_unit(lambda: nn.Linear(width, width), u, 0, torch.device("cpu")) for u in range(units)}
        states[kind] = ModelState(modules, lambda p: torch.optim.AdamW(p, lr=1e-3), None, {})
    states["zero1"].shard(plan, rank.rank, proven=False)
    group = rank.group()
    generator = torch.Generator().manual_seed(1)
    gradients = {k: torch.randn(p.shape, generator=generator) for k, p in states["whole"].parameters.items()}
    times: dict[str, list[float]] = {"whole": [], "zero1": [], "gather": []}
    for _ in range(rounds):
        for kind, state in states.items():
            group.allgather(torch.zeros(1))
            started = time.perf_counter()
            state.apply_gradients(dict(gradients))
            if state.shards is not None:
                updated = time.perf_counter()
                state.shards.gather(group)
                times["gather"].append(time.perf_counter() - updated)
            times[kind].append(time.perf_counter() - started)
    one, other = (list(state.parameters.values()) for state in states.values())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "other bits"
    kept = {
        kind: sum(e.tensor.nbytes for e in state.entries() if e.state.startswith("exp_avg"))
        for kind, state in states.items()
    }
    return {"times": times, "bytes": kept, "weights": sum(p.nbytes for p in one)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("width", 1024), ("units", 8), ("rounds", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("width", "units", "rounds")}
    found = run_ranks(f"{HERE}:measure", arguments.ranks, settings)
    medians = {
        kind: round(statistics.median(t * 1e3 for one in found for t in one["times"][kind][2:]), 2)
        for kind in ("whole", "zero1", "gather")
    }
    mib = {kind: [round(one["bytes"][kind] / 2**20, 1) for one in found] for kind in ("whole", "zero1")}
    weights = round(found[0]["weights"] / 2**20, 1)
    print(json.dumps({**vars(arguments), "median_ms": medians, "moments_mib": mib, "weights_mib": weights}))


if __name__ == "__main__":
    main()

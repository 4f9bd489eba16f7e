"""A small pipeline whose stages are lost; and, in one plain process, what is then expected of it.

    lossy.py [--model blocks|edges] [--steps N] [--out DIR] [--split 1,1,1,1] [--cut RANK:STEP] [--swapped]
             [--step-seconds S]
    lossy.py --plain '[{"step": 5, "stage": 2, "how": "average"}, ...]' ...

`--plain` trains all layers on one rank and does by hand, after the step, what the rung should have done to a stage:
"average" or "copy" (with "of": stage), "depth" (with "from": two units), "older" (with "from": step). Written without
anything of runtime/recovery: that is what it is compared with. With `--swapped` it runs the order of swapped stages,
and no surgery touches the edges, which their partners keep. `--cut`: that rank does not hear the end of that barrier.
Out come the final state, and what the script was told of each step.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.proto.errors import PeerLost
from holdfast.runtime import NeighbourOptions, Trainer

DIM, WORDS = 8, 16
FACTOR, FLOOR = 1.1, 1e-4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + torch.tanh(self.linear(self.norm(h)))


class Pairs:
    """Vectors, or words, and where they should go."""

    def __init__(self, words: bool) -> None:
        self.words = words

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        if self.words:
            return torch.randint(0, WORDS, (4,), generator=generator), torch.randn(4, DIM, generator=generator)
        return torch.randn(DIM, generator=generator), torch.randn(DIM, generator=generator)


class Stepped(torch.optim.AdamW):
    """AdamW, with the learning rate of some parameters multiplied inside the step: the plain way to say it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__([{"params": [parameter]} for parameter in parameters], lr=0.01)
        self.faster: set[int] = set()
        self.norms: dict[int, float] = {}

    def step(self, closure: Any = None) -> Any:
        before = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            (parameter,) = group["params"]
            if parameter.grad is not None:
                self.norms[id(parameter)] = float(torch.linalg.vector_norm(parameter.grad))
            if id(parameter) in self.faster:
                group["lr"] *= FACTOR
        result = super().step(closure)
        for group, lr in zip(self.param_groups, before, strict=True):
            group["lr"] = lr
        return result


class Plain:
    """Does to the layers of one process what a lost stage should become."""

    def __init__(self, trainer: Trainer, surgery: list[dict[str, Any]], stages: list[list[int]]) -> None:
        state = trainer._engine.state
        self.modules, self.optimizer = state.modules, state.optimizer
        self.surgery, self.stages = surgery, stages
        self.kept: dict[int, Any] = {0: self.capture()}

    def capture(self) -> Any:
        kept = {id(p): copy.deepcopy(s) for p, s in self.optimizer.state.items()}
        return {u: [(p.detach().clone(), kept.get(id(p), {})) for p in m.parameters()] for u, m in self.modules.items()}

    def after(self, step: int) -> None:
        self.kept[step] = self.capture()
        due = [one for one in self.surgery if one["step"] == step]
        made = [self.made(one) for one in due]  # all from what was there before any of them
        with torch.no_grad():
            for one, layers in zip(due, made, strict=True):
                for unit, tensors in layers.items():
                    for parameter, (value, moments) in zip(self.modules[unit].parameters(), tensors, strict=True):
                        parameter.copy_(value)
                        self.optimizer.state.pop(parameter, None)
                        if moments:
                            self.optimizer.state[parameter] = copy.deepcopy(moments)
                        if one["how"] != "older":
                            self.optimizer.faster.add(id(parameter))

    def made(self, one: dict[str, Any]) -> dict[int, list[Any]]:
        number, how = one["stage"], one["how"]
        mine, now = self.stages[number], self.kept[one["step"]]
        if how == "older":
            return {unit: self.kept[one["from"]][unit] for unit in mine}
        if how == "copy":
            return {
                unit: [(w, {}) for w, _ in now[other]] for unit, other in zip(mine, self.stages[one["of"]], strict=True)
            }
        if how == "average":
            left, right = self.stages[number - 1], self.stages[number + 1]
            a, b = self.weight(left), self.weight(right)
            trios = zip(mine, left, right, strict=True)
            return {unit: self.mean(now[x], a, now[y], b) for unit, x, y in trios}
        below, above = one["from"]
        a, b = (self.weight(next(stage for stage in self.stages if unit in stage)) for unit in (below, above))
        shares = {unit: (unit - below) / (above - below) for unit in mine}
        return {unit: self.mean(now[below], a * (1 - x), now[above], b * x) for unit, x in shares.items()}

    @staticmethod
    def mean(first: list[Any], a: float, second: list[Any], b: float) -> list[Any]:
        return [((v * a + w * b) / (a + b), {}) for (v, _), (w, _) in zip(first, second, strict=True)]

    def weight(self, units: list[int]) -> float:
        """Norm of the last gradient of these blocks, without edges. Four microbatches: scaling rounds nothing."""
        blocks = [self.modules[unit] for unit in units if isinstance(self.modules[unit], Block)]
        squares = [sum(self.optimizer.norms[id(p)] ** 2 for p in block.parameters()) for block in blocks]
        return float(sum(squares) ** 0.5) + FLOOR


def cut(trainer: Trainer, step: int) -> None:
    """The barrier of `step` ends for all others, and this rank does not hear of it."""
    engine = trainer._engine
    gather = engine._gather
    armed = [True]

    def deaf(*arguments: Any) -> Any:
        result = gather(*arguments)
        if engine.step + 1 == step and armed.pop() if armed else False:
            raise PeerLost("cut off")
        return result

    engine._gather = deaf  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="blocks")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--split", default="1,1,1,1")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--plain", default="")
    parser.add_argument("--cut", default="")
    parser.add_argument("--swapped", action="store_true")
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="sleep so long after each step, and print it")
    arguments = parser.parse_args()
    split = [int(part) for part in arguments.split.split(",")]
    edges = arguments.model == "edges"
    layers: list[Any] = [Block for _ in range(sum(split) - 2 * edges)]
    if edges:
        layers = [lambda: nn.Embedding(WORDS, DIM), *layers, lambda: nn.Linear(DIM, DIM, bias=False)]
    plain = bool(arguments.plain)
    trainer = Trainer(
        layers=layers,
        loss=nn.functional.mse_loss,
        optimizer=Stepped if plain else lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        data=Pairs(edges),
        microbatch_size=2,
        microbatches=4,
        stages=1 if plain and not arguments.swapped else len(split),
        replicas=arguments.replicas,
        split=None if plain and not arguments.swapped else split,
        swap=plain and arguments.swapped,
        neighbours=NeighbourOptions(exponent=arguments.exponent),
    )
    rank, at = (int(part) for part in (arguments.cut or "-1:0").split(":"))
    if rank == trainer.rank and os.environ.get("HOLDFAST_INCARNATION") == "0":
        cut(trainer, at)
    stages = cuts(split)
    if arguments.swapped and edges:
        stages = [[unit for unit in stage if unit not in (0, sum(split) - 1)] for stage in stages]
    surgeon = Plain(trainer, json.loads(arguments.plain), stages) if plain else None
    told = []
    for step in trainer.steps(until=arguments.steps):
        result = step.run()
        told.append({"step": result.step, "loss": result.loss, "lr": result.lr, "recovered": result.recovered})
        if surgeon is not None:
            surgeon.after(result.step)
        if arguments.step_seconds:
            print(f"hostjob: rank {trainer.rank} step {result.step}", flush=True)
            time.sleep(arguments.step_seconds)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_file(trainer.final_state(), arguments.out / f"rank-{trainer.rank}.safetensors")
        (arguments.out / f"rank-{trainer.rank}.json").write_text(json.dumps(told))


def cuts(split: list[int]) -> list[list[int]]:
    ends = [sum(split[:i]) for i in range(len(split) + 1)]
    return [list(range(a, b)) for a, b in pairwise(ends)]


if __name__ == "__main__":
    main()

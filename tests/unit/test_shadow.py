"""What shadows get, what it costs, and that it is enough to stay equal to the bit. One process plays all ranks."""

from __future__ import annotations

import sys
from pathlib import Path as File

import torch
from torch import nn

sys.path.insert(0, str(File(__file__).parents[1] / "helpers"))

from post import Post

from holdfast.proto.plan import Hop, Path, Plan, Shadow
from holdfast.runtime.pipeline.shadow import Gradients, Link, Shadows, plan_links
from holdfast.runtime.pipeline.swap import swapped_plan
from holdfast.runtime.state import ModelState, build_unit

WORDS, DIM = 11, 6


class Head(nn.Module):
    """Gradients in an odd layout, one that does not exist, and a buffer."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.words = nn.Parameter(torch.rand(WORDS, DIM))
        self.unused = nn.Parameter(torch.rand(3))
        self.register_buffer("seen", torch.zeros(2))


LAYERS = [lambda: nn.Embedding(WORDS, DIM), *[lambda: nn.Linear(DIM, DIM)] * 4, Head]
PLAN = swapped_plan(units=6, blocks=range(1, 5), stages=4, replicas=1, microbatches=4, shadows=True)


def state_of(plan: Plan, rank: int, seed: int = 0) -> ModelState:
    modules = {unit: build_unit(LAYERS[unit], unit, seed, torch.device("cpu")) for unit in plan.hosted(rank)}
    return ModelState(modules, lambda p: torch.optim.AdamW(p, lr=0.1), None, {})


def states_of(plan: Plan) -> dict[int, ModelState]:
    return {rank: state_of(plan, rank) for rank in range(plan.world_size)}


def hand_on(plan: Plan, states: dict[int, ModelState], gradients: dict[int, Gradients]) -> Post:
    """One step's handing on, workers first; nothing may be left in the post."""
    post = Post()
    for rank in sorted(states, key=lambda rank: rank in {shadow.rank for shadow in plan.shadows}):
        Shadows(plan, rank, states[rank]).hand_on(post.group(rank), gradients[rank])
    assert not any(post.boxes.values())
    return post


def made_up(state: ModelState, worked: tuple[int, ...], step: int) -> Gradients:
    """What exchanges and ties left at a rank: nothing yet for units that it only shadows."""
    found: Gradients = dict.fromkeys(state.parameters)
    for number, (key, parameter) in enumerate(state.parameters.items()):
        if key[0] in worked and key[1] != "unused":
            generator = torch.Generator().manual_seed(100 * step + number)
            across = torch.randn(parameter.shape[::-1], generator=generator)
            found[key] = across.permute(*reversed(range(across.ndim)))  # not row by row
    return found


def test_a_shadow_has_its_workers_weights_moments_and_buffers_at_every_step() -> None:
    states = states_of(PLAN)
    for step in (1, 2, 3):
        gradients = {rank: made_up(state, PLAN.worked(rank), step) for rank, state in states.items()}
        states[3].modules[5].seen += step
        hand_on(PLAN, states, gradients)
        for rank, state in states.items():
            state.apply_gradients(gradients[rank])
        for unit, worker, shadow in ((0, 0, 1), (5, 3, 2)):
            mine, its = (
                {(e.name, e.state): e.tensor for e in states[rank].entries() if e.name.startswith(f"{unit}.")}
                for rank in (worker, shadow)
            )
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[key], its[key]) for key in mine)
    assert ("5.norm.bias", "exp_avg_sq") in mine
    assert ("5.unused", "exp_avg") not in mine
    assert mine["5.seen", "buffer"].tolist() == [6.0, 6.0]


def test_a_step_costs_one_gradient_of_each_edge_and_no_other_byte_moves() -> None:
    states = states_of(PLAN)
    gradients = {rank: made_up(state, PLAN.worked(rank), 1) for rank, state in states.items()}
    post = hand_on(PLAN, states, gradients)
    embedding, norm, words, unused, buffer = WORDS * DIM, 2 * DIM, WORDS * DIM, 3, 2
    assert dict(post.nbytes) == {(0, 1): 4 * embedding + 1, (3, 2): 4 * (norm + words + unused + buffer) + 4}


def test_without_shadows_nothing_is_sent() -> None:
    plan = swapped_plan(units=6, blocks=range(1, 5), stages=4, replicas=1, microbatches=4)
    states = states_of(plan)
    post = hand_on(plan, states, {rank: made_up(s, plan.worked(rank), 1) for rank, s in states.items()})
    assert dict(post.nbytes) == {}


def test_shadows_start_from_their_workers_weights_even_if_modules_were_made_differently() -> None:
    states = {rank: state_of(PLAN, rank, seed=rank) for rank in range(4)}
    states[3].modules[5].seen += 4
    assert not torch.equal(states[0].modules[0].weight, states[1].modules[0].weight)
    own = states[1].modules[PLAN.worked(1)[0]].weight.clone()
    post = Post()
    for rank in (0, 3, 1, 2):
        Shadows(PLAN, rank, states[rank]).start(post.group(rank))
    assert not any(post.boxes.values())
    assert torch.equal(states[0].modules[0].weight, states[1].modules[0].weight)
    assert torch.equal(states[1].modules[PLAN.worked(1)[0]].weight, own)
    assert all(
        torch.equal(a, b) for a, b in zip(*(states[r].modules[5].state_dict().values() for r in (3, 2)), strict=True)
    )


def test_every_replicas_shadow_is_served_by_its_own_worker() -> None:
    plan = swapped_plan(units=6, blocks=range(1, 5), stages=4, replicas=2, microbatches=4, shadows=True)
    assert plan_links(plan) == (Link(0, 0, 1), Link(0, 4, 5), Link(5, 3, 2), Link(5, 7, 6))


def test_more_shadows_than_workers_take_turns() -> None:
    path = Path((Hop(0, (0,)), Hop(1, (1,))))
    other = Path((Hop(2, (0,)), Hop(1, (1,))))
    plan = Plan(6, 2, (path, other), shadows=(Shadow(0, 5), Shadow(0, 1), Shadow(0, 3), Shadow(1, 0)))
    assert plan_links(plan) == (Link(0, 0, 1), Link(0, 2, 3), Link(0, 0, 5), Link(1, 1, 0))

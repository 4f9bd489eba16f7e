"""CheckFree+ in jobs whose ranks are threads: edges and their moments stay exact whoever is lost, the rest is as one
engine that trains plainly in the swapped order and has done to its blocks, by hand, what the rung should have done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path[:0] = [str(HELPERS), str(HELPERS / "scripts")]

from crew import Crew, assert_equal  # noqa: E402
from lossy import DIM, WORDS, Block, Pairs, Plain, Stepped  # noqa: E402

from holdfast.runtime.recovery.decide import Impossible, Resume  # noqa: E402

MICROBATCHES = 4


def arguments(stages: int, *, plain: bool = False, **more: Any) -> dict[str, Any]:
    """One block a stage between an embedding and a head."""
    return {
        "layers": [lambda: nn.Embedding(WORDS, DIM), *[Block] * stages, lambda: nn.Linear(DIM, DIM, bias=False)],
        "loss": nn.functional.mse_loss,
        "optimizer": Stepped if plain else lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        "data": Pairs(words=True),
        "microbatch_size": 2,
        "microbatches": MICROBATCHES,
        "stages": stages,
        **more,
    }


class Trained:
    """What Plain wants of a trainer."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine


def by_hand(stages: int, until: int, surgery: list[dict[str, Any]]) -> Crew:
    alone = Crew(1, "exact", **arguments(stages, plain=True, swap=True))
    surgeon = Plain(Trained(alone.engines[0]), surgery, [[1 + stage] for stage in range(stages)])  # type: ignore[arg-type]
    for step in range(1, until + 1):
        alone.train(step)
        surgeon.after(step)
    return alone


def lose(crew: Crew, *faults: str) -> Resume:
    crew.train(99, faults)
    decision = crew.recover()
    assert isinstance(decision, Resume)
    return decision


@pytest.mark.parametrize("stages", [4, 5, 6, 12])
def test_every_rank_in_turn_is_replaced_and_the_edges_do_not_notice(stages: int) -> None:
    crew = Crew(stages, "neighbours+", **arguments(stages))
    copies = {0: 1, 1: 0, stages - 2: stages - 1, stages - 1: stages - 2}
    surgery = []
    for stage in range(stages):
        point = ("forward:1", "backward:2", "exchange")[stage % 3]
        decision = lose(crew, f"rank={stage},step={2 + stage},at={point}")
        assert decision.step == 1 + stage
        how = {"how": "copy", "of": copies[stage]} if stage in copies else {"how": "average"}
        surgery.append({"step": decision.step, "stage": stage, **how})
    crew.train(stages + 3)
    assert_equal(crew, by_hand(stages, stages + 3, surgery))


@pytest.mark.parametrize("point", ["user", "commit", "optimizer", "applied"])
def test_the_first_stage_lost_at_the_boundary_of_a_step_takes_no_step_of_the_embedding_with_it(point: str) -> None:
    crew = Crew(4, "neighbours+", **arguments(4))
    decision = lose(crew, f"rank=0,step=4,at={point}")
    assert decision.step in (3, 4)
    crew.train(6)
    assert_equal(crew, by_hand(4, 6, [{"step": decision.step, "stage": 0, "how": "copy", "of": 1}]))


def test_both_ends_lost_at_once_come_back_each_from_its_own_side() -> None:
    crew = Crew(6, "neighbours+", **arguments(6))
    decision = lose(crew, "rank=0,step=3,at=user", "rank=5,step=3,at=user")
    assert "layer 0 taken from rank 1, copied from rank 1" in crew.restored[0].note
    assert "copied from rank 4, layer 7 taken from rank 4" in crew.restored[5].note
    crew.train(5)
    surgery = [{"step": decision.step, "stage": stage, "how": "copy", "of": of} for stage, of in ((0, 1), (5, 4))]
    assert_equal(crew, by_hand(6, 5, surgery))


def test_an_embedding_lost_with_its_shadow_is_an_error_that_names_it() -> None:
    crew = Crew(6, "neighbours+", **arguments(6))
    crew.train(99, ["rank=0,step=3,at=user", "rank=1,step=3,at=user"])
    failed = crew.recover()
    assert isinstance(failed, Impossible)
    assert "no live rank has layer 0, nor a layer of the same kind" in failed.why


def test_ranks_cut_off_at_the_barrier_apply_the_step_to_shadows_too() -> None:
    crew = Crew(4, "neighbours+", **arguments(4))
    crew.deaf = {1: 3, 2: 3}  # both shadows
    crew.train(9)
    assert crew.recover().step == 3  # type: ignore[union-attr]
    crew.train(6)
    assert_equal(crew, by_hand(4, 6, []))


@pytest.mark.parametrize("replicas", [1, 2])
def test_swapped_stages_train_as_one_engine_in_the_same_order_and_not_as_a_chain(replicas: int) -> None:
    crew = Crew(4 * replicas, "exact", **arguments(4, swap=True, shadows=True, replicas=replicas, clip_norm=0.05))
    alone = Crew(1, "exact", **arguments(4, swap=True, clip_norm=0.05))
    chain = Crew(1, "exact", **arguments(1, clip_norm=0.05))
    for one in (crew, alone, chain):
        one.train(4)
    assert_equal(crew, alone)
    assert chain.losses != alone.losses
    assert [e.report.grad_norm for e in crew.engines] == [alone.engines[0].report.grad_norm] * len(crew.engines)  # type: ignore[union-attr]


def test_shadows_of_units_whose_moments_are_cut_over_replicas_keep_them_whole() -> None:
    crew = Crew(8, "exact", **arguments(4, swap=True, shadows=True, replicas=2, zero=1))
    alone = Crew(1, "exact", **arguments(4, swap=True))
    for one in (crew, alone):
        one.train(4)
    expected = alone.state()
    kept = {
        rank: {f"{entry.name}@{entry.state}": entry.tensor for entry in crew.engines[rank].state.entries()}
        for rank in range(8)
    }
    names = [name for name in expected if name.endswith("@weight")]
    assert all(torch.equal(held[name], expected[name]) for held in kept.values() for name in names if name in held)
    assert all(torch.equal(kept[rank]["0.weight@exp_avg"], expected["0.weight@exp_avg"]) for rank in (1, 5))
    assert kept[0]["0.weight@exp_avg"].numel() < expected["0.weight@exp_avg"].numel()


def test_a_healthy_step_sends_one_gradient_of_each_edge_more_than_the_same_order_without_shadows() -> None:
    crews = [Crew(4, "exact", **arguments(4, swap=True)), Crew(4, "neighbours+", **arguments(4))]
    sent = []
    for crew in crews:
        crew.train(1)  # shapes are told in the first
        before = [group.sent for group in crew.groups]
        crew.train(4)
        sent.append([group.sent - was for group, was in zip(crew.groups, before, strict=True)])
    embedding, head, flag = WORDS * DIM * 4, DIM * DIM * 4, 1
    more = [b - a for a, b in zip(*sent, strict=True)]
    assert more == [3 * (embedding + flag), 0, 0, 3 * (head + flag)]

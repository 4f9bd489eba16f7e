"""Jobs whose ranks are threads lose stages: the bits are those of one engine that trains plainly and has done to its
layers, by hand, what the rung should have done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path[:0] = [str(HELPERS), str(HELPERS / "scripts")]

from crew import Crew, assert_equal  # noqa: E402
from lossy import DIM, WORDS, Block, Pairs, Plain, Stepped, cuts  # noqa: E402

from holdfast.runtime.recovery.decide import Impossible, Resume  # noqa: E402


def arguments(split: list[int], *, edges: bool = False, plain: bool = False, replicas: int = 1) -> dict[str, Any]:
    layers: list[Any] = [Block for _ in range(sum(split) - 2 * edges)]
    if edges:
        layers = [lambda: nn.Embedding(WORDS, DIM), *layers, lambda: nn.Linear(DIM, DIM, bias=False)]
    return {
        "layers": layers,
        "loss": nn.functional.mse_loss,
        "optimizer": Stepped if plain else lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        "data": Pairs(edges),
        "microbatch_size": 2,
        "microbatches": 4,
        **({"stages": 1} if plain else {"stages": len(split), "split": split, "replicas": replicas}),
    }


class Trained:
    """What Plain wants of a trainer."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine


def by_hand(split: list[int], until: int, surgery: list[dict[str, Any]], *, edges: bool = False) -> Crew:
    alone = Crew(1, "exact", **arguments(split, edges=edges, plain=True))
    surgeon = Plain(Trained(alone.engines[0]), surgery, cuts(split))  # type: ignore[arg-type]
    for step in range(1, until + 1):
        alone.train(step)
        surgeon.after(step)
    return alone


def lose(crew: Crew, *faults: str, until: int = 99) -> Resume:
    crew.train(until, faults)
    assert crew.dead == {int(fault.partition(",")[0].partition("=")[2]) for fault in faults}
    decision = crew.recover()
    assert isinstance(decision, Resume)
    assert not crew.post.broken
    return decision


@pytest.mark.parametrize("stages", [4, 6, 12])
def test_every_stage_in_turn_is_rebuilt_with_fresh_moments_and_a_higher_rate(stages: int) -> None:
    crew = Crew(stages, "neighbours", **arguments([1] * stages))
    surgery = []
    for turn, stage in enumerate(range(stages)):
        lost_in = 2 + turn
        decision = lose(crew, f"rank={stage},step={lost_in},at={('forward:1', 'backward:2', 'exchange')[turn % 3]}")
        assert decision.step == lost_in - 1
        ends = {0: 1, stages - 1: stages - 2}
        how = {"how": "copy", "of": ends[stage]} if stage in ends else {"how": "average"}
        surgery.append({"step": decision.step, "stage": stage, **how})
    crew.train(stages + 3)
    assert_equal(crew, by_hand([1] * stages, stages + 3, surgery))


@pytest.mark.parametrize("point", ["user", "forward:0", "backward:3", "exchange", "commit", "optimizer", "applied"])
def test_a_stage_lost_at_any_point_of_a_step_leaves_the_others_at_one_step(point: str) -> None:
    crew = Crew(4, "neighbours", **arguments([2, 2, 2, 2]))
    decision = lose(crew, f"rank=1,step=4,at={point}")
    assert decision.step in ((3, 4) if point in ("optimizer", "applied") else (3,))
    crew.train(6)
    assert_equal(crew, by_hand([2] * 4, 6, [{"step": decision.step, "stage": 1, "how": "average"}]))


def test_ranks_cut_off_at_the_barrier_apply_the_step_with_the_bits_of_an_unbroken_run() -> None:
    crew = Crew(4, "neighbours", **arguments([1] * 4))
    crew.deaf = {1: 3, 3: 3}
    crew.train(9)
    assert [(engine.step, engine.forward.ready_step) for engine in crew.engines] == [(3, -1), (2, 3), (3, -1), (2, 3)]
    decision = crew.recover()
    assert isinstance(decision, Resume)
    assert decision.step == 3
    assert [source.rung for _, source in sorted(decision.sources.items())] == ["live", "ready", "live", "ready"]
    assert {engine.born for engine in crew.engines} == {1}, "of the generation in which the others applied it"
    assert {engine.forward.told_step for engine in crew.engines} == {3}
    crew.train(6)
    assert_equal(crew, by_hand([1] * 4, 6, []))
    assert [engine.forward.since for engine in crew.engines] == [0] * 4


class Counted(nn.Module):
    """Batch statistics change in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.linear(self.norm(h))


class Stream:
    """Microbatches in order, whose place is state."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            self.place += 1
            generator = torch.Generator().manual_seed(self.place)
            yield torch.randn(2, DIM, generator=generator), torch.randn(2, DIM, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def test_buffers_data_position_and_loss_scale_are_rolled_forward_too() -> None:
    given = {**arguments([1] * 4), "layers": [Counted for _ in range(4)], "data": Stream(), "loss_scale": "dynamic"}
    crew, whole = Crew(4, "neighbours", **given), Crew(4, "neighbours", **given)
    crew.deaf = {0: 3, 2: 3}
    crew.train(9)
    crew.recover()
    for one in (crew, whole):
        one.train(6)
    assert_equal(crew, whole)
    assert [e.source.state() for e in crew.engines] == [e.source.state() for e in whole.engines]
    assert [e.scaler.state_dict() for e in crew.engines] == [e.scaler.state_dict() for e in whole.engines]


def test_a_replacement_goes_on_with_the_data_and_statistics_of_the_present() -> None:
    given = {**arguments([1] * 4), "layers": [Counted for _ in range(4)], "data": Stream()}
    crew = Crew(4, "neighbours", **given)
    lose(crew, "rank=2,step=4,at=forward:0")
    left, mine, right = (crew.engines[rank].state.modules[rank].norm for rank in (1, 2, 3))
    assert torch.equal(mine.num_batches_tracked, left.num_batches_tracked)
    low, high = (
        torch.minimum(left.running_mean, right.running_mean),
        torch.maximum(left.running_mean, right.running_mean),
    )
    assert bool(((low <= mine.running_mean) & (mine.running_mean <= high)).all())
    assert len({str(engine.source.state()) for engine in crew.engines}) == 1
    crew.train(6)
    assert len({str(engine.source.state()) for engine in crew.engines}) == 1


def test_a_rank_cut_off_and_a_stage_lost_in_the_same_step() -> None:
    crew = Crew(4, "neighbours", **arguments([1] * 4))
    crew.deaf = {1: 3}
    crew.train(9)
    crew.dead = {2}  # it had applied the step
    decision = crew.recover()
    assert isinstance(decision, Resume)
    assert decision.step == 3
    assert [source.rung for _, source in sorted(decision.sources.items())] == ["live", "ready", "neighbours", "live"]
    crew.train(6)
    assert_equal(crew, by_hand([1] * 4, 6, [{"step": 3, "stage": 2, "how": "average"}]))


@pytest.mark.parametrize("point", ["restore", "optimizer", "applied"])
def test_a_rank_that_dies_before_or_while_it_applies_what_it_had_ready(point: str) -> None:
    crew = Crew(4, "neighbours", **arguments([1] * 4))
    crew.deaf = {1: 3, 2: 3, 3: 3}  # rank 0 alone heard the end of the barrier
    crew.train(9)
    crew.recover([f"rank=3,step={2 if point == 'restore' else 3},at={point}"])
    assert crew.dead == {3}
    decision = crew.recover()
    assert isinstance(decision, Resume)
    assert decision.step == 3
    assert decision.sources[3].rung == "neighbours"
    crew.train(5)
    assert_equal(crew, by_hand([1] * 4, 5, [{"step": 3, "stage": 3, "how": "copy", "of": 2}]))


def test_a_second_stage_lost_while_the_first_is_rebuilt() -> None:
    crew = Crew(4, "neighbours", **arguments([1] * 4))
    crew.train(9, ["rank=2,step=4,at=forward:1"])
    crew.recover(["rank=1,step=3,at=restore"])
    assert crew.dead == {1}
    decision = crew.recover()
    assert isinstance(decision, Resume)
    crew.train(6)
    surgery = [{"step": 3, "stage": stage, "how": "depth", "from": [0, 3]} for stage in (1, 2)]
    assert_equal(crew, by_hand([1] * 4, 6, surgery))


def test_two_stages_lost_at_once_each_come_back_from_their_own_neighbours() -> None:
    crew = Crew(6, "neighbours", **arguments([1] * 6))
    assert lose(crew, "rank=1,step=3,at=user", "rank=3,step=3,at=user").step == 2
    crew.train(5)
    surgery = [{"step": 2, "stage": stage, "how": "average"} for stage in (1, 3)]
    assert_equal(crew, by_hand([1] * 6, 5, surgery))


def test_stages_of_different_lengths_are_interpolated_by_depth() -> None:
    split = [3, 3, 2, 2]
    crew = Crew(4, "neighbours", **arguments(split))
    decision = lose(crew, "rank=1,step=3,at=forward:0")
    crew.train(5)
    assert_equal(crew, by_hand(split, 5, [{"step": decision.step, "stage": 1, "how": "depth", "from": [2, 6]}]))


def test_of_a_stage_with_two_replicas_one_comes_back_exactly_and_both_alike() -> None:
    crew = Crew(4, "neighbours", **arguments([1, 1], replicas=2))
    assert lose(crew, "rank=1,step=3,at=forward:0").sources[1].rung == "peer"
    assert [engine.forward.since for engine in crew.engines] == [0] * 4
    lose(crew, "rank=1,step=5,at=user", "rank=3,step=5,at=user")
    crew.train(7)
    assert_equal(crew, by_hand([1, 1], 7, [{"step": 4, "stage": 1, "how": "copy", "of": 0}]))
    assert [engine.forward.since for engine in crew.engines] == [5] * 4


def test_an_embedding_that_nobody_else_has_is_an_error_and_an_inner_stage_beside_it_is_not() -> None:
    crew = Crew(4, "neighbours", **arguments([2, 1, 1, 2], edges=True))
    decision = lose(crew, "rank=1,step=3,at=forward:0")
    assert "averaged from" in crew.restored[1].note
    crew.train(4)
    surgery = [{"step": decision.step, "stage": 1, "how": "depth", "from": [1, 3]}]
    assert_equal(crew, by_hand([2, 1, 1, 2], 4, surgery, edges=True))
    crew.train(9, ["rank=0,step=6,at=forward:0"])
    failed = crew.recover()
    assert isinstance(failed, Impossible)
    assert failed.why == "stage 0 (rank 0): no live rank has layer 0, nor a layer of the same kind"


def test_a_stage_alone_goes_back_to_its_older_copy_with_its_moments_also_that_of_the_embedding() -> None:
    split = [2, 1, 1, 2]
    crew = Crew(4, "stale", keep_every=3, **arguments(split, edges=True))
    assert lose(crew, "rank=0,step=6,at=backward:0").sources[0].step == 3
    assert lose(crew, "rank=2,step=9,at=commit").sources[2].step == 6
    assert crew.restored[2].note == "stage 2 went back alone to step 6 (2 steps old)"
    assert all(engine.forward.boosts.since == {} for engine in crew.engines), "its learning rate is the script's"
    crew.train(10)
    surgery = [{"step": 5, "stage": 0, "how": "older", "from": 3}, {"step": 8, "stage": 2, "how": "older", "from": 6}]
    assert_equal(crew, by_hand(split, 10, surgery, edges=True))
    assert len({engine.state.learning_rate for engine in crew.engines}) == 1


def test_auto_takes_the_older_copy_of_one_lost_stage_and_the_neighbours_of_another() -> None:
    crew = Crew(4, "auto", keep_every=2, **arguments([1] * 4))
    crew.train(3)
    for rank in (0, 2, 3):
        crew.kept[rank].clear()  # else everybody would go back to step 2, exactly
    decision = lose(crew, "rank=1,step=4,at=backward:0", until=4)
    assert [source.rung for _, source in sorted(decision.sources.items())] == ["live", "stale", "live", "live"]
    crew.kept, crew.keep_every = {rank: {} for rank in range(4)}, 0
    assert lose(crew, "rank=2,step=5,at=backward:0").sources[2].rung == "neighbours"
    crew.train(6)
    surgery = [{"step": 3, "stage": 1, "how": "older", "from": 2}, {"step": 4, "stage": 2, "how": "average"}]
    assert_equal(crew, by_hand([1] * 4, 6, surgery))


def test_a_healthy_step_sends_not_a_byte_more_than_one_of_an_exact_job() -> None:
    crews = [Crew(4, mode, **arguments([1] * 4)) for mode in ("exact", "neighbours")]
    for crew in crews:
        crew.train(1)  # shapes are told in the first
    before = [[group.sent for group in crew.groups] for crew in crews]
    for crew in crews:
        crew.train(4)
    sent = [
        [g.sent - b for g, b in zip(crew.groups, was, strict=True)] for crew, was in zip(crews, before, strict=True)
    ]
    assert sent[0] == sent[1]
    assert min(sent[0]) > 0


def test_a_rebuilt_rank_says_how_and_all_carry_since_when_the_run_is_not_exact() -> None:
    crew = Crew(4, "neighbours", **arguments([1] * 4))
    lose(crew, "rank=2,step=3,at=forward:0")
    assert crew.formation.told == "stage 2 rebuilt from its neighbours"
    assert {engine.forward.since for engine in crew.engines} == {3}
    assert [restored.note[:34] for _, restored in sorted(crew.restored.items())] == [
        "", "", "stage 2 is rebuilt: averaged from ", "",
    ]  # fmt: skip
    assert [engine.forward.boosts.since for engine in crew.engines] == [{}, {}, {2: 2}, {}]

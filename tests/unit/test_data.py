"""Sources of microbatches: a dataset is a pure function of (step, microbatch), a stream has a position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.proto.errors import ConfigError
from holdfast.runtime.data import make_source


class Numbers:
    """Sample i is the number i, twice."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(index), torch.tensor(-index)


class Dice(Numbers):
    """Draws from every generator a dataset may know."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])
        return drawn, drawn


class Counting:
    """Counts from its position; an epoch has `length` microbatches, of which the position is the number read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.position = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            self.position += 1
            yield self.position, -self.position
            if self.position % self.length == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def read(source: Any, step: int, microbatches: int) -> list[Any]:
    source.begin(step)
    return [source.microbatch(step, m)[0] for m in range(microbatches)]


def test_microbatch_m_of_step_s_holds_the_samples_in_the_order_of_the_job() -> None:
    source = make_source(Numbers(100), microbatch_size=2, microbatches=3, seed=0, shuffle=False)
    assert source.microbatch(1, 0)[0].tolist() == [0, 1]
    assert source.microbatch(1, 2)[0].tolist() == [4, 5]
    assert source.microbatch(2, 0)[0].tolist() == [6, 7]
    assert source.microbatch(2, 0)[1].tolist() == [-6, -7]


def test_each_epoch_of_a_shuffled_dataset_has_every_sample_once_and_wraps_inside_a_microbatch() -> None:
    source = make_source(Numbers(5), microbatch_size=2, microbatches=5, seed=7)
    seen = torch.cat(read(source, 1, 5)).tolist()  # 10 samples, 2 epochs: the third microbatch has both
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]


def test_a_dataset_smaller_than_a_microbatch_repeats() -> None:
    source = make_source(Numbers(1), microbatch_size=3, microbatches=1, seed=0)
    assert source.microbatch(4, 0)[0].tolist() == [0, 0, 0]


def test_a_shuffled_dataset_needs_no_history() -> None:
    """A replacement that asks for step 9 first gets what a survivor gets that read all steps."""
    survivor = make_source(Numbers(13), microbatch_size=2, microbatches=3, seed=5)
    for step in range(1, 9):
        read(survivor, step, 3)
    replacement = make_source(Numbers(13), microbatch_size=2, microbatches=3, seed=5)
    assert torch.equal(torch.stack(read(survivor, 9, 3)), torch.stack(read(replacement, 9, 3)))
    other = make_source(Numbers(13), microbatch_size=2, microbatches=3, seed=6)
    assert not torch.equal(torch.stack(read(replacement, 9, 3)), torch.stack(read(other, 9, 3)))


def test_random_augmentation_is_the_same_on_every_rank_and_leaves_the_generators_alone() -> None:
    first = make_source(Dice(8), microbatch_size=2, microbatches=2, seed=1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    mine = first.microbatch(3, 1)[0]
    after = (random.random(), np.random.random(), torch.rand(()).item())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert after == (random.random(), np.random.random(), torch.rand(()).item())
    last = make_source(Dice(8), microbatch_size=2, microbatches=2, seed=1)
    assert torch.equal(last.microbatch(3, 1)[0], mine)
    assert not torch.equal(last.microbatch(3, 0)[0], mine)
    assert not torch.equal(last.microbatch(4, 1)[0], mine)


def test_a_stream_goes_on_over_epochs_within_a_step() -> None:
    source = make_source(Counting(3), microbatch_size=1, microbatches=2, seed=0)
    assert [read(source, step, 2) for step in (1, 2, 3)] == [[1, 2], [3, 4], [5, 6]]


def test_a_stream_put_back_to_the_position_before_a_step_reads_that_step_again() -> None:
    source = make_source(Counting(3), microbatch_size=1, microbatches=2, seed=0)
    read(source, 1, 2)
    before = source.state()
    assert read(source, 2, 2) == [3, 4]
    source.load_state(before)
    assert source.state() == {"position": 2}
    assert read(source, 2, 2) == [3, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the dataset is empty"),
        (7, "data must be a map-style dataset .* got builtins.int"),
        (iter(()), "data must be a map-style dataset"),
        ([(torch.zeros(1),)] * 4, r"a sample of the dataset must be a pair \(input, target\), got builtins.list of 1"),
        ([torch.zeros(2)] * 4, "a sample of the dataset must be a pair"),
        ([(torch.zeros(n), 0) for n in range(4)], "the samples of the dataset do not stack to a microbatch"),
    ],
)
def test_what_is_no_data_is_said_in_a_line(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_source(data, microbatch_size=2, microbatches=1, seed=0).microbatch(1, 0)
    assert "\n" not in str(caught.value)


def test_a_stream_that_has_nothing_even_at_the_start_of_an_epoch_is_refused() -> None:
    class Dry(Counting):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            return iter(())

    with pytest.raises(ConfigError, match="the data stream gives nothing"):
        make_source(Dry(1), microbatch_size=1, microbatches=1, seed=0).begin(1)

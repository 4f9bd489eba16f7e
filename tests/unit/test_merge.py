"""Merging: the weights are those of the formula, the average is that of numpy, and the order never matters."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.ckpt.universal import weights
from holdfast.ckpt.universal.errors import CheckpointError, IncompleteError, LossyError, MappingError, UsageError
from holdfast.ckpt.universal.merge import MERGE_BYTES, Merged, lora_note
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.write import Details

_spec = importlib.util.spec_from_file_location("model_helpers", Path(__file__).parents[1] / "helpers" / "models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

Tensors = dict[tuple[str, str], Any]


def readers(tmp_path: Path, *tensors: Tensors, details: Details | None = None) -> list[Reader]:
    number = len(list(tmp_path.iterdir()))
    return [Reader(models.save(tmp_path / f"c{number + at}", each, details)) for at, each in enumerate(tensors)]


def f32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "values", "penalty", "expected"),
    [
        ("loss-power", [1.0, 2.0], 1.0, [2 / 3, 1 / 3]),
        ("loss-power", [1.0, 2.0], 2.0, [0.8, 0.2]),
        ("loss-exp", [3.0, 5.0, 4.0], 2.0, [1.0, math.exp(-2), math.exp(-1)]),
        ("loss-exp", [4.0, 4.0], 9.0, [0.5, 0.5]),
        ("step-power", [100, 300], 1.0, [0.25, 0.75]),
        ("step-exp", [50, 100], 1.0, [math.exp(0.5), math.exp(1.0)]),
        ("score-power", [0.2, 0.6], 2.0, [0.1, 0.9]),
    ],
)
def test_a_kernel_weighs_as_its_formula_says(
    mode: str, values: list[float], penalty: float, expected: list[float]
) -> None:
    found = weights.kernel(mode, values, penalty)
    assert found == pytest.approx([e / sum(expected) for e in expected])
    assert sum(found) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", weights.KERNELS)
def test_without_penalty_every_kernel_is_uniform(mode: str) -> None:
    assert weights.kernel(mode, [1.0, 2.0, 7.0], 0.0) == [1 / 3] * 3


def test_the_better_one_weighs_more() -> None:
    for mode, (kind, _) in weights.KERNELS.items():
        low, high = weights.kernel(mode, [1.0, 2.0], 1.5)
        assert (low > high) == (kind == "loss")


def test_ema_is_the_average_that_would_have_been_kept_while_training() -> None:
    kept = 10.0
    for value in (20.0, 40.0):
        kept = 0.9 * kept + 0.1 * value
    newest_first = weights.ema([300, 100, 200], 0.9)
    assert sum(w * v for w, v in zip(newest_first, [40.0, 10.0, 20.0], strict=True)) == pytest.approx(kept)
    assert weights.last([300, 100, 200], 2) == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: weights.kernel("loss-power", [0.0, 1.0], 1.0), "losses above 0"),
        (lambda: weights.kernel("loss-exp", [math.nan, 1.0], 1.0), "no number"),
        (lambda: weights.kernel("score-power", [-1.0, 1.0], 1.0), "not above 0"),
        (lambda: weights.kernel("step-exp", [1, 2], -1.0), "penalty"),
        (lambda: weights.explicit([1.0, -1.0], 2), "add up"),
        (lambda: weights.explicit([1.0], 2), "one weight for each"),
        (lambda: weights.ema([3, 3], 0.9), "one step"),
        (lambda: weights.ema([3, 4], 1.0), "below 1"),
        (lambda: weights.last([3, 4], 3), "last-k"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(call: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        call()


# ---- averages ---------------------------------------------------------------------------------------------------


def test_the_average_is_of_the_master_copies_rounded_once(tmp_path: Path) -> None:
    each = [models.states("w", (40, 30), seed) for seed in range(3)]
    found = models.load(Merged(readers(tmp_path, *each), weights.explicit([0.5, 0.3, 0.2], 3), masters=True))
    parts = [w * t["w", "fp32"].astype(np.float64) for w, t in zip([0.5, 0.3, 0.2], each, strict=True)]
    assert found.keys() == {("w", "weight"), ("w", "fp32")}
    # Simple weights make sums that lie half way between two floats: there numpy's order may round the other way.
    expected = np.sum(parts, axis=0).astype(np.float32)
    assert np.mean(found["w", "fp32"] == expected) > 0.99
    assert np.allclose(found["w", "fp32"], expected, rtol=2.0**-23, atol=0)
    half_ulp = 2.0**-8
    assert np.allclose(f32(found["w", "weight"]), np.sum(parts, axis=0), rtol=half_ulp, atol=0)


def test_without_master_copies_everywhere_the_weights_themselves_are_averaged(tmp_path: Path) -> None:
    each = [models.states("w", (8, 4), seed) for seed in range(2)]
    del each[1]["w", "fp32"]
    found = models.load(Merged(readers(tmp_path, *each), [0.5, 0.5]))
    expected = (f32(each[0]["w", "weight"]).astype(np.float64) + f32(each[1]["w", "weight"])) / 2
    assert np.allclose(f32(found["w", "weight"]), expected, rtol=2.0**-8, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.lists(st.floats(allow_nan=False, width=32, allow_infinity=False), min_size=6, max_size=6),
        min_size=2,
        max_size=4,
    ),
    st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
)
def test_the_order_of_the_checkpoints_does_not_matter_to_a_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]], raw: list[float]
) -> None:
    tmp_path = tmp_path_factory.mktemp("order")
    each = [{("w", "fp32"): np.array(v, np.float32)} for v in values]
    share = weights.normalized(raw[: len(each)])
    opened = readers(tmp_path, *each)
    results = set()
    for order in itertools.permutations(range(len(each))):
        merged = Merged([opened[i] for i in order], [share[i] for i in order], masters=True)
        results.add(bytes(merged.read("w", "fp32")))
    assert len(results) == 1


def test_sums_that_lie_half_way_between_two_floats_are_rounded_the_same_way_in_any_order(tmp_path: Path) -> None:
    each = [models.states("w", (200, 200), seed) for seed in range(3)]
    share = [0.5, 0.3, 0.2]
    orders = list(itertools.permutations(range(3)))
    terms = [w * t["w", "fp32"].astype(np.float64) for w, t in zip(share, each, strict=True)]
    naive = {sum(terms[i] for i in order).astype(np.float32).tobytes() for order in orders}
    assert len(naive) > 1  # or this would show nothing
    opened = readers(tmp_path, *each)
    results = {
        bytes(Merged([opened[i] for i in order], [share[i] for i in order], masters=True).read("w", "fp32"))
        for order in orders
    }
    assert len(results) == 1


def test_checkpoints_that_agree_in_the_sample_are_told_apart_by_all_their_bytes(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    base = chance.standard_normal(1 << 17).astype(np.float32)
    each = [{("w", "fp32"): base.copy()} for _ in range(3)]
    for tensors in each:  # between the sampled places
        tensors["w", "fp32"][20_000:24_000] = chance.standard_normal(4000).astype(np.float32)
    opened = readers(tmp_path, *each)
    share = [1 / 3] * 3
    results = {
        bytes(Merged([opened[i] for i in order], share).read("w", "fp32")) for order in itertools.permutations(range(3))
    }
    assert len(results) == 1


def test_what_is_read_in_pieces_is_what_is_read_at_once(tmp_path: Path) -> None:
    size = MERGE_BYTES // 4 + 1000
    each = [{("w", "fp32"): np.random.default_rng(s).standard_normal(size).astype(np.float32)} for s in range(3)]
    merged = Merged(readers(tmp_path, *each), weights.explicit([1, 2, 4], 3))
    whole = bytes(merged.read("w", "fp32"))
    for low, high in ((0, 10), (MERGE_BYTES // 4 - 3, MERGE_BYTES // 4 + 3), (17, size)):
        assert bytes(merged.read("w", "fp32", (low, high))) == whole[4 * low : 4 * high]


def test_a_weight_of_zero_brings_no_infinity_along(tmp_path: Path) -> None:
    each = [{("w", "fp32"): np.full(3, value, np.float32)} for value in (1.0, math.inf)]
    found = models.load(Merged(readers(tmp_path, *each), [1.0, 0.0]))
    assert found["w", "fp32"].tolist() == [1.0, 1.0, 1.0]


def test_moments_are_left_out_unless_an_average_is_asked_for(tmp_path: Path) -> None:
    each = [models.states("w", (3, 2), seed) for seed in range(2)]
    opened = readers(tmp_path, *each, details=models.details(each[0]))
    dropped = Merged(opened, [0.5, 0.5])
    assert {state for _, state in dropped.checkpoint.states} == {"weight"}
    assert (dropped.checkpoint.groups, dropped.checkpoint.steps) == ((), {})
    assert dropped.checkpoint.completeness["optimizer"] == "absent"
    kept = Merged(opened, [0.5, 0.5], moments=True)
    expected = (each[0]["w", "exp_avg"].astype(np.float64) + each[1]["w", "exp_avg"]) / 2
    assert np.array_equal(models.load(kept)["w", "exp_avg"], expected.astype(np.float32))
    assert kept.checkpoint.steps == {"w": 7}


def test_integers_that_differ_need_a_policy(tmp_path: Path) -> None:
    each = [{("n", "buffer"): np.array([1, at, 5 - at])} for at in (2, 3)]
    opened = readers(tmp_path, *each)
    with pytest.raises(LossyError, match="integers that differ"):
        Merged(opened, [0.25, 0.75]).read("n", "buffer")
    for policy, expected in (("max", [1, 3, 3]), ("min", [1, 2, 2]), ("heaviest", [1, 3, 2])):
        found = models.load(Merged(opened, [0.25, 0.75], int_policy=policy))
        assert found["n", "buffer"].tolist() == expected
    same = readers(tmp_path, each[0], each[0])
    assert models.load(Merged(same, [0.5, 0.5]))["n", "buffer"].tolist() == [1, 2, 3]


def test_checkpoints_of_different_models_are_refused(tmp_path: Path) -> None:
    one, other = models.states("a", (2, 3)), models.states("a", (3, 2))
    more = one | models.states("b", (2,))
    problems: list[tuple[Tensors, Tensors, type[CheckpointError]]] = [
        (one, other, MappingError),
        (more, one, IncompleteError),
        (one, more, MappingError),
    ]
    for left, right, kind in problems:
        with pytest.raises(kind):
            Merged(readers(tmp_path, left, right), [0.5, 0.5])


def test_a_tie_in_some_of_the_checkpoints_only_is_refused(tmp_path: Path) -> None:
    tensors = models.states("a", (2, 3))
    tied = readers(tmp_path, tensors, details=Details(aliases={"b": "a"}))
    with pytest.raises(MappingError, match="tied in some"):
        Merged([*tied, *readers(tmp_path, tensors)], [0.5, 0.5])


def test_low_rank_factors_are_remarked_upon(tmp_path: Path) -> None:
    tensors = models.states("q.lora_A.weight", (2, 3)) | models.states("q.lora_B.weight", (3, 2))
    assert "average of A and of B" in lora_note(readers(tmp_path, tensors)[0].checkpoint)
    assert lora_note(readers(tmp_path, models.states("a", (2,)))[0].checkpoint) == ""

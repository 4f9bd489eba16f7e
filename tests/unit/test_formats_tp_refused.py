"""What must not be guessed of tensor-parallel checkpoints: refused in our words, or compared, never read wrong."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.ckpt.cli import main as ckpt
from holdfast.ckpt.formats import open_any, write_as
from holdfast.ckpt.formats.deepspeed_tp_rules import Rules
from holdfast.ckpt.formats.torchwrite import Tensor, write_torch
from holdfast.ckpt.universal.errors import CheckpointError, CorruptError, IncompleteError, LossyError, MappingError
from holdfast.ckpt.universal.read import Reader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from tensor_parallel import INFO, SHAPES, affine, numbers, rewritten, saved  # noqa: E402


@pytest.fixture
def source(tmp_path: Path) -> Reader:
    return saved(tmp_path / "source")


def test_frozen_parameters_are_put_together_although_zero_1_does_not_list_them(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    folder = tmp_path / "out/global_step4"
    for rank in range(2):
        rewritten(folder, f"mp_rank_0{rank}_model_states.pt", lambda value: value.update(frozen_param_shapes=None))
    found = Reader(open_any(tmp_path / "out"))
    tensor = found.checkpoint.tensor("frozen.weight", "weight")
    assert (tensor.shape, tensor.role) == (SHAPES["frozen.weight"], "frozen")
    assert bytes(found.read("frozen.weight", "weight")) == bytes(source.read("frozen.weight", "weight"))


def test_buffers_that_differ_between_ranks_are_not_the_first_ranks(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    assert ckpt(["convert", str(tmp_path / "out"), str(tmp_path / "same")]) == 0

    def slopes(value: dict[str, Any]) -> None:
        value["module"]["scale"] = Tensor("F32", (1,), lambda: [np.float32([2.5]).tobytes()])

    rewritten(tmp_path / "out/global_step4", "mp_rank_01_model_states.pt", slopes)
    with pytest.raises(LossyError, match=r"hold different values.*name=scale"):
        write_as("hf", Reader(open_any(tmp_path / "out")), tmp_path / "hf")
    assert ckpt(["adopt", str(tmp_path / "out")]) == LossyError.exit_code, "a manifest would forget the other copy"


def test_parts_without_optimizer_files_are_not_the_model(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    for path in (tmp_path / "out/global_step4").glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(MappingError, match="several model-parallel ranks"):
        open_any(tmp_path / "out")


@pytest.mark.parametrize("dims", [{"pp_degree": 1, "tp_degree": 1}, {"pp_degree": 2, "tp_degree": 1}, {"tp_degree": 3}])
def test_dimensions_that_contradict_the_files_are_refused(tmp_path: Path, source: Reader, dims: dict[str, int]) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    for rank in range(2):
        name = f"mp_rank_0{rank}_model_states.pt"
        rewritten(tmp_path / "out/global_step4", name, lambda v: v.update(checkpoint_parallel_dimensions=dims))
    with pytest.raises(CorruptError, match=r"not as many ranks|on two pipeline stages"):
        open_any(tmp_path / "out")


def test_ranks_without_their_layers_files_are_not_pipeline_stages(tmp_path: Path) -> None:
    """An incomplete copy of a pipeline, two stages with two tensor-parallel ranks each, before dimensions were told."""
    for mp in range(4):
        shapes = [{f"{mp // 2}.weight": (3, 2)}]
        value = {"module": None, "param_shapes": shapes, "dp_world_size": 1, "mp_world_size": 4, "buffer_names": []}
        write_torch(tmp_path / f"mp_rank_0{mp}_model_states.pt", value)
        write_torch(tmp_path / f"zero_pp_rank_0_mp_rank_0{mp}_optim_states.pt", {"optimizer_state_dict": {}})
    for layer in range(2):
        tensor = Tensor("F32", (3, 2), lambda: [bytes(24)])
        write_torch(tmp_path / f"layer_0{layer}-model_00-model_states.pt", {"weight": tensor})
    with pytest.raises(CorruptError, match="on two pipeline stages"):
        open_any(tmp_path)


def test_a_map_that_no_category_describes_holds_for_its_own_ranks_only() -> None:
    """CodeGen's blocks: rank 0 has rows 0, 1, 4, 5."""

    def rank(first: int) -> tuple[list[int], list[dict[str, Any]]]:
        return [4, 2], [
            {
                "shape": [2, 2],
                "source": [2 * (first + 4 * i), [2, 1]],
                "dest": [4 * i, [2, 1]],
                "locations": [first // 2],
            }
            for i in range(2)
        ]

    rules = Rules(affine([8, 2], rank(0), rank(2)))
    split = rules.split("w", [(4, 2), (4, 2)])
    assert [piece.whole[0] for piece in split.pieces[0]] == [(0, 2), (4, 6)]
    assert rules.divide("w", (8, 2), 2) == split
    with pytest.raises(MappingError, match="for so many ranks only"):
        rules.divide("w", (8, 2), 4)


def test_what_only_a_map_describes_is_not_split_by_a_pattern_once_the_map_is_gone(
    tmp_path: Path, source: Reader
) -> None:
    """Two ranks, one rank, two ranks: the map is for two, and one rank's folder has none."""
    blocks = [
        {"shape": [6, 5], "source": [30 * (r + 2 * i), [5, 1]], "dest": [30 * i, [5, 1]], "locations": [r]}
        for r in range(2)
        for i in range(2)
    ]
    ranks = {r: {"shard_shape": [12, 5], "pieces": blocks[2 * r : 2 * r + 2]} for r in range(2)}
    maps = {"version": 1, "params": {"^embed\\.weight$": {"logical_shape": [24, 5], "ranks": ranks}}}
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "two")
    for r in range(2):
        name = f"mp_rank_0{r}_model_states.pt"
        info = {**INFO, "affine_map": maps}
        rewritten(tmp_path / "two/global_step4", name, lambda value, i=info: value.update(universal_checkpoint_info=i))
    two = Reader(open_any(tmp_path / "two"))
    rows = np.frombuffer(two.read("embed.weight", "fp32"), np.float32).reshape(24, 5)[:, 0]
    assert [int(row - rows[0]) // 5 for row in rows[::6]] == [0, 12, 6, 18], "the parts, read as the map says"
    write_as("deepspeed:zero1,dp=1,tp=1", two, tmp_path / "one")
    one = Reader(open_any(tmp_path / "one"))
    assert bytes(one.read("embed.weight", "fp32")) == bytes(two.read("embed.weight", "fp32"))
    with pytest.raises(MappingError, match=r"cannot tell how this was split.*embed\.weight"):
        write_as("deepspeed:zero1,dp=1,tp=2", one, tmp_path / "again")


def test_a_map_that_a_category_describes_holds_for_other_ranks_too() -> None:
    halves = [
        ([2, 1], [{"shape": [2, 1], "source": [rank, [2, 1]], "dest": [0, [1, 1]], "locations": [rank]}])
        for rank in range(2)
    ]
    rules = Rules({**affine([2, 2], *halves), "parameter_with_row_parallelism_patterns": ["^w$"]})
    assert rules.divide("w", (2, 2), 2) == rules.split("w", [(2, 1), (2, 1)])
    assert rules.divide("w", (2, 2), 1).locals == ((2, 2),)


@pytest.mark.parametrize(
    ("spec", "shape"), [([[12, 12, 12], -1], (48, 2)), ([3, -1], (10, 2)), ([10**13, -1], (12, 2)), ([-2, -1], (4, 2))]
)
def test_fused_parts_that_do_not_add_up_lose_no_rows(spec: list[Any], shape: tuple[int, ...]) -> None:
    rules = Rules({"parameter_with_sub_params": [{"patterns": ["w"], "shape": spec, "partition_dim": 0}]})
    for ask in (
        lambda: rules.divide("w", shape, 2),
        lambda: rules.hints("w", shape),
        lambda: rules.split("w", [shape]),
    ):
        with pytest.raises(MappingError, match="fused parts"):
            ask()
    with pytest.raises(MappingError, match="odd length"):
        Rules({"parameter_with_2_sub_params_cat_dim_0": ["w"]}).divide("w", (7, 2), 2)


def test_patterns_that_name_nothing_are_of_another_model(tmp_path: Path, source: Reader) -> None:
    patterns = INFO["tp_replicated_parameter_patterns"]
    info = {**INFO, "tp_replicated_parameter_patterns": [*patterns, "^model\\.norm\\.weight$"]}
    source.checkpoint.metadata["client"]["universal_checkpoint_info"] = info
    with pytest.raises(MappingError, match="name no parameter of this checkpoint"):
        write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    source.checkpoint.metadata["client"]["universal_checkpoint_info"] = INFO
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    folder = tmp_path / "out/global_step4"
    rewritten(folder, "mp_rank_00_model_states.pt", lambda value: value.update(universal_checkpoint_info=info))
    with pytest.raises(MappingError, match="name no parameter of this checkpoint"):
        open_any(tmp_path / "out")


@pytest.mark.parametrize("stage", [1, 3])
def test_experts_on_tensor_parallel_ranks_are_refused_under_every_stage(
    tmp_path: Path, source: Reader, stage: int
) -> None:
    write_as(f"deepspeed:zero{stage},dp=1,tp=2", source, tmp_path / "out")
    info = {**INFO, "expert_parameter_patterns": [r".*\.experts\.w[123]$"]}
    name = "mp_rank_00_model_states.pt" if stage == 1 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    rewritten(tmp_path / "out/global_step4", name, lambda value: value.update(universal_checkpoint_info=info))
    with pytest.raises(MappingError, match="experts on tensor-parallel ranks"):
        open_any(tmp_path / "out")


def test_a_vocabulary_that_ranks_filled_up_is_not_written_for_ranks_again(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "two")
    info = {**INFO, "vocabulary_parameter_patterns": ["^embed\\.weight$"], "original_vocab_size": 20}
    folder = tmp_path / "two/global_step4"
    rewritten(folder, "mp_rank_00_model_states.pt", lambda value: value.update(universal_checkpoint_info=info))
    found = Reader(open_any(tmp_path / "two"))
    assert found.checkpoint.tensor("embed.weight", "fp32").shape == (20, 5)
    exact = numbers("embed.weight")[:20]
    assert np.array_equal(np.frombuffer(found.read("embed.weight", "fp32"), np.float32), exact.ravel())
    with pytest.raises(MappingError, match=r"rows that fill up a vocabulary.*embed\.weight"):
        write_as("deepspeed:zero1,dp=1,tp=2", found, tmp_path / "out")
    write_as("deepspeed:zero1,dp=2,tp=1", found, tmp_path / "one")
    write_as("deepspeed-universal", found, tmp_path / "universal")
    assert open_any(tmp_path / "universal").tensor("embed.weight", "fp32").shape == (20, 5)


def test_the_rows_of_a_map_are_never_cut_off() -> None:
    """AutoTP takes the first embedding's size for every vocabulary's."""
    whole = ([6, 3], [{"shape": [6, 3], "source": [0, [3, 1]], "dest": [0, [3, 1]], "locations": [0]}])
    info = {**affine([6, 3], whole), "vocabulary_parameter_patterns": ["w"], "original_vocab_size": 2}
    assert Rules(info).split("w", [(6, 3)]).shape == (6, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"universal_checkpoint_info": {"affine_map": {"params": {"norm.weight": {"ranks": {0: 1, "x": 2}}}}}},
        {"universal_checkpoint_info": {"parameter_with_sub_params": [{"patterns": [["w"]], "shape": [1], "dim": 0}]}},
        {"frozen_param_shapes": [1]},
        {"frozen_param_shapes": {"a": 3}},
        {"frozen_param_shapes": {"a": None}},
        {"param_shapes": [{"a": 5}]},
        {"shared_params": [1]},
        {"checkpoint_parallel_dimensions": [1]},
        {"checkpoint_parallel_dimensions": {"tp_degree": 10**30}},
        {"buffer_names": 3},
    ],
)  # fmt: skip
def test_model_files_that_say_something_impossible_are_refused_in_our_words(
    tmp_path: Path, source: Reader, change: dict[str, Any]
) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    for rank in range(2):
        name = f"mp_rank_0{rank}_model_states.pt"
        rewritten(tmp_path / "out/global_step4", name, lambda value: value.update(change))
    with contextlib.suppress(CheckpointError):
        open_any(tmp_path / "out")


def test_a_universal_folder_without_a_ranks_model_is_incomplete(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed-universal", source, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*mp_rank_00_model_states.pt"):
        path.rename(path.with_name(path.name.replace("mp_rank_00", "mp_rank_01")))
    with pytest.raises(IncompleteError, match="1 model-parallel ranks are missing"):
        open_any(tmp_path / "out")

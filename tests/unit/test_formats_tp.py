"""DeepSpeed's tensor-parallel checkpoints: what the ranks hold, what they make up, and what is refused.

The wholes here are numbered elements, so each part's numbers say where it belongs; what DeepSpeed itself makes of such
checkpoints is in tests/interop.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.ckpt.cli import main as ckpt
from holdfast.ckpt.formats import open_any, write_as
from holdfast.ckpt.formats.deepspeed import NAMES
from holdfast.ckpt.formats.deepspeed_tp_rules import Patterns, Rules, Split, info_for
from holdfast.ckpt.formats.torchwrite import Tensor, write_torch
from holdfast.ckpt.formats.torchzip import read_torch
from holdfast.ckpt.universal.errors import CheckpointError, CorruptError, IncompleteError, LossyError, MappingError
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.verify import verify

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from tensor_parallel import INFO, SHAPES, TRAINED, affine, numbers, rewritten, saved  # noqa: E402


@pytest.fixture
def source(tmp_path: Path) -> Reader:
    return saved(tmp_path / "source")


def parts(name: str, rank: int, tp: int) -> np.ndarray[Any, Any]:
    """What a rank has of a parameter, by numpy's own cutting."""
    whole = numbers(name)
    if name in ("norm.weight", "row.bias"):
        return whole
    pieces = {"qkv.weight": 3, "gate.weight": 2}.get(name, 1)
    dim = 1 if name == "row.weight" else 0
    return np.concatenate([np.split(piece, tp, dim)[rank] for piece in np.split(whole, pieces, dim)], dim)


def weights(value: Any, folder: Path, name: str) -> np.ndarray[Any, Any]:
    stored = value["module"][name]
    data = np.fromfile(folder / stored.file, np.int16, stored.elements, offset=stored.offset)
    return torch.from_numpy(data).view(torch.bfloat16).float().numpy().reshape(stored.shape)


@pytest.mark.parametrize("tp", [2, 3])
def test_each_rank_gets_its_part_of_every_parameter(tmp_path: Path, source: Reader, tp: int) -> None:
    write_as(f"deepspeed:zero1,dp=2,tp={tp}", source, tmp_path / "out")
    folder = tmp_path / "out/global_step4"
    assert sorted(path.name for path in folder.glob("mp_rank*")) == [f"mp_rank_0{r}_model_states.pt" for r in range(tp)]
    for rank in range(tp):
        value = read_torch(folder, f"mp_rank_0{rank}_model_states.pt", names=NAMES)
        for name in SHAPES:
            exact = torch.from_numpy(np.ascontiguousarray(parts(name, rank, tp))).bfloat16().float().numpy()
            assert np.array_equal(weights(value, folder, name), exact), (name, rank)
        assert value["checkpoint_parallel_dimensions"] == {"pp_degree": 1, "tp_degree": tp}
        assert value["mp_world_size"] == tp


@pytest.mark.parametrize("variant", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (3, 2), (2, 4), (5, 3)])
def test_what_the_ranks_hold_is_read_as_the_wholes(
    tmp_path: Path, source: Reader, variant: str, dp: int, tp: int
) -> None:
    write_as(f"deepspeed:{variant},dp={dp},tp={tp}", source, tmp_path / "out")
    found = open_any(tmp_path / "out")
    assert found.metadata["source"]["mesh"] == {"dp": dp, "pp": 1, "tp": tp}
    assert (found.groups, found.steps) == (source.checkpoint.groups, source.checkpoint.steps)
    reader = Reader(found)
    for (name, state), tensor in source.checkpoint.states.items():
        if variant == "zero3" and state == "weight" and tensor.role == "param":
            continue  # made from the masters
        assert found.states[name, state].shape == tensor.shape
        assert bytes(reader.read(name, state)) == bytes(source.read(name, state)), (name, state)
    assert {name for name, _ in found.copies} >= {"norm.weight", "row.bias"}
    # In pieces that fit nothing: regions are computed, not remembered.
    for low in range(0, 60, 7):
        ours = reader.read("row.weight", "exp_avg", (low, min(low + 7, 60)))
        assert bytes(ours) == bytes(source.read("row.weight", "exp_avg", (low, min(low + 7, 60))))


def test_another_number_of_ranks_is_reached_through_our_format(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=2,tp=2", source, tmp_path / "two")
    assert ckpt(["convert", str(tmp_path / "two"), str(tmp_path / "ours")]) == 0
    for target in ("deepspeed:zero3,dp=1,tp=3", "deepspeed:zero1,dp=2,tp=1", "deepspeed-universal"):
        there = tmp_path / re.sub(r"\W", "-", target)
        assert ckpt(["reshard", str(tmp_path / "ours"), str(there), "--to", target, "--allow-lossy"]) == 0
        found = Reader(open_any(there))
        for name in TRAINED:
            assert np.array_equal(np.frombuffer(found.read(name, "fp32"), np.float32), numbers(name).ravel()), name
    # Without --to tp=: as many as the source had.
    assert ckpt(["reshard", str(tmp_path / "ours"), str(tmp_path / "same"), "--to", "deepspeed:zero1"]) == 0
    assert open_any(tmp_path / "same").metadata["source"]["mesh"] == {"dp": 2, "pp": 1, "tp": 2}


def test_what_the_folder_says_holds_for_the_ranks_that_it_is_for() -> None:
    given = {**INFO, "affine_map": {"version": 1, "params": {}}}
    found = info_for(given, 3, 2)
    assert "affine_map" not in found
    assert found["parameter_with_sub_params"][0]["shape"] == ((12, 12, 12), -1)
    assert found["sub_param_shard_widths"] == {"^qkv\\.weight$": [[4, 4, 4]] * 3}
    assert info_for(given, 5, 2)["sub_param_shard_widths"] == {}
    assert info_for(given, 2, 2)["affine_map"] == given["affine_map"]


def test_maps_come_through_our_format_and_back(tmp_path: Path, source: Reader) -> None:
    """Their ranks are numbers, which JSON has no keys of."""
    rank = [{"shape": [12, 5], "source": [60 * r, [5, 1]], "dest": [0, [5, 1]], "locations": [r]} for r in range(2)]
    entry = {"logical_shape": [24, 5], "ranks": {r: {"shard_shape": [12, 5], "pieces": [rank[r]]} for r in range(2)}}
    info = {**INFO, "affine_map": {"version": 1, "params": {"^embed\\.weight$": entry}}}
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "two")
    for r in range(2):
        name = f"mp_rank_0{r}_model_states.pt"
        rewritten(tmp_path / "two/global_step4", name, lambda value: value.update(universal_checkpoint_info=info))
    assert ckpt(["convert", str(tmp_path / "two"), str(tmp_path / "ours")]) == 0
    for to in ("deepspeed:zero1,dp=2,tp=2", "deepspeed:zero1,dp=1,tp=3", "deepspeed-universal"):
        there = tmp_path / re.sub(r"\W", "-", to)
        assert ckpt(["reshard", str(tmp_path / "ours"), str(there), "--to", to]) == 0
        found = Reader(open_any(there)).read("embed.weight", "fp32")
        assert np.array_equal(np.frombuffer(found, np.float32), numbers("embed.weight").ravel())
    folder = tmp_path / "deepspeed-zero1-dp-2-tp-2/global_step4"
    value = read_torch(folder, "mp_rank_00_model_states.pt", names=NAMES)
    assert value["universal_checkpoint_info"]["affine_map"]["params"]["^embed\\.weight$"]["ranks"].keys() == {0, 1}


def test_a_vocabulary_loses_the_rows_that_filled_it_up() -> None:
    rules = Rules({"vocabulary_parameter_patterns": [".*embed.*"], "original_vocab_size": 7})
    split = rules.split("embed", [(4, 3), (4, 3)])
    assert split.shape == (7, 3)
    assert [piece.local for piece in split.pieces[1]] == [((0, 3), (0, 3))]
    assert [piece.whole for piece in split.pieces[1]] == [((4, 7), (0, 3))]


def test_uneven_parts_follow_the_recorded_widths() -> None:
    info = {
        "parameter_with_sub_params": [{"patterns": ["kv"], "shape": [-1, [5, 3]], "partition_dim": 1}],
        "sub_param_shard_widths": {"kv": [[3, 2], [3, 0]]},
    }
    split = Rules(info).split("kv", [(2, 6), (2, 2)])
    assert split.shape == (2, 8)
    assert [(piece.local[1], piece.whole[1]) for piece in split.pieces[0]] == [((0, 3), (0, 3)), ((3, 6), (5, 8))]
    assert [(piece.local[1], piece.whole[1]) for piece in split.pieces[1]] == [((0, 2), (3, 5))]


def test_affine_maps_say_it_all_by_themselves() -> None:
    columns = [
        ([4, 2], [{"shape": [4, 2], "source": [0, [3, 1]], "dest": [0, [2, 1]], "locations": [0]}]),
        ([4, 1], [{"shape": [4, 1], "source": [2, [3, 1]], "dest": [0, [1, 1]], "locations": [1]}]),
    ]
    split = Rules(affine([4, 3], *columns)).split("w", [(4, 2), (4, 1)])
    assert split.shape == (4, 3)
    assert split.pieces[1][0].whole == ((0, 4), (2, 3))
    everywhere = ([3], [{"shape": [3], "source": [0, [1]], "dest": [0, [1]], "locations": [0, 1]}])
    split = Rules(affine([3], everywhere, everywhere)).split("w", [(3,), (3,)])
    assert [len(pieces) for pieces in split.pieces] == [1, 0]
    assert [len(pieces) for pieces in split.copies] == [0, 1]


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ({"shape": [4, 2], "source": [0, [1, 4]], "dest": [0, [2, 1]]}, "no box of its tensor"),
        ({"shape": [4, 2], "source": [0, [2, 1]], "dest": [0, [2, 1]], "scale": 0.5}, "a scaled piece"),
        ({"shape": [4, 1], "source": [0, [2, 1]], "dest": [0, [2, 1]]}, "do not fill a rank's part"),
        ({"shape": [4, 2], "source": [3, [2, 1]], "dest": [0, [2, 1]]}, "no box of its tensor"),
    ],
)
def test_pieces_that_cannot_be_followed_are_refused(piece: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Rules(affine([4, 2], ([4, 2], [{**piece, "locations": [0]}]))).split("w", [(4, 2)])


@pytest.mark.parametrize(
    ("info", "shapes", "message"),
    [
        ({"parameter_to_average_patterns": ["w"]}, [(2,), (2,)], "to be averaged"),
        ({"autotp_unsupported_parameter_patterns": {"w": "why"}}, [(2,), (2,)], "DeepSpeed itself"),
        ({"tp_replicated_parameter_patterns": ["w"]}, [(2,), (3,)], "copies of one parameter"),
        ({"parameter_with_row_parallelism_patterns": ["w"]}, [(2,), (2,)], "do not make up"),
        ({"parameter_with_row_parallelism_patterns": ["w"]}, [(2, 2), (3, 2)], "do not make up"),
        ({"parameter_with_row_parallelism_patterns": ["w", ".*"]}, [(2, 2), (2, 2)], "two patterns"),
        ({"vocabulary_parameter_patterns": ["w"]}, [(2, 2), (2, 2)], "without its size"),
        ({"affine_map": {"version": 2, "params": {}}}, [(2,)], "not understood"),
        ({}, [(), ()], "do not make up"),
        ({}, [(2,), (2, 2)], "other dimensions"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(
    info: dict[str, Any], shapes: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Rules(info).split("w", shapes)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a*)*",
        "(a|b){3}",
        ".*.*.*.*x",
        "(",
        "a" * 600,
        "a?a?a?a?aaaa",
        "(?x)(a+)#c\n+$",
        "(a|aa)(a|aa)(a|aa)(a|aa)",
        "a{1,9}b{1,9}c{1,9}d{1,9}",
    ],
)
def test_patterns_that_might_be_matched_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(MappingError, match="a pattern that"):
        Patterns([pattern], "test")


def test_patterns_are_matched_from_the_start_as_deepspeed_does() -> None:
    found = Patterns(["^a\\.b\\-c$", r"layers\.\d+\.[^+*]+\.bias", "x{2}y"], "test")
    assert found.match("a.b-c")
    assert found.match("layers.12.norm.bias")
    assert found.match("xxyz")
    assert not found.match("my.layers.12.norm.bias")


def without_info(folder: Path) -> None:
    """As a job that does not say how it splits."""
    for path in folder.glob("mp_rank*"):
        value = dict(read_torch(folder, path.name, names=NAMES))
        for key in ("universal_checkpoint_info", "checkpoint_parallel_dimensions"):
            value.pop(key)
        value["module"] = {name: Tensor("F32", (0,), tuple) for name in value["module"]}
        value["frozen_param_fragments"] = None
        write_torch(folder / "new", value)
        (folder / "new").replace(path)


def test_a_split_that_the_files_do_not_tell_is_refused_and_not_read_as_one_ranks_part(
    tmp_path: Path, source: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    without_info(tmp_path / "out/global_step4")
    assert ckpt(["convert", str(tmp_path / "out"), str(tmp_path / "ours")]) == 4
    assert "no universal_checkpoint_info (DeepSpeed's AutoTP and" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_source_that_does_not_say_how_it_is_split_goes_to_one_rank_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: Reader
) -> None:
    source.checkpoint.metadata["client"].pop("universal_checkpoint_info")
    with pytest.raises(MappingError, match="is not in the source"):
        write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lengths_that_the_ranks_do_not_divide_are_refused(tmp_path: Path, source: Reader) -> None:
    with pytest.raises(MappingError, match="do not divide"):
        write_as("deepspeed:zero1,dp=1,tp=5", source, tmp_path / "out")


def test_copies_that_drifted_apart_are_found_and_never_taken_unasked(
    tmp_path: Path, source: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    write_as("deepspeed:zero1,dp=2,tp=2", source, tmp_path / "out")
    assert verify(open_any(tmp_path / "out")) == []
    found = open_any(tmp_path / "out")
    slab = found.copies["norm.weight", "exp_avg"][0]
    with open(found.root / slab.span.file, "r+b") as file:
        file.seek(slab.span.offset + 4)
        file.write(np.float32(-1).tobytes())
    (finding,) = verify(open_any(tmp_path / "out"))
    assert (finding.kind, finding.name, finding.state) == ("copies", "norm.weight", "exp_avg")
    assert (finding.file, finding.start) == (slab.span.file, slab.span.offset)
    arguments = ["convert", str(tmp_path / "out"), str(tmp_path / "ours")]
    assert ckpt(arguments) == LossyError.exit_code
    assert "norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
    assert ckpt([*arguments, "--allow-lossy"]) == 0
    ours = Reader(open_checkpoint(tmp_path / "ours"))
    assert np.array_equal(
        np.frombuffer(ours.read("norm.weight", "exp_avg"), np.float32), numbers("norm.weight", "exp_avg")
    )


def test_a_missing_ranks_file_is_named(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=2,tp=2", source, tmp_path / "out")
    (tmp_path / "out/global_step4/mp_rank_01_model_states.pt").unlink()
    with pytest.raises(IncompleteError, match=r"mp_rank_01_model_states\.pt"):
        open_any(tmp_path / "out")


def test_a_part_of_another_shape_than_the_model_lists_is_refused(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=1,tp=2", source, tmp_path / "out")
    folder = tmp_path / "out/global_step4"
    value = dict(read_torch(folder, "mp_rank_01_model_states.pt", names=NAMES))
    value["module"] = {"row.weight": Tensor("BF16", (5, 5), lambda: [bytes(50)])}
    value["frozen_param_fragments"] = None
    write_torch(folder / "new", value)
    (folder / "new").replace(folder / "mp_rank_01_model_states.pt")
    with pytest.raises(CorruptError, match="a part of another shape"):
        open_any(tmp_path / "out")


# ---- any split ---------------------------------------------------------------------------------------------------


def rebuilt(split: Split) -> np.ndarray[Any, Any]:
    """The whole from its parts, element by element: how often each was given."""
    times = np.zeros(split.shape, np.int64)
    for pieces in split.pieces:
        for piece in pieces:
            times[tuple(slice(low, high) for low, high in piece.whole)] += 1
    return times


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_element_is_given_once_and_each_rank_is_filled(data: st.DataObject) -> None:
    tp = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.lists(st.integers(1, 4).map(lambda n: n * tp), min_size=1, max_size=3)))
    info: dict[str, Any] = {}
    kind = data.draw(st.sampled_from(["plain", "rows", "replicated", "fused"]))
    if kind == "rows" and len(shape) > 1:
        info["parameter_with_row_parallelism_patterns"] = ["w"]
    elif kind == "replicated":
        info["tp_replicated_parameter_patterns"] = ["w"]
    elif kind == "fused":
        dim = data.draw(st.integers(0, len(shape) - 1))
        sizes = [tp * n for n in data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))]
        shape = (*shape[:dim], sum(sizes), *shape[dim + 1 :])
        spec = [*shape[:dim], sizes, *shape[dim + 1 :]]
        info["parameter_with_sub_params"] = [{"patterns": ["w"], "shape": spec, "partition_dim": dim}]
    split = Rules(info).divide("w", shape, tp)
    assert split.shape == shape
    assert (rebuilt(split) == 1).all()
    assert Rules(info).split("w", split.locals) == split, "what is written is read"
    for rank, local in enumerate(split.locals):
        held = np.zeros(local, np.int64)
        for piece in (*split.pieces[rank], *split.copies[rank]):
            held[tuple(slice(low, high) for low, high in piece.local)] += 1
        assert (held == 1).all()


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.sampled_from(["w", "^w$", "(", "0", "1"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["w", "shape", "patterns", "partition_dim", "params", "version", "0", "1",
                                       "ranks", "pieces", "source", "dest", "locations", "logical_shape",
                                       "shard_shape"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


KEYS = [*INFO, "affine_map", "vocabulary_parameter_patterns", "original_vocab_size"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), anything))
def test_whatever_a_file_says_ends_in_a_split_or_in_an_error_of_ours(info: Mapping[str, Any]) -> None:
    with contextlib.suppress(CheckpointError):
        rules = Rules(info)
        rules.split("w", [(4, 4), (4, 4)])
        rules.divide("w", (8, 4), 2)
        rules.hints("w", (8, 4))
    with contextlib.suppress(CheckpointError):
        info_for(info, 2, 1)

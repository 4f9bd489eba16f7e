"""Every writer's output is read back, by our readers and by torch, as the same checkpoint, for any world.

The source is made here, by hand, so that no framework is needed; what the frameworks themselves make of our files
is in tests/interop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from holdfast.ckpt.formats import detect, open_any, parse_target, write_as
from holdfast.ckpt.formats.deepspeed import NAMES
from holdfast.ckpt.formats.torchwrite import Tensor, write_torch
from holdfast.ckpt.formats.torchzip import read_torch
from holdfast.ckpt.universal.errors import (
    CheckpointError,
    CorruptError,
    IncompleteError,
    LossyError,
    MappingError,
    UnsafeError,
    UsageError,
)
from holdfast.ckpt.universal.model import Checkpoint, Group
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.save import Part, save_universal
from holdfast.ckpt.universal.write import Details

SHAPES = {"embed.weight": (13, 10), "a.w": (31, 10), "a.b": (31,), "norm.w": (1,), "odd": (3, 5, 7), "one": ()}
HYPER = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
GROUPS = (
    Group(0, HYPER, ("embed.weight", "a.w", "odd")),
    Group(1, {**HYPER, "weight_decay": 0.0}, ("a.b", "norm.w", "one")),
)
METADATA: dict[str, Any] = {
    "trainer": {"global_steps": 7, "global_samples": 70, "skipped_steps": 0},
    "scheduler": {"last_epoch": 7, "_last_lr": [0.01, 0.02]},
    "client": {"next": 7, "note": "by hand"},
}


def bfloat16(values: np.ndarray[Any, Any]) -> bytes:
    return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def parts(seed: int = 0) -> Iterator[Part]:
    random = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        values = np.asarray(random.standard_normal(shape, np.float32))
        elements = math.prod(shape)
        yield Part(name, "weight", "BF16", shape, 0, elements, bfloat16(values))
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            data = values if state == "fp32" else random.standard_normal(elements, np.float32)
            yield Part(name, state, "F32", shape, 0, elements, data.tobytes(), "param" if state == "fp32" else "optim")
    frozen = random.standard_normal((9, 3), np.float32)
    yield Part("frozen.w", "weight", "BF16", (9, 3), 0, 27, bfloat16(frozen), "frozen")
    yield Part("scale", "buffer", "F32", (2,), 0, 2, np.float32([1.5, 2.5]).tobytes(), "buffer")


@pytest.fixture
def source(tmp_path: Path) -> Reader:
    details = Details(
        metadata=METADATA,
        groups=GROUPS,
        steps={name: 7 if name in GROUPS[0].params else 5 for name in SHAPES},
        aliases={"head.weight": "embed.weight"},
        completeness={"optimizer": "exact"},
    )
    save_universal(tmp_path / "source", list(parts()), details)
    return Reader(open_checkpoint(tmp_path / "source"))


def same(one: Reader, other: Checkpoint, *, only: set[str] | None = None) -> int:
    """Compare, byte by byte, every state that both have; how many."""
    reader = Reader(other)
    count = 0
    for key, tensor in one.checkpoint.states.items():
        if key in other.states and (only is None or key[1] in only):
            assert other.states[key].shape == tensor.shape, key
            assert bytes(reader.read(*key)) == bytes(one.read(*key)), key
            count += 1
    return count


# ---- DeepSpeed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("dp", [1, 3, 20])
def test_deepspeed_files_for_any_world_hold_the_same_bits(
    tmp_path: Path, source: Reader, variant: str, dp: int
) -> None:
    write_as(f"deepspeed:{variant},dp={dp}", source, tmp_path / "out")
    assert detect(tmp_path / "out") == "deepspeed"
    found = open_any(tmp_path / "out")
    assert found.format == f"deepspeed:{variant}"
    # ZeRO-3 files hold no rounded weights: they are made from the masters.
    weights = len(SHAPES) if variant != "zero3" else 0
    assert same(source, found) == weights + 3 * len(SHAPES) + 2
    assert found.groups == source.checkpoint.groups
    assert found.steps == source.checkpoint.steps
    assert found.aliases == {"head.weight": "embed.weight"}
    assert found.metadata["client"] == METADATA["client"]
    assert found.metadata["scheduler"] == METADATA["scheduler"]
    assert {t.name for t in found.states.values() if t.role == "frozen"} == {"frozen.w"}
    assert {t.name for t in found.states.values() if t.role == "buffer"} == {"scale"}
    assert len(list((tmp_path / "out" / "global_step7").glob("*optim_states.pt"))) == dp


def test_sub_groups_of_zero_3_are_cut_as_asked(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero3,dp=2,sub_group=50", source, tmp_path / "out")
    found = open_any(tmp_path / "out")
    assert same(source, found) == 3 * len(SHAPES) + 2
    assert found.groups == source.checkpoint.groups
    file = next((tmp_path / "out" / "global_step7").glob("*rank_0*optim_states.pt"))
    inner = read_torch(file.parent, file.name, names=NAMES)["optimizer_state_dict"]
    assert len(inner["fp32_flat_groups"]) == 4
    assert [group["params"] for group in inner["optimizer_state_dict"]["param_groups"]] == [[0, 1, 2], [3]]


def test_a_dtype_may_be_spelt_as_people_do(tmp_path: Path, source: Reader) -> None:
    write_as("hf:dtype=fp32", source, tmp_path / "a")
    write_as("hf", source, tmp_path / "b", dtype="F32")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="unknown dtype"):
        write_as("hf:dtype=int3", source, tmp_path / "c")


def test_weights_of_another_dtype_are_rounded_from_the_masters(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=1,dtype=fp32", source, tmp_path / "out")
    found = Reader(open_any(tmp_path / "out"))
    assert bytes(found.read("a.w", "weight")) == bytes(source.read("a.w", "fp32"))


def test_a_group_at_two_steps_is_refused_and_nothing_is_left(tmp_path: Path, source: Reader) -> None:
    source.checkpoint.steps["a.w"] = 6  # type: ignore[index]
    with pytest.raises(LossyError, match="different steps"):
        write_as("deepspeed:zero1,dp=2", source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("variant", ["zero1", "zero3"])
@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
def test_a_missing_rank_is_shown_in_a_grid_before_anything_is_read(
    tmp_path: Path, source: Reader, variant: str, kind: str
) -> None:
    write_as(f"deepspeed:{variant},dp=3", source, tmp_path / "out")
    folder = tmp_path / "out" / "global_step7"
    gone = sorted(folder.glob(f"*{kind}.pt"))[-1]
    gone.unlink()
    if kind == "model_states" and variant == "zero1":
        expected = "no model_states"
    else:
        expected = r"\+-" if kind == "optim_states" else r"\+\+-"
        for path in folder.glob("*optim_states.pt"):
            path.write_bytes(b"not even opened")
    with pytest.raises(IncompleteError, match=expected) as error:
        open_any(tmp_path / "out") if detect(tmp_path / "out") else open_deepspeed(tmp_path / "out")
    assert error.value.exit_code == 3


def open_deepspeed(path: Path) -> Checkpoint:
    from holdfast.ckpt.formats import deepspeed

    return deepspeed.open(path)


def test_a_rank_file_of_another_save_is_refused(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero3,dp=2", source, tmp_path / "one")
    other = Reader(open_checkpoint(tmp_path / "source"))
    other.checkpoint.metadata["trainer"]["global_steps"] = 8
    write_as("deepspeed:zero3,dp=2,tag=global_step7", other, tmp_path / "two")
    name = "global_step7/zero_pp_rank_1_mp_rank_00_model_states.pt"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(CorruptError, match="different saves"):
        open_any(tmp_path / "one")


def test_ranks_at_different_steps_are_refused(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed:zero1,dp=2", source, tmp_path / "one")
    source.checkpoint.steps.update(dict.fromkeys(SHAPES, 9))  # type: ignore[attr-defined]
    write_as("deepspeed:zero1,dp=2", source, tmp_path / "two")
    name = "global_step7/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(CorruptError, match="two steps"):
        open_any(tmp_path / "one")


def test_a_folder_for_load_universal_is_read_back(tmp_path: Path, source: Reader) -> None:
    write_as("deepspeed-universal", source, tmp_path / "out")
    assert detect(tmp_path / "out") == "deepspeed universal"
    found = open_any(tmp_path / "out")
    assert same(source, found) == len(source.checkpoint.states)
    assert (found.groups, found.steps) == (source.checkpoint.groups, source.checkpoint.steps)
    atom = torch.load(tmp_path / "out/global_step7_universal/zero/a.w/exp_avg.pt", weights_only=True)
    assert tuple(atom["param"].shape) == SHAPES["a.w"]
    (tmp_path / "out/global_step7_universal/zero/a.w/fp32.pt").unlink()
    with pytest.raises(IncompleteError, match=r"a\.w"):
        open_any(tmp_path / "out")


# ---- distributed checkpoints of PyTorch ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["dp=1", "dp=3", "dp=40", "dp=3,dim=1", "dp=2,flat=true"])
def test_distributed_checkpoints_hold_the_same_bits(tmp_path: Path, source: Reader, options: str) -> None:
    write_as(f"fsdp2:{options}", source, tmp_path / "out")
    found = open_any(tmp_path / "out")
    assert found.format == "dcp"
    reader = Reader(found)
    for name in SHAPES:
        assert bytes(reader.read(name, "weight")) == bytes(source.read(name, "fp32"))
    assert same(source, found, only={"exp_avg", "exp_avg_sq"}) == 2 * len(SHAPES)
    assert (found.groups, found.steps) == (source.checkpoint.groups, source.checkpoint.steps)
    assert found.metadata["client"]["next"] == 7


@pytest.mark.parametrize("options", ["dp=1", "dp=3", "dp=3,dim=1"])
def test_torch_loads_our_distributed_checkpoint(tmp_path: Path, source: Reader, options: str) -> None:
    write_as(f"dcp:{options}", source, tmp_path / "out")
    names = [name for name in SHAPES if name != "one"]
    wanted: dict[str, Any] = {
        "model": {name: torch.zeros(SHAPES[name]) for name in names},
        "optim": {
            "state": {name: {"exp_avg": torch.zeros(SHAPES[name]), "step": torch.zeros(())} for name in names},
            "param_groups": [{"lr": 0.0, "weight_decay": 9.0, "betas": (), "params": []} for _ in GROUPS],
        },
        "next": 0,
    }
    torch_dcp.load(wanted, checkpoint_id=tmp_path / "out", no_dist=True)
    for name in names:
        assert wanted["model"][name].numpy().tobytes() == bytes(source.read(name, "fp32"))
        assert wanted["optim"]["state"][name]["exp_avg"].numpy().tobytes() == bytes(source.read(name, "exp_avg"))
        assert wanted["optim"]["state"][name]["step"].item() == source.checkpoint.steps[name]
    for group, found in zip(GROUPS, wanted["optim"]["param_groups"], strict=True):
        assert found == {
            "lr": 0.01,
            "weight_decay": group.hyper["weight_decay"],
            "betas": (0.9, 0.95),
            "params": list(group.params),
        }
    assert wanted["next"] == 7


def test_what_torch_saved_is_read(tmp_path: Path) -> None:
    weight, moment = torch.randn(4, 6), torch.randn(6, 4).t()
    state = {"model": {"w": weight, "n.b": torch.arange(3)}, "optim": {"state": {"w": {"exp_avg": moment}}}, "epoch": 3}
    torch_dcp.save(state, checkpoint_id=tmp_path / "out", no_dist=True)
    found = open_any(tmp_path / "out")
    reader = Reader(found)
    assert bytes(reader.read("w", "weight")) == weight.numpy().tobytes()
    assert bytes(reader.read("w", "exp_avg")) == moment.contiguous().numpy().tobytes()
    assert bytes(reader.read("n.b", "weight")) == torch.arange(3).numpy().tobytes()
    assert found.metadata["client"] == {"epoch": 3}


def test_hostile_distributed_metadata_is_refused(tmp_path: Path, source: Reader) -> None:
    write_as("dcp:dp=2", source, tmp_path / "out")
    path = tmp_path / "out" / ".metadata"
    data = path.read_bytes()
    path.write_bytes(b"cos\nsystem\n(S'id'\ntR.")
    with pytest.raises(UnsafeError, match=r"os\.system"):
        open_any(tmp_path / "out")
    path.write_bytes(data.replace(b"__1_0.distcp", b"../../etc/pw"))
    with pytest.raises(CorruptError, match="outside"):
        open_any(tmp_path / "out")
    path.write_bytes(data)
    whole = (tmp_path / "out/__1_0.distcp").read_bytes()
    (tmp_path / "out/__1_0.distcp").write_bytes(whole[:-100])
    with pytest.raises(CorruptError, match="cut short"):
        open_any(tmp_path / "out")
    (tmp_path / "out/__1_0.distcp").unlink()
    with pytest.raises(IncompleteError, match="__1_0"):
        open_any(tmp_path / "out")


def test_damaged_metadata_never_raises_anything_but_ours(tmp_path: Path, source: Reader) -> None:
    write_as("dcp:dp=2", source, tmp_path / "out")
    path = tmp_path / "out" / ".metadata"
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        try:
            open_any(tmp_path / "out")
        except CheckpointError:
            continue


def test_megatrons_layout_is_read_and_its_buckets_are_refused_by_name(tmp_path: Path) -> None:
    state = {"decoder.w": torch.randn(2, 3), "optimizer.state.exp_avg.decoder.w": torch.randn(2, 3)}
    torch_dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    (tmp_path / "a/metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    found = open_any(tmp_path / "a")
    assert (found.format, set(found.states)) == (
        "megatron:torch_dist",
        {("decoder.w", "weight"), ("decoder.w", "exp_avg")},
    )
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
    torch_dcp.save({bucket: torch.randn(4)}, checkpoint_id=tmp_path / "b", no_dist=True)
    (tmp_path / "b/metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(MappingError, match="fully-reshardable"):
        open_any(tmp_path / "b")


# ---- one file, and Hugging Face -----------------------------------------------------------------------------------


def test_one_torch_file_is_read_back_with_its_optimizer(tmp_path: Path, source: Reader) -> None:
    write_as("torch", source, tmp_path / "out.pt")
    found = open_any(tmp_path / "out.pt")
    assert found.format == "torch"
    assert same(source, found) == 3 * len(SHAPES) + 1
    assert (found.groups, found.steps) == (source.checkpoint.groups, source.checkpoint.steps)
    assert found.aliases == {"head.weight": "embed.weight"}
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded["model"]["head.weight"].data_ptr() == loaded["model"]["embed.weight"].data_ptr()


def test_torchs_optimizer_takes_the_states_of_our_file(tmp_path: Path, source: Reader) -> None:
    write_as("torch:masters=true", source, tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    parameters = [[torch.nn.Parameter(loaded["model"][name]) for name in names] for names in loaded["param_names"]]
    assert loaded["model"]["head.weight"].data_ptr() == loaded["model"]["embed.weight"].data_ptr()
    optimizer = torch.optim.AdamW([{"params": group} for group in parameters])
    optimizer.load_state_dict(loaded["optimizer"])
    state = optimizer.state[parameters[0][1]]
    assert state["exp_avg"].numpy().tobytes() == bytes(source.read("a.w", "exp_avg"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("options", ["", ":file_bytes=800"])
def test_hugging_face_folders_are_what_safetensors_reads(tmp_path: Path, source: Reader, options: str) -> None:
    from safetensors.torch import load_file

    write_as(f"hf{options}", source, tmp_path / "out")
    found = open_any(tmp_path / "out")
    assert same(source, found, only={"weight"}) == len(SHAPES) + 1
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == bool(options)
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert "head.weight" not in loaded
    assert loaded["a.w"].view(torch.uint8).numpy().tobytes() == bytes(source.read("a.w", "weight"))
    if options:
        files[1].unlink()
        with pytest.raises(IncompleteError, match="00002"):
            open_any(tmp_path / "out")


def test_shards_of_several_ranks_are_joined_and_a_missing_first_one_is_found(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    (tmp_path / "hf").mkdir()
    whole = torch.randn(5, 4)
    for rank, (low, high) in enumerate([(0, 3), (3, 5)]):
        info = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [low, 0]}}), "DCP_VERSION": "1.0"}
        path = tmp_path / "hf" / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file({"w": whole[low:high].contiguous()}, path, metadata=info)
    reader = Reader(open_any(tmp_path / "hf"))
    assert bytes(reader.read("w", "weight")) == whole.numpy().tobytes()
    (tmp_path / "hf/shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError):
        open_any(tmp_path / "hf")


# ---- targets and failures ---------------------------------------------------------------------------------------


def test_a_targets_spelling_is_checked_before_anything_is_written() -> None:
    assert parse_target("deepspeed:zero3,dp=6").options == {"dp": 6}
    for text in ("deepspeed", "deepspeed:zero4", "dcp:dp=x", "dcp:dp=-1", "nothing", "hf:dp=2", "dcp:dp=2,dp"):
        with pytest.raises(UsageError):
            parse_target(text)


def test_an_existing_target_is_never_touched(tmp_path: Path, source: Reader) -> None:
    (tmp_path / "out").mkdir()
    for target in ("deepspeed:zero1", "dcp:dp=1", "hf", "torch", "deepspeed-universal"):
        with pytest.raises(UsageError, match="there already"):
            write_as(target, source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("target", ["deepspeed:zero1,dp=2", "deepspeed:zero3,dp=2", "dcp:dp=2", "hf", "torch"])
def test_a_source_that_breaks_half_way_leaves_nothing(tmp_path: Path, source: Reader, target: str) -> None:
    # A bit of the last moment's file is flipped: its digest is checked while it is read.
    for file in (tmp_path / "source").rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    with pytest.raises(CorruptError):
        write_as(target, Reader(open_checkpoint(tmp_path / "source")), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("pointer", ["latest", "latest_universal"])
@pytest.mark.parametrize("text", [b"\x80lobal_step7", b"../elsewhere", b"x" * 300, b"\xff" * 5000])
def test_a_pointer_of_any_bytes_is_one_clear_error(tmp_path: Path, pointer: str, text: bytes) -> None:
    (tmp_path / pointer).write_bytes(text)
    with pytest.raises(CheckpointError):
        open_any(tmp_path)


def test_an_index_of_files_that_no_file_system_can_have_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    for name in ("x" * 300, "é" * 200, "\\ud800"):
        index = f'{{"weight_map": {{"w": "{name}"}}}}'
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CorruptError, match="files beside it"):
            open_any(tmp_path)


def test_what_is_no_checkpoint_is_refused_with_the_known_formats(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." * 4)
    with pytest.raises(CorruptError, match="not a zip"):
        open_any(tmp_path / "old.pt")
    for path in (tmp_path / "x.txt", tmp_path):
        with pytest.raises(UsageError, match="deepspeed"):
            open_any(path)
    with pytest.raises(UsageError, match="no such"):
        open_any(tmp_path / "nothing")


def test_a_plain_optimizer_without_names_is_not_guessed(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    groups = [{"params": [model[0].weight, model[1].weight]}, {"params": [model[0].bias, model[1].bias]}]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    assert open_any(tmp_path / "a.pt").completeness["optimizer"] == "absent"
    one = torch.optim.AdamW(model.parameters())
    one.step()
    torch.save({"model": model.state_dict(), "optimizer": one.state_dict()}, tmp_path / "b.pt")
    found = open_any(tmp_path / "b.pt")
    assert found.completeness["optimizer"] == "exact"
    moment = one.state[model[1].bias]["exp_avg"]
    assert bytes(Reader(found).read("1.bias", "exp_avg")) == moment.numpy().tobytes()


def test_bf16_zero_0_states_are_named_by_their_values(tmp_path: Path, source: Reader) -> None:
    names = [name for group in GROUPS for name in group.params]

    def tensor(name: str, state: str) -> Tensor:
        found = source.checkpoint.tensor(name, state)
        return Tensor(found.dtype, found.shape, lambda: [bytes(source.read(name, state))])

    order = iter(range(len(names)))
    numbered = [[next(order) for _ in group.params] for group in GROUPS]
    inner = {
        "state": {i: {"exp_avg": tensor(name, "exp_avg")} for i, name in enumerate(names)},
        "param_groups": [{**g.hyper, "params": n} for g, n in zip(GROUPS, numbered, strict=True)],
    }
    fp32 = [[tensor(name, "fp32") for name in group.params] for group in GROUPS]
    module = {name: tensor(name, "weight") for name in sorted(names)}
    value = {"module": module, "optimizer": {"fp32_groups": fp32, "optimizer_state_dict": inner}, "dp_world_size": 4}
    (tmp_path / "z0").mkdir()
    write_torch(tmp_path / "z0/mp_rank_00_model_states.pt", value)
    found = open_any(tmp_path / "z0")
    assert found.format == "deepspeed:zero0"
    assert found.completeness["optimizer"] == "exact"
    assert same(source, found) == 3 * len(SHAPES)

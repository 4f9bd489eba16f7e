"""`holdfast.ckpt.tensors.load`: what comes back, whatever the format, and what is refused with a line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import universal as helpers

from holdfast.ckpt.dtypes import ITEM_BYTES, TORCH_NAMES
from holdfast.ckpt.formats import dcp, open_any, write_as
from holdfast.ckpt.formats.torchzip import read_region
from holdfast.ckpt.tensors import load
from holdfast.ckpt.universal.errors import CorruptError, IncompleteError, UsageError
from holdfast.ckpt.universal.geometry import share
from holdfast.ckpt.universal.model import Group
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.write import Details, StatePlan, WriteOptions, Writer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save(tmp_path_factory.mktemp("saved") / "step", scale=20).root


def expected(state: str) -> dict[str, torch.Tensor]:
    kinds = {name: getattr(torch, TORCH_NAMES[name]) for name in helpers.DTYPES}
    found = helpers.tensors(scale=20)
    return {
        name: torch.from_numpy(array.copy()).view(kinds[dtype])
        for (name, of), (dtype, array) in found.items()
        if of == state
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the bit: there are NaN among them."""
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))
        for a, b in ((one[name], other[name]) for name in one)
    )


def test_every_dtype_that_can_be_kept_has_a_name_in_torch() -> None:
    assert TORCH_NAMES.keys() == ITEM_BYTES.keys()
    assert all(getattr(torch, name).itemsize == ITEM_BYTES[kind] for kind, name in TORCH_NAMES.items())


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_model_is_its_weights_and_buffers_and_masters_of_what_has_no_weight(saved: Path, jobs: int) -> None:
    model = expected("weight") | expected("buffer") | {"none": torch.zeros(0, 4)}
    assert same(load(saved, jobs=jobs), model)


@pytest.mark.parametrize("state", ["fp32", "exp_avg", "rng"])
def test_a_state_by_its_word(saved: Path, state: str) -> None:
    assert same(load(saved, state=state), expected(state))


def test_some_names_only_and_in_their_order(saved: Path) -> None:
    found = load(saved, names=["layer.0", "embed"])
    assert list(found) == ["layer.0", "embed"]
    assert same({"embed": found["embed"]}, {"embed": expected("weight")["embed"]})


def test_tensors_that_are_there_are_filled_and_keep_their_memory(saved: Path) -> None:
    live = {name: torch.nn.Parameter(torch.full_like(t, 3)) for name, t in expected("exp_avg").items()}
    places = {name: tensor.data_ptr() for name, tensor in live.items()}
    load(saved, state="exp_avg", into=live)
    assert same({name: tensor.detach() for name, tensor in live.items()}, expected("exp_avg"))
    assert places == {name: tensor.data_ptr() for name, tensor in live.items()}


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(33, 1), torch.zeros(33, dtype=torch.float64), torch.zeros(66)[::2], torch.zeros(33).to("meta")],
)
def test_a_tensor_that_does_not_fit_is_refused_and_left_alone(saved: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"wanted a contiguous float32\[33\] on the CPU"):
        load(saved, state="fp32", into={"bias": wrong})


@pytest.mark.parametrize(("state", "names"), [("weight", ["nobody"]), ("nothing", None), ("exp_avg", ["rope"])])
def test_what_is_not_there_is_said_with_what_is(saved: Path, state: str, names: list[str] | None) -> None:
    with pytest.raises(IncompleteError, match=r"no such tensor.*exp_avg_sq"):
        load(saved, state=state, names=names)


def test_a_flipped_bit_is_found_before_anything_is_returned(tmp_path: Path) -> None:
    root = helpers.save(tmp_path / "step").root
    payload = max(root.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with payload.open("r+b") as file:
        file.seek(payload.stat().st_size - 9)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    states = ("weight", "fp32", "exp_avg", "exp_avg_sq", "rng")
    caught = []
    for state in states:
        try:
            load(root, state=state)
        except CorruptError as error:
            caught.append(str(error))
    assert len(caught) == 1
    assert payload.name in caught[0]


def test_other_formats_by_the_same_call(tmp_path: Path) -> None:
    model = {"a.weight": torch.randn(5, 7), "b": torch.randn(3).bfloat16(), "n": torch.tensor(3)}
    save_file(model, tmp_path / "model.safetensors")
    torch.save(model, tmp_path / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        assert same(load(tmp_path / name), model), name


# ---- one rank's part ----------------------------------------------------------------------------------------------


def joined(parts: list[dict[str, torch.Tensor]], dim: int | dict[str, int]) -> dict[str, torch.Tensor]:
    """What all ranks have, put together."""
    found = {}
    for name, first in parts[0].items():
        cut = dim if isinstance(dim, int) else dim.get(name, first.dim())
        bits = [part[name].view(torch.uint8) if first.dtype.itemsize == 1 else part[name] for part in parts]
        found[name] = torch.cat(bits, cut).view(first.dtype) if cut < first.dim() else first
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 40])
@pytest.mark.parametrize("dim", [0, 1, {"layer.0": 1, "embed": 0}])
def test_the_parts_of_all_ranks_are_the_whole(saved: Path, world: int, dim: int | dict[str, int]) -> None:
    parts = [load(saved, state="exp_avg", rank=rank, world=world, dim=dim) for rank in range(world)]
    assert same(joined(parts, dim), expected("exp_avg"))
    if dim == 0 and world == 3:
        rows = [len(part["layer.0"]) for part in parts]
        assert rows[0] == rows[1] >= rows[2]  # as DTensor cuts


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masters and moments as three ranks of DCP have them, each part of a tensor an archive of its own."""
    folder = tmp_path_factory.mktemp("dcp") / "out"
    found = {key: pair for key, pair in helpers.tensors().items() if key[1] in ("fp32", "exp_avg", "exp_avg_sq")}
    with Writer(folder.with_name("ours"), WriteOptions(fsync=False)) as writer:
        roles = {key: "param" if key[1] == "fp32" else "optim" for key in found}
        writer.begin([replace(plan, role=roles[plan.name, plan.state]) for plan in helpers.plans(found)])
        for (name, state), (_, array) in found.items():
            writer.put(name, state, array.reshape(-1).data.cast("B") if array.size else b"")
        writer.commit(helpers.DETAILS)
    with Reader(open_any(folder.with_name("ours"))) as reader:
        write_as("dcp:dp=3", reader, folder)
    return folder


@pytest.mark.parametrize(("dim", "archives"), [(0, 3 * 6), (1, 3 * 3 * 4)])
def test_only_the_archives_that_a_rank_reads_are_opened(
    distributed: Path, dim: int, archives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counted(fd: int, file: str, region: tuple[int, int], **more: Any) -> Any:
        opened.extend([region] if region[1] - region[0] > 4096 else [])  # not the small ones of scalars
        return read_region(fd, file, region, **more)

    monkeypatch.setattr(dcp, "read_region", counted)
    whole = load(distributed)
    assert len(opened) == 3 * 3  # parts of embed, of head, which is embed again, and of layer.0; no moments
    opened.clear()
    parts = [load(distributed, rank=rank, world=4, dim=dim) for rank in range(4)]
    assert same(joined(parts, dim), whole)
    assert len(opened) == archives
    opened.clear()
    open_any(distributed)
    assert len(opened) == 3 * 3 + 2 * 3 * 2


def test_what_was_not_asked_for_is_not_read_wrongly(distributed: Path) -> None:
    found = open_any(distributed, lambda name, state, shape, box: box[0][0] == 0 if box else True)
    name = next(
        name for name, state in found.states if state == "exp_avg" and len(found.states[name, state].slabs) == 1
    )
    with Reader(found) as reader, pytest.raises(IncompleteError, match="elements are missing"):
        reader.read(name, "exp_avg")


def test_a_part_that_nothing_holds_is_missed_whether_it_was_asked_for_or_not(
    distributed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dcp._plan

    def without_one(value: object) -> dcp.Plan:
        made = plan(value)
        dtype, shape, chunks = made.tensors["model.layer.0"]
        made.tensors["model.layer.0"] = dtype, shape, chunks[:-1]
        return made

    monkeypatch.setattr(dcp, "_plan", without_one)
    with pytest.raises(IncompleteError, match=r"elements are missing.*layer\.0"):
        open_any(distributed, lambda *part: False)


@pytest.mark.parametrize("more", [{"rank": 2, "world": 2}, {"rank": -1}, {"world": 0}, {"dim": -1}, {"dim": {"a": -2}}])
def test_a_rank_or_dim_that_cannot_be_is_refused(saved: Path, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a rank is from 0 on and below the world"):
        load(saved, **more)


@pytest.mark.parametrize("world", [4, 40])  # of 40 ranks some have nothing of most
def test_parts_fill_tensors_that_are_there_whatever_the_format(saved: Path, distributed: Path, world: int) -> None:
    for path, state in ((saved, "fp32"), (distributed, "exp_avg")):
        whole = load(path, state=state)
        for rank in (0, world // 2, world - 1):
            boxes = {name: share(t.shape, 0, rank, world) for name, t in whole.items()}
            live = {name: torch.full([b - a for a, b in box], 3.0) for name, box in boxes.items()}
            found = load(path, state=state, into=live, rank=rank, world=world)
            assert found is not live
            for name, tensor in live.items():
                assert found[name] is tensor
                assert torch.equal(tensor, whole[name][slice(*boxes[name][0])]), (name, rank)
    with pytest.raises(UsageError, match=r"wanted a contiguous float32\[24, 256\] on the CPU"):
        load(distributed, names=None, into={"embed": torch.zeros(96, 256)}, rank=1, world=4)
    assert list(load(distributed, names=["layer.0"], rank=3, world=4)) == ["layer.0"]


def test_buffers_and_frozen_parameters_of_dcp_come_in_parts_too(tmp_path: Path) -> None:
    arrays = {"w": torch.randn(6, 4), "frozen": torch.randn(9, 2), "scale": torch.randn(5)}
    with Writer(tmp_path / "ours", WriteOptions(fsync=False)) as writer:
        plans = [StatePlan("w", "fp32", "F32", (6, 4)), StatePlan("w", "exp_avg", "F32", (6, 4), "optim")]
        plans += [StatePlan("frozen", "weight", "F32", (9, 2), "frozen")]
        writer.begin([*plans, StatePlan("scale", "buffer", "F32", (5,), "buffer")])
        for plan in [*plans, StatePlan("scale", "buffer", "F32", (5,))]:
            writer.put(plan.name, plan.state, arrays[plan.name].numpy().tobytes())
        writer.commit(Details(groups=(Group(0, {"lr": 0.1}, ("w",)),), steps={"w": 3}))
    with Reader(open_any(tmp_path / "ours")) as reader:
        write_as("dcp:dp=3", reader, tmp_path / "dcp")
    assert {t.role for t in open_any(tmp_path / "dcp").states.values()} == {"param", "optim", "frozen", "buffer"}
    parts = [load(tmp_path / "dcp", rank=rank, world=4) for rank in range(4)]
    assert same(joined(parts, 0), arrays)


def test_damage_is_found_by_the_rank_that_has_it_and_by_nobody_else(tmp_path: Path) -> None:
    root = helpers.save(tmp_path / "step", scale=20).root
    slab = open_any(root).states["embed", "fp32"].slabs[0]
    with (root / slab.span.file).open("r+b") as file:
        file.seek(slab.span.offset + slab.span.nbytes // 2 + 100_000)
        file.write(b"\x55")
    for rank in range(4):
        if rank == 2:
            with pytest.raises(CorruptError, match="embed"):
                load(root, state="fp32", rank=rank, world=4)
        else:
            load(root, state="fp32", rank=rank, world=4)

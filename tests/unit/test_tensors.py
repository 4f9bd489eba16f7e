"""`holdfast.ckpt.tensors.load`: what comes back, whatever the format, and what is refused with a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import universal as helpers

from holdfast.ckpt.dtypes import TORCH_NAMES
from holdfast.ckpt.tensors import load
from holdfast.ckpt.universal.errors import CorruptError, IncompleteError, UsageError
from holdfast.ckpt.universal.model import ITEM_BYTES


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

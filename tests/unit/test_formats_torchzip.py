"""torch.save archives as byte ranges; hostile archives; and archives of ours that torch takes."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.ckpt.formats import torchzip
from holdfast.ckpt.formats.inert import Global
from holdfast.ckpt.formats.pickling import Construct, Ordered, Persistent, dumps
from holdfast.ckpt.formats.torchwrite import Tensor, scalar, write_torch
from holdfast.ckpt.formats.torchzip import Stored, globals_of, is_torch, plain, read_torch
from holdfast.ckpt.universal.errors import CheckpointError, CorruptError, UnsafeError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
NEW_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]


def raw(path: Path, tensor: Stored) -> bytes:
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


def read(path: Path) -> Any:
    return read_torch(path.parent, path.name)


@pytest.mark.parametrize("dtype", DTYPES + NEW_DTYPES, ids=str)
def test_a_tensor_is_found_where_torch_put_it(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.arange(24) % 7).reshape(4, 6).to(dtype)
    torch.save({"w": value, "n": [1, "x", None]}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found["n"] == [1, "x", None]
    assert (found["w"].shape, found["w"].strides) == ((4, 6), (6, 1))
    assert raw(tmp_path / "a.pt", found["w"]) == value.contiguous().view(torch.uint8).numpy().tobytes()


def test_views_strides_and_ties_are_kept(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.Linear(2, 3)
    torch.save(
        {"t": base.t(), "row": base[2], "tied": base, "p": module.weight, "sd": module.state_dict()}, tmp_path / "a.pt"
    )
    found = read(tmp_path / "a.pt")
    assert (found["t"].shape, found["t"].strides, found["t"].contiguous) == ((6, 4), (1, 6), False)
    assert found["t"].slab().strides == (1, 6)
    assert found["row"].offset == found["tied"].offset + 12 * 4
    assert found["row"].key == found["tied"].key
    assert (found["p"].key, found["p"].shape) == (found["sd"]["weight"].key, (3, 2))


def test_an_unknown_class_is_refused_by_its_name_and_listed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    torch.save({"w": torch.zeros(2), "x": Evil()}, tmp_path / "a.pt")
    with pytest.raises(UnsafeError, match=r"__builtin__\.print"):
        read(tmp_path / "a.pt")
    assert "__builtin__.print" in globals_of(tmp_path / "a.pt")


def test_a_scheduler_and_numpys_generator_become_stand_ins(tmp_path: Path) -> None:
    import numpy as np

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5])
    torch.save({"s": scheduler.state_dict(), "rng": np.random.RandomState(0).get_state()}, tmp_path / "a.pt")
    found = plain(read(tmp_path / "a.pt"))
    assert found["s"]["milestones"] == {
        "$object": "collections.Counter",
        "args": [{"$key:3": 1, "$key:5": 1}],
        "state": None,
    }
    assert found["rng"][0] == "MT19937"


# ---- hostile archives -----------------------------------------------------------------------------------------


def archive(members: dict[str, bytes], *, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def tensor_pickle(elements: int, offset: int, shape: tuple[int, ...], strides: tuple[Any, ...]) -> bytes:
    storage = Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", elements))
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return dumps({"w": Construct(rebuild, (storage, offset, shape, strides, False, Ordered()))})


def good() -> bytes:
    return archive({"a/data.pkl": tensor_pickle(6, 0, (2, 3), (3, 1)), "a/data/0": b"x" * 24})


def patched(data: bytes, magic: bytes, at: int, patch: bytes, *, last: bool = True) -> bytes:
    start = (data.rfind if last else data.find)(magic) + at
    return data[:start] + patch + data[start + len(patch) :]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (
        lambda: archive({"a/data.pkl": dumps({"x": "y" * 99})}, method=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "no pickle": (lambda: archive({"a/other": b""}), "data.pkl"),
    "two pickles": (lambda: archive({"a/data.pkl": dumps(1), "b/data.pkl": dumps(2)}), "data.pkl"),
    "cut short": (lambda: good()[:-5], "not a zip"),
    "front cut": (lambda: good()[40:], "."),
    "empty": (lambda: b"", "too short"),
    "trailing comment": (lambda: patched(good(), b"PK\5\6", 20, struct.pack("<H", 4)) + b"abcd", "zip"),
    "directory outside": (lambda: patched(good(), b"PK\5\6", 16, struct.pack("<I", 1 << 30)), "outside"),
    "directory huge": (lambda: patched(good(), b"PK\5\6", 12, struct.pack("<I", 1 << 31)), "larger than"),
    "more members than listed": (lambda: patched(good(), b"PK\5\6", 8, struct.pack("<HH", 999, 999)), "directory"),
    "member outside": (lambda: patched(good(), b"PK\1\2", 42, struct.pack("<I", 1 << 20)), "."),
    "member over another": (lambda: patched(good(), b"PK\1\2", 42, struct.pack("<I", 0)), "overlap"),
    "size lies": (lambda: patched(good(), b"PK\1\2", 20, struct.pack("<II", 4000, 4000)), "."),
    "other local name": (lambda: patched(good(), b"PK\3\4", 30, b"z", last=False), "something else"),
    "zip64 without its field": (lambda: patched(good(), b"PK\1\2", 20, b"\xff" * 8), "64-bit"),
    "encrypted": (lambda: patched(good(), b"PK\1\2", 8, b"\1\0"), "encrypted"),
    "big-endian": (lambda: archive({"a/data.pkl": dumps({}), "a/byteorder": b"big"}), "big-endian"),
    "storage missing": (lambda: archive({"a/data.pkl": tensor_pickle(6, 0, (2, 3), (3, 1))}), "not in the file"),
    "storage too short": (
        lambda: archive({"a/data.pkl": tensor_pickle(7, 0, (7,), (1,)), "a/data/0": b"x" * 24}),
        "larger",
    ),
    "leaves its storage": (
        lambda: archive({"a/data.pkl": tensor_pickle(6, 1, (2, 3), (3, 1)), "a/data/0": b"x" * 24}),
        "leaves",
    ),
    "negative stride": (
        lambda: archive({"a/data.pkl": tensor_pickle(6, 0, (2, 3), (-3, 1)), "a/data/0": b"x" * 24}),
        "impossible",
    ),
    "huge shape": (
        lambda: archive({"a/data.pkl": tensor_pickle(6, 0, (1 << 50, 1 << 50), (1 << 50, 1)), "a/data/0": b"x" * 24}),
        "leaves",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, why = HOSTILE[name]
    (tmp_path / "a.pt").write_bytes(make())
    with pytest.raises(CorruptError, match=why) as error:
        read(tmp_path / "a.pt")
    assert "a.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_archive_that_the_hostile_ones_are_made_of_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(good())
    assert raw(tmp_path / "a.pt", read(tmp_path / "a.pt")["w"]) == b"x" * 24


def test_no_single_changed_byte_raises_anything_but_ours(tmp_path: Path) -> None:
    data = good()
    path = tmp_path / "a.pt"
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            read(path)
        except CheckpointError:
            continue


# ---- the shortcut for one tensor --------------------------------------------------------------------------------

ALONE = {
    "vector": lambda: torch.arange(3.0),
    "matrix": lambda: torch.randn(5, 7).bfloat16(),
    "large": lambda: torch.zeros(70_000, 300, dtype=torch.uint8),
    "three dims": lambda: torch.zeros(2, 300, 5, dtype=torch.int64),
    "turned": lambda: torch.randn(300, 4).t(),
    "empty": lambda: torch.empty(0, 4),
    "part": lambda: torch.arange(600)[500:],
    "number": lambda: torch.tensor(3.0),
    "four dims": lambda: torch.zeros(1, 2, 3, 4),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(2)),
    "new dtype": lambda: torch.zeros(3, dtype=torch.float8_e4m3fn),
}
TAKEN = {"vector", "matrix", "large", "three dims", "turned", "empty"}


@pytest.mark.parametrize("name", ALONE)
def test_the_shortcut_gives_what_the_machine_gives(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(ALONE[name](), tmp_path / "a.pt")
    taken = []
    shortcut = torchzip._Reader._single

    def watched(reader: Any, data: bytes) -> Stored | None:
        taken.append(shortcut(reader, data))
        return taken[-1]

    monkeypatch.setattr(torchzip._Reader, "_single", watched)
    found = read(tmp_path / "a.pt")
    assert [one is not None for one in taken] == [name in TAKEN]
    monkeypatch.setattr(torchzip._Reader, "_single", lambda reader, data: None)
    assert found == read(tmp_path / "a.pt")


def test_a_changed_byte_of_such_a_pickle_changes_the_shortcut_as_it_does_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.zeros(300, 5), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        members = {name: file.read(name) for name in file.namelist()}
    (pickle,) = [name for name in members if name.endswith("data.pkl")]

    def outcome(path: Path) -> Any:
        try:
            return read(path)
        except CheckpointError as error:
            return type(error)

    machine = lambda reader, data: None  # noqa: E731
    for at in range(len(members[pickle])):
        for flip in (0x01, 0x04, 0x80, 0xFF):
            data = bytearray(members[pickle])
            data[at] ^= flip
            (tmp_path / "b.pt").write_bytes(archive({**members, pickle: bytes(data)}))
            found = outcome(tmp_path / "b.pt")
            with monkeypatch.context() as patch:
                patch.setattr(torchzip._Reader, "_single", machine)
                assert found == outcome(tmp_path / "b.pt"), (at, flip)


# ---- writing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write_without_trusting_it(tmp_path: Path, mmap: bool) -> None:
    values = torch.arange(35.0).reshape(5, 7)
    data = values.numpy().tobytes()
    tensor = Tensor("F32", (5, 7), lambda: [data[:50], data[50:]])
    path = tmp_path / "a.pt"
    eights = Tensor("F8_E4M3", (3,), lambda: [b"abc"])
    empty = Tensor("F32", (0, 4), tuple)
    nbytes = write_torch(
        path, {"w": tensor, "tied": tensor, "step": scalar(3), "f8": eights, "e": empty, "n": {1: (2,)}}
    )
    assert path.stat().st_size == nbytes
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert torch.equal(found["w"], values)
    assert found["w"].data_ptr() == found["tied"].data_ptr()
    assert found["step"].item() == 3.0
    assert found["f8"].view(torch.uint8).tolist() == list(b"abc")
    assert (found["e"].shape, found["n"]) == (torch.Size([0, 4]), {1: (2,)})
    assert zipfile.ZipFile(path).testzip() is None
    assert is_torch(path)
    assert read(path)["w"].offset % 64 == 0


def test_a_fill_of_another_size_is_an_error(tmp_path: Path) -> None:
    for data in (b"x" * 11, b"x" * 13):
        with pytest.raises(CorruptError, match="more or fewer"):
            write_torch(tmp_path / f"{len(data)}.pt", Tensor("F32", (3,), lambda data=data: [data]))

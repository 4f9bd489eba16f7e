"""Hostile and broken folders: each is one clear error, and no offset, size or path of theirs is believed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.ckpt.universal.chunks import digest
from holdfast.ckpt.universal.errors import CheckpointError, CorruptError, IncompleteError, UsageError
from holdfast.ckpt.universal.jsonio import canonical, parse, parse_canonical
from holdfast.ckpt.universal.latest import (
    Candidate,
    leftovers,
    plan_prune,
    prune,
    read_latest,
    write_latest,
)
from holdfast.ckpt.universal.manifest import commit_bytes
from holdfast.ckpt.universal.model import Checkpoint, Group, Slab, Span, TensorState, validate
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.stheader import build_header, parse_header, read_header
from holdfast.ckpt.universal.verify import verify
from holdfast.ckpt.universal.write import WriteOptions

_spec = importlib.util.spec_from_file_location(
    "universal_helpers", Path(__file__).parents[1] / "helpers" / "universal.py"
)
assert _spec is not None
assert _spec.loader is not None
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)


def rewritten(home: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest changed by somebody who also wrote a COMMIT for it."""
    value = json.loads((home / "MANIFEST.json").read_bytes())
    change(value)
    data = canonical(value)
    (home / "MANIFEST.json").write_bytes(data)
    (home / "COMMIT").write_bytes(commit_bytes(data))


def slab_of(value: dict[str, Any], name: str = "embed", state: str = "exp_avg") -> dict[str, Any]:
    return next(t for t in value["tensors"] if (t["name"], t["state"]) == (name, state))["slabs"][0]  # type: ignore[no-any-return]


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("leaves", lambda v: slab_of(v).update(file="../../secret")),
    ("leaves", lambda v: slab_of(v).update(file="/secret")),
    ("leaves", lambda v: v["files"].update({"a/../../b": {"bytes": 1, "rest": ""}})),
    ("beyond the end", lambda v: slab_of(v).update(offset=1 << 40)),
    ("not one", lambda v: slab_of(v).update(offset=-1)),
    ("not one", lambda v: slab_of(v).update(offset=1.5)),
    ("not one", lambda v: slab_of(v).update(offset=True)),
    ("not that of its elements", lambda v: slab_of(v).update(bytes=8)),
    ("not one", lambda v: slab_of(v).update(box=[[0, 1 << 70]])),
    ("both or neither", lambda v: slab_of(v).update(flat=[0, 4])),
    ("missing", lambda v: slab_of(v).update(box=[[0, 96], [0, 128]], bytes=96 * 128 * 4, chunk=0, digests="")),
    ("do not cover", lambda v: slab_of(v).update(digests="0" * 32)),
    ("that are none", lambda v: slab_of(v).update(digests="x" * 32)),
    ("chunk size", lambda v: slab_of(v).update(chunk=1 << 40)),
    ("chunk size", lambda v: slab_of(v).update(chunk=16383)),
    ("codec", lambda v: slab_of(v).update(codec="lzma")),
    ("all listed", lambda v: slab_of(v).update(codec="zstd-planes")),
    ("share bytes", lambda v: slab_of(v, "layer.0").update(offset=slab_of(v)["offset"])),
    ("unknown dtype", lambda v: v["tensors"][0].update(dtype="F31")),
    ("impossible shape", lambda v: v["tensors"][0].update(shape=[1 << 59, 1 << 59])),
    ("impossible shape", lambda v: v["tensors"][0].update(shape=[1] * 99)),
    ("role", lambda v: v["tensors"][0].update(role="root")),
    ("listed twice", lambda v: v["tensors"].append(v["tensors"][0])),
    ("not one", lambda v: v.update(tensors={})),
    ("not one", lambda v: v.pop("groups")),
    ("two groups", lambda v: v["groups"].append(v["groups"][0])),
    ("not there", lambda v: v["groups"][0]["params"].append("ghost")),
    ("owner is not there", lambda v: v["aliases"].update(head="ghost")),
    ("states of its own", lambda v: v["aliases"].update(embed="bias")),
    ("topics", lambda v: v["metadata"].append("../x")),
    ("not listed", lambda v: v["metadata"].append("ghost")),
    ("completeness", lambda v: v["completeness"].update(rng="perhaps")),
    ("another version", lambda v: v.update(version=2)),
    ("not a manifest of ours", lambda v: v.update(format="x")),
    ("has no base", lambda v: v.update(layout="dcp")),
    ("not there", lambda v: v["files"].update(ghost={"bytes": 1, "rest": ""})),
]


@pytest.mark.parametrize(("message", "change"), HOSTILE, ids=[f"{n}-{m}" for n, (m, _) in enumerate(HOSTILE)])
def test_a_hostile_manifest_is_one_clear_error(
    tmp_path: Path, message: str, change: Callable[[dict[str, Any]], None]
) -> None:
    helpers.save(tmp_path / "c")
    open_checkpoint(tmp_path / "c")
    rewritten(tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert verify(tmp_path / "c", "quick") != []


def test_chunks_larger_than_a_run_are_verified_whole(tmp_path: Path) -> None:
    """Other writers may have chunks of up to 64 MiB."""
    data = bytes(range(256)) * (9 << 12) + b"end!"
    (tmp_path / "f").write_bytes(data)
    slab = Slab(Span("f", 0, len(data)), "F32", flat=(0, len(data) // 4), chunk_bytes=16 << 20, digests=(digest(data),))
    tensor = TensorState("w", "fp32", "F32", (len(data) // 4,), (slab,))
    checkpoint = Checkpoint(tmp_path, "test", {tensor.key: tensor})
    assert verify(checkpoint) == []
    with Reader(checkpoint) as reader:
        assert bytes(reader.read("w", "fp32")) == data
    (tmp_path / "f").write_bytes(data[:-1] + b"?")
    assert [(f.start, f.stop) for f in verify(checkpoint)] == [(0, len(data))]


def test_random_damage_with_a_valid_commit_is_a_checkpoint_error_and_nothing_else(tmp_path: Path) -> None:
    helpers.save(tmp_path / "c")
    good = (tmp_path / "c/MANIFEST.json").read_bytes()
    chance = random.Random(7)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 3)] = bytes(chance.choices(b'0123456789[]{},:"-.enulltrue', k=2))
        (tmp_path / "c/MANIFEST.json").write_bytes(data)
        (tmp_path / "c/COMMIT").write_bytes(commit_bytes(bytes(data)))
        try:
            open_checkpoint(tmp_path / "c")
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_json_has_caps_and_one_spelling() -> None:
    value = {"b": [1, 0.1, float("inf"), float("-inf"), "ä"], "a": {"x": None}}
    data = canonical(value)
    assert data == '{"a":{"x":null},"b":[1,0.1,{"$float":"inf"},{"$float":"-inf"},"ä"]}\n'.encode()
    assert parse_canonical(data, "f") == value
    for bad in (
        b'{"a":1,"a":2}\n',
        b'{"a": 1}\n',
        b'{"b":1,"a":2}\n',
        b"1.0e0\n",
        b"NaN\n",
        b"[1]",
        b"\xff\n",
        b"1e999\n",
    ):
        with pytest.raises(CorruptError):
            parse_canonical(bad, "f")
    for deep in (b"[" * 100_000, b"[" * 100 + b"]" * 100, b"9" * 10_000):
        with pytest.raises(CorruptError):
            parse(deep, "f")
    with pytest.raises(UsageError):
        canonical({"$float": "inf"})


def test_a_safetensors_header_is_read_as_it_was_built_and_hostile_ones_are_refused(tmp_path: Path) -> None:
    rows = [("a", "F32", (2, 3), 24), ("b", "BF16", (), 2), ("c", "U8", (0,), 0)]
    header = build_header(rows, {"format": "pt"})
    assert len(header) % 64 == 0
    (tmp_path / "f").write_bytes(header + bytes(26))
    found = read_header(tmp_path / "f")
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in found.entries] == rows
    assert found.entries[0].offset == found.data_start == len(header)
    for bad in (header + bytes(25), header + bytes(27), b"\xff" * 8 + header[8:], header[:7], b""):
        (tmp_path / "f").write_bytes(bad)
        with pytest.raises(CorruptError):
            read_header(tmp_path / "f")
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    for change in (
        {"dtype": "X"},
        {"shape": [5]},
        {"shape": [-4]},
        {"shape": [True]},
        {"data_offsets": [1, 5]},
        {"x": 1},
    ):
        data = json.dumps({"a": {**entry, **change}}).encode()
        with pytest.raises(CorruptError):
            parse_header(data, 8 + len(data) + 4, "f")
    data = b'{"a":' + json.dumps(entry).encode() + b',"a":' + json.dumps(entry).encode() + b"}"
    with pytest.raises(CorruptError, match="twice"):
        parse_header(data, 8 + len(data) + 4, "f")


def test_a_cover_with_a_gap_an_overlap_or_another_dtype_is_named(tmp_path: Path) -> None:
    def check(*slabs: Slab) -> None:
        tensor = TensorState("w", "fp32", "F32", (4, 4), slabs)
        validate(Checkpoint(tmp_path, "test", {tensor.key: tensor}))

    def flat(low: int, high: int, dtype: str = "F32") -> Slab:
        return Slab(Span("f", 0, (high - low) * (4 if dtype == "F32" else 2)), dtype, flat=(low, high))

    check(flat(8, 16), flat(0, 8))
    check(flat(0, 6), Slab(Span("f", 0, 8), "F32", box=((1, 2), (2, 4))), flat(8, 16))
    with pytest.raises(IncompleteError, match=r"name=w state=fp32 missing=\[\(6, 8\)\]"):
        check(flat(0, 6), flat(8, 16))
    with pytest.raises(IncompleteError, match=r"missing=\[\(\(1, 2\), \(2, 4\)\)\]"):
        check(flat(0, 6), Slab(Span("f", 0, 32), "F32", box=((2, 4), (0, 4))))
    with pytest.raises(CorruptError, match="same elements"):
        check(flat(0, 9), flat(8, 16))
    with pytest.raises(CorruptError, match="another dtype"):
        check(flat(0, 8), flat(8, 16, "BF16"))
    with pytest.raises(CorruptError, match="outside of its tensor"):
        check(flat(0, 17))
    with pytest.raises(CorruptError, match="order"):
        Checkpoint(tmp_path, "test", {}, groups=(Group(1, {}, ()),))


def test_latest_is_swapped_and_never_points_to_what_was_not_committed(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="no checkpoint here yet"):
        read_latest(tmp_path)
    for name in ("step-1", "step-2"):
        helpers.save(tmp_path / name)
        write_latest(tmp_path, name)
        assert read_latest(tmp_path) == tmp_path / name
    (tmp_path / "empty").mkdir()
    for name in ("empty", "ghost", "../x", ".hidden"):
        with pytest.raises(UsageError):
            write_latest(tmp_path, name)
    prune(tmp_path, ["step-2"])
    with pytest.raises(IncompleteError, match="nothing that was committed"):
        read_latest(tmp_path)
    assert leftovers(tmp_path) == []
    (tmp_path / "latest").write_text("../../etc\n")
    with pytest.raises(IncompleteError):
        read_latest(tmp_path)


def test_pruning_keeps_the_last_the_best_and_the_protected() -> None:
    losses = [5.0, 2.0, float("nan"), 3.0, None, 4.0]
    found = [Candidate(f"s{step}", step, loss) for step, loss in enumerate(losses)]
    random.Random(1).shuffle(found)
    assert plan_prune(found, keep_last=2) == ["s0", "s1", "s2", "s3"]
    assert plan_prune(found, keep_last=2, keep_best=1) == ["s0", "s2", "s3"]
    assert plan_prune(found, keep_last=1, keep_best=2, best="max") == ["s1", "s2", "s3", "s4"]
    assert plan_prune(found, keep_last=0, protected=["s0"]) == ["s1", "s2", "s3", "s4"]
    assert plan_prune([], keep_last=3) == []


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    helpers.save(tmp_path / "c")
    path = tmp_path / "c/optim/exp_avg-00001-of-00001.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptError, match="not a regular file"):
        open_checkpoint(tmp_path / "c")
    assert verify(tmp_path / "c") != []


def test_the_document_s_reader_reads_what_we_write(tmp_path: Path) -> None:
    helpers.save(tmp_path / "c", scale=32, options=WriteOptions(fsync=False, tile=True))
    text = (Path(__file__).parents[2] / "docs/CHECKPOINT_FORMAT.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    for (name, state), (_, array) in helpers.tensors(scale=32).items():
        if array.size:
            assert scope["read"](tmp_path / "c", name, state) == array.tobytes()
    assert scope["read"](tmp_path / "c", "head", "fp32") == scope["read"](tmp_path / "c", "embed", "fp32")
    said = json.loads(commit_bytes(b"x"))
    check = said.pop("check")
    assert check == digest(canonical(said))

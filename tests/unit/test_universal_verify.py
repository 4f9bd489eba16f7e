"""Faults of every kind, put into checkpoints on purpose: verification finds each, and names the place."""

from __future__ import annotations

import importlib.util
import itertools
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from holdfast.ckpt.universal import scan
from holdfast.ckpt.universal.adopt import adopt
from holdfast.ckpt.universal.errors import CheckpointError, CorruptError, IncompleteError
from holdfast.ckpt.universal.files import Files
from holdfast.ckpt.universal.model import Checkpoint, Slab, Span, TensorState
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.verify import digested, verify
from holdfast.ckpt.universal.write import WriteOptions

_spec = importlib.util.spec_from_file_location(
    "universal_helpers", Path(__file__).parents[1] / "helpers" / "universal.py"
)
assert _spec is not None
assert _spec.loader is not None
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

ARCHIVE = WriteOptions(fsync=False, archive=True)


def flip(path: Path, bit: int) -> None:
    """Flip one bit; again to take it back."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))


def owner(checkpoint: Checkpoint, file: str, offset: int) -> tuple[str, str]:
    """Whose byte this is; ("", "") outside of all tensors."""
    for tensor in checkpoint.states.values():
        for slab in tensor.slabs:
            if slab.span.file == file and slab.span.offset <= offset < slab.span.stop:
                return tensor.key
    return "", ""


@pytest.mark.parametrize("archive", [False, True])
def test_a_thousand_flipped_bits_are_each_found_at_their_place(tmp_path: Path, archive: bool) -> None:
    home = tmp_path / "c"
    checkpoint = helpers.save(home, options=WriteOptions(fsync=False, archive=archive))
    files = sorted(path for path in home.rglob("*") if path.is_file())
    assert {"MANIFEST.json", "COMMIT"} <= {path.name for path in files}
    chance = random.Random(5)
    for at in range(1000 if not archive else 200):
        path = files[at % len(files)]
        name = path.relative_to(home).as_posix()
        bit = chance.randrange(path.stat().st_size * 8)
        flip(path, bit)
        found = verify(home)
        flip(path, bit)
        assert len(found) == 1, (name, bit, found)
        assert found[0].file == name
        if name not in ("MANIFEST.json", "COMMIT"):
            assert found[0].start <= bit // 8 < found[0].stop, (name, bit, found)
            assert (found[0].name, found[0].state) == owner(checkpoint, name, bit // 8)
    assert verify(home) == []


def test_a_flipped_bit_never_reaches_a_reader(tmp_path: Path) -> None:
    checkpoint = helpers.save(tmp_path / "c")
    tensor = checkpoint.tensor("embed", "exp_avg")
    span = tensor.slabs[0].span
    flip(tmp_path / "c" / span.file, (span.offset + 50_000) * 8)
    with Reader(checkpoint) as reader:
        reader.read("embed", "exp_avg", (0, 1000))  # another chunk
        with pytest.raises(CorruptError, match=rf"a digest differs \[name=embed state=exp_avg file={span.file} range="):
            reader.read("embed", "exp_avg", (12_400, 12_600))
        with pytest.raises(CorruptError, match="digest"):
            reader.read("embed", "exp_avg", ((48, 49), (10, 250)))
    with Reader(checkpoint, verify=False) as reader:
        reader.read("embed", "exp_avg")


def kinds(home: Path, mode: str = "full") -> set[tuple[str, str]]:
    return {(finding.kind, finding.file) for finding in verify(home, mode)}  # type: ignore[arg-type]


def test_structural_faults_are_found_without_reading_the_payload(tmp_path: Path) -> None:
    helpers.save(tmp_path / "c")
    payload = "optim/exp_avg-00001-of-00001.safetensors"

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        return Path(shutil.copytree(tmp_path / "c", tmp_path / "d"))

    home = fresh()
    with (home / payload).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    assert {kind for kind, _ in kinds(home, "quick")} == {"size", "missing"}
    named = [finding for finding in verify(home, "quick") if finding.name]
    assert [(f.name, f.state, f.stop - f.start) for f in named] == [("bias", "exp_avg", 1)]
    with pytest.raises(CorruptError, match="another size"):
        open_checkpoint(home)

    home = fresh()
    (home / payload).unlink()
    assert kinds(home, "quick") == {("missing", payload)}
    with pytest.raises(IncompleteError, match=payload):
        open_checkpoint(home)

    home = fresh()
    (home / payload).rename(home / "optim/exp_avg-00002-of-00001.safetensors")
    assert kinds(home, "quick") == {("missing", payload), ("unexpected", "optim/exp_avg-00002-of-00001.safetensors")}

    home = fresh()
    shutil.copy(home / payload, home / "optim/copy.safetensors")
    assert kinds(home, "quick") == {("unexpected", "optim/copy.safetensors")}

    home = fresh()
    (home / payload).unlink()
    (home / payload).symlink_to(tmp_path / "c" / payload)
    assert kinds(home, "quick") == {("structure", payload)}
    with pytest.raises(CorruptError, match="a link that leaves"):
        open_checkpoint(home)

    home = fresh()
    (home / "COMMIT").unlink()
    assert kinds(home, "quick") == {("missing", "COMMIT")}
    with pytest.raises(IncompleteError, match="no COMMIT"):
        open_checkpoint(home)


@pytest.mark.parametrize("options", [WriteOptions(fsync=False), ARCHIVE], ids=["plain", "archive"])
def test_a_file_of_another_step_is_found_even_by_the_quick_look(tmp_path: Path, options: WriteOptions) -> None:
    home = tmp_path / "c"
    helpers.save(home, seed=0, options=options)
    helpers.save(tmp_path / "other", seed=1, options=options)
    for payload in sorted(path.relative_to(home) for path in home.rglob("*.safetensors")):
        shutil.copy(home / payload, tmp_path / "kept")
        shutil.copy(tmp_path / "other" / payload, home / payload)
        for mode in ("quick", "full"):
            assert {file for _, file in kinds(home, mode)} == {payload.as_posix()}
        shutil.copy(tmp_path / "kept", home / payload)
    shutil.copy(tmp_path / "other/MANIFEST.json", home / "MANIFEST.json")
    assert {file for _, file in kinds(home, "quick")} == {"MANIFEST.json"}


def foreign(folder: Path) -> Checkpoint:
    """Two files of somebody else: flat ranges, a transposed box, and bytes that belong to no tensor."""
    folder.mkdir()
    array = np.arange(60_000, dtype=np.float32).reshape(300, 200)
    half = array.size // 2
    (folder / "rank0.bin").write_bytes(b"head" + array.reshape(-1)[:half].tobytes() + b"tail")
    (folder / "rank1.bin").write_bytes(b"HEAD" + array.reshape(-1)[half:].tobytes() + array.T.tobytes())
    flats = (
        Slab(Span("rank0.bin", 4, half * 4), "F32", flat=(0, half)),
        Slab(Span("rank1.bin", 4, half * 4), "F32", flat=(half, array.size)),
    )
    box = Slab(Span("rank1.bin", 4 + half * 4, array.nbytes), "F32", box=((0, 300), (0, 200)), strides=(1, 300))
    states = [TensorState("w", "fp32", "F32", (300, 200), flats), TensorState("w", "weight", "F32", (300, 200), (box,))]
    return Checkpoint(folder, "test:flat", {t.key: t for t in states}, metadata={"trainer": {"step": 3}})


@pytest.mark.parametrize("elsewhere", [False, True])
def test_foreign_files_are_adopted_where_they_are(tmp_path: Path, elsewhere: bool) -> None:
    checkpoint = foreign(tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    (tmp_path / "far").mkdir()
    home = tmp_path / "far/manifest" if elsewhere else tmp_path / "theirs.holdfast"
    adopted = adopt(checkpoint, home if elsewhere else None, digests=True)
    opened = open_checkpoint(home)
    assert opened == adopted
    assert digested(opened)
    assert verify(home) == []
    assert opened.metadata == {"trainer": {"step": 3}}
    expected = np.arange(60_000, dtype=np.float32)
    with Reader(opened) as reader:
        assert bytes(reader.read("w", "fp32")) == bytes(reader.read("w", "weight")) == expected.tobytes()
    assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before
    if not elsewhere:  # the pair may be moved together
        (tmp_path / "moved").mkdir()
        shutil.move(tmp_path / "theirs", tmp_path / "moved/theirs")
        shutil.move(home, tmp_path / "moved/theirs.holdfast")
        assert verify(tmp_path / "moved/theirs.holdfast") == []


def test_every_flipped_bit_of_an_adopted_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint = foreign(tmp_path / "theirs")
    adopt(checkpoint, digests=True)
    home = tmp_path / "theirs.holdfast"
    chance = random.Random(6)
    for path in [*sorted((tmp_path / "theirs").iterdir()), *sorted(p for p in home.rglob("*") if p.is_file())]:
        for _ in range(40):
            bit = chance.randrange(path.stat().st_size * 8)
            flip(path, bit)
            found = verify(home)
            flip(path, bit)
            assert path.name in {Path(finding.file).name for finding in found}
    assert verify(home) == []


def test_an_adopted_file_that_was_swapped_is_found_without_digests(tmp_path: Path) -> None:
    adopt(foreign(tmp_path / "theirs"))
    home = tmp_path / "theirs.holdfast"
    assert not digested(open_checkpoint(home))
    other = np.full(30_000, 2.5, np.float32)
    (tmp_path / "theirs/rank0.bin").write_bytes(b"head" + other.tobytes() + b"tail")
    assert kinds(home, "quick") == {("digest", "rank0.bin")}


def test_a_truncated_foreign_file_is_refused_before_it_is_adopted(tmp_path: Path) -> None:
    checkpoint = foreign(tmp_path / "theirs")
    path = tmp_path / "theirs/rank1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"beyond the end of its file \[name=w state=weight file=rank1.bin\]"):
        adopt(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    checkpoint = helpers.save(tmp_path / "c")
    seen: list[tuple[int, int]] = []
    assert verify(tmp_path / "c", progress=lambda done, total: seen.append((done, total))) == []
    total = sum(slab.span.nbytes for tensor in checkpoint.states.values() for slab in tensor.slabs)
    assert max(seen) == (total, total)


def test_runs_hold_every_chunk_once_in_order_and_no_more_than_fits() -> None:
    # Side by side, with a hole, and one chunk that is larger than a run.
    sizes = [(0, 5 << 20, 1 << 20), (5 << 20, 300_000, 16 << 10), (7 << 20, 9 << 20, 8 << 20)]
    slabs = [
        Slab(Span("f", offset, nbytes), "U8", box=((0, nbytes),), chunk_bytes=chunk) for offset, nbytes, chunk in sizes
    ]
    runs = list(scan._runs(slabs[::-1]))
    for run in runs:
        edges = [edge for part in run for edge in part.edges]
        assert edges == sorted(edges)
        assert edges[-1] - edges[0] <= scan.RUN_BYTES or len(run) == 1 == len(run[0].edges) - 1
    found = [
        (slabs[::-1][part.slab].span.offset, part.first + at, low, high)
        for run in runs
        for part in run
        for at, (low, high) in enumerate(itertools.pairwise(part.edges))
    ]
    expected = [
        (offset, at, offset + low, offset + min(low + chunk, nbytes))
        for offset, nbytes, chunk in sizes
        for at, low in enumerate(range(0, nbytes, chunk))
    ]
    assert found == expected


def test_an_error_in_one_thread_ends_the_pass(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(3 * scan.RUN_BYTES))
    size = 8 * scan.RUN_BYTES
    slab = Slab(Span("f", 0, size), "U8", box=((0, size),), chunk_bytes=scan.RUN_BYTES)
    seen: list[int] = []
    files = Files(tmp_path, links=True)
    with ThreadPoolExecutor(2) as pool, pytest.raises(IncompleteError, match="too early"):
        scan.scan(files, "f", [slab], pool, 2, lambda at, first, edges, found: seen.append(first), lambda n: None)
    files.close()
    assert set(seen) <= {0, 1, 2}

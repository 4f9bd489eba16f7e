"""Writing and reading universal checkpoints: bits, layout, resume, crash, full disk. No torch."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from holdfast.ckpt.universal.disk import Disk, Unsynced
from holdfast.ckpt.universal.errors import IncompleteError, StorageError, UsageError
from holdfast.ckpt.universal.model import Checkpoint
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.save import Part, save_universal
from holdfast.ckpt.universal.verify import verify
from holdfast.ckpt.universal.write import Details, StatePlan, WriteOptions, Writer

HELPERS = Path(__file__).parents[1] / "helpers" / "universal.py"
_spec = importlib.util.spec_from_file_location("universal_helpers", HELPERS)
assert _spec is not None
assert _spec.loader is not None
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

CALM = WriteOptions(fsync=False)


def same(checkpoint: Checkpoint, seed: int = 0, scale: int = 1) -> None:
    """Every tensor has the bits of tensors(seed)."""
    with Reader(checkpoint, jobs=2) as reader:
        for (name, state), (_, array) in helpers.tensors(seed, scale).items():
            assert bytes(reader.read(name, state)) == array.tobytes(), (name, state)


@pytest.mark.parametrize(
    "options",
    [
        CALM,
        WriteOptions(),
        replace(CALM, tile=True),
        replace(CALM, archive=True),
        replace(CALM, archive=True, tile=True, file_bytes_max=3 << 20),
        replace(CALM, file_bytes_max=100_000),
    ],
    ids=["plain", "fsync", "tiles", "archive", "archive-tiles-small-files", "small-files"],
)
def test_everything_comes_back_bit_for_bit(tmp_path: Path, options: WriteOptions) -> None:
    written = helpers.save(tmp_path / "c", scale=32, options=options)
    opened = open_checkpoint(tmp_path / "c")
    assert opened == written
    same(opened, scale=32)
    assert verify(tmp_path / "c") == []
    assert opened.metadata["trainer"]["best"] == float("inf")
    assert opened.tensor("head", "exp_avg").name == "embed", "an alias leads to its owner"
    with Reader(opened) as reader:
        assert reader.opaque("odd.bin") == b"somebody's bytes"
    assert list(tmp_path.glob(".*")) == [], "nothing hidden is left"


def test_the_weights_load_in_the_reference_reader(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    helpers.save(tmp_path / "c", options=replace(CALM, tile=True), scale=32)
    index = json.loads((tmp_path / "c/weights/model.safetensors.index.json").read_text())
    with safetensors.safe_open(tmp_path / "c/weights" / index["weight_map"]["rope"], "np") as file:
        assert (file.get_tensor("rope") == helpers.tensors(scale=32)["rope", "buffer"][1]).all()
        assert set(file.keys()) == {n for n, s in helpers.tensors() if s in ("weight", "buffer")}
    (path,) = (tmp_path / "c/optim").glob("exp_avg-*")
    with safetensors.safe_open(path, "np") as file:
        tiles = [file.get_tensor(f"embed[:,{a}:{a + 128}]") for a in (0, 128)]
        assert (np.hstack(tiles) == helpers.tensors(scale=32)["embed", "exp_avg"][1]).all()


def test_pieces_may_come_in_any_order_twice_and_from_several_threads(tmp_path: Path) -> None:
    array = np.arange(700 * 300, dtype=np.float32).reshape(700, 300)
    edges = sorted({0, array.size, *random.Random(1).sample(range(array.size), 40)})
    pieces = list(itertools.pairwise(edges)) * 2
    random.Random(2).shuffle(pieces)
    writer = Writer(tmp_path / "c", CALM)
    writer.begin([StatePlan("w", "fp32", "F32", array.shape)])

    def work(mine: list[tuple[int, int]]) -> None:
        for low, high in mine:
            writer.put("w", "fp32", array.reshape(-1)[low:high].tobytes(), (low, high))

    threads = [threading.Thread(target=work, args=(pieces[at::3],)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Reader(writer.commit()) as reader:
        assert bytes(reader.read("w", "fp32")) == array.tobytes()
    assert verify(tmp_path / "c") == []


def test_two_writers_that_disagree_are_found(tmp_path: Path) -> None:
    with Writer(tmp_path / "c", CALM) as writer:
        writer.begin([StatePlan("w", "fp32", "F32", (9,))])
        writer.put("w", "fp32", b"\1" * 36)
        with pytest.raises(UsageError, match="disagree"):
            writer.put("w", "fp32", b"\2" * 36)


def test_bytes_that_never_came_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    with Writer(tmp_path / "c", CALM) as writer:
        writer.begin([StatePlan("w", "fp32", "F32", (50_000,))])
        writer.put("w", "fp32", bytes(4 * 20_000), (0, 20_000))
        with pytest.raises(IncompleteError, match=r"name=w state=fp32 missing=\[\(16384, 50000\)\]"):
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(UsageError, match="there already"):
        helpers.save(tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_second_writer_of_the_same_plan_is_refused(tmp_path: Path) -> None:
    plan = [StatePlan("w", "fp32", "F32", (9,))]
    first, second = Writer(tmp_path / "c", CALM), Writer(tmp_path / "c", CALM)
    first.begin(plan)
    with pytest.raises(UsageError, match="another process"):
        second.begin(plan)
    first.put("w", "fp32", bytes(36))
    first.commit()
    open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("archive", [False, True])
def test_a_full_disk_at_any_call_is_one_clear_error_and_leaves_nothing(tmp_path: Path, archive: bool) -> None:
    counting = helpers.FaultyDisk()
    helpers.save(tmp_path / "whole", disk=counting, options=WriteOptions(archive=archive))
    committed = 0
    for at in random.Random(3).sample(range(1, counting.calls + 1), 40):
        target = tmp_path / f"c{at}"
        with contextlib.ExitStack() as fails:
            if at < counting.calls - 4:
                fails.enter_context(pytest.raises(StorageError, match="no space left"))
            else:
                fails.enter_context(contextlib.suppress(StorageError))
            helpers.save(target, disk=helpers.FaultyDisk(at), options=WriteOptions(archive=archive))
        if target.exists():  # only the last calls, after the rename
            assert verify(target) == []
            committed += 1
        assert not list(tmp_path.glob(f".c{at}.*"))
    assert committed < 5


CHILD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec); spec.loader.exec_module(helpers)
from holdfast.ckpt.universal.write import WriteOptions
from pathlib import Path
options = WriteOptions(resume=True, archive=sys.argv[4] == "archive", id="0" * 32)
helpers.save(Path(sys.argv[2]), disk=helpers.FaultyDisk(int(sys.argv[3]), die=True), options=options, piece=3000)
"""


@pytest.mark.parametrize(("mode", "points"), [("plain", 50), ("archive", 12)])
def test_sigkill_at_any_write_leaves_the_whole_or_nothing_and_is_taken_up(
    tmp_path: Path, mode: str, points: int
) -> None:
    options = WriteOptions(resume=True, archive=mode == "archive", id="0" * 32)
    counting = helpers.FaultyDisk()
    helpers.save(tmp_path / "whole", disk=counting, options=options, piece=3000)
    places = sorted(random.Random(4).sample(range(2, counting.calls - 5), points - 6))
    places += list(range(counting.calls - 5, counting.calls + 1))
    killed = 0
    for first in range(0, len(places), 2):  # as many at a time as the machine that tests may have cores
        children = [_child(tmp_path / f"c{at}", at, mode) for at in places[first : first + 2]]
        killed += sum(child.wait(60) == -9 for child in children)
    assert killed == len(places)
    for at in places:
        target = tmp_path / f"c{at}"
        hidden = list(tmp_path.glob(f".{target.name}.tmp-*"))
        for folder in [target, *hidden]:
            if (folder / "COMMIT").exists() and (folder / "COMMIT").stat().st_size > 0:
                assert _refused(folder) or verify(folder) == []
        if not target.exists():
            helpers.save(target, options=options)
        same(open_checkpoint(target))
        assert verify(target) == []
        assert not list(tmp_path.glob(f".{target.name}.*"))


def _child(target: Path, at: int, mode: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", CHILD, str(HELPERS), str(target), str(at), mode]
    return subprocess.Popen(arguments, env={**os.environ, "PYTHONSAFEPATH": "1"}, cwd=target.parent)


def _refused(folder: Path) -> bool:
    """A torn COMMIT: half of it was written when the process died."""
    found = verify(folder, "quick")
    return bool(found) and found[0].file == "COMMIT"


def test_a_resumed_write_does_not_write_again_what_is_there(tmp_path: Path) -> None:
    options = replace(CALM, resume=True)
    array = np.random.default_rng(0).standard_normal((2000, 1000), np.float32)  # 7.6 MiB, chunks of 32 KiB
    plan = [StatePlan("w", "fp32", "F32", array.shape)]
    done = 1_600_000
    with Writer(tmp_path / "c", options) as writer:
        writer.begin(plan)
        writer.put("w", "fp32", array.reshape(-1)[:done].tobytes(), (0, done))
    with Writer(tmp_path / "c", options) as writer:
        writer.begin(plan)
        ((start, stop),) = writer.missing("w", "fp32")
        writer.put("w", "fp32", array.tobytes())
        assert writer.bytes_written == (stop - start) * 4
        assert writer.bytes_written <= (array.size - done) * 4 + 0.05 * done * 4
        writer.commit()
    with Reader(open_checkpoint(tmp_path / "c")) as reader:
        assert bytes(reader.read("w", "fp32")) == array.tobytes()


def test_a_journal_is_not_believed_when_the_bytes_are_others(tmp_path: Path) -> None:
    options = replace(CALM, resume=True)
    array = np.random.default_rng(0).standard_normal(100_000, np.float32)
    plan = [StatePlan("w", "fp32", "F32", array.shape)]
    with Writer(tmp_path / "c", options) as writer:
        writer.begin(plan)
        writer.put("w", "fp32", array.tobytes())
    (payload,) = tmp_path.glob(".c.tmp-*/optim/*.safetensors")
    with payload.open("r+b") as file:  # as a loss of power leaves it
        file.seek(200_000)
        file.write(bytes(5000))
    with Writer(tmp_path / "c", options) as writer:
        writer.begin(plan)
        assert writer.missing("w", "fp32") == [(49152, 53248)]
        writer.put("w", "fp32", array.tobytes())
        writer.commit()
    assert verify(tmp_path / "c") == []


class Waiting(Disk):
    """Notes the files whose fsync it waited for."""

    def __init__(self) -> None:
        self.durable_files: set[str] = set()

    def fsync(self, fd: int) -> None:
        self.durable_files.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name.removesuffix(".new"))
        super().fsync(fd)


@pytest.mark.parametrize("archive", [False, True])
def test_what_was_written_without_waiting_is_waited_for_by_who_takes_it_up(tmp_path: Path, archive: bool) -> None:
    options = WriteOptions(resume=True, archive=archive)
    array = np.random.default_rng(0).standard_normal(100_000, np.float32)
    plan = [StatePlan("w", "fp32", "F32", array.shape), StatePlan("v", "weight", "F32", (3,))]
    with Writer(tmp_path / "c", options, Unsynced()) as writer:
        writer.begin(plan)
        writer.put("w", "fp32", array.tobytes())
    disk = Waiting()
    with Writer(tmp_path / "c", options, disk) as writer:
        writer.begin(plan)
        assert writer.missing("w", "fp32") == []
        writer.put("v", "weight", bytes(12))
        writer.commit()
    payloads = {path.name for path in (tmp_path / "c").rglob("*.safetensors")}
    assert len(payloads) == 2
    assert payloads <= disk.durable_files
    assert verify(tmp_path / "c") == []


def test_parts_of_stages_and_replicas_become_one_checkpoint(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.float32)
    fetched = []

    def part(low: int, high: int) -> Part:
        def data() -> bytes:
            fetched.append((low, high))
            return array[low:high].tobytes()

        return Part("w", "exp_avg", "F32", (1000,), low, high, data, "optim")

    parts = [part(600, 1000), part(0, 500), part(0, 300), part(400, 700)]
    details = Details(steps={"w": 3}, metadata={"trainer": {"step": 3}})
    with Reader(save_universal(tmp_path / "c", parts, details, CALM)) as reader:
        assert bytes(reader.read("w", "exp_avg")) == array.tobytes()
    assert (0, 300) not in fetched, "what another part has is not fetched"
    with pytest.raises(IncompleteError, match=r"missing=\[\(500, 600\)\]"):
        save_universal(tmp_path / "d", [part(600, 1000), part(0, 500)], details, CALM)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_rank_reads_only_its_bytes(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((4096, 1024), np.float32)
    writer = Writer(tmp_path / "c", replace(CALM, tile=True))
    writer.begin([StatePlan("w", "weight", "F32", array.shape), StatePlan("w", "exp_avg", "F32", array.shape)])
    for state in ("weight", "exp_avg"):
        writer.put("w", state, array.data.cast("B"))
    checkpoint = writer.commit()
    for state, axis, most in (("weight", 0, 1.05), ("exp_avg", 0, 1.05), ("exp_avg", 1, 1.05)):
        for world in (3, 4):
            with Reader(checkpoint) as reader:
                size = array.shape[axis]
                for rank in range(world):
                    box = [(0, n) for n in array.shape]
                    box[axis] = (rank * size // world, (rank + 1) * size // world)
                    got = reader.read("w", state, tuple(box))
                    assert bytes(got) == array[tuple(slice(*pair) for pair in box)].tobytes()
                uneven = axis == 1 and world == 3  # 16 tiles over 3 ranks: two tiles are read twice
                assert reader.bytes_read <= (1.15 if uneven else most) * reader.bytes_wanted, (state, axis, world)


def test_a_read_converts_only_when_asked_and_rounds_as_torch_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    chance = np.random.default_rng(0)
    bits = chance.integers(0, 1 << 32, 200_000, np.uint32)
    bits[:4] = [0x7F800000, 0x7FC00001, 0x80000000, 0x7F7FFFFF]
    single = bits.view(np.float32)
    double = chance.standard_normal(200_000)
    writer = Writer(tmp_path / "c", CALM)
    writer.begin([StatePlan("a", "fp32", "F32", single.shape), StatePlan("b", "fp32", "F64", double.shape)])
    writer.put("a", "fp32", single.tobytes())
    writer.put("b", "fp32", double.tobytes())
    with Reader(writer.commit()) as reader:
        assert bytes(reader.read("a", "fp32")) == single.tobytes()
        got = np.frombuffer(reader.read("a", "fp32", (1, 150_000), dtype="BF16"), np.uint16)
        want = torch.from_numpy(single[1:150_000]).bfloat16().view(torch.uint16).numpy()
        number = ~np.isnan(single[1:150_000])
        assert (got[number] == want[number]).all()
        assert np.isnan((got[~number].astype(np.uint32) << 16).view(np.float32)).all()
        assert bytes(reader.read("b", "fp32", dtype="F32")) == double.astype(np.float32).tobytes()


def test_the_library_imports_no_torch() -> None:
    names = [path.stem for path in (Path(__file__).parents[2] / "ckpt/universal").glob("[!_]*.py")]
    code = "import sys\n" + "".join(f"import holdfast.ckpt.universal.{name}\n" for name in names)
    code += "sys.exit(any(name.split('.')[0] in ('torch', 'grpc', 'zstandard', 'safetensors') for name in sys.modules))"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0

"""Every parser of what may come from anyone: any bytes end in a value or in one clear line, soon, in bounded memory.

Valid files are changed by hypothesis (bytes replaced, cut out, doubled, put in; numbers made enormous), then opened,
read and verified. A parser that raises anything but CheckpointError or ConfigError, executes something, or takes memory
or time that the file does not explain, is a bug. Derandomised, and bounded: a few seconds each.
"""

from __future__ import annotations

import io
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.ckpt.formats import open_any, write_as
from holdfast.ckpt.universal.errors import CheckpointError
from holdfast.ckpt.universal.manifest import commit_bytes
from holdfast.ckpt.universal.mapping import parse_layout
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.verify import verify
from holdfast.proto.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import models

SECONDS = 4.0
MEMORY_BYTES = 64 << 20
FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
EXECUTED: list[str] = []
WATCHED = frozenset({"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "os.fork"})
sys.addaudithook(lambda event, args: EXECUTED.append(event) if event in WATCHED else None)

MAPPING = """
[layout]
name = "mine"
otherwise = "keep"
[variables]
heads = 4
hidden = { shape = ["norm.weight", 0] }
head_dim = "$hidden / $heads"
[[rule]]
match = "layers.{i}.attn.{q,k,v}.weight"
to = "blocks.{i}.qkv.weight"
op = "concat_grouped"
axis = 0
groups = "$heads"
sizes = ["$head_dim", "$head_dim", "$head_dim"]
[[rule]]
match = "layers.{i}.mlp.weight"
to = "blocks.{i}.mlp.weight"
op = "permute"
axis = 0
view = [2, "$heads", -1]
order = [1, 0, 2]
"""


@dataclass(frozen=True, slots=True)
class Edit:
    """One change; places are parts of the length, so that one edit fits every file."""

    way: int
    at: float
    length: int
    data: bytes

    def apply(self, bytes_: bytearray) -> None:
        at = int(self.at * len(bytes_))
        if self.way == 0:
            bytes_[at : at + len(self.data)] = self.data
        elif self.way == 1:
            del bytes_[at : at + self.length]
        elif self.way == 2:
            bytes_[at:at] = bytes_[at : at + self.length]
        elif self.way == 3:
            bytes_[at:at] = self.data * self.length
        else:
            digit = next((i for i in range(at, len(bytes_)) if 48 <= bytes_[i] < 58), -1)
            if digit >= 0:
                bytes_[digit:digit] = b"9" * (self.length % 24)


EDITS = st.lists(
    st.builds(
        Edit,
        st.integers(0, 4),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 60),
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"[" * 8, b'{"', b"\xff" * 8, b"\0" * 8, b"9" * 8, b"}}"]),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, edits: list[Edit]) -> bytes:
    found = bytearray(data)
    for edit in edits:
        edit.apply(found)
    return bytes(found)


def ours(work: Callable[[], Any]) -> None:
    """A value or one line, soon, without executing anything or taking memory that nothing explains."""
    EXECUTED.clear()
    said = ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    try:
        work()
    except (CheckpointError, ConfigError) as error:
        said = str(error)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert "\n" not in said
    assert EXECUTED == []
    assert taken < MEMORY_BYTES, f"{taken / 1e6:.0f} MB"
    assert time.process_time() - began < SECONDS


def look(path: Path) -> None:
    """Everything that is read without reading tensors, and some tensors."""
    with Reader(open_any(path), jobs=1) as reader:
        for key, tensor in sorted(reader.checkpoint.states.items())[::8]:
            if tensor.nbytes < 1 << 20:
                reader.read(*key)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """One small checkpoint in every format."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tensors = models.llama()
        models.save(root / "ours", tensors, models.details(tensors, loss=2.5))
        with Reader(open_checkpoint(root / "ours")) as reader:
            write_as("deepspeed:zero2,dp=2", reader, root / "zero2")
            write_as("deepspeed:zero3,dp=2", reader, root / "zero3")
            write_as("deepspeed-universal", reader, root / "ds-universal")
            write_as("dcp:dp=2", reader, root / "dcp")
            write_as("hf:file_bytes=6000", reader, root / "hf")
            write_as("torch", reader, root / "torch.pt")
        yield root


def header_changed(data: bytes, edits: list[Edit]) -> bytes:
    """Of a safetensors file: the data behind it says nothing."""
    head = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    return changed(data[:head], edits) + data[head:]


def pickle_changed(data: bytes, edits: list[Edit]) -> bytes:
    """Of torch's zip: its pickle, in an archive that is right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            body = old.read(member)
            new.writestr(member.filename, changed(body, edits) if member.filename.endswith("data.pkl") else body)
    return buffer.getvalue()


def file_of(root: Path, pattern: str) -> Path:
    """The first file that matches; some formats have one level more."""
    return min(root.rglob(pattern)) if root.is_dir() else root


Change = Callable[[bytes, list[Edit]], bytes]
FOREIGN: dict[str, tuple[str, str, Change]] = {
    "safetensors": ("hf", "*.safetensors", header_changed),
    "hf-index": ("hf", "*.json", changed),
    "torch-zip": ("torch.pt", "", changed),
    "torch-pickle": ("torch.pt", "", pickle_changed),
    "dcp-metadata": ("dcp", ".metadata", changed),
    "dcp-payload": ("dcp", "*.distcp", changed),
    "zero2-optimizer": ("zero2", "*optim_states.pt", pickle_changed),
    "zero2-model": ("zero2", "*model_states.pt", pickle_changed),
    "zero3-optimizer": ("zero3", "*optim_states.pt", pickle_changed),
    "zero3-model": ("zero3", "*model_states.pt", pickle_changed),
    "ds-universal": ("ds-universal", "*.pt", pickle_changed),
    "latest": ("zero2", "latest", changed),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_changed_foreign_file_is_read_or_refused_in_one_line(name: str, made: Path) -> None:
    source, pattern, change = FOREIGN[name]
    file = file_of(made / source, pattern)
    data = file.read_bytes()

    @FUZZ
    @given(EDITS)
    def fuzz(edits: list[Edit]) -> None:
        file.write_bytes(change(data, edits))
        ours(lambda: look(made / source))

    try:
        fuzz()
    finally:
        file.write_bytes(data)
    look(made / source)


OURS = ("MANIFEST.json", "COMMIT", "state/trainer.json", "weights/*.safetensors", "weights/*.json", "optim/exp_avg-*")


@pytest.mark.parametrize("pattern", OURS)
def test_a_changed_file_of_ours_is_read_or_refused_in_one_line(pattern: str, made: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(made / "ours", tmp_path / "c"))
    file = min(home.glob(pattern))
    data, commit = file.read_bytes(), (home / "COMMIT").read_bytes()

    @FUZZ
    @given(EDITS)
    def fuzz(edits: list[Edit]) -> None:
        change = header_changed if file.suffix == ".safetensors" else changed
        file.write_bytes(change(data, edits))
        if pattern == "MANIFEST.json":  # who forges a manifest gets its COMMIT right
            (home / "COMMIT").write_bytes(commit_bytes(file.read_bytes()))
        ours(lambda: look(home) if len(edits) % 2 else verify(home, jobs=1))

    fuzz()
    file.write_bytes(data)
    (home / "COMMIT").write_bytes(commit)
    assert verify(home) == []


@FUZZ
@given(EDITS)
def test_a_changed_mapping_file_is_a_layout_or_one_line(edits: list[Edit]) -> None:
    text = changed(MAPPING.encode(), edits).decode("utf-8", "replace")
    ours(lambda: parse_layout(text, "fuzzed.toml"))

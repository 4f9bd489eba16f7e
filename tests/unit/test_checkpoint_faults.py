"""A small part of benchmarks/checkpoint_faults.py: seeded damage is found at its place, crafted pickles do nothing."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest

from holdfast.ckpt.formats import open_any
from holdfast.ckpt.universal.errors import CheckpointError, UnsafeError
from holdfast.ckpt.universal.verify import verify
from holdfast.ckpt.universal.write import WriteOptions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import universal as helpers
from spoil import KINDS, bomb, spoil, zipped


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_seeded_damage_is_found_in_its_file_at_its_byte(kind: str, tmp_path: Path) -> None:
    plain = helpers.save(tmp_path / "plain", options=WriteOptions(fsync=False, id="a" * 32)).root
    later = helpers.save(tmp_path / "later", seed=1, options=WriteOptions(fsync=False, id="b" * 32)).root
    for seed in range(8):
        home = Path(shutil.copytree(plain, tmp_path / f"c{seed}"))
        spoilt = spoil(home, kind, random.Random(seed), later)
        found = [one for one in verify(home) if one.file == spoilt.file]
        assert found, (seed, spoilt, verify(home))
        if spoilt.at >= 0 and spoilt.file not in ("MANIFEST.json", "COMMIT"):
            assert (found[0].name, found[0].state) == spoilt.tensor
            assert found[0].start <= spoilt.at < found[0].stop


def test_no_crafted_pickle_is_executed(tmp_path: Path) -> None:
    canary, refused = tmp_path / "canary", list[CheckpointError]()
    for seed in range(120):
        (tmp_path / "a.pt").write_bytes(zipped(bomb(random.Random(seed), canary)))
        try:
            open_any(tmp_path / "a.pt")
        except CheckpointError as error:
            refused.append(error)
        assert not canary.exists(), seed
    assert [error for error in refused if "\n" in str(error)] == []
    assert sum(isinstance(error, UnsafeError) for error in refused) > 40, "they are told by what they would call"

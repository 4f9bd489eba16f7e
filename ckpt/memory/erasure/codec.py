"""encode and decode: buffers are checked, then an engine works on them in place.

    buffers ──▶ vectors, checked ──▶ recipe (which shards, which coefficients) ──▶ copy, zero, engine.apply

Encoding is decoding with all the data at hand and parity wanted: there is one path. Does not allocate shards,
verify digests or start threads. Invariants:

* nothing is written before every count, length and address has been checked;
* shards known to be zeros (short stripes) cost no reading and no arithmetic;
* the bytes do not depend on the engine.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from holdfast.proto.errors import SnapshotError

from .fallback import Bytes, Engine, NumpyEngine
from .isal import EngineRefused, library_names, load
from .matrix import Code, recipe

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES: Final = 1 << 20
"""A good length per shard and call for who works block by block: at 64 KiB the calls themselves begin to show."""

log = logging.getLogger(__name__)


def encode(
    code: Code, data: Sequence[Buffer | None], parity: Sequence[Buffer | None], *, using: Engine | None = None
) -> None:
    """Write the parity of `data`. None in `data` is a shard of zeros, None in `parity` one that is not wanted.

    SnapshotError: counts, lengths or memory that do not fit; nothing is written then.
    """
    if len(data) != code.k or len(parity) != code.m:
        raise SnapshotError(
            "encode takes k data and m parity shards", k=code.k, m=code.m, data=len(data), parity=len(parity)
        )
    wanted = {code.k + at: shard for at, shard in enumerate(parity) if shard is not None}
    _work(code, dict(enumerate(data)), wanted, using)


def decode(
    code: Code, have: Mapping[int, Buffer | None], want: Mapping[int, Buffer], *, using: Engine | None = None
) -> None:
    """Write the shards in `want`, data or parity, from any k of those in `have`. None is a shard of zeros.

    SnapshotIncomplete: fewer than k. SnapshotError: numbers, lengths or memory that do not fit. Nothing is
    written in either case.
    """
    unknown = sorted(shard for shard in {*have, *want} if not 0 <= shard < code.n)
    if unknown:
        raise SnapshotError("no such shards in this code", k=code.k, m=code.m, shards=unknown)
    _work(code, have, want, using)


def engine() -> Engine:
    """The engine of this process: ISA-L where it is and proves itself, else numpy. Chosen at the first call."""
    return _CHOICE.engine()


def choose(libraries: Sequence[str]) -> Engine:
    """The first of `libraries` that computes what it should; numpy if none does."""
    for library in libraries:
        try:
            found = load(library)
        except EngineRefused as refused:
            log.debug("erasure engine refused: %s", refused)
            continue
        log.debug("erasure engine: ISA-L of %s", library)
        return found
    log.warning("ISA-L is not there (pip install pyeclib): parity beyond XOR is computed slowly, by numpy")
    return NumpyEngine()


class _Choice:
    """Made once, whoever comes first: two threads may encode before either has finished looking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    def engine(self) -> Engine:
        with self._lock:
            if self._engine is None:
                self._engine = choose(library_names())
            return self._engine


_CHOICE: Final = _Choice()


def _work(code: Code, have: Mapping[int, Buffer | None], want: Mapping[int, Buffer], using: Engine | None) -> None:
    given = {shard: _vector(shard, buffer) for shard, buffer in have.items() if buffer is not None}
    targets = {shard: _vector(shard, buffer, written=True) for shard, buffer in want.items()}
    empty = frozenset(shard for shard, buffer in have.items() if buffer is None)
    how = recipe(code, frozenset(given), empty, tuple(targets))
    if _common_length(given, targets) == 0:
        return
    _refuse_overlap(given, targets)
    for shard in how.zeros:
        targets[shard][:] = 0
    for source, target in how.copies:
        np.copyto(targets[target], given[source])
    if how.targets:
        (using or engine()).apply(
            how.matrix,
            len(how.targets),
            len(how.sources),
            [given[shard] for shard in how.sources],
            [targets[shard] for shard in how.targets],
        )


def _vector(shard: int, buffer: Buffer, *, written: bool = False) -> Bytes:
    """The buffer's own memory as bytes. SnapshotError: it has none in one piece, or may not be written."""
    try:
        vector: Bytes = np.frombuffer(memoryview(buffer), np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise SnapshotError(f"a shard must be one piece of memory: {error}", shard=shard) from None
    if written and not vector.flags.writeable:
        raise SnapshotError("a shard to be written is in read-only memory", shard=shard)
    return vector


def _common_length(given: Mapping[int, Bytes], targets: Mapping[int, Bytes]) -> int:
    lengths = {vector.nbytes for vectors in (given, targets) for vector in vectors.values()}
    if len(lengths) > 1:
        raise SnapshotError(
            "shards of different lengths",
            at_hand={shard: vector.nbytes for shard, vector in given.items()},
            wanted={shard: vector.nbytes for shard, vector in targets.items()},
        )
    return lengths.pop() if lengths else 0


def _refuse_overlap(given: Mapping[int, Bytes], targets: Mapping[int, Bytes]) -> None:
    """Targets share no memory with anything: engines write one while others are still being read.

    Sources may share memory with each other, and whoever reads two equal shards from one place may do so.
    """
    spans = [(vector.ctypes.data, shard, False, vector.nbytes) for shard, vector in given.items()]
    spans += [(vector.ctypes.data, shard, True, vector.nbytes) for shard, vector in targets.items()]
    # All are equally long, so if any two overlap, then so do two that start next to each other. That holds for a
    # source between a target and its victim as well: what lies between overlaps both.
    spans.sort()
    for (low, first, first_written, nbytes), (high, second, second_written, _) in itertools.pairwise(spans):
        if high < low + nbytes and (first_written or second_written):
            raise SnapshotError(
                "the memory of a shard to be written overlaps another shard's",
                shards=[first, second],
                overlap_bytes=low + nbytes - high,
            )

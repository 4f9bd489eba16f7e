"""Intel's ISA-L through ctypes: found, proved, then called on the shards' own memory.

    library_names() ──▶ load(name) ──▶ known_answers(engine) ──▶ IsalEngine | EngineRefused

The pyeclib wheel bundles the library (x86-64 and aarch64); its Python API would copy every byte several times
and hold the GIL, so only the library is used. Invariants:

* no byte is copied and the GIL is free while the library works (ctypes.CDLL);
* ISA-L's tables depend on the CPU, so they never leave the process: what is exchanged is the matrix;
* an engine that once gave a wrong byte, or wrote beside a target, is not used.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from .fallback import Bytes, Engine
from .field import multiples, product

_CALL_BYTES: Final = 1 << 30
"""The library takes a C int. Shorter calls gained nothing: it reads each source once for up to six targets."""
_TABLES_KEPT: Final = 256
_TABLE_BYTES: Final = 32
"""For each coefficient, whatever the CPU."""


class EngineRefused(Exception):
    """This library is not to be used; the message says why. Never leaves the package."""


def library_names() -> list[str]:
    """Where ISA-L may be: in the wheel of pyeclib, under a name private to it, or with the system."""
    try:
        files = importlib.metadata.files("pyeclib") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    bundled = sorted(str(file.locate()) for file in files if file.match("pyeclib.libs/libisal-pyeclib*.so*"))
    return [*bundled, "libisal.so.2"]


class IsalEngine:
    """The library behind one name. OSError: not there. AttributeError: not ISA-L."""

    name: Final = "isa-l"

    def __init__(self, library: str, *, call_bytes: int = _CALL_BYTES) -> None:
        functions = ctypes.CDLL(library)
        self._init_tables = functions.ec_init_tables
        self._init_tables.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
        self._init_tables.restype = None
        self._encode = functions.ec_encode_data
        self._encode.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 3]
        self._encode.restype = None
        self._call_bytes = call_bytes
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[int, int, bytes], ctypes.Array[ctypes.c_char]] = OrderedDict()

    def apply(self, matrix: bytes, rows: int, cols: int, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        nbytes = targets[0].nbytes
        # Behind this line nobody checks any more: a wrong count is a write into somebody's memory.
        assert len(matrix) == rows * cols and len(sources) == cols and len(targets) == rows
        assert all(shard.nbytes == nbytes and shard.flags.c_contiguous for shard in (*sources, *targets))
        tables = self._tables_of(matrix, rows, cols)
        read = [shard.ctypes.data for shard in sources]
        written = [shard.ctypes.data for shard in targets]
        for start in range(0, nbytes, self._call_bytes):
            self._encode(
                min(self._call_bytes, nbytes - start),
                cols,
                rows,
                tables,
                (ctypes.c_void_p * cols)(*[address + start for address in read]),
                (ctypes.c_void_p * rows)(*[address + start for address in written]),
            )

    def _tables_of(self, matrix: bytes, rows: int, cols: int) -> ctypes.Array[ctypes.c_char]:
        key = (rows, cols, matrix)
        with self._lock:
            tables = self._tables.get(key)
            if tables is None:
                tables = ctypes.create_string_buffer(_TABLE_BYTES * rows * cols)
                self._init_tables(cols, rows, matrix, tables)
                self._tables[key] = tables
                if len(self._tables) > _TABLES_KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(key)
        return tables


def load(library: str, make: Callable[[str], Engine] = IsalEngine) -> Engine:
    """The library as an engine that has proved itself. EngineRefused says why not."""
    try:
        engine = make(library)
    except OSError as error:
        raise EngineRefused(str(error)) from None
    except AttributeError as error:
        raise EngineRefused(f"{library}: {error}") from None
    wrong = known_answers(engine)
    if wrong is not None:
        raise EngineRefused(f"{library}: {wrong}")
    return engine


def known_answers(engine: Engine) -> str | None:
    """What the engine computes wrongly, or None. Also the first call of every function that will be used.

    A library's kernels differ by number of rows and by length, and their tails by alignment; hence the three parts.
    """
    for check in (_every_product, _every_kernel, _by_hand):
        wrong = check(engine)
        if wrong is not None:
            return wrong
    return None


def _every_product(engine: Engine) -> str | None:
    values = np.arange(256, dtype=np.uint8)
    targets = list(np.zeros((256, 256), np.uint8))
    engine.apply(bytes(range(256)), 256, 1, [values], targets)
    for factor, target in enumerate(targets):
        if target.tobytes() != multiples(factor):
            return f"wrong products with {factor}"
    return None


def _every_kernel(engine: Engine) -> str | None:
    """1 to 7 rows of 5 columns, lengths around the widths of vectors, odd addresses, and guards beside each target."""
    cols, guard = 5, 64
    pattern = np.arange(1 << 11, dtype=np.uint32)
    stored = [(pattern * (2 * col + 3) + (pattern >> 5) * 29).astype(np.uint8) for col in range(cols)]
    for rows in range(1, 8):
        matrix = bytes((37 * at + 11 * rows + 1) % 256 for at in range(rows * cols))
        for nbytes in (1, 15, 33, 64, 127, 1021):
            sources = [whole[1 + col : 1 + col + nbytes] for col, whole in enumerate(stored)]
            wholes = [np.full(nbytes + 2 * guard + 1, 0xA5, np.uint8) for _ in range(rows)]
            engine.apply(matrix, rows, cols, sources, [whole[guard + 1 : guard + 1 + nbytes] for whole in wholes])
            for row, whole in enumerate(wholes):
                factors = matrix[row * cols : (row + 1) * cols]
                right = _sum(factors, [source.tobytes() for source in sources])
                if whole.tobytes() != b"\xa5" * (guard + 1) + right + b"\xa5" * guard:
                    return f"wrong bytes in or beside row {row} of {rows}, length {nbytes}"
    return None


def _sum(factors: bytes, sources: Sequence[bytes]) -> bytes:
    total = 0
    for factor, source in zip(factors, sources, strict=True):
        total ^= int.from_bytes(source.translate(multiples(factor)), "little")
    return total.to_bytes(len(sources[0]), "little")


def _by_hand(engine: Engine) -> str | None:
    """Products from the literature (AES uses another polynomial: 0x80 * 2 tells them apart), not from our field."""
    target = np.zeros(4, np.uint8)
    engine.apply(b"\x02", 1, 1, [np.array([0x01, 0x80, 0x8E, 0xFF], np.uint8)], [target])
    if target.tobytes() != b"\x02\x1d\x01\xe3" or product(0x02, 0x80) != 0x1D:
        return "another field than x^8 + x^4 + x^3 + x^2 + 1"
    return None

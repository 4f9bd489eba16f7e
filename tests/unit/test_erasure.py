"""The erasure codec: which shards bring back which, what it refuses, and which engine it lets work."""

from __future__ import annotations

import ctypes
import itertools
import logging
import random
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import pytest

from holdfast.ckpt.memory.erasure import BLOCK_BYTES, Code, Engine, decode, encode, engine
from holdfast.ckpt.memory.erasure.codec import _Choice, choose
from holdfast.ckpt.memory.erasure.fallback import Bytes, NumpyEngine
from holdfast.ckpt.memory.erasure.field import combined, inverse, inverted, multiples, product, unit_row
from holdfast.ckpt.memory.erasure.isal import EngineRefused, IsalEngine, known_answers, library_names, load
from holdfast.ckpt.memory.erasure.matrix import recipe
from holdfast.proto.errors import ConfigError, SnapshotError, SnapshotIncomplete

CODES: Final = [(1, 1), (1, 2), (2, 1), (3, 1), (4, 2), (6, 2), (8, 3), (12, 4)]


def isal_name() -> str:
    for name in library_names():
        try:
            load(name)
        except EngineRefused:
            continue
        return name
    pytest.skip("no ISA-L here: neither pyeclib's wheel nor libisal.so.2")


def isal() -> IsalEngine:
    return IsalEngine(isal_name())


@pytest.fixture(params=["isa-l", "numpy"])
def using(request: pytest.FixtureRequest) -> Engine:
    return isal() if request.param == "isa-l" else NumpyEngine()


def stripe(code: Code, nbytes: int, using: Engine | None = None, seed: int = 0) -> list[bytes]:
    """All n shards, the data random."""
    data = [random.Random(seed + at).randbytes(nbytes) for at in range(code.k)]
    parity = [bytearray(nbytes) for _ in range(code.m)]
    encode(code, data, parity, using=using)
    return data + [bytes(shard) for shard in parity]


# ---- the code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), [*CODES, (60, 4), (32, 32), (1, 63), (63, 1)])
def test_data_are_kept_as_they_are_and_the_first_parity_is_xor(k: int, m: int) -> None:
    code = Code(k, m)
    assert code.n == k + m
    assert len(code.matrix) == (k + m) * k
    assert [code.row(shard) for shard in range(k)] == [unit_row(shard, k) for shard in range(k)]
    assert code.row(k) == b"\x01" * k
    assert all(code.row(shard)[0] == 1 for shard in range(k, k + m))
    assert min(b"".join(code.row(shard) for shard in range(k, k + m))) > 0


def test_the_matrices_are_those_that_other_processes_and_releases_have() -> None:
    assert Code(4, 2).matrix.hex() == "010000000001000000000100000000010101010101d95cac"
    assert Code(8, 3).matrix[64:].hex() == "01010101010101010137274954b5e1d90127d9a15c3cac5a"
    assert Code(1, 2).matrix.hex() == "010101"
    assert Code(6, 2).matrix == Code(6, 4).matrix[: 8 * 6]


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (-1, 2), (61, 4), (64, 1), (2.0, 1), (True, 1)])
def test_a_code_outside_the_limits_is_refused_and_the_limits_are_said(k: int, m: int) -> None:
    with pytest.raises(ConfigError, match=r"at least 1 data and 1 parity shard, and at most 64") as caught:
        Code(k, m)
    assert f"data_shards={k} parity_shards={m}" in str(caught.value)


def test_codes_are_equal_by_their_numbers() -> None:
    assert Code(4, 2) == Code(4, 2) != Code(4, 3)
    assert repr(Code(4, 2)) == "Code(k=4, m=2)"


def test_an_inverse_times_its_matrix_is_one_and_a_singular_matrix_has_none() -> None:
    chance = random.Random(0)
    matrix = [chance.randbytes(9) for _ in range(9)]
    identity = [unit_row(at, 9) for at in range(9)]
    assert [combined(row, inverted(matrix)) for row in matrix] == identity
    assert all(product(a, inverse(a)) == 1 for a in range(1, 256))
    with pytest.raises(ArithmeticError, match="no pivot in column 8 of 9"):
        inverted([*matrix[:8], matrix[3]])
    with pytest.raises(ArithmeticError, match="0 has no inverse"):
        inverse(0)


# ---- encode and decode --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), CODES)
def test_whatever_up_to_m_shards_are_lost_they_come_back(k: int, m: int) -> None:
    code, nbytes = Code(k, m), 37
    shards = stripe(code, nbytes)
    patterns = 0
    for count in range(1, m + 1):
        for lost in itertools.combinations(range(code.n), count):
            want = {shard: bytearray(nbytes) for shard in lost}
            decode(code, {shard: shards[shard] for shard in range(code.n) if shard not in lost}, want)
            assert {shard: bytes(target) for shard, target in want.items()} == {s: shards[s] for s in lost}
            patterns += 1
    assert patterns == sum(len(list(itertools.combinations(range(code.n), c))) for c in range(1, m + 1))


def test_known_answers(using: Engine) -> None:
    """First parity by eye: 1 + 2 + 4 + 8 = 15 without carries. The second, of row 01 d9 5c ac, by logarithms."""
    parity = [bytearray(3), bytearray(3)]
    encode(Code(4, 2), [b"\x01\x00\x80", b"\x02\x01\xff", b"\x04\x00\x55", b"\x08\x00\xaa"], parity, using=using)
    assert [bytes(shard).hex() for shard in parity] == ["0f0180", "cad932"]


def test_parity_is_written_in_place_whatever_the_buffer(using: Engine) -> None:
    code, data = Code(2, 2), [b"\x10" * 8, b"\x22" * 8]
    expected = parity_of(code, data)
    words = np.zeros(2, np.float32)
    inside = bytearray(b"\xee" * 12)
    encode(
        code, [np.frombuffer(data[0], np.uint16), memoryview(data[1])], [words, memoryview(inside)[3:11]], using=using
    )
    assert words.tobytes() == expected[0]
    assert bytes(inside) == b"\xee" * 3 + expected[1] + b"\xee"


def parity_of(code: Code, data: Sequence[bytes]) -> list[bytes]:
    """Straight from the coefficients."""
    return [combined(code.row(shard), data) for shard in range(code.k, code.n)]


def test_an_unwanted_parity_and_a_shard_of_zeros_cost_nothing(using: Engine) -> None:
    code, data = Code(4, 2), [b"abc", b"def", b"ghi"]
    expected = parity_of(code, [*data, bytes(3)])
    parity = bytearray(b"\xff" * 3)
    encode(code, [*data, None], [None, parity], using=using)
    assert bytes(parity) == expected[1]
    short = recipe(code, frozenset({0, 1, 2}), frozenset({3}), (4, 5))
    assert short.sources == (0, 1, 2)
    assert len(short.matrix) == 6


def test_a_stripe_of_zeros_has_zeros_as_parity_and_gives_zeros_back(using: Engine) -> None:
    parity = [bytearray(b"\xff" * 5) for _ in range(2)]
    encode(Code(3, 2), [None, None, None], parity, using=using)
    assert parity == [bytearray(5)] * 2
    lost = bytearray(b"\xff" * 5)
    decode(Code(3, 2), {0: None, 4: None, 3: None}, {1: lost}, using=using)
    assert lost == bytearray(5)


def test_data_are_used_before_parity_zeros_before_reading_and_no_more_than_needed() -> None:
    code = Code(4, 2)
    assert recipe(code, frozenset({0, 1, 2, 4, 5}), frozenset(), (3,)).sources == (0, 1, 2, 4)
    assert recipe(code, frozenset({0, 1, 2, 4}), frozenset({5}), (3,)).sources == (0, 1, 2)
    assert recipe(code, frozenset({0, 1, 2, 4}), frozenset(), (3,)).matrix == b"\x01" * 4
    at_hand = recipe(code, frozenset({0, 1, 2, 3, 4}), frozenset(), (4, 1))
    assert (at_hand.copies, at_hand.targets, at_hand.sources) == (((4, 4), (1, 1)), (), ())


def test_mirrors_are_copied_not_computed() -> None:
    mirror = recipe(Code(1, 2), frozenset({1}), frozenset(), (0, 2))
    assert (mirror.copies, mirror.targets) == (((1, 0), (1, 2)), ())


def test_a_spare_shard_at_hand_is_copied_and_a_lost_one_computed_in_one_call(using: Engine) -> None:
    code = Code(4, 2)
    shards = stripe(code, 100)
    want = {shard: bytearray(100) for shard in (5, 0, 2)}
    decode(code, {shard: shards[shard] for shard in (1, 2, 3, 4, 5)}, want, using=using)
    assert {shard: bytes(target) for shard, target in want.items()} == {s: shards[s] for s in (5, 0, 2)}


def test_empty_shards_and_empty_wishes_are_fine(using: Engine) -> None:
    encode(Code(2, 2), [b"", b""], [bytearray(), bytearray()], using=using)
    encode(Code(2, 2), [b"ab", b"cd"], [None, None], using=using)
    decode(Code(2, 1), {0: b"", 2: b""}, {1: bytearray()}, using=using)
    decode(Code(2, 1), {0: b"ab", 2: b"cd"}, {}, using=using)


# ---- what is refused ----------------------------------------------------------------------------------------


def test_fewer_than_k_shards_are_refused_with_the_counts_and_the_missing() -> None:
    target = bytearray(b"\xff" * 2)
    with pytest.raises(SnapshotIncomplete) as caught:
        decode(Code(4, 2), {0: b"ab", 4: b"cd", 5: None}, {1: target})
    assert str(caught.value) == ("3 shards at hand, 4 needed [data_shards=4 parity_shards=2 missing=[1, 2, 3]]")
    assert target == b"\xff" * 2


@pytest.mark.parametrize(
    ("data", "parity", "said"),
    [
        ([b"ab"], [bytearray(2)], r"data=1 parity=1"),
        ([b"ab", b"cd"], [], r"data=2 parity=0"),
        ([b"ab", b"cde"], [bytearray(2)], r"lengths .*at_hand=\{0: 2, 1: 3\} wanted=\{2: 2\}"),
        ([b"ab", b"cd"], [bytearray(3)], r"lengths .*wanted=\{2: 3\}"),
        ([None, None], [b"ab"], r"read-only memory \[shard=2\]"),
        ([memoryview(b"abcd")[::2], b"cd"], [bytearray(2)], r"one piece of memory: .*\[shard=0\]"),
        ([7, b"cd"], [bytearray(2)], r"one piece of memory: .*\[shard=0\]"),
    ],
)
def test_buffers_that_do_not_fit_are_refused_with_the_numbers(
    data: list[bytes | None], parity: list[bytearray], said: str
) -> None:
    with pytest.raises(SnapshotError, match=said):
        encode(Code(2, 1), data, parity)
    assert all(not any(shard) for shard in parity if isinstance(shard, bytearray))


@pytest.mark.parametrize(("have", "want"), [({0: b"a", 3: b"b"}, {1: bytearray(1)}), ({0: b"a"}, {-1: bytearray(1)})])
def test_a_shard_number_outside_the_code_is_refused(have: dict[int, bytes], want: dict[int, bytearray]) -> None:
    with pytest.raises(SnapshotError, match=r"no such shards in this code \[k=2 m=1 shards=\[(3|-1)\]\]"):
        decode(Code(2, 1), have, want)


@pytest.mark.parametrize(
    ("data", "parity", "shards", "overlap"),
    [
        ((0, 100), (200, 250), (2, 3), 50),
        ((0, 100), (300, 199), (1, 3), 1),
        ((0, 100), (100, 300), (1, 2), 100),
        ((0, 50), (25, 400), (0, 2), 75),
    ],
)
def test_a_target_in_the_memory_of_another_shard_is_refused_before_anything_is_written(
    data: tuple[int, int], parity: tuple[int, int], shards: tuple[int, int], overlap: int
) -> None:
    memory = bytearray(range(250)) * 2
    before = bytes(memory)
    view = memoryview(memory)
    with pytest.raises(SnapshotError, match="overlaps another shard's") as caught:
        encode(Code(2, 2), [view[at : at + 100] for at in data], [view[at : at + 100] for at in parity])
    assert sorted(caught.value.fields["shards"]) == list(shards)  # type: ignore[call-overload]
    assert caught.value.fields["overlap_bytes"] == overlap
    assert bytes(memory) == before


def test_shards_that_touch_and_sources_that_coincide_are_fine() -> None:
    view = memoryview(bytearray(range(10)) * 4)
    encode(Code(3, 1), [view[0:10], view[5:15], view[0:10]], [view[15:25]])
    assert bytes(view[15:25]) == bytes(view[5:15])


def test_a_spare_shard_that_decoding_does_not_read_is_not_overwritten_either() -> None:
    shards = stripe(Code(2, 2), 8)
    spare = bytearray(shards[3])
    with pytest.raises(SnapshotError, match="overlaps"):
        decode(Code(2, 2), {0: shards[0], 2: shards[2], 3: spare}, {1: spare})
    assert spare == shards[3]


# ---- engines ------------------------------------------------------------------------------------------------


class WrongTables(IsalEngine):
    """ISA-L with one flipped bit in the table of its last coefficient."""

    def _tables_of(self, matrix: bytes, rows: int, cols: int) -> ctypes.Array[ctypes.c_char]:
        good = super()._tables_of(matrix, rows, cols)
        wrong = ctypes.create_string_buffer(good.raw, len(good))
        wrong[len(wrong) - 32] = good.raw[len(wrong) - 32] ^ 1
        return wrong


class Spoilt:
    """numpy's engine, after which something goes wrong."""

    name: Final = "spoilt"

    def __init__(self, how: str) -> None:
        self.how = how

    def apply(self, matrix: bytes, rows: int, cols: int, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        NumpyEngine().apply(matrix, rows, cols, sources, targets)
        last = targets[-1]
        if self.how == "many rows" and rows == 7 and cols > 1:
            last[0] ^= 1
        elif self.how == "tail" and last.nbytes % 64 == 63:
            last[-1] ^= 1
        elif self.how == "beside" and cols > 1:
            ctypes.memset(last.ctypes.data + last.nbytes, 0, 1)
        elif self.how == "one product" and cols == 1 and rows > 0xD9:
            targets[0xD9][200] ^= 4
        elif self.how == "does nothing":
            last[:] = 0


def test_an_engine_that_is_right_is_accepted(using: Engine) -> None:
    assert known_answers(using) is None


def test_an_engine_with_a_wrong_table_is_refused() -> None:
    name = isal_name()
    assert known_answers(WrongTables(name)) == "wrong products with 255"
    with pytest.raises(EngineRefused, match=r"libisal.*: wrong products with 255"):
        load(name, WrongTables)


@pytest.mark.parametrize("how", ["many rows", "tail", "beside", "one product", "does nothing"])
def test_an_engine_with_one_wrong_byte_is_refused(how: str) -> None:
    assert known_answers(Spoilt("in nothing")) is None
    assert known_answers(Spoilt(how)) is not None


@pytest.mark.parametrize("name", ["libholdfast-is-not-there.so.9", "libc.so.6"])
def test_a_library_that_is_not_there_or_not_isal_is_refused(name: str) -> None:
    with pytest.raises(EngineRefused, match=name if "holdfast" in name else "ec_init_tables"):
        load(name)


def test_without_a_library_numpy_does_it_and_says_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = choose(["libholdfast-is-not-there.so.9"])
    assert chosen.name == "numpy"
    assert "ISA-L is not there (pip install pyeclib)" in caplog.text
    assert stripe(Code(4, 2), 1001, chosen) == stripe(Code(4, 2), 1001)


def test_the_engine_is_chosen_once_whoever_asks_first() -> None:
    choice, together, found = _Choice(), threading.Barrier(8), []

    def ask() -> None:
        together.wait()
        found.append(choice.engine())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(one) for one in found}) == 1
    assert engine() is engine()


def test_both_engines_write_the_same_bytes_at_any_length() -> None:
    fast, slow = isal(), NumpyEngine()
    for (k, m), nbytes in itertools.product([(1, 3), (3, 1), (4, 2), (5, 7), (12, 4)], [1, 63, 64, 65, 4097, 200_003]):
        assert stripe(Code(k, m), nbytes, fast) == stripe(Code(k, m), nbytes, slow)


def test_a_shard_longer_than_a_call_takes_is_worked_on_in_pieces() -> None:
    name = isal_name()
    assert stripe(Code(4, 2), 10_001, IsalEngine(name, call_bytes=1000)) == stripe(Code(4, 2), 10_001, NumpyEngine())


def test_tables_are_kept_but_not_without_bound() -> None:
    using, source = isal(), np.arange(16, dtype=np.uint8)
    for at in range(600):
        target = np.zeros(16, np.uint8)
        matrix = bytes([1 + at % 255, at // 255])
        using.apply(matrix, 1, 2, [source, source], [target])
        assert target.tobytes() == bytes(multiples(matrix[0] ^ matrix[1])[x] for x in range(16))
    assert len(using._tables) == 256


def test_threads_encode_at_once_and_each_gets_its_own_bytes(using: Engine) -> None:
    wrong: list[tuple[int, int]] = []

    def work(k: int) -> None:
        expected = stripe(Code(k, 3), 5000, NumpyEngine())
        for turn in range(20):
            if stripe(Code(k, 3), 5000, using) != expected:
                wrong.append((k, turn))

    threads = [threading.Thread(target=work, args=(k,)) for k in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _other_thread_ran_inside(using: Engine) -> bool:
    """Whether a thread that was let go just before an encode of 64 MB ran before its end.

    The interpreter takes the GIL from nobody meanwhile (switch interval), so only a call that gives it up lets
    the thread run.
    """
    data = [np.full(16 << 20, at, np.uint8) for at in range(4)]
    parity = [np.zeros(16 << 20, np.uint8) for _ in range(2)]
    encode(Code(4, 2), data, parity, using=using)
    ready, go, order = threading.Event(), threading.Event(), []

    def other() -> None:
        ready.set()
        go.wait()
        order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        go.set()
        encode(Code(4, 2), data, parity, using=using)
        order.append("encoded")
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    return order == ["other", "encoded"]


def test_python_goes_on_while_the_library_works() -> None:
    using = isal()
    deadline = time.monotonic() + 60  # a busy machine may wake the other thread too late, some of the times
    while not _other_thread_ran_inside(using):
        assert time.monotonic() < deadline, "no other thread ran during any encode: the GIL was held"


def test_the_test_for_that_would_see_a_held_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    name = isal_name()
    monkeypatch.setattr(ctypes, "CDLL", ctypes.PyDLL)
    holding = IsalEngine(name)
    assert not any(_other_thread_ran_inside(holding) for _ in range(5))


def test_a_block_is_a_whole_number_of_pages() -> None:
    assert BLOCK_BYTES % 4096 == 0

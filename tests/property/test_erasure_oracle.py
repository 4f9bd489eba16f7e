"""The erasure code against others: its definition on logarithms, both engines on hostile buffers, and pyeclib.

The oracle of this file multiplies by logarithms and inverts nothing; ours multiplies by look-up and inverts by
elimination. pyeclib's own API has other matrices, so what it must agree with is named in each test.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.ckpt.memory.erasure import Code, Engine, decode, encode
from holdfast.ckpt.memory.erasure.codec import choose
from holdfast.ckpt.memory.erasure.fallback import NumpyEngine
from holdfast.ckpt.memory.erasure.isal import library_names

GUARD: Final = 70
NUMPY: Final = NumpyEngine()


@functools.cache
def engines() -> dict[str, Engine]:
    """numpy's, and ISA-L where there is one."""
    chosen = choose(library_names())
    return {"numpy": NUMPY, chosen.name: chosen}


def named(name: str) -> Engine:
    if name not in engines():
        pytest.skip("no ISA-L here: neither pyeclib's wheel nor libisal.so.2")
    return engines()[name]


# ---- the oracle -------------------------------------------------------------------------------------------------


class Logarithms:
    """GF(2^8) by powers of 2, which generates all 255 elements but 0."""

    def __init__(self) -> None:
        self.power = [1]
        while len(self.power) < 255:
            doubled = self.power[-1] * 2
            self.power.append(doubled if doubled < 256 else doubled ^ 0x11D)
        assert sorted(self.power) == list(range(1, 256))
        self.log = {value: at for at, value in enumerate(self.power)}

    def times(self, a: int, b: int) -> int:
        return self.power[(self.log[a] + self.log[b]) % 255] if a and b else 0

    def over(self, a: int, b: int) -> int:
        return self.power[(self.log[a] - self.log[b]) % 255] if a else 0


GF: Final = Logarithms()


def coefficient(k: int, parity: int, column: int) -> int:
    """Cauchy's 1 / (x + y), its columns divided by their first entry, then its rows by theirs."""

    def by_column(row: int, y: int) -> int:
        return GF.over(GF.over(1, (k + row) ^ y), GF.over(1, k ^ y))

    return GF.over(by_column(parity, column), by_column(parity, 0))


def slow_parity(k: int, m: int, data: list[bytes]) -> list[bytes]:
    shards = []
    for parity in range(m):
        factors = [coefficient(k, parity, column) for column in range(k)]
        tables = [bytes(GF.times(factor, x) for x in range(256)) for factor in factors]
        total = 0
        for table, shard in zip(tables, data, strict=True):
            total ^= int.from_bytes(shard.translate(table), "little")
        shards.append(total.to_bytes(len(data[0]), "little"))
    return shards


@pytest.mark.parametrize(
    ("k", "m"), [(1, 1), (1, 3), (2, 1), (3, 4), (4, 2), (6, 2), (8, 3), (12, 4), (32, 32), (60, 4)]
)
def test_the_matrix_is_its_definition(k: int, m: int) -> None:
    parity = bytes(coefficient(k, row, column) for row in range(m) for column in range(k))
    assert Code(k, m).matrix[k * k :] == parity


@pytest.mark.parametrize("name", ["isa-l", "numpy"])
def test_an_engine_multiplies_as_logarithms_do(name: str) -> None:
    using = named(name)
    values = np.arange(256, dtype=np.uint8)
    for factor in range(256):
        target = np.full(256, 0xEE, np.uint8)
        using.apply(bytes([factor]), 1, 1, [values], [target])
        assert target.tolist() == [GF.times(factor, x) for x in range(256)]


# ---- any stripe -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stripe:
    """k, m, a length, where buffers begin in their memory, which data shards are zeros, and chance for the rest."""

    k: int
    m: int
    nbytes: int
    offset: int
    zeros: frozenset[int]
    seed: int


@st.composite
def stripes(draw: st.DrawFn) -> Stripe:
    k, m = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    return Stripe(
        k=k,
        m=m,
        nbytes=draw(st.one_of(st.integers(0, 130), st.integers(0, 5000))),
        offset=draw(st.integers(0, 65)),
        zeros=draw(st.frozensets(st.integers(0, k - 1))),
        seed=draw(st.integers(0, 1 << 30)),
    )


class Guarded:
    """A target at an odd address, between bytes that must not change."""

    def __init__(self, nbytes: int, offset: int) -> None:
        self.memory = bytearray(b"\xc3" * (nbytes + offset + GUARD))
        self.view = memoryview(self.memory)[offset : offset + nbytes]
        self.before, self.after = bytes(self.memory[:offset]), bytes(self.memory[offset + nbytes :])

    def written(self) -> bytes:
        found = bytes(self.view)
        assert bytes(self.memory) == self.before + found + self.after, "written beside the target"
        return found


def _all_shards(case: Stripe) -> list[bytes]:
    chance = random.Random(case.seed)
    data = [bytes(case.nbytes) if at in case.zeros else chance.randbytes(case.nbytes) for at in range(case.k)]
    return data + slow_parity(case.k, case.m, data)


def _source(shard: bytes, offset: int, *, read_only: bool) -> Any:
    memory = b"\x5a" * offset + shard + b"\x5a" * GUARD
    return memoryview(memory if read_only else bytearray(memory))[offset : offset + len(shard)]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(stripes())
def test_encoding_is_the_definition_for_any_length_address_zeros_and_wishes(case: Stripe) -> None:
    shards, chance = _all_shards(case), random.Random(case.seed)
    for using in engines().values():
        data = [
            None if at in case.zeros else _source(shards[at], case.offset + at, read_only=chance.random() < 0.5)
            for at in range(case.k)
        ]
        targets = [
            Guarded(case.nbytes, case.offset + 3 * at) if chance.random() < 0.8 else None for at in range(case.m)
        ]
        encode(Code(case.k, case.m), data, [target and target.view for target in targets], using=using)
        for at, target in enumerate(targets):
            assert target is None or target.written() == shards[case.k + at]
        assert all(shard is None or bytes(shard) == shards[at] for at, shard in enumerate(data)), "a source changed"


@settings(derandomize=True, deadline=None, max_examples=200)
@given(stripes())
def test_any_k_shards_or_more_give_back_any_wish(case: Stripe) -> None:
    shards, chance, n = _all_shards(case), random.Random(case.seed), case.k + case.m
    kept = chance.sample(range(n), chance.randint(case.k, n))
    wanted = chance.sample(range(n), chance.randint(0, n))
    for using in engines().values():
        have = {
            shard: None
            if shard in case.zeros
            else _source(shards[shard], case.offset + shard, read_only=chance.random() < 0.5)
            for shard in kept
        }
        want = {shard: Guarded(case.nbytes, case.offset + 2 * shard) for shard in wanted}
        decode(Code(case.k, case.m), have, {shard: target.view for shard, target in want.items()}, using=using)
        assert {shard: target.written() for shard, target in want.items()} == {s: shards[s] for s in wanted}
        assert all(value is None or bytes(value) == shards[shard] for shard, value in have.items()), "a source changed"


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 63), st.integers(0, 1 << 30))
def test_the_largest_codes_decode_from_whatever_is_left(k: int, seed: int) -> None:
    chance = random.Random(seed)
    case = Stripe(k, 64 - k, 200, 1, frozenset(), seed)
    shards = _all_shards(case)
    kept = chance.sample(range(64), k)
    for using in engines().values():
        want = {shard: bytearray(200) for shard in range(64) if shard not in kept}
        decode(Code(k, 64 - k), {shard: shards[shard] for shard in kept}, want, using=using)
        assert all(bytes(target) == shards[shard] for shard, target in want.items())


# ---- pyeclib --------------------------------------------------------------------------------------------------


def eclib(k: int, m: int, kind: str) -> Any:
    interface = pytest.importorskip("pyeclib.ec_iface", reason="pyeclib is not installed")
    return interface.ECDriver(k=k, m=m, ec_type=kind)


HEADER_BYTES: Final = 80
"""Of liberasurecode, before the payload of each fragment."""


def payloads(fragments: list[bytes]) -> list[bytes]:
    return [fragment[HEADER_BYTES:] for fragment in fragments]


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_with_one_parity_pyeclib_has_our_fragments_and_takes_ours(k: int) -> None:
    """Where the matrices agree: ISA-L's Vandermonde of one row is ones, as is ours."""
    driver = eclib(k, 1, "isa_l_rs_vand")
    message = random.Random(k).randbytes(k * 16 * 21)
    fragments = driver.encode(message)
    theirs = payloads(fragments)
    parity = bytearray(len(theirs[0]))
    encode(Code(k, 1), theirs[:k], [parity])
    assert b"".join(theirs[:k]) == message
    assert bytes(parity) == theirs[k]
    for lost in range(k):
        target = bytearray(len(parity))
        decode(Code(k, 1), {s: theirs[s] for s in range(k + 1) if s != lost}, {lost: target})
        assert bytes(target) == theirs[lost]
        ours = [*fragments[:k], fragments[k][:HEADER_BYTES] + bytes(parity)]
        del ours[lost]
        assert driver.decode(ours) == message


def vandermonde(k: int, m: int) -> bytes:
    """ISA-L's gf_gen_rs_matrix, parity rows: powers of 1, 2, 4, …"""
    return bytes(GF.power[row * column % 255] for row in range(m) for column in range(k))


def cauchy(k: int, m: int) -> bytes:
    """ISA-L's gf_gen_cauchy1_matrix, parity rows."""
    return bytes(GF.over(1, row ^ column) for row in range(k, k + m) for column in range(k))


@pytest.mark.parametrize("using", ["isa-l", "numpy"])
@pytest.mark.parametrize(("k", "m"), [(2, 2), (4, 2), (6, 2), (8, 3), (12, 4)])
@pytest.mark.parametrize(("kind", "matrix"), [("isa_l_rs_vand", vandermonde), ("isa_l_rs_cauchy", cauchy)])
def test_with_pyeclibs_matrix_our_engines_write_pyeclibs_parity(
    kind: str, matrix: Any, k: int, m: int, using: str
) -> None:
    chosen = named(using)
    theirs = payloads(eclib(k, m, kind).encode(random.Random(k).randbytes(k * 16 * 21)))
    targets = list(np.zeros((m, len(theirs[0])), np.uint8))
    chosen.apply(matrix(k, m), m, k, [np.frombuffer(shard, np.uint8) for shard in theirs[:k]], targets)
    assert [target.tobytes() for target in targets] == theirs[k:]

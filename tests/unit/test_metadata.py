"""The metadata blob: what goes in comes out, type for type and bit for bit, or is refused by its path."""

from __future__ import annotations

import json
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.ckpt.memory.metadata import decode, encode
from holdfast.proto.errors import ConfigError, SnapshotCorrupt


class Tensor:
    """Stands for a tensor: compared by identity."""


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def through(value: Any) -> Any:
    coded, tensors = encode(value, is_tensor=is_tensor)
    text = json.dumps(coded, allow_nan=False)
    return decode(json.loads(text), [tensor for _, tensor in tensors])


def same(one: Any, other: Any) -> bool:
    """Equal types and bits, all the way down; dicts also in the order of their keys."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
keys = st.text() | st.integers()
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
    ),
    max_leaves=20,
)


@settings(derandomize=True, deadline=None)
@given(values)
def test_every_value_comes_back_with_its_types_and_bits(value: Any) -> None:
    assert same(through(value), value)


def test_the_awkward_ones() -> None:
    negative_nan = struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0]
    awkward = [math.nan, negative_nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, 2**63, -(2**63), 10**5000]
    awkward += ["\ud800", "\x00", b"", b"\xff" * 3, (), [], {}, {1: "a", "1": "b"}, True, 1]
    for value in awkward:
        assert same(through(value), value), value


def test_the_state_of_a_random_generator_goes_on_where_it_was() -> None:
    generator = random.Random(3)
    state = through(generator.getstate())
    expected = [generator.random() for _ in range(5)]
    generator.setstate(state)
    assert [generator.random() for _ in range(5)] == expected


def test_tensors_come_back_by_reference_with_their_paths() -> None:
    one, other = Tensor(), Tensor()
    value = {"scheduler": {"foo": [1, (one,)]}, 7: other, "again": one}
    coded, tensors = encode(value, is_tensor=is_tensor)
    assert tensors == [("scheduler.foo[1][0]", one), ("[7]", other)]
    assert through(value) == value
    assert decode(coded, ["x", "y"]) == {"scheduler": {"foo": [1, ("x",)]}, 7: "y", "again": "x"}


class Pair(NamedTuple):
    """A tuple that is more than a tuple."""

    a: int


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"scheduler": {"foo": [0, 1, 2, {1}]}}, "scheduler.foo[3]", "builtins.set"),
        ({"a": defaultdict(int)}, "a", "collections.defaultdict"),
        ([Pair(1)], "[0]", f"{__name__}.Pair"),
        ({"f": len}, "f", "builtins.builtin_function_or_method"),
        ({3: bytearray(1)}, "[3]", "builtins.bytearray"),
        (Tensor, "", "builtins.type"),
        ({"k": {1.5: 0}}, "k", "builtins.float"),
        ({"k": {True: 0}}, "k", "builtins.bool"),
    ],
)
def test_an_unknown_type_is_refused_with_its_path(value: Any, path: str, kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot capture") as caught:
        encode(value, is_tensor=is_tensor)
    assert (caught.value.fields["path"], caught.value.fields["type"]) == (path, kind)


def test_the_given_path_opens_every_path() -> None:
    with pytest.raises(ConfigError, match=r"cannot capture data\.pos\[0\] \[path=data\.pos\[0\] type="):
        encode({"pos": [object()]}, "data")


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="contains itself"):
        encode(loop)


@pytest.mark.parametrize(
    "coded",
    [
        1.5,
        {},
        [],
        [1],
        ["?"],
        ["f"],
        ["f", "soon"],
        ["f", "nan:00"],
        ["f", 1],
        ["f", "0x1p99999"],
        ["i", "ten"],
        ["b", "!"],
        ["b", None],
        ["T", 0],
        ["T", -1],
        ["T", True],
        ["d", "key"],
        ["d", None, 1],
        ["d", ["l"], 1],
        ["d", "a", 1, "a", 2],
        ["l", ["l", {}]],
        ["t", 1.0],
    ],
)
def test_a_blob_that_encode_does_not_write_is_corrupt(coded: Any) -> None:
    with pytest.raises(SnapshotCorrupt):
        decode(coded)


def test_a_blob_nested_without_end_is_corrupt() -> None:
    coded: Any = ["l"]
    for _ in range(5000):
        coded = ["l", coded]
    with pytest.raises(SnapshotCorrupt):
        decode(coded)

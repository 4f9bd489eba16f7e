"""What a hostile pickle can do to our reader: nothing, and it is told so by name."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.ckpt.formats import machine
from holdfast.ckpt.formats.inert import Global, Instance
from holdfast.ckpt.formats.pickling import Construct, Ordered, dumps
from holdfast.ckpt.formats.unpickle import loads, named
from holdfast.ckpt.universal.errors import CheckpointError, CorruptError, UnsafeError

NONE: frozenset[tuple[str, str]] = frozenset()
POINT = ("frame.work", "Point")


def op(text: str) -> bytes:
    return text.encode("latin-1")


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


class Bomb:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_through_every_protocol(protocol: int) -> None:
    value: dict[Any, Any] = {
        "a": [1, -1, 2**40, -(2**70), 0.5, True, None, "text", ()],
        "b": OrderedDict(x=(1, 2, 3, 4)),
        3: {},
    }
    assert loads(pickle.dumps(value, protocol), allowed=NONE) == value
    if protocol > 1:
        assert loads(pickle.dumps({"s": {1, 2}, "b": b"\0\xff"}, protocol), allowed=NONE) == {
            "s": {1, 2},
            "b": b"\0\xff",
        }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, open, os.unlink])
def test_a_call_is_refused_by_the_name_of_what_it_calls(tmp_path: Path, function: Any, protocol: int) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps({"weights": Bomb(function, f"touch {marker}")}, protocol)
    with pytest.raises(UnsafeError, match=function.__name__) as error:
        loads(data, allowed=NONE)
    assert error.value.exit_code == 5
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"cos\nsystem\n(S'id'\ntR.", "os.system"),
        (b"(S'id'\nios\nsystem\n.", "os.system"),
        (b"(cposix\nsystem\nX\x02\0\0\0ido.", "posix.system"),
        # The name is assembled from what was on the stack and in the memo.
        (b"\x80\x04" + short("os") + b"\x94" + short("system") + b"0h\0" + short("popen") + b"\x93.", "os.popen"),
        (b"\x80\x04" + short("builtins") + short("__import__.__call__") + b"\x93.", "builtins.__import__.__call__"),
        # An allowed name first: REDUCE inside of the arguments of a REDUCE.
        (b"ccollections\nOrderedDict\n(cbuiltins\neval\n(S'1'\ntRtR.", "builtins.eval"),
        (b"\x80\x02ccollections\nOrderedDict.__init__\n.", "collections.OrderedDict.__init__"),
        (b"\x80\x02ctorch.hub\nload\n.", "torch.hub.load"),
        (b"\x80\x02c\xd0\xbes\nsystem\n.", "\u043es.system"),
    ],
)  # fmt: skip
def test_a_name_is_refused_however_it_is_spelt(data: bytes, name: str) -> None:
    with pytest.raises(UnsafeError, match=name.replace(".", r"\.")):
        loads(data, allowed=NONE)
    assert name in named(data)


def test_the_extension_registry_is_refused() -> None:
    for data in (b"\x80\x02\x82\x01.", b"\x80\x02\x83\x01\0.", b"\x80\x02\x84\x01\0\0\0."):
        with pytest.raises(UnsafeError, match="extension"):
            loads(data, allowed=NONE)


def test_an_allowed_name_becomes_an_inert_stand_in() -> None:
    data = dumps(Construct(Global(*POINT), (1, 2), {"x": 3}, new=True))
    value = loads(data, allowed=frozenset({POINT}))
    assert isinstance(value, Instance)
    assert (str(value.cls), value.args, value.get("x")) == ("frame.work.Point", (1, 2), 3)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]}X\x01\0\0\0aK\x01sb.",  # state for a list
        b"\x80\x02K\x01}b.",  # state for a number
        b"\x80\x02cframe.work\nPoint\n}b.",  # state for a name
        b"\x80\x02X\x02\0\0\0os)R.",  # a call of text
        b"\x80\x02cframe.work\nPoint\n)R)R.",  # a call of what a call made
        b"\x80\x02cframe.work\nPoint\nK\x01R.",  # arguments that are no tuple
        b"\x80\x02]K\x01K\x02s.",  # an item for a list
        b"\x80\x02}K\x01a.",  # an append to a dictionary
        b"\x80\x02}]K\x02s.",  # a list for a key
        b"\x80\x02}cframe.work\nPoint\n)R(K\x01t\x86K\x02s.",  # a nested tuple for a key
    ],
)
def test_state_and_calls_go_only_where_they_belong(data: bytes) -> None:
    with pytest.raises((CorruptError, UnsafeError)):
        loads(data, allowed=frozenset({POINT}))


def test_state_is_kept_and_never_set() -> None:
    hostile = {"__class__": "x", "__dict__": {"get": 1}, "cls": "os.system", "__setstate__": 1}
    value = loads(dumps(Construct(Global(*POINT), (), hostile)), allowed=frozenset({POINT}))
    assert type(value) is Instance
    assert str(value.cls) == "frame.work.Point"
    assert value.get("cls") == "os.system"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x80\x02" + b"]" + b"q\0" + b"h\0a" + b".", "itself"),
        (b"\x80\x02" + b")" + b"\x85" * 5000 + b".", "too much"),
        (b"\x80\x02]" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b".", "too much"),
        (b"\x80\x02" + b"(" * 5000 + b".", "stacks"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "too early"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc.", "too early"),
        (b"\x80\x04\x8a\xff" + b"\x01" * 20, "too early"),
        (b"\x80\x02\x8b" + struct.pack("<i", 2000) + b"\x01" * 2000 + b".", "integer"),
        (b"I" + b"9" * 5000 + b"\n.", "integer"),
        (b"\x80\x02h\x07.", "never stored"),
        (b"\x80\x020.", "empty stack"),
        (b"\x80\x02K\x01K\x02.", "one value"),
        (b"\x80\x02K\x01Q.", "persistent"),
        (b"\x80\x05\x97.", "opcode"),
        (b"\x80\x09N.", "protocol"),
        (b"\x80\x02}\x8a\x09" + b"\xff" * 8 + b"\x01K\x01s.", "key"),
        (b"", "not a pickle"),
        (b"\x80\x02N", "not a pickle"),
    ],
)  # fmt: skip
def test_bombs_and_broken_pickles_end_in_one_clear_error(data: bytes, why: str) -> None:
    with pytest.raises(CorruptError, match=why):
        loads(data, allowed=NONE)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_ours(data: bytes) -> None:
    for prefix in (b"", b"\x80\x02", b"\x80\x04\x95"):
        try:
            loads(prefix + data, allowed=frozenset({POINT}))
        except CheckpointError:
            continue


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_a_damaged_pickle_never_raises_anything_but_ours(at: int, patch: bytes) -> None:
    good = pickle.dumps({"a": [1, 2.5, "x"] * 3, "b": OrderedDict(y=(1, {2}, b"z")), "c": ("t", None, True)}, 4)
    at %= len(good)
    try:
        loads(good[:at] + patch + good[at + len(patch) :], allowed=NONE)
    except CheckpointError:
        return


OFTEN = [getattr(machine, name) for name in ("MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "EMPTY_TUPLE", "TUPLE1")]
OFTEN += [getattr(machine, name) for name in ("TUPLE2", "EMPTY_DICT", "SETITEMS", "NEWOBJ", "REDUCE", "BUILD")]
OFTEN += [getattr(machine, name) for name in ("BININT1", "BININT2", "SHORT_BINUNICODE")]
POINTS = short("frame.work") + short("Point") + b"\x93\x94"
PARTS = st.sampled_from(
    [bytes([code]) for code in OFTEN] + [short("a"), b"K\1", b"h\0", POINTS, b"]", b"N", b"e", b"0"]
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(PARTS, max_size=25), st.binary(max_size=3))
@example([POINTS, b")", b"\x81", b"}", b"(", short("a"), b"K\1", b"u", b"b"], b".")
@example([b"}", b"(", b"K\1", b"(", b"u"], b"u.")
@example([b"}", b"(", b"\x8a\x09" + b"\xff" * 8 + b"\1", b"N", b"u"], b".")  # a number that is no key
@example([b"}", b"\x94", b"(", b"(", short("a"), b"h\0", b"u"], b".")
def test_what_is_done_without_calls_is_what_the_operations_do(parts: list[bytes], rest: bytes) -> None:
    data = b"".join(parts) + rest

    def outcome() -> str:
        try:
            return repr(loads(data, allowed=frozenset({POINT})))
        except CheckpointError as error:
            return type(error).__name__

    quick = outcome()
    with pytest.MonkeyPatch.context() as patch:
        for name, code in vars(machine).items():
            if type(code) is int and code in OFTEN and name != "STOP":
                patch.setattr(machine, name, -1)
        patch.setattr(machine, "CALL", ())
        assert outcome() == quick


def test_the_stack_is_measured_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "STACK_MAX", 100)
    monkeypatch.setattr(machine, "CHECK_BYTES", 50)
    assert loads(b")" * 90 + b"0" * 89 + b".", allowed=NONE) == ()
    with pytest.raises(CorruptError, match="stacks too much"):
        loads(b")" * 160 + b"0" * 159 + b".", allowed=NONE)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(-5, 5), inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_we_write_python_reads_as_the_same_value(value: Any) -> None:
    assert pickle.loads(dumps(value)) == value
    assert loads(dumps(value), allowed=NONE) == value


def test_many_items_are_batched_and_names_are_memoised() -> None:
    value = Ordered({f"k{i}": list(range(i % 7)) for i in range(3000)})
    assert pickle.Unpickler(io.BytesIO(dumps(value))).load() == OrderedDict(value)

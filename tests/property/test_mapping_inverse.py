"""Mapping and mapping back is the identity, bit for bit, for every operation; and numpy agrees on the way there.

A view is read in random regions, too: what is asked for in pieces is what is asked for at once.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.ckpt.universal.mapping import Mapped, parse_layout
from holdfast.ckpt.universal.read import Reader

_spec = importlib.util.spec_from_file_location("model_helpers", Path(__file__).parents[1] / "helpers" / "models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

COMMON = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
STATES = ("weight", "fp32", "exp_avg")
small = st.integers(1, 4)


def bits(shape: tuple[int, ...], seed: int, state: str) -> Any:
    """Any bits, NaNs among them: a mapping moves, it does not look."""
    chance = np.random.default_rng(seed)
    if state == "weight":
        return chance.integers(0, 1 << 16, shape, np.uint16)
    return chance.integers(0, 1 << 32, shape, np.uint32).view(np.float32)


def parameter(name: str, shape: tuple[int, ...], seed: int) -> dict[tuple[str, str], Any]:
    return {(name, state): bits(shape, seed + at, state) for at, state in enumerate(STATES)}


@st.composite
def others(draw: st.DrawFn, least: int = 0) -> list[int]:
    return draw(st.lists(small, min_size=least, max_size=2))


Case = tuple[str, dict[str, tuple[int, ...]]]
"""A rule, and the shapes of what it takes."""


@st.composite
def joins(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["concat", "concat_grouped", "interleave", "stack", "over"]))
    count, rest = draw(st.integers(2, 4)), draw(others())
    names = [f"n{at}" for at in range(count)]
    rule = f'match = {names}\nto = "out"\nop = "{kind}"\n'
    if kind in ("stack", "over"):
        shape = (draw(small), *rest)
        if kind == "over":
            rule = 'match = "n{e}"\nto = "out"\nop = "stack"\nover = "e"\n'
        return rule + f"axis = {draw(st.integers(0, len(shape)))}\n", dict.fromkeys(names, shape)
    axis = draw(st.integers(0, len(rest)))
    if kind == "interleave":
        block = draw(small)
        lengths = [block * draw(small)] * count
        rule += f"block = {block}\n"
    else:
        groups = draw(small) if kind == "concat_grouped" else 1
        sizes = [draw(st.integers(0, 3)) for _ in names]
        lengths = [groups * size for size in sizes]
        rule += f"sizes = {sizes}\n" + (f"groups = {groups}\n" if kind == "concat_grouped" else "")
    shapes = {name: (*rest[:axis], n, *rest[axis:]) for name, n in zip(names, lengths, strict=True)}
    return rule + f"axis = {axis}\n", shapes


@st.composite
def each(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["rename", "transpose", "permute", "pad"]))
    shape = (draw(small), *draw(others()))
    axis = draw(st.integers(0, len(shape) - 1))
    rule = f'match = "a"\nto = "b"\nop = "{kind}"\n'
    if kind == "transpose":
        rule += f"order = {draw(st.permutations(range(len(shape))))}\n"
    elif kind == "permute":
        view = draw(st.lists(small, min_size=1, max_size=4))
        shape = (*shape[:axis], int(np.prod(view)), *shape[axis + 1 :])
        order = draw(st.permutations(range(len(view))))
        if draw(st.booleans()):
            view[draw(st.integers(0, len(view) - 1))] = -1
        rule += f"axis = {axis}\nview = {view}\norder = {list(order)}\n"
    elif kind == "pad":
        rule += f"axis = {axis}\nsize = {shape[axis]}\npadded = {shape[axis] + draw(st.integers(0, 3))}\n"
    return rule, {"a": shape}


@st.composite
def splits(draw: st.DrawFn) -> Case:
    """The inverse first."""
    kind = draw(st.sampled_from(["split", "split_grouped", "deinterleave", "unstack", "replicate"]))
    count, rest = draw(st.integers(2, 4)), draw(others(least=1))
    axis = draw(st.integers(0, len(rest)))
    rule = f'match = "a"\nto = {[f"n{at}" for at in range(count)]}\nop = "{kind}"\n'
    if kind == "replicate":
        return rule, {"a": tuple(rest)}
    block, groups = draw(small), draw(small)
    sizes = [draw(st.integers(0, 3)) for _ in range(count)]
    length = {
        "split": sum(sizes),
        "split_grouped": groups * sum(sizes),
        "deinterleave": groups * count * block,
        "unstack": count,
    }[kind]
    told = {
        "split": f"sizes = {sizes}\n",
        "split_grouped": f"sizes = {sizes}\ngroups = {groups}\n",
        "deinterleave": f"block = {block}\n",
        "unstack": "",
    }[kind]
    return f"{rule}axis = {axis}\n{told}", {"a": (*rest[:axis], length, *rest[axis:])}


@COMMON
@given(case=joins() | each() | splits(), seed=st.integers(0, 1 << 20), data=st.data())
def test_there_and_back_is_the_identity_bit_for_bit_and_pieces_are_the_whole(case: Case, seed: int, data: Any) -> None:
    rule, shapes = case
    tensors: dict[tuple[str, str], Any] = {}
    for at, (name, shape) in enumerate(shapes.items()):
        tensors |= parameter(name, shape, seed + 10 * at)
    layout = parse_layout(f"[[rule]]\n{rule}")
    with (
        tempfile.TemporaryDirectory() as folder,
        Mapped(Reader(models.save(Path(folder, "c"), tensors)), layout, {}) as there,
    ):
        found = models.load(there)
        assert models.same(models.load(Mapped(there, layout, {}, reverse=True)), tensors)
        for (name, state), array in found.items():
            flat = array.reshape(-1)
            low = data.draw(st.integers(0, flat.size))
            high = data.draw(st.integers(low, flat.size))
            assert bytes(there.read(name, state, (low, high))) == flat[low:high].tobytes()
            box = []
            for length in array.shape:
                start = data.draw(st.integers(0, length))
                box.append((start, data.draw(st.integers(start, length))))
            wanted = array[tuple(slice(*pair) for pair in box)].tobytes()
            assert bytes(there.read(name, state, tuple(box))) == wanted


@COMMON
@given(
    groups=small, sizes=st.lists(st.integers(1, 3), min_size=2, max_size=3), rest=small, seed=st.integers(0, 1 << 20)
)
def test_a_grouped_concat_is_what_numpy_makes_of_the_groups(
    groups: int, sizes: list[int], rest: int, seed: int
) -> None:
    names = [f"n{at}" for at in range(len(sizes))]
    tensors: dict[tuple[str, str], Any] = {}
    for at, (name, size) in enumerate(zip(names, sizes, strict=True)):
        tensors |= parameter(name, (groups * size, rest), seed + 10 * at)
    rule = f'match = {names}\nto = "out"\nop = "concat_grouped"\naxis = 0\ngroups = {groups}\nsizes = {sizes}\n'
    with tempfile.TemporaryDirectory() as folder:
        saved = models.save(Path(folder, "c"), tensors)
        found = models.load(Mapped(Reader(saved), parse_layout(f"[[rule]]\n{rule}"), {}))
    for state in STATES:
        parts = [tensors[name, state].reshape(groups, size, rest) for name, size in zip(names, sizes, strict=True)]
        assert np.concatenate(parts, axis=1).tobytes() == found["out", state].tobytes()


@COMMON
@given(view=st.lists(small, min_size=2, max_size=4), rest=small, seed=st.integers(0, 1 << 20), data=st.data())
def test_a_permuted_axis_is_what_numpy_makes_of_the_view(view: list[int], rest: int, seed: int, data: Any) -> None:
    order = list(data.draw(st.permutations(range(len(view)))))
    tensors = parameter("a", (rest, int(np.prod(view))), seed)
    rule = f'match = "a"\nop = "permute"\naxis = 1\nview = {view}\norder = {order}\n'
    with tempfile.TemporaryDirectory() as folder:
        saved = models.save(Path(folder, "c"), tensors)
        layout = parse_layout(f"[[rule]]\n{rule}")
        there = Mapped(Reader(saved), layout, {})
        found = models.load(there)
        assert models.same(models.load(Mapped(there, layout, {}, reverse=True)), tensors)
    for state in STATES:
        array = tensors["a", state].reshape(rest, *view).transpose(0, *[at + 1 for at in order])
        assert array.tobytes() == found["a", state].tobytes()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("op", ["transpose", "permute"])
def test_every_order_of_three_axes_is_undone(tmp_path: Path, op: str, order: tuple[int, ...]) -> None:
    tensors = parameter("a", (2, 3, 5) if op == "transpose" else (30,), 0)
    told = "" if op == "transpose" else "axis = 0\nview = [2, 3, 5]\n"
    layout = parse_layout(f'[[rule]]\nmatch = "a"\nop = "{op}"\n{told}order = {list(order)}\n')
    there = Mapped(Reader(models.save(tmp_path / "c", tensors)), layout, {})
    expected = tensors["a", "fp32"].reshape(2, 3, 5).transpose(order)
    assert models.load(there)["a", "fp32"].tobytes() == expected.tobytes()
    assert models.same(models.load(Mapped(there, layout, {}, reverse=True)), tensors)

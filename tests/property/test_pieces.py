"""The algebra of pieces, against sets of element numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.ckpt.pieces import ITEM_BYTES, Piece, assign_owners, cover, gaps
from holdfast.proto.errors import ConfigError, SnapshotCorrupt, SnapshotIncomplete

SHAPE = (4, 6)
ELEMENTS = 24

ranges = st.tuples(st.integers(0, ELEMENTS), st.integers(0, ELEMENTS)).map(sorted)
sizes = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 1000), max_size=30)
holders = st.lists(st.integers(0, 100), min_size=1, max_size=8, unique=True)
exactly = settings(derandomize=True, deadline=None)


def piece(start: int, stop: int, *, name: str = "a", state: str = "weight", dtype: str = "F32") -> Piece:
    return Piece(name, state, dtype, SHAPE, start, stop)


def elements(one: Piece | None) -> set[int]:
    return set() if one is None else set(range(one.start, one.stop))


@exactly
@given(ranges, ranges)
def test_an_intersection_holds_what_both_hold(one: list[int], other: list[int]) -> None:
    a, b = piece(*one), piece(*other)
    assert elements(a.intersect(b)) == elements(a) & elements(b)
    assert a.intersect(b) == b.intersect(a)


@exactly
@given(st.lists(ranges, min_size=1, max_size=6))
def test_gaps_are_the_elements_that_nobody_holds(held: list[list[int]]) -> None:
    pieces = [piece(*bounds) for bounds in held]
    missing = gaps(pieces, "a", "weight")
    assert {e for start, stop in missing for e in range(start, stop)} == set(range(ELEMENTS)).difference(
        *map(elements, pieces)
    )
    assert all(start < stop for start, stop in missing)
    if missing:
        with pytest.raises(SnapshotIncomplete, match="elements are missing"):
            cover(pieces, "a", "weight")
    else:
        cover(pieces, "a", "weight")


def test_an_empty_tensor_is_covered_by_its_empty_piece_and_not_by_none() -> None:
    cover([Piece("e", "buffer", "I64", (0, 3), 0, 0)], "e", "buffer")
    with pytest.raises(SnapshotIncomplete, match="no piece"):
        cover([piece(0, ELEMENTS)], "a", "exp_avg")


def test_pieces_of_other_tensors_share_nothing_and_contradictions_are_errors() -> None:
    assert piece(0, 9).intersect(piece(0, 9, state="exp_avg")) is None
    assert piece(0, 9).intersect(piece(0, 9, name="b")) is None
    with pytest.raises(SnapshotCorrupt, match="disagree"):
        piece(0, 9).intersect(piece(0, 9, dtype="BF16"))
    with pytest.raises(SnapshotCorrupt, match="disagree"):
        gaps([piece(0, 9), piece(9, 24, dtype="BF16")], "a", "weight")


@pytest.mark.parametrize("bounds", [(-1, 3), (4, 3), (0, ELEMENTS + 1)])
def test_a_piece_outside_of_its_tensor_cannot_exist(bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="outside"):
        piece(*bounds)


def test_bytes_follow_the_dtype() -> None:
    for dtype, size in ITEM_BYTES.items():
        assert piece(2, 7, dtype=dtype).nbytes == 5 * size


@exactly
@given(sizes, holders, st.randoms(use_true_random=False))
def test_owners_do_not_depend_on_the_order_of_anything(
    given_sizes: dict[str, int], given_holders: list[int], chance: object
) -> None:
    names = list(given_sizes)
    shuffled = list(given_holders)
    chance.shuffle(names)  # type: ignore[attr-defined]
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    again = assign_owners({name: given_sizes[name] for name in names}, shuffled)
    assert again == assign_owners(given_sizes, given_holders)


@exactly
@given(sizes, holders)
def test_each_name_has_one_owner_and_no_owner_much_more_than_its_share(
    given_sizes: dict[str, int], given_holders: list[int]
) -> None:
    owners = assign_owners(given_sizes, given_holders)
    assert owners.keys() == given_sizes.keys()
    assert set(owners.values()) <= set(given_holders)
    loads = [sum(size for name, size in given_sizes.items() if owners[name] == holder) for holder in given_holders]
    assert max(loads) <= sum(loads) / len(loads) + max(given_sizes.values(), default=0)


def test_owners_by_hand() -> None:
    assert assign_owners({"a": 5, "b": 3, "c": 3, "d": 1}, [7, 2]) == {"a": 2, "b": 7, "c": 7, "d": 2}


@pytest.mark.parametrize("bad", [[], [1, 1]])
def test_owners_need_holders_each_once(bad: list[int]) -> None:
    with pytest.raises(ConfigError, match="each once"):
        assign_owners({"a": 1}, bad)

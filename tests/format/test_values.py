"""Typed JSON: values come back as they were, or are refused by name; bad input is damage, not a crash."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque, namedtuple
from contextlib import suppress
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_ckpt.errors import CorruptCheckpoint, StateError
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.values import MAX_DEPTH, TensorRef, decode_value, encode_value


def through_json(value: Any) -> Any:
    return decode_value(msgspec.json.decode(encode_json(encode_value(value, path="v"))), path="v")


def same(a: Any, b: Any) -> bool:
    """Equal in type, value and order, at every level."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (np.ndarray, np.generic)):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
leaves = (
    hashable
    | st.floats()
    | st.complex_numbers()
    | st.binary().map(bytearray)
    | st.sets(hashable, max_size=3)
    | st.text().map(TensorRef)
)
pairs = hashable | st.text() | st.sampled_from(["$int", "$", "a", "b"])
values: st.SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(pairs, inner, max_size=4)
        | st.dictionaries(pairs, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(pairs, st.integers(), max_size=4).map(Counter)
        | st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(4, 9))
    ),
    max_leaves=15,
)


@given(values)
def test_a_value_comes_back_as_it_was(value):
    assert same(through_json(value), value)


@given(values)
def test_equal_values_have_equal_bytes(value):
    assert encode_json(encode_value(value, path="v")) == encode_json(
        encode_value(through_json(value), path="v")
    )


@pytest.mark.parametrize(
    "value",
    [
        2**53, 2**53 + 1, -(2**53) - 1, 10**400, -0.0, 5e-324, 1e308, 1e22, 0.1, float("nan"), float("-inf"),
        complex(float("nan"), -0.0), {"b": 1, "a": 2}, {"a": 1, "b": 2}, {1: "x", "1": "y", 2: None},
        {(1, 2): {3: [None]}}, {"$int": "5"}, {}, [], (), set(), "\0 \u2028 \U0001f600", b"\0\xff",
        deque([1], maxlen=1), Counter({"b": 0, "a": -1}), [[[]]],
    ],
    ids=repr,
)  # fmt: skip
def test_hard_cases_come_back_as_they_were(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(6, dtype=np.float16)[::2],
        np.array(3.5),
        np.zeros((0, 3), dtype=np.complex64),
        np.array([True, False]),
        np.array(["a", "long"]),
        np.array(["2026-01-01"], dtype="datetime64[D]"),
        np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    ],
    ids=lambda array: f"{array.dtype}",
)
def test_arrays_come_back_writable_with_the_same_elements(array):
    again = through_json({"array": array})["array"]
    assert (again.shape, again.dtype) == (array.shape, array.dtype.newbyteorder("="))
    assert np.array_equal(again, array)
    assert again.flags.writeable


@pytest.mark.parametrize(
    "scalar", [np.float32(0.1), np.int64(-5), np.bool_(True), np.complex64(1 + 2j)], ids=repr
)
def test_numpy_scalars_come_back_as_they_were(scalar):
    assert same(through_json(scalar), scalar)


class Level(IntEnum):
    LOW = 1


Point = namedtuple("Point", "x y")  # the kind users have


class Words(dict):  # type: ignore[type-arg]
    """A subclass may hold more than its items."""


@pytest.mark.parametrize(
    "bad",
    [
        object(), Level.LOW, Point(1, 2), Words(), lambda: None, type, range(3), memoryview(b"x"), iter([]),
        np.array([object()], dtype=object), np.zeros(2, dtype=[("x", "f4")]), np.dtype("f4"),
    ],
    ids=lambda bad: f"{type(bad).__name__}-{getattr(bad, 'dtype', '')}",
)  # fmt: skip
def test_what_would_not_come_back_exactly_is_refused_by_name(bad):
    with pytest.raises(StateError, match=r"top\['list'\]\[1\]"):
        encode_value({"list": [0, bad]}, path="top")


def test_a_bad_key_is_refused_by_name():
    with pytest.raises(StateError, match="top key"):
        encode_value({Point(1, 2): 1}, path="top")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_depth_has_a_limit_that_both_sides_keep():
    assert same(through_json(nested(MAX_DEPTH)), nested(MAX_DEPTH))
    with pytest.raises(StateError, match="nested deeper than 200"):
        encode_value(nested(MAX_DEPTH + 1), path="v")
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(StateError, match="or contains itself"):
        encode_value(itself, path="v")


@pytest.mark.parametrize(
    "encoded",
    [
        {"$new": 1},
        {"$int": "x"},
        {"$int": None},
        {"$int": "1", "more": 2},
        {"$float": "1.5"},
        {"$complex": [1.0]},
        {"$complex": 5},
        {"$bytes": 5},
        {"$bytes": "a"},
        {"$bytearray": "\u00e9"},
        {"$tuple": 5},
        {"$set": [[1]]},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$ordered": 5},
        {"$counter": [1]},
        {"$deque": []},
        {"$deque": [[1]]},
        {"$deque": [[1], "x"]},
        {"$ndarray": ["<f4"]},
        {"$ndarray": ["<f4", [2], "AAAA"]},
        {"$ndarray": ["nonsense", [1], "AAAAAA=="]},
        {"$ndarray": ["|O", [1], "AAAAAAAAAAA="]},
        {"$npscalar": ["<f4", ""]},
        {"$npscalar": ["|O", "AAAAAAAAAAA="]},
        [{"deep": {"$new": 1}}],
    ],
    ids=repr,
)
def test_bad_input_is_damage(encoded):
    with pytest.raises(CorruptCheckpoint, match="name"):
        decode_value(encoded, path="name")


plain_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "$int",
                    "$float",
                    "$complex",
                    "$bytes",
                    "$tuple",
                    "$set",
                    "$dict",
                    "$deque",
                    "$ndarray",
                    "$npscalar",
                    "x",
                ]
            ),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@given(plain_json)
def test_any_json_is_a_value_or_damage(encoded):
    with suppress(CorruptCheckpoint):
        decode_value(encoded, path="name")

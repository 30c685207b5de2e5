"""Typed JSON: values come back as they were, or are refused by name; bad input is damage, not a crash."""

from __future__ import annotations

from collections import Counter, defaultdict, deque, namedtuple
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_ckpt.errors import CorruptCheckpoint, StateError
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.values import (
    MAX_DEPTH,
    InlineTensor,
    TensorRef,
    ValueRef,
    decode_value,
    encode_value,
)
from tests.format.exact_values import leaves, nested, same


def through_json(value: Any) -> Any:
    return decode_value(msgspec.json.decode(encode_json(encode_value(value, path="v"))), path="v")


inline_tensors = st.binary(max_size=8).map(lambda data: InlineTensor("uint8", (len(data), 1), data))
values = nested(leaves | st.text().map(TensorRef) | st.text().map(ValueRef) | inline_tensors)


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
    assert (again.shape, again.dtype) == (array.shape, array.dtype)
    assert np.array_equal(again, array)
    assert again.flags.writeable


@pytest.mark.parametrize(
    "scalar",
    [
        np.float32(0.1), np.int64(-5), np.bool_(True), np.complex64(1 + 2j), np.str_(""), np.bytes_(b"a\0b"),
        np.datetime64("NaT", "s"), np.void(b"\0\1"),
    ],
    ids=repr,
)  # fmt: skip
def test_numpy_scalars_come_back_as_they_were(scalar):
    assert same(through_json(scalar), scalar)


class Level(IntEnum):
    LOW = 1


class Name(StrEnum):
    FIRST = "first"


@dataclass
class Settings:
    rate: float = 0.1


class Stateful:
    def state_dict(self) -> dict[str, int]:
        return {}


class Seconds(int):
    """A subclass may mean more than its number."""


class Text(str):
    pass


class Words(dict):  # type: ignore[type-arg]
    pass


Point = namedtuple("Point", "x y")  # the kind users have


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        (object(), "give the object state_dict"),
        (Stateful(), "a key of its own in a dictionary"),
        (Level.LOW, "its name or its value"),
        (Name.FIRST, "its name or its value"),
        (Settings(), r"dataclasses\.asdict"),
        (Point(1, 2), r"save tuple\(\.\.\.\) of it"),
        (Seconds(3), r"save int\(\.\.\.\) of it"),
        (Text("x"), r"save str\(\.\.\.\) of it"),
        (Words(), r"save dict\(\.\.\.\) of it"),
        (defaultdict(int), r"save dict\(\.\.\.\) of it"),
        (lambda: None, "builtins.function"),
        (type, "builtins.type"),
        (range(3), "builtins.range"),
        (memoryview(b"x"), "builtins.memoryview"),
        (iter([]), "list_iterator"),
        (10**5000, "4300 digits"),
        ("a\ud800", "UTF-8"),
        (np.array([object()], dtype=object), "array of dtype object"),
        (np.zeros(2, dtype=[("x", "f4")]), "one array for each field"),
        (np.zeros(2, dtype=[("x", "f4")])[0], "scalar of dtype"),
        (np.array(["a"], dtype=np.dtypes.StringDType()), "array of dtype StringDType"),
        (np.longdouble(0.1), "numbers of 64 bits"),
        (np.zeros(2, np.clongdouble), "numbers of 64 bits"),
        (np.zeros(2, "V0"), "array of dtype"),
        (np.ma.masked_array([1], [True]), "MaskedArray"),
        (np.zeros(2).view(np.recarray), "recarray"),
        (np.dtype("f4"), "Float32DType"),
        (np.add, r"numpy\.ufunc"),
        (np.random.default_rng(0), "Generator"),
    ],
    ids=lambda bad: f"{type(bad).__name__}-{getattr(bad, 'dtype', '')}" if type(bad) is not str else "",
)
def test_what_would_not_come_back_exactly_is_refused_by_name(bad, advice):
    with pytest.raises(StateError, match=rf"top\['list'\]\[1\].*{advice}"):
        encode_value({"list": [0, bad]}, path="top")


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_kinds_of_arrays_that_would_come_back_as_another_are_refused(tmp_path):
    for bad in (np.matrix([1]), np.memmap(tmp_path / "map", dtype="f4", mode="w+", shape=(2,))):
        with pytest.raises(StateError, match=rf"top is a numpy\.{type(bad).__name__}.*numpy\.array\(\)"):
            encode_value(bad, path="top")


def test_a_bad_key_is_refused_by_name():
    for key, shown in ((Point(1, 2), "Point"), ("\ud800", "UTF-8")):
        with pytest.raises(StateError, match=f"top key .*{shown}"):
            encode_value({key: 1}, path="top")


def deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_depth_has_a_limit_that_both_sides_keep():
    assert same(through_json(deep(MAX_DEPTH)), deep(MAX_DEPTH))
    with pytest.raises(StateError, match="nested deeper than 200"):
        encode_value(deep(MAX_DEPTH + 1), path="v")
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
        {"$inline": ["uint8", [1]]},
        {"$inline": ["uint8", [2], "AA=="]},
        {"$inline": ["uint8", [-1], "AA=="]},
        {"$inline": ["uint8", 1, "AA=="]},
        {"$inline": ["int128", [1], "AA=="]},
        {"$inline": [8, [1], "AA=="]},
        {"$inline": ["float32", [0, 4611686018427387904], ""]},
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
                    "$inline",
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

"""What typed values may be, for property tests; and what it means that one comes back as it was."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

__all__ = ["leaves", "nested", "same"]


def same(a: Any, b: Any) -> bool:
    """Equal in type, value and order, at every level."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, (np.ndarray, np.generic)):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


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
arrays = np_st.arrays(
    st.sampled_from(
        ["?", "i1", "<u2", ">i4", "<i8", "<f2", ">f4", "<f8", "<c8", ">c16", "S3", ">U3", "<M8[ns]", ">m8[D]"]
    ),
    np_st.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
leaves: st.SearchStrategy[Any] = (
    hashable
    | st.floats()
    | st.complex_numbers()
    | st.binary().map(bytearray)
    | st.sets(hashable, max_size=3)
    | arrays
    | arrays.map(np.transpose)
    | arrays.filter(lambda array: array.size > 0).map(lambda array: array.ravel()[0])
)
keys = hashable | st.text() | st.sampled_from(["$int", "$", "a", "b"])


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """All containers that are stored, of these leaves."""
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(keys, inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
            | st.dictionaries(keys, st.integers(), max_size=4).map(Counter)
            | st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(4, 9))
        ),
        max_leaves=15,
    )

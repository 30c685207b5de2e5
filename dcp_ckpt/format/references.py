"""Decoded values as nested containers: what they refer to, and copies with other leaves. Pure.

Owns the list of containers that are walked through, which are those of docs/format.md, section 7, but for
sets: nothing that refers to something can be in a set. Called by `state`, `load` and `ops`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

from dcp_ckpt.format.values import TensorRef, ValueRef

__all__ = [
    "ATOMS",
    "MAPPINGS",
    "SEQUENCES",
    "inside_of_values",
    "outlined",
    "referenced_names",
    "with_leaves",
]

ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
"""What holds nothing and cannot change: most of all leaves."""
MAPPINGS: dict[type, Callable[[], Any]] = {dict: dict, OrderedDict: OrderedDict, Counter: Counter}
SEQUENCES = frozenset({list, tuple, deque})


def with_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a value, with what `change` makes of each leaf that is not one of `ATOMS`."""
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind in MAPPINGS:
        copied = MAPPINGS[kind]()
        for key, item in value.items():
            copied[key] = with_leaves(item, change)
        return copied
    if kind in SEQUENCES:
        items = [with_leaves(item, change) for item in value]
        return deque(items, value.maxlen) if kind is deque else kind(items)
    return change(value)


def referenced_names(value: Any) -> list[str]:
    """The names of the tensors that a decoded value refers to."""
    kind = type(value)
    if kind in ATOMS:
        return []
    if kind is TensorRef:
        return [value.name]
    if kind in MAPPINGS:
        return [name for item in value.values() for name in referenced_names(item)]
    if kind in SEQUENCES:
        return [name for item in value for name in referenced_names(item)]
    return []


def outlined(value: Any) -> list[str]:
    """The leaves of which a decoded value only tells the order and the kinds of dictionaries they are in.

    They are entries of their own. None where the value is no outline.
    """
    if type(value) in (TensorRef, ValueRef):
        return [value.name]
    if type(value) not in (dict, OrderedDict) or not all(type(key) is str for key in value):
        return []
    return [name for item in value.values() for name in outlined(item)]


def inside_of_values(values: Mapping[str, Any]) -> dict[str, str]:
    """The tensors that are a part of a value and no entries of their own: their names, and the value's.

    Args:
        values: decoded, by name.
    """
    return {
        inner: name
        for name, value in values.items()
        if not outlined(value)
        for inner in referenced_names(value)
    }

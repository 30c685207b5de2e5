"""Nested Python state as a tree: what is entered, what is a leaf, and copies of values.

Owns the rule of what becomes a key: dictionaries whose keys are all strings are entered, every other leaf is
one tensor or one value. Knows no component, no file and no rank. Called by `state.collector`, which captures,
and `state.rebuild`, which restores.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.references import ATOMS, MAPPINGS, SEQUENCES
from dcp_ckpt.format.values import MAX_DEPTH
from dcp_ckpt.state.component import Path
from dcp_ckpt.state.paths import join_path

__all__ = ["copied_leaf", "holds_tensor", "is_branch", "leaves", "replace_tensors"]

_SETS = frozenset({set, frozenset})
_COPIED = frozenset({set, bytearray})


def is_branch(value: Any) -> bool:
    """Whether `value` is entered key by key: a non-empty dict with string keys.

    An OrderedDict is entered only when it holds tensors (a `state_dict()`); without tensors it
    is one value, so that its type comes back.
    """
    kind = type(value)
    if (kind is not dict and kind is not OrderedDict) or not value:
        return False
    if not all(type(key) is str for key in value):
        return False
    return kind is dict or holds_tensor(value)


def leaves(state: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """All leaves of `state` with their paths, depth first, in the order of the dictionaries.

    Raises:
        StateError: nested too deeply, or a dictionary contains itself.
    """
    _check_depth(path)
    if not is_branch(state):
        yield path, state
        return
    for key, item in state.items():
        yield from leaves(item, (*path, key))


def _check_depth(path: Path) -> None:
    if len(path) > MAX_DEPTH:
        raise StateError(
            f"{join_path(path[:8])}... is nested deeper than {MAX_DEPTH} levels, or contains itself"
        )


def holds_tensor(value: Any, depth: int = 0) -> bool:
    """Whether a tensor is in `value`, at whatever depth."""
    kind = type(value)
    if kind in ATOMS or depth > MAX_DEPTH:
        return False
    if isinstance(value, torch.Tensor):
        return True
    if kind in MAPPINGS:
        return any(holds_tensor(item, depth + 1) for item in value.values())
    if kind in SEQUENCES or kind in _SETS:
        return any(holds_tensor(item, depth + 1) for item in value)
    return False


def replace_tensors(value: Any, path: Path, replace: Callable[[Path, torch.Tensor], Any]) -> Any:
    """A copy of `value` with every tensor in it replaced by what `replace` makes of its path and itself.

    Raises:
        StateError: nested too deeply, or tensors in a set; and what `replace` raises.
    """
    kind = type(value)
    if kind in ATOMS:
        return value
    _check_depth(path)
    if isinstance(value, torch.Tensor):
        return replace(path, value)
    if kind in MAPPINGS:
        copied = MAPPINGS[kind]()
        for key, item in value.items():
            copied[key] = item if type(item) in ATOMS else replace_tensors(item, (*path, str(key)), replace)
        return copied
    if kind in SEQUENCES:
        items = [
            item if type(item) in ATOMS else replace_tensors(item, (*path, str(index)), replace)
            for index, item in enumerate(value)
        ]
        return deque(items, value.maxlen) if kind is deque else kind(items)
    if kind in _SETS and holds_tensor(value):
        raise StateError(f"{join_path(path)} is a set that holds tensors, which has no order; use a list")
    return copied_leaf(value)


def copied_leaf(value: Any) -> Any:
    """A copy of what can change and holds nothing else that can."""
    kind = type(value)
    changes = kind in _COPIED or (kind.__module__ == "numpy" and kind.__name__ == "ndarray")
    return value.copy() if changes else value

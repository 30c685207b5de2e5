"""State of which a part is restored: what is one entry, and what stays beside it.

Knows no component and no file. Called by the components, and by a load that selects.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from dcp_ckpt.format.values import TensorRef, ValueRef
from dcp_ckpt.state.component import Path, StoredState
from dcp_ckpt.state.tree import is_branch, join_path, referenced_names

__all__ = ["inside_of_values", "outlined", "with_unselected"]


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


def with_unselected(state: Any, live: Any, stored: StoredState, path: Path) -> Any:
    """Rebuilt state with the leaves of the live state that are not selected, in the order of the live one.

    Args:
        state: what `rebuild` gave for `path`. A single value or tensor is restored as a whole.
        live: what the object at `path` gives now.
    """
    name = join_path(path)
    if name in stored.tensors or (name in stored.values and not outlined(stored.values[name])):
        return state
    return _merged(state, live, stored, path)


def _merged(state: Any, live: Any, stored: StoredState, path: Path) -> Any:
    if not is_branch(live) or type(state) not in (dict, OrderedDict):
        return state
    merged = type(live)()
    for key, item in live.items():
        inner = (*path, key)
        if is_branch(item):
            below = _merged(state.get(key, {}), item, stored, inner)
            if below or key in state:
                merged[key] = below
        elif not stored.selects(join_path(inner)):
            merged[key] = item
        elif key in state:
            merged[key] = state[key]
    merged.update((key, item) for key, item in state.items() if key not in merged)
    return merged

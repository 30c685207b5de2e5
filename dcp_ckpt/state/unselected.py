"""An object's state of which a part is restored: what stays of the live one beside it.

Knows no component and no file. Called by the components that hand whole states over.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from dcp_ckpt.format.references import outlined
from dcp_ckpt.state.component import Path, StoredState
from dcp_ckpt.state.paths import join_path
from dcp_ckpt.state.tree import is_branch

__all__ = ["with_unselected"]


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

"""From stored tensors and values by path back to nested Python state; the inverse of `state.collector`.

Knows no component, no file and no rank. Called by every component that restores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.references import referenced_names, with_leaves
from dcp_ckpt.format.values import InlineTensor, TensorRef, ValueRef
from dcp_ckpt.state.component import Path, StoredState, Targets
from dcp_ckpt.state.inline import from_inline
from dcp_ckpt.state.paths import path_of, stored_under
from dcp_ckpt.state.tensors import Fillable
from dcp_ckpt.state.tree import copied_leaf

__all__ = ["attach_tensors", "rebuild", "tree_targets"]


def attach_tensors(
    value: Any, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A copy of a decoded value with its tensors in place; the stored value stays as it is.

    Args:
        values: what an outline may refer to.

    Raises:
        CorruptCheckpoint: it refers to something that is not in `tensors` or `values`.
    """

    def attach(leaf: Any) -> Any:
        kind = type(leaf)
        if kind is TensorRef:
            return _referred(leaf.name, tensors)
        if kind is ValueRef:
            return attach_tensors(_referred(leaf.name, values), tensors)
        return from_inline(leaf) if kind is InlineTensor else copied_leaf(leaf)

    return with_leaves(value, attach)


def _referred(name: str, entries: Mapping[str, Any]) -> Any:
    if name not in entries:
        raise CorruptCheckpoint(f"a value refers to {name}, which the checkpoint does not hold", phase="read")
    return entries[name]


def tree_targets(
    stored: StoredState, prefix: Path, live: Mapping[str, torch.Tensor], fillable: Fillable
) -> Targets:
    """Ask for everything that is stored under `prefix`.

    Args:
        live: tensors by name that may be filled in place where dtype and global shape fit; others
            are filled into new CPU tensors.
    """
    tensors = {
        name: fillable.choose(live.get(name), name) for name in stored_under(stored, prefix, stored.tensors)
    }
    return Targets(tensors=tensors, values=frozenset(stored_under(stored, prefix, stored.values)))


def rebuild(stored: StoredState, targets: Targets, names: Iterable[str], *, depth: int) -> Any:
    """Nested state from stored names; the inverse of `StateCollector.add_object` and `add_tree`.

    Args:
        targets: the filled tensors.
        names: the tensors and values to use.
        depth: how many leading parts of each path lead to the root that is rebuilt.

    Returns:
        The single value, outline or tensor whose path ends at the root, or nested plain dictionaries with
        sorted keys.

    Raises:
        CorruptCheckpoint: the stored paths contradict each other.
    """
    # Neither JSON nor the fragments keep an order among keys, so one is fixed here.
    names = sorted(names)
    referenced = {
        name
        for value_name in names
        if value_name in stored.values
        for name in referenced_names(stored.values[value_name])
    }
    root: dict[str, Any] = {}
    for name in names:
        if name in referenced:
            continue
        is_value = name in stored.values
        path = path_of(stored, name)[depth:]
        if is_value:
            # Only an outline refers to other values, and it stands at the root.
            values = {} if path else stored.values
            leaf = attach_tensors(stored.values[name], targets.tensors, values)
        else:
            leaf = targets.tensors[name]
        if not path:
            return leaf
        branch = root
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
            if type(branch) is not dict:
                raise CorruptCheckpoint(f"{name} lies below a stored leaf", phase="read")
        branch[path[-1]] = leaf
    return root

"""From nested Python state to tensors and values by path; every component captures through it.

Owns that names can be told apart and that what is collected is safe from later changes. Tensors inside of
containers other than dictionaries are stored as tensors that the value refers to. Knows no file and no rank;
`state.rebuild` is the way back.
"""

from __future__ import annotations

from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.values import TensorRef, ValueRef, encode_value
from dcp_ckpt.state.component import Captured, Path
from dcp_ckpt.state.paths import join_path
from dcp_ckpt.state.tensors import check_tensor
from dcp_ckpt.state.tree import holds_tensor, is_branch, leaves, replace_tensors

__all__ = ["StateCollector"]


class StateCollector:
    """Collects what a component holds, and refuses keys that cannot be told apart.

    What it collects is safe from later changes of Python state: values are encoded and copied at once.
    Tensors stay live.
    """

    def __init__(self) -> None:
        self._tensors: dict[Path, torch.Tensor] = {}
        self._values: dict[Path, Any] = {}
        self._stock: dict[Path, Any] = {}
        self._paths: dict[str, Path] = {}

    def add_tensor(self, path: Path, tensor: torch.Tensor) -> None:
        """One live tensor under `path`.

        Raises:
            StateError: the tensor cannot be stored, or its name is taken.
        """
        check_tensor(tensor, self._claim(path))
        self._tensors[path] = tensor

    def add_value(self, path: Path, value: Any) -> None:
        """One Python value under `path`; tensors in it are stored below that path.

        Raises:
            StateError: a type that cannot be stored exactly, or a name is taken.
        """
        name = self._claim(path)
        found: dict[Path, torch.Tensor] = {}

        def refer(inner: Path, tensor: torch.Tensor) -> TensorRef:
            if inner in found:
                raise StateError(
                    f"two tensors have the name {join_path(inner)!r}; keys that differ in type only "
                    "cannot be told apart"
                )
            found[inner] = tensor
            return TensorRef(join_path(inner))

        copied = replace_tensors(value, path, refer)
        self._values[path] = encode_value(copied, path=name)
        if not found:
            self._stock[path] = copied
        for tensor_path, tensor in found.items():
            self.add_tensor(tensor_path, tensor)

    def add_leaf(self, path: Path, leaf: Any) -> None:
        """A tensor or a value, whichever `leaf` is."""
        if isinstance(leaf, torch.Tensor):
            self.add_tensor(path, leaf)
        else:
            self.add_value(path, leaf)

    def add_tree(self, path: Path, state: Any) -> None:
        """Nested state: one key per leaf."""
        for leaf_path, leaf in leaves(state, path):
            self.add_leaf(leaf_path, leaf)

    def add_object(self, path: Path, state: Any) -> None:
        """The state of an object: one value when it holds no tensors, else one key per leaf.

        Where the keys alone would lose the order or the kind of a dictionary, a value at `path` tells them.
        """
        if not holds_tensor(state):
            self.add_value(path, state)
            return
        self.add_tree(path, state)
        if is_branch(state) and not _follows_from_keys(state):
            name = self._claim(path)
            self._values[path] = encode_value(_outline(state, path), path=name)

    def add_captured(self, captured: Captured) -> None:
        """What another component holds.

        Raises:
            StateError: one of its names is taken.
        """
        for path in (*captured.tensors, *captured.values):
            self._claim(path)
        self._tensors.update(captured.tensors)
        self._values.update(captured.values)
        self._stock.update(captured.stock)

    def captured(self) -> Captured:
        """Everything that was added."""
        return Captured(tensors=self._tensors, values=self._values, stock=self._stock)

    def _claim(self, path: Path) -> str:
        name = join_path(path)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise StateError(f"the name {name!r} cannot be stored: {error}; rename the entry") from error
        other = self._paths.setdefault(name, path)
        if other is not path:
            raise StateError(
                f"two entries have the name {name!r}: {_show(other)} and {_show(path)}; rename one of them"
            )
        return name


def _show(path: Path) -> str:
    return "".join(f"[{part!r}]" for part in path)


def _follows_from_keys(branch: Any) -> bool:
    """Whether `rebuild` would make the same dictionaries of the leaves alone: plain ones with sorted keys."""
    if not is_branch(branch):
        return True
    keys = list(branch)
    return type(branch) is dict and keys == sorted(keys) and all(map(_follows_from_keys, branch.values()))


def _outline(branch: Any, path: Path) -> Any:
    """The dictionaries of `branch`, with references to its leaves."""
    if is_branch(branch):
        return type(branch)((key, _outline(item, (*path, key))) for key, item in branch.items())
    name = join_path(path)
    return TensorRef(name) if isinstance(branch, torch.Tensor) else ValueRef(name)

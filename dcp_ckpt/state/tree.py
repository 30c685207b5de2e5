"""Nested Python state to tensors and values by path, and back.

Owns the rule of what becomes a key: dictionaries whose keys are all strings are entered, every other leaf is
one tensor or one value, and tensors inside of other containers are stored as tensors that the value refers
to. Knows no component, no file and no rank; every component captures through a `StateCollector`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from dcp_ckpt.errors import CorruptCheckpoint, StateError
from dcp_ckpt.format.values import MAX_DEPTH, InlineTensor, TensorRef, ValueRef, encode_value
from dcp_ckpt.state.component import Captured, Path, StoredState, Targets
from dcp_ckpt.state.inline import from_inline
from dcp_ckpt.state.tensors import Fillable, check_tensor

__all__ = [
    "StateCollector",
    "attach_tensors",
    "by_name",
    "is_branch",
    "is_under",
    "join_path",
    "leaves",
    "names_under",
    "path_of",
    "rebuild",
    "referenced_names",
    "replace_tensors",
    "stored_under",
    "tree_targets",
]

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})


def join_path(path: Path) -> str:
    """The name of a path: its parts joined with dots, as DCP flattens them."""
    return ".".join(path)


def by_name(tensors: Mapping[Path, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Captured tensors under their names."""
    return {join_path(path): tensor for path, tensor in tensors.items()}


def names_under(names: Iterable[str], prefix: Path) -> list[str]:
    """Those of `names` that are the prefix itself or lie below it; all of them for the empty prefix."""
    if not prefix:
        return list(names)
    root = join_path(prefix)
    below = root + "."
    return [name for name in names if name == root or name.startswith(below)]


def is_under(path: Path, prefix: Path) -> bool:
    """Whether a path is the prefix or lies below it.

    By parts, for one part may hold dots: `optimizer.a.b` is not below `optimizer.a` when its key is "a.b". A
    path of one part (a flat state has no others) is looked at by its name.
    """
    return path[: len(prefix)] == prefix or (len(path) == 1 and path[0].startswith(f"{join_path(prefix)}."))


def stored_under(stored: StoredState, prefix: Path, names: Iterable[str] | None = None) -> list[str]:
    """Those of `names` that lie under the prefix; of all tensors and values where no names are given."""
    candidates = (*stored.tensors, *stored.values) if names is None else names
    return [name for name in candidates if is_under(path_of(stored, name), prefix)]


def path_of(stored: StoredState, name: str) -> Path:
    """The path of a stored tensor or replicated value."""
    tensor = stored.tensors.get(name)
    return tensor.path if tensor is not None else stored.value_paths[name]


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
    return kind is dict or _holds_tensor(value)


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


def _holds_tensor(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind in _ATOMS or depth > MAX_DEPTH:
        return False
    if isinstance(value, torch.Tensor):
        return True
    if kind in _MAPPINGS:
        return any(_holds_tensor(item, depth + 1) for item in value.values())
    if kind in _SEQUENCES or kind in _SETS:
        return any(_holds_tensor(item, depth + 1) for item in value)
    return False


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
        if not _holds_tensor(state):
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


def replace_tensors(value: Any, path: Path, replace: Callable[[Path, torch.Tensor], Any]) -> Any:
    """A copy of `value` with every tensor in it replaced by what `replace` makes of its path and itself.

    Raises:
        StateError: nested too deeply, or tensors in a set; and what `replace` raises.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    _check_depth(path)
    if isinstance(value, torch.Tensor):
        return replace(path, value)
    if kind in _MAPPINGS:
        copied = _MAPPINGS[kind]()
        for key, item in value.items():
            copied[key] = item if type(item) in _ATOMS else replace_tensors(item, (*path, str(key)), replace)
        return copied
    if kind in _SEQUENCES:
        items = [
            item if type(item) in _ATOMS else replace_tensors(item, (*path, str(index)), replace)
            for index, item in enumerate(value)
        ]
        return deque(items, value.maxlen) if kind is deque else kind(items)
    if kind in _SETS and _holds_tensor(value):
        raise StateError(f"{join_path(path)} is a set that holds tensors, which has no order; use a list")
    return _copied(value)


def _copied(value: Any) -> Any:
    """A copy of what can change and holds nothing else that can."""
    kind = type(value)
    changes = kind in _COPIED or (kind.__module__ == "numpy" and kind.__name__ == "ndarray")
    return value.copy() if changes else value


_MAPPINGS: dict[type, Callable[[], Any]] = {dict: dict, OrderedDict: OrderedDict, Counter: Counter}
_SEQUENCES = frozenset({list, tuple, deque})
_SETS = frozenset({set, frozenset})
_COPIED = frozenset({set, bytearray})


def referenced_names(value: Any) -> list[str]:
    """The names of the tensors that a decoded value refers to."""
    kind = type(value)
    if kind in _ATOMS:
        return []
    if kind is TensorRef:
        return [value.name]
    if kind in _MAPPINGS:
        return [name for item in value.values() for name in referenced_names(item)]
    if kind in _SEQUENCES:
        return [name for item in value for name in referenced_names(item)]
    return []


def attach_tensors(
    value: Any, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A copy of a decoded value with its tensors in place; the stored value stays as it is.

    Args:
        values: what an outline may refer to.

    Raises:
        CorruptCheckpoint: it refers to something that is not in `tensors` or `values`.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is TensorRef:
        return _referred(value.name, tensors)
    if kind is ValueRef:
        return attach_tensors(_referred(value.name, values), tensors)
    if kind is InlineTensor:
        return from_inline(value)
    if kind in _MAPPINGS:
        copied = _MAPPINGS[kind]()
        for key, item in value.items():
            copied[key] = attach_tensors(item, tensors, values)
        return copied
    if kind in _SEQUENCES:
        items = [attach_tensors(item, tensors, values) for item in value]
        return deque(items, value.maxlen) if kind is deque else kind(items)
    return _copied(value)


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

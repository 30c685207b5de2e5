"""States that DCP flattened, under the names by which this package stores the same state. Pure.

DCP enters every dictionary, and every list that holds tensors or dictionaries, and names each leaf by its
path; this package stores a list, or the state of a scheduler, as one value. Owns the way from the one to the
other, led by what the live state looks like. Called by `load.fit`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dcp_ckpt.format.stock_metadata import FlatPath
from dcp_ckpt.format.values import TensorRef
from dcp_ckpt.state.component import Path, StoredState, StoredTensor
from dcp_ckpt.state.param_groups import are_named_groups
from dcp_ckpt.state.paths import join_path, names_under

__all__ = ["Regrouped", "regroup"]

_GROUPS = "param_groups"


@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """A stored state under our names.

    Args:
        stored_names: for tensors that were renamed: their names in the checkpoint.
    """

    state: StoredState
    stored_names: Mapping[str, str]


def regroup(
    state: StoredState, flat_paths: Mapping[str, FlatPath], live: Sequence[tuple[Path, Any]]
) -> Regrouped:
    """Give a flattened state the names that a save of the live state would give it.

    What fits nowhere keeps its name, for the diff to report.

    Args:
        state: as the checkpoint names it.
        flat_paths: the path of every tensor and value in the state that DCP flattened.
        live: path and decoded content of every value that a save of the live state would store now.
    """
    names = _Names(state, flat_paths)
    for path, content in live:
        names.gather(path, content)
    for path, content in live:
        if path and path[-1] == _GROUPS and are_named_groups(content):
            names.name_parameters(path[:-1], [group["params"] for group in content])
    return names.regrouped()


class _Names:
    """The stored state in the making."""

    def __init__(self, state: StoredState, flat_paths: Mapping[str, FlatPath]) -> None:
        self._state = state
        self._flat_paths = flat_paths
        self._tensors = dict(state.tensors)
        self._values = dict(state.values)
        self._value_paths = dict(state.value_paths)
        self._stored_names: dict[str, str] = {}

    def regrouped(self) -> Regrouped:
        state = replace(
            self._state, tensors=self._tensors, values=self._values, value_paths=self._value_paths
        )
        return Regrouped(state=state, stored_names=self._stored_names)

    def gather(self, path: Path, live: Any) -> None:
        """Put together one value of which DCP stored the leaves."""
        name = join_path(path)
        if name in self._values or name in self._tensors:
            return
        below = [
            leaf
            for leaf in names_under((*self._tensors, *self._values), path)
            if tuple(map(str, self._flat_paths[leaf][: len(path)])) == path
        ]
        if not below:
            # DCP stores nothing for an empty dictionary, so nothing stored may well mean one.
            if type(live) is dict and not live:
                self._add_value(path, {})
            return
        nested: dict[str | int, Any] = {}
        for leaf in below:
            branch = nested
            *parents, last = self._flat_paths[leaf][len(path) :]
            for part in parents:
                branch = branch.setdefault(part, {})
            branch[last] = TensorRef(leaf) if leaf in self._tensors else _Leaf(self._values.pop(leaf))
        self._add_value(path, _assembled(nested, live))

    def name_parameters(self, prefix: Path, groups: Sequence[Sequence[str]]) -> None:
        """Give one optimizer's state the names of its parameters.

        Args:
            prefix: of the optimizer.
            groups: names of the live parameters, by group.
        """
        groups_path = (*prefix, _GROUPS)
        stored = self._values.get(join_path(groups_path))
        if stored is None:
            self._unflatten(prefix, groups)
        elif numbers := _numbered_params(stored, groups):
            self._rename_numbered(prefix, numbers)
            renamed = [
                {**group, "params": list(members)} for group, members in zip(stored, groups, strict=True)
            ]
            self._add_value(groups_path, renamed)

    def _rename_numbered(self, prefix: Path, numbers: Mapping[str, str]) -> None:
        """State by position, as `optimizer.state_dict()` keeps it."""
        state_path = (*prefix, "state")
        depth = len(state_path)
        for name in names_under((*self._tensors, *self._values), state_path):
            path = self._tensors[name].path if name in self._tensors else self._value_paths[name]
            if len(path) > depth + 1 and path[depth] in numbers:
                self._move(name, (*state_path, numbers[path[depth]], *path[depth + 1 :]))

    def _unflatten(self, prefix: Path, groups: Sequence[Sequence[str]]) -> None:
        """State by names in one flat dictionary, as `flatten_optimizer_state_dict` gives it."""
        root, state_path = join_path((*prefix, _GROUPS)), (*prefix, "state")
        below: dict[str, list[str]] = {}
        for name in names_under((*self._tensors, *self._values), prefix):
            below.setdefault(name.rpartition(".")[0], []).append(name)
        members = {name: index for index, group in enumerate(groups) for name in group}
        settings: dict[str, dict[str, Any]] = {
            parameter: {
                name.rpartition(".")[2]: self._values[name]
                for name in below.get(f"{root}.{parameter}", ())
                if name in self._values
            }
            for parameter in members
        }
        found: list[dict[str, Any]] = [{} for _ in groups]
        for parameter, index in members.items():
            for key, value in settings[parameter].items():
                # The parameters of one live group had different settings: there is no such group to restore.
                if found[index].setdefault(key, value) != value:
                    return
        for parameter, index in members.items():
            for key in settings[parameter]:
                del self._values[f"{root}.{parameter}.{key}"]
            if settings[parameter]:
                found[index].setdefault("params", []).append(parameter)
            for name in below.get(f"{join_path(state_path)}.{parameter}", ()):
                self._move(name, (*state_path, parameter, name.rpartition(".")[2]))
        if any(found):
            self._add_value((*prefix, _GROUPS), [{"params": [], **group} for group in found])

    def _move(self, name: str, path: Path) -> None:
        new_name = join_path(path)
        if name in self._tensors:
            entry = self._tensors.pop(name)
            self._tensors[new_name] = StoredTensor(path=path, dtype=entry.dtype, shape=entry.shape)
            if new_name != name:
                self._stored_names[new_name] = name
        else:
            self._values[new_name] = self._values.pop(name)
            self._value_paths[new_name] = path

    def _add_value(self, path: Path, value: Any) -> None:
        self._values[join_path(path)] = value
        self._value_paths[join_path(path)] = path


@dataclass(frozen=True)
class _Leaf:
    """A stored value, which may be a dictionary itself."""

    value: Any


def _assembled(node: Any, live: Any) -> Any:
    """Nested state from leaves, with lists and integer keys where the live state has them."""
    if isinstance(node, _Leaf):
        return node.value
    if not isinstance(node, dict) or not node:
        return node
    numbered = all(type(key) is int or _is_number(key) for key in node)
    if all(type(key) is int for key in node) or (numbered and isinstance(live, list)):
        items = {int(key): item for key, item in node.items()}
        old = live if isinstance(live, list) else []
        count = max(items) + 1
        # DCP leaves out empty dictionaries, also in lists.
        while count < len(old) and old[count] == {}:
            count += 1
        return [_assembled(items.get(i, {}), old[i] if i < len(old) else None) for i in range(count)]
    old_items: Mapping[Any, Any] = live if isinstance(live, dict) else {}
    by_number = numbered and not any(type(key) is str for key in old_items)
    result = {
        key: _assembled(item, old_items.get(key))
        for key, item in ((int(key) if by_number else key, item) for key, item in node.items())
    }
    empty: dict[Any, Any] = {key: {} for key, item in old_items.items() if type(item) is dict and not item}
    # DCP forgets what kind of dictionary it was.
    kind = type(live) if type(live) in (OrderedDict, Counter) else dict
    return kind(empty | result)


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and text.isdecimal() and str(int(text)) == text


def _numbered_params(stored: Any, groups: Sequence[Sequence[str]]) -> dict[str, str] | None:
    """Names by position, where the stored groups list positions and are as large as the live ones."""
    if not isinstance(stored, list) or len(stored) != len(groups):
        return None
    numbers: dict[str, str] = {}
    for group, members in zip(stored, groups, strict=True):
        positions = group.get("params") if isinstance(group, dict) else None
        if not isinstance(positions, list) or len(positions) != len(members):
            return None
        if not all(type(position) is int for position in positions):
            return None
        numbers.update(zip(map(str, positions), members, strict=True))
    return numbers

"""Stored entries under the names that the live state has for them. Pure.

Owns what follows a name: the path that it stands for, references to tensors inside of values, and the state
that optimizers keep by parameter name. Called by `load.fit`, before anything else looks at the names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.dotted import cuts, is_below, joined, tail
from dcp_ckpt.format.references import referenced_names, with_leaves
from dcp_ckpt.format.stock_metadata import FlatPath
from dcp_ckpt.format.values import TensorRef, ValueRef
from dcp_ckpt.load.nearest import did_you_mean
from dcp_ckpt.state.component import Path, StoredState
from dcp_ckpt.state.inventory import Inventory
from dcp_ckpt.state.paths import join_path

__all__ = ["Renamed", "renamed"]

_SECTIONS = ("state", "param_groups")
"""Of an optimizer's stored state: both name parameters."""


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """A stored state under live names.

    Args:
        flat_paths: as given, under the new names.
        names: stored name -> new name, of everything.
    """

    state: StoredState
    flat_paths: Mapping[str, FlatPath] | None
    names: Mapping[str, str]


def renamed(
    state: StoredState,
    flat_paths: Mapping[str, FlatPath] | None,
    rules: Mapping[str, str],
    live: Inventory,
    *,
    others: Iterable[str] = (),
) -> Renamed:
    """Rename entries by `rules`; what optimizers keep follows the parameters.

    Args:
        flat_paths: the path of every tensor and value, for a state that DCP flattened.
        rules: as `Selection.rename`.
        others: names that are stored and not in `state`.

    Raises:
        ConfigError: a rule that no stored name fits, or several entries of one name.
    """
    renaming = _Renaming(state, flat_paths, others)
    renaming.by_rules(rules, live.nodes)
    for prefix in live.optimizers:
        renaming.by_parameters(prefix, live)
    return renaming.result()


class _Renaming:
    """Names and paths in the making, all by stored name."""

    def __init__(
        self, state: StoredState, flat_paths: Mapping[str, FlatPath] | None, others: Iterable[str]
    ) -> None:
        self._state = state
        self._names = {name: name for name in (*state.tensors, *state.values, *state.per_rank_names, *others)}
        self._paths = {name: entry.path for name, entry in state.tensors.items()} | dict(state.value_paths)
        self._flat_paths = None if flat_paths is None else dict(flat_paths)
        self._values = dict(state.values)

    def by_rules(self, rules: Mapping[str, str], nodes: Mapping[str, Path]) -> None:
        """Apply the longest rule that fits each name."""
        unused = [rule for rule in rules if not any(is_below(stored, rule) for stored in self._names)]
        if unused:
            raise ConfigError("\n".join(_unused(rule, self._names) for rule in unused), phase="diff")
        by_length = sorted(rules, key=len, reverse=True)
        for stored in self._names:
            old = next((rule for rule in by_length if is_below(stored, rule)), None)
            if old is not None:
                self._names[stored] = joined(rules[old], tail(stored, old))
                self._change_paths(stored, partial(_moved, old=old, new=rules[old], nodes=nodes))

    def by_parameters(self, prefix: Path, live: Inventory) -> None:
        """Give the state that one optimizer keeps the new names of its parameters."""
        new_names = self._new_parameters(prefix, live)
        for section in _SECTIONS:
            at = len(join_path((*prefix, section))) + 1
            for stored in self._below(prefix, section):
                self._rename_parameter(stored, at, new_names)
                if stored in self._values and self._lists_parameters(stored):
                    self._values[stored] = _relisted(self._values[stored], new_names)

    def result(self) -> Renamed:
        """The state under the new names."""
        state, names = self._state, self._names
        counts = Counter(names[stored] for stored in (*state.tensors, *state.values, *state.per_rank_names))
        if taken := [name for name, count in counts.items() if count > 1 or not name]:
            several = sorted(stored for stored, name in names.items() if name == taken[0])
            raise ConfigError(
                f"rename: {' and '.join(several)} cannot have the name {taken[0]!r}", phase="diff"
            )
        flat = self._flat_paths
        return Renamed(
            state=replace(
                state,
                tensors={
                    names[stored]: replace(entry, path=self._paths[stored])
                    for stored, entry in state.tensors.items()
                },
                values={
                    names[stored]: _with_names(value, names) if referenced_names(value) else value
                    for stored, value in self._values.items()
                },
                aliases={names[alias]: names[stored] for alias, stored in state.aliases.items()},
                value_paths={names[stored]: self._paths[stored] for stored in state.value_paths},
                per_rank_of=lambda rank: {
                    names.get(stored, stored): value for stored, value in state.per_rank_of(rank).items()
                },
            ),
            flat_paths=None if flat is None else {names[stored]: path for stored, path in flat.items()},
            names=names,
        )

    def _new_parameters(self, prefix: Path, live: Inventory) -> dict[str, str]:
        """The parameters of one optimizer that get another name.

        Parameter `p` is the tensor that the checkpoint holds as `<root>.p`, with one root for all parameters.
        It becomes what the live optimizer calls that tensor under its new name.
        """
        parameters = self._parameters(prefix)
        counts = Counter(
            root for tensor in self._state.tensors for root, rest in cuts(tensor) if rest in parameters
        )
        fits = {
            root: sum(self._names.get(joined(root, p)) in live.parameters for p in parameters)
            for root in counts
        }
        root = max(counts, key=lambda root: (fits[root], counts[root], -len(root)), default="")
        new_names: dict[str, str] = {}
        for parameter in parameters:
            tensor = self._names.get(joined(root, parameter), "")
            if tensor in live.parameters:
                new_names[parameter] = live.parameters[tensor].key
            elif tensor and is_below(tensor, root):
                new_names[parameter] = tail(tensor, root)
        return {old: new for old, new in new_names.items() if new != old}

    def _parameters(self, prefix: Path) -> set[str]:
        """The stored names of an optimizer's parameters."""
        found: set[str] = set()
        for section in _SECTIONS:
            at = len(join_path((*prefix, section))) + 1
            for stored in self._below(prefix, section):
                found.add(_parameter_at(self._path(stored), at))
                if stored in self._values and self._lists_parameters(stored):
                    found.update(_listed(self._values[stored]))
        return found - {""}

    def _below(self, prefix: Path, section: str) -> list[str]:
        """Stored names of what now lies in one section of an optimizer's state."""
        root = join_path((*prefix, section))
        return [stored for stored, name in self._names.items() if is_below(name, root)]

    def _lists_parameters(self, stored: str) -> bool:
        return self._names[stored].endswith((".param_groups", ".params"))

    def _rename_parameter(self, stored: str, at: int, new_names: Mapping[str, str]) -> None:
        """Rename one entry, whose parameter begins at character `at` of its name."""
        old = _parameter_at(self._path(stored), at)
        if old in new_names:
            name = self._names[stored]
            self._names[stored] = name[:at] + new_names[old] + name[at + len(old) :]
            self._change_paths(stored, partial(_replaced, at=at, old=old, new=new_names[old]))

    def _path(self, stored: str) -> FlatPath:
        if self._flat_paths is not None and stored in self._flat_paths:
            return self._flat_paths[stored]
        return self._paths.get(stored, ())

    def _change_paths(self, stored: str, change: Callable[[FlatPath], FlatPath]) -> None:
        if stored in self._paths:
            self._paths[stored] = tuple(map(str, change(self._paths[stored])))
        if self._flat_paths is not None and stored in self._flat_paths:
            self._flat_paths[stored] = change(self._flat_paths[stored])


def _part_at(path: FlatPath, at: int) -> tuple[int, int]:
    """Which part of a path holds character `at` of its name, and where in that part."""
    start = 0
    for index, part in enumerate(path):
        stop = start + len(str(part))
        if at < stop:
            return index, at - start
        start = stop + 1
    raise ValueError(f"{path} has no character {at}")


def _moved(path: FlatPath, *, old: str, new: str, nodes: Mapping[str, Path]) -> FlatPath:
    """A path that lies below the name `old`, below `new`: along live paths, or its own, as far as they lead.

    What is left of the new name is one part, as the name of a tensor in a model is.
    """
    count, inner = 0, ""
    if old:
        index, place = _part_at(path, len(old) - 1)
        count, inner = index + 1, str(path[index])[place + 1 :].removeprefix(".")
    bases: list[FlatPath] = [nodes[root] for root, _ in cuts(new + ".") if root in nodes]
    bases += [path[:depth] for depth in range(count + 1 - bool(inner)) if is_below(new, _name(path[:depth]))]
    base = max(bases, key=lambda base: len(_name(base)))
    middle = joined(tail(new, _name(base)), inner)
    return (*base, *([middle] if middle else []), *path[count:])


def _name(path: FlatPath) -> str:
    return ".".join(map(str, path))


def _parameter_at(path: FlatPath, at: int) -> str:
    """The parameter whose name begins at character `at` of a path's name; "" where none does.

    In an optimizer's state that was flattened the key follows in the same part, behind a dot.
    """
    if at >= len(_name(path)):
        return ""
    index, place = _part_at(path, at)
    if type(path[index]) is int:
        return ""  # a position in a list of groups
    text = str(path[index])[place:]
    return text if index < len(path) - 1 else text.rpartition(".")[0]


def _replaced(path: FlatPath, *, at: int, old: str, new: str) -> FlatPath:
    """A path in which the text at character `at` of its name is another one."""
    index, place = _part_at(path, at)
    text = str(path[index])
    return (*path[:index], text[:place] + new + text[place + len(old) :], *path[index + 1 :])


def _listed(value: Any) -> Iterator[str]:
    """The parameters that a stored value lists: of all groups, or of one."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from _listed(item.get("params"))


def _relisted(value: Any, new_names: Mapping[str, str]) -> Any:
    """The same value with the new names of parameters."""
    if isinstance(value, str):
        return new_names.get(value, value)
    if isinstance(value, dict) and "params" in value:
        return {**value, "params": _relisted(value["params"], new_names)}
    return [_relisted(item, new_names) for item in value] if isinstance(value, list) else value


def _with_names(value: Any, names: Mapping[str, str]) -> Any:
    """A value with the new names in its references to other entries."""

    def renamed(leaf: Any) -> Any:
        kind = type(leaf)
        return kind(names.get(leaf.name, leaf.name)) if kind in (TensorRef, ValueRef) else leaf

    return with_leaves(value, renamed)


def _unused(rule: str, names: Iterable[str]) -> str:
    hint = did_you_mean(rule, names)
    return f"rename: the checkpoint holds nothing of the name {rule!r}, and nothing below it{hint}"

"""Objects with `state_dict()` and `load_state_dict()`, and nested dictionaries loaded in place.

Owns how user state that is equal on all ranks comes and goes: schedulers, scalers, elastic loaders, `extra`
and plain dictionaries. Knows no file and no rank.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dcp_ckpt.errors import CheckpointError, LoadError, StateError
from dcp_ckpt.format.references import referenced_names
from dcp_ckpt.state.accumulation import watch_steps
from dcp_ckpt.state.collector import StateCollector
from dcp_ckpt.state.component import Captured, Component, Path, Problem, StoredState, Targets
from dcp_ckpt.state.model import ModelComponent, parameter_names
from dcp_ckpt.state.optimizer import OptimizerComponent
from dcp_ckpt.state.paths import by_name, join_path, names_under, stored_under
from dcp_ckpt.state.problems import missing, unexpected, unfillable, value_for_tensor
from dcp_ckpt.state.rebuild import rebuild, tree_targets
from dcp_ckpt.state.tensors import Fillable, fits, unsuitable
from dcp_ckpt.state.tree import is_branch
from dcp_ckpt.state.unselected import with_unselected

__all__ = ["DictComponent", "Stateful", "StatefulComponent", "load_into", "put"]


@runtime_checkable
class Stateful(Protocol):
    """An object that gives its state as a dictionary and takes it back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class StatefulComponent:
    """One object with `state_dict()`: a single value if it holds no tensors, else one key per leaf."""

    def __init__(self, prefix: Path, stateful: Stateful) -> None:
        self._prefix = prefix
        self._stateful = stateful

    @property
    def prefix(self) -> Path:
        return self._prefix

    def capture(self) -> Captured:
        collector = StateCollector()
        collector.add_object(self._prefix, self._stateful.state_dict())
        return collector.captured()

    def targets(self, stored: StoredState) -> Targets:
        """Everything that is stored under the prefix; the object itself judges it in `load_state_dict`."""
        live = by_name(self.capture().tensors)
        targets = tree_targets(stored, self._prefix, live, Fillable(stored))
        if targets.tensors or targets.values:
            return targets
        return Targets(problems=(missing(join_path(self._prefix)),))

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        names = stored_under(stored, self._prefix, (*targets.values, *targets.tensors))
        if names:
            state = rebuild(stored, targets, names, depth=len(self._prefix))
            if stored.is_partial:
                state = with_unselected(state, self._stateful.state_dict(), stored, self._prefix)
            load_into(self._stateful, state, join_path(self._prefix))
        return []


def load_into(stateful: Stateful, state: Any, name: str) -> None:
    """Give a loaded state to the object that it is of.

    Args:
        name: of that state, for the message.

    Raises:
        LoadError: the object refused it.
    """
    try:
        stateful.load_state_dict(state)
    except CheckpointError:
        raise
    # The boundary to code that is not ours: whatever it raises means that the load failed at this key.
    except Exception as error:
        raise LoadError(
            f"{name}: {type(stateful).__qualname__}.load_state_dict refused the stored state: {error}",
            phase="restore",
        ) from error


class DictComponent:
    """A nested dictionary of tensors, values and objects, loaded in place.

    Modules and optimizers in it are kept like those of a TrainState (an optimizer's parameters are
    named by the modules in the same dictionary), other objects with `state_dict()` keep their own state. On
    load, tensors are filled, lists, dictionaries and sets updated, everything else is replaced in its
    dictionary. The live dictionary is the template: keys on one side only are problems, except that an empty
    dictionary inside of it takes whatever is stored below it.

    Args:
        prefix: may be empty, for a dictionary that is the whole state.
        mapping: the live dictionary.
    """

    def __init__(self, prefix: Path, mapping: dict[str, Any]) -> None:
        self._prefix = prefix
        self._mapping = mapping
        self._models: dict[Path, ModelComponent] = {}

    @property
    def prefix(self) -> Path:
        return self._prefix

    def capture(self) -> Captured:
        collector = StateCollector()
        for component in self.components():
            collector.add_captured(component.capture())
        for path, _, leaf in self._leaves():
            collector.add_leaf(path, leaf)
        return collector.captured()

    def targets(self, stored: StoredState) -> Targets:
        tensors: dict[str, torch.Tensor] = {}
        values: set[str] = set()
        problems: list[Problem] = []
        reinitialised: dict[str, str] = {}
        components = self.components()
        for component in components:
            part = component.targets(stored)
            tensors.update(part.tensors)
            values.update(part.values)
            problems += part.problems
            reinitialised.update(part.reinitialised)
        fillable = Fillable(stored)
        for path, _, leaf in self._leaves():
            part = _leaf_targets(stored, path, leaf, fillable)
            tensors.update(part.tensors)
            values.update(part.values)
            problems += part.problems
        known = {*tensors, *values, *(problem.key for problem in problems)}
        for component in components:
            known.update(stored_under(stored, component.prefix))
        problems += [
            unexpected(name, "the live dictionary")
            for name in stored_under(stored, self._prefix)
            if name not in known
        ]
        return Targets(
            tensors=tensors,
            values=frozenset(values),
            problems=tuple(problems),
            reinitialised=reinitialised,
        )

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        notes: list[str] = []
        for component in self.components():
            notes += component.install(stored, targets)
        for path, parent, leaf in list(self._leaves()):
            names = _leaf_names(targets, path, leaf)
            if names:
                put(parent, path[-1], leaf, rebuild(stored, targets, names, depth=len(path)))
        return notes

    def _leaves(self) -> Iterator[tuple[Path, dict[str, Any], Any]]:
        """Leaves that are no objects: path, the dictionary that holds it, the leaf."""
        for path, parent, leaf in _entries(self._mapping, self._prefix):
            if not (isinstance(leaf, (nn.Module, torch.optim.Optimizer)) or _is_stateful(leaf)):
                yield path, parent, leaf

    def components(self) -> list[Component]:
        """Adapters of the objects in it: models first, since they name the optimizers' parameters."""
        entries = [(path, leaf) for path, _, leaf in _entries(self._mapping, self._prefix)]
        models = {path: self._model(path, leaf) for path, leaf in entries if isinstance(leaf, nn.Module)}
        self._models = models
        names = parameter_names(
            (model, path[len(self._prefix) :] if len(models) > 1 else ()) for path, model in models.items()
        )
        components: list[Component] = list(models.values())
        watch = watch_steps(
            [leaf for _, leaf in entries if isinstance(leaf, torch.optim.Optimizer)],
            next((leaf for _, leaf in entries if isinstance(leaf, torch.amp.GradScaler)), None),
        )
        for path, leaf in entries:
            if isinstance(leaf, torch.optim.Optimizer):
                components.append(OptimizerComponent(path, leaf, names, watch))
            elif _is_stateful(leaf) and not isinstance(leaf, nn.Module):
                components.append(StatefulComponent(path, leaf))
        return components

    def _model(self, path: Path, module: nn.Module) -> ModelComponent:
        known = self._models.get(path)
        return known if known is not None and known.module is module else ModelComponent(path, module)


def _is_stateful(leaf: Any) -> bool:
    """Whether it is an object that gives and takes its state.

    Tensors first: there are many of them, and to see that one has no such methods takes 20 us.
    """
    return not isinstance(leaf, torch.Tensor) and isinstance(leaf, Stateful)


def _entries(mapping: dict[str, Any], path: Path) -> Iterator[tuple[Path, dict[str, Any], Any]]:
    for key, item in mapping.items():
        if type(key) is not str:
            where = join_path(path) or "the state"
            raise StateError(f"{where} has the key {key!r}; keys at this level must be strings")
        if is_branch(item):
            yield from _entries(item, (*path, key))
        else:
            yield (*path, key), mapping, item


def _leaf_targets(stored: StoredState, path: Path, leaf: Any, fillable: Fillable) -> Targets:
    name = join_path(path)
    if type(leaf) is dict and not leaf:
        below = tree_targets(stored, path, {}, fillable)
        return below if below.tensors or below.values else Targets(problems=(missing(name),))
    if name in stored.tensors:
        if not isinstance(leaf, torch.Tensor) or fits(leaf, stored.tensors[name]):
            return Targets(tensors={name: fillable.choose(leaf, name)})
        if reason := unsuitable(leaf):
            return Targets(problems=(unfillable(name, reason),))
        # One of another shape or dtype is offered as it is: the caller compares and reports.
        return Targets(tensors={name: leaf})
    if name in stored.values:
        if isinstance(leaf, torch.Tensor):
            return Targets(problems=(value_for_tensor(name),))
        live = _tensors_inside(path, leaf)
        tensors = {
            inner: fillable.choose(live.get(inner), inner)
            for inner in referenced_names(stored.values[name])
            if inner in stored.tensors
        }
        return Targets(tensors=tensors, values=frozenset({name}))
    return Targets(problems=(missing(name),))


def _leaf_names(targets: Targets, path: Path, leaf: Any) -> list[str]:
    """What was asked for a leaf: itself, or all that lies below an empty dictionary."""
    name = join_path(path)
    if name in targets.values or name in targets.tensors:
        return [name]
    return names_under((*targets.values, *targets.tensors), path) if type(leaf) is dict and not leaf else []


def _tensors_inside(path: Path, leaf: Any) -> dict[str, torch.Tensor]:
    collector = StateCollector()
    collector.add_value(path, leaf)
    return by_name(collector.captured().tensors)


def put(parent: dict[str, Any], key: str, live: Any, value: Any) -> None:
    """Make the live object, an entry of `parent`, equal to `value`: in place where it can change."""
    if live is value:
        return
    same_kind = type(live) is type(value)
    if same_kind and isinstance(live, list):
        live[:] = value
    elif same_kind and type(live) in (dict, OrderedDict, Counter, set):
        live.clear()
        live.update(value)
    else:
        parent[key] = value

"""What a live state consists of, by name: what globs can mean, and where renamed entries belong.

Owns the look at all components together. Reads, changes nothing. Called by a load that restores a part, or
under other names, or from a state that DCP flattened.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.references import inside_of_values
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.state.component import Captured, Component, Path
from dcp_ckpt.state.model import ModelComponent
from dcp_ckpt.state.optimizer import OptimizerComponent
from dcp_ckpt.state.part import PartComponent
from dcp_ckpt.state.paths import join_path
from dcp_ckpt.state.stateful import DictComponent
from dcp_ckpt.state.tensors import once_each

__all__ = ["Inventory", "LiveParameter", "every_component", "take_inventory"]


@dataclass(frozen=True, kw_only=True)
class LiveParameter:
    """A parameter of a model.

    Args:
        key: the name by which optimizers know it.
        shape: its global shape.
    """

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The names of one rank's live state.

    Args:
        names: of all that a save would store now, and of the parameters that optimizers may keep state for;
            tensors inside of a value have none of their own.
        nodes: the path of every entry and of everything above one, by name.
        values: path and decoded content of every value that a save would store now.
        parameters: those of all models, by each of their names in the whole state.
        optimizers: where their state is stored.
        ties: all names of one tensor, or of what an optimizer keeps for one, where it has several.
    """

    names: frozenset[str]
    nodes: Mapping[str, Path]
    values: Sequence[tuple[Path, Any]]
    parameters: Mapping[str, LiveParameter]
    optimizers: tuple[Path, ...]
    ties: tuple[tuple[str, ...], ...]


def take_inventory(components: Sequence[Component]) -> Inventory:
    """Look at everything. Local to the rank; `state_dict()` of the user's objects is called."""
    paths: list[Path] = []
    values: list[tuple[Path, Any]] = []
    tensors: dict[Path, torch.Tensor] = {}
    for component in components:
        captured = _captured(component)
        tensors.update(captured.tensors)
        paths += [*captured.tensors, *captured.values, *captured.per_rank] or [component.prefix]
        values += [
            (path, decode_value(value, path=join_path(path))) for path, value in captured.values.items()
        ]
    inside = inside_of_values({join_path(path): value for path, value in values})
    parts = list(every_component(components))
    optimizers = [part for part in parts if isinstance(part, OptimizerComponent)]
    models = [part for part in parts if isinstance(part, ModelComponent)]
    kept_for = [paths for optimizer in optimizers for paths in optimizer.state_paths()]
    names = frozenset(map(join_path, (*paths, *chain.from_iterable(kept_for)))) - {"", *inside}
    tied = [(path, *others) for path, others in once_each(tensors)[1].items()]
    nodes = {join_path(path[:depth]): path[:depth] for path in paths for depth in range(len(path) + 1)}
    return Inventory(
        names=names,
        nodes=nodes,
        values=values,
        parameters=_parameters(models, optimizers),
        optimizers=tuple(optimizer.prefix for optimizer in optimizers),
        ties=tuple(_ties((*tied, *kept_for), names)),
    )


def _ties(paths: Iterable[Iterable[Path]], names: Container[str]) -> Iterator[tuple[str, ...]]:
    for tied in paths:
        known = tuple(name for name in map(join_path, tied) if name in names)
        if len(known) > 1:
            yield known


def _captured(component: Component) -> Captured:
    try:
        return component.capture()
    except StateError:
        return Captured()  # what cannot be saved as it is now may well be loaded into


def every_component(components: Sequence[Component]) -> Iterator[Component]:
    """All components, and those of the objects inside of dictionaries."""
    for component in components:
        component = component.component if isinstance(component, PartComponent) else component
        yield component
        if isinstance(component, DictComponent):
            yield from component.components()


def _parameters(
    models: Sequence[ModelComponent], optimizers: Sequence[OptimizerComponent]
) -> dict[str, LiveParameter]:
    keys = {key: name for optimizer in optimizers for key, name in optimizer.param_names.items()}
    return {
        join_path((*model.prefix, name)): LiveParameter(key=keys[id(tensor)][0], shape=tuple(tensor.shape))
        for model in models
        for name, tensor in model.tensors().items()
        if id(tensor) in keys
    }

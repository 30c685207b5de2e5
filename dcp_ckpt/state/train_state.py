"""What a training run saves: the user's objects, and the components that adapt them.

Owns the prefixes and the order of loading. Made by users; called by the checkpointer and `load_checkpoint`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.state.accumulation import watch_steps
from dcp_ckpt.state.component import Component, Path
from dcp_ckpt.state.inventory import every_component
from dcp_ckpt.state.keying import KeyingComponent
from dcp_ckpt.state.loaders import loader_component
from dcp_ckpt.state.mesh_roles import MeshRoles
from dcp_ckpt.state.model import ModelComponent, parameter_names
from dcp_ckpt.state.optimizer import OptimizerComponent
from dcp_ckpt.state.part import PartComponent
from dcp_ckpt.state.paths import join_path
from dcp_ckpt.state.per_rank import PerRankComponent
from dcp_ckpt.state.rng import RngComponent
from dcp_ckpt.state.stateful import DictComponent, Stateful, StatefulComponent

__all__ = ["State", "TrainState", "components_of", "components_to_save"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainState:
    """The objects of a training run, saved and loaded in place. Holds references, copies nothing.

    `model`, `optimizer` and `lr_scheduler` take one object, a sequence or a mapping of them; it is stored
    under `model`, `model.<index>` or `model.<key>`, and likewise for the others.

    Args:
        model: modules, plain or wrapped (DDP, FSDP2, torch.compile, activation checkpointing). Of a pipelined
            model this rank's part, with the whole model's names; `ModelParts` where a rank has several.
        optimizer: optimizers over parameters of these models.
        lr_scheduler: anything with `state_dict()` and `load_state_dict()`.
        scaler: a GradScaler or the like.
        dataloader: a sampler or loader. An elastic one (`dcp_ckpt.data`, or any with a true `is_elastic`) has
            one position for all ranks and continues on any number. The position of another is each rank's
            own: it is restored where the data-parallel size is the same, and refused elsewhere.
        extra: replicated state by name: values, tensors, objects with `state_dict()`, nested.
        per_rank: values of this rank only, small tensors included; restored where every rank stands where one
            stood at the save.
        rng: keep the global random number generators of this rank.
        mesh_roles: which ranks share their data and which their part of the model, where that is not "none"
            and "all": tensor, context and pipeline parallelism.
    """

    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
    optimizer: (
        torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer] | None
    ) = None
    lr_scheduler: Stateful | Sequence[Stateful] | Mapping[str, Stateful] | None = None
    scaler: Stateful | None = None
    dataloader: Stateful | None = None
    extra: dict[str, Any] | None = None
    per_rank: dict[str, Any] | None = None
    rng: bool = True
    mesh_roles: MeshRoles | None = None
    _models: dict[Path, ModelComponent] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        # From here on, so that already the first save is known to stand between two steps or not to.
        watch_steps(
            [part for _, part in _parts("optimizer", self.optimizer, torch.optim.Optimizer)], self.scaler
        )

    def components(self) -> list[Component]:
        """The components in load order. Local, cheap, and read anew: call it for each save and load.

        Raises:
            ConfigError: an argument is of the wrong kind, or two mapping keys give the same name.
            StateError: a model whose parameters cannot be named.
        """
        models = self._model_components()
        names = parameter_names((model, model.prefix[1:]) for model in models)
        optimizers = _parts("optimizer", self.optimizer, torch.optim.Optimizer)
        watch = watch_steps([optimizer for _, optimizer in optimizers], self.scaler)
        components: list[Component] = [
            self._of_part(model, lambda path: join_path(path[1:])) for model in models
        ]
        # Before the optimizers: a scale that a load writes is not one that an update has written since.
        if self.scaler is not None:
            components.append(StatefulComponent(("scaler",), _stateful("scaler", self.scaler)))
        components += [
            self._of_part(OptimizerComponent(path, optimizer, names, watch), _moment_of(path))
            for path, optimizer in optimizers
        ]
        components += [
            self._of_part(StatefulComponent(path, scheduler), None)
            for path, scheduler in _parts("lr_scheduler", self.lr_scheduler, Stateful)
        ]
        if self._keying is not None:
            components.append(self._keying)
        if self.dataloader is not None:
            loader = _stateful("dataloader", self.dataloader)
            components.append(loader_component(("dataloader",), loader, self.mesh_roles))
        if self.extra is not None:
            components.append(DictComponent(("extra",), self.extra))
        if self.per_rank is not None:
            components.append(PerRankComponent(("per_rank",), self.per_rank, self.mesh_roles))
        # Last: whatever is installed before may draw random numbers.
        if self.rng:
            components.append(RngComponent(roles=self.mesh_roles))
        _refuse_repeated([component.prefix for component in components])
        return components

    @cached_property
    def _keying(self) -> KeyingComponent | None:
        return None if self.mesh_roles is None else KeyingComponent(self.mesh_roles)

    def _of_part(self, component: Component, parameter_of: Callable[[Path], str] | None) -> Component:
        """The component as one that only some ranks have, where the model is cut into parts."""
        if self.mesh_roles is None:
            return component
        return PartComponent(component, self.mesh_roles, parameter_of)

    def _model_components(self) -> list[ModelComponent]:
        """One component per model, kept between calls for the sake of its walk over the modules."""
        components = []
        for path, module in _parts("model", self.model, nn.Module):
            component = self._models.get(path)
            if component is None or component.module is not module:
                component = self._models[path] = ModelComponent(path, module)
            components.append(component)
        return components


State = TrainState | dict[str, Any]
"""What can be saved and loaded: registered components, or a plain nested dictionary."""


def components_of(state: State) -> list[Component]:
    """The components of a TrainState, or of a plain nested dictionary that is the whole state.

    Raises:
        ConfigError: neither of the two.
    """
    if isinstance(state, TrainState):
        return state.components()
    if isinstance(state, dict):
        return [DictComponent((), state)]
    raise ConfigError(f"the state must be a TrainState or a dict, not {type(state).__qualname__}")


def components_to_save(state: State) -> list[Component]:
    """The components of a state that is about to be saved.

    Raises:
        ConfigError: neither a TrainState nor a dictionary.
        StateError: this is the middle of a gradient accumulation.
    """
    components = components_of(state)
    for component in every_component(components):
        if isinstance(component, ModelComponent | OptimizerComponent):
            component.require_step_boundary()
    return components


def _stateful(name: str, given: Any) -> Stateful:
    if not isinstance(given, Stateful):
        raise ConfigError(f"{name} has no state_dict() and load_state_dict()")
    return given


def _parts(name: str, given: Any, kind: Any) -> list[tuple[Path, Any]]:
    """One, several or none of `kind`, with their prefixes."""
    if given is None:
        return []
    if isinstance(given, kind):
        return [((name,), given)]
    parts: list[tuple[Path, Any]]
    if isinstance(given, Mapping):
        parts = [((name, str(key)), part) for key, part in given.items()]
    elif isinstance(given, Sequence):
        parts = [((name, str(index)), part) for index, part in enumerate(given)]
    else:
        parts = [((name,), given)]
    for path, part in parts:
        if not isinstance(part, kind):
            raise ConfigError(f"{join_path(path)} is a {type(part).__qualname__}, not a {kind.__name__}")
    return parts


def _moment_of(prefix: Path) -> Callable[[Path], str]:
    """From a path in an optimizer's state to the name of its parameter; empty for what belongs to none."""
    state_path, position = (*prefix, "state"), len(prefix) + 1
    return lambda path: path[position] if path[:position] == state_path else ""


def _refuse_repeated(prefixes: Iterable[Path]) -> None:
    for path, count in Counter(map(join_path, prefixes)).items():
        if count > 1:
            raise ConfigError(f"{path!r} names {count} objects; choose other keys")

"""The state of a model: live parameters and persistent buffers under canonical names.

Knows modules and names; knows nothing of optimizers, files or ranks. Saves no copy: staging reads
the live tensors, a load fills them in place.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dcp_ckpt.errors import LoadError
from dcp_ckpt.state.accumulation import mid_accumulation, unreduced_parameter
from dcp_ckpt.state.collector import StateCollector
from dcp_ckpt.state.component import Captured, Path, Problem, StoredState, Targets
from dcp_ckpt.state.names import ModuleNames, NamedTensor
from dcp_ckpt.state.paths import join_path, stored_under
from dcp_ckpt.state.problems import missing, unexpected, unfillable
from dcp_ckpt.state.rebuild import rebuild, tree_targets
from dcp_ckpt.state.tensors import (
    Fillable,
    fill_shared,
    same_bits,
    shares_elements,
    unsuitable,
    writable_like,
)
from dcp_ckpt.state.unselected import with_unselected

__all__ = ["ModelComponent", "parameter_names"]

_HOLDER = "the model"


class ModelComponent:
    """Parameters, persistent buffers and extra state of one module.

    State-dict hooks are not run: what is stored is what the modules hold.

    Args:
        prefix: where it is stored; a tensor's path is the prefix and its full name as one part.
        module: plain, or wrapped by DDP, torch.compile, activation checkpointing or FSDP2.
    """

    def __init__(self, prefix: Path, module: nn.Module) -> None:
        self._prefix = prefix
        self._module = module
        self._names = ModuleNames(module)

    @property
    def prefix(self) -> Path:
        return self._prefix

    @property
    def module(self) -> nn.Module:
        return self._module

    def parameter_names(self) -> dict[int, tuple[str, ...]]:
        """The full names of every parameter, by `id()` of the live object, for the optimizer."""
        return self._names.parameter_names()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live parameters and persistent buffers, by each of their names in the model."""
        return {name: entry.tensor for entry in self._names.tensors() for name in entry.names}

    def require_step_boundary(self) -> None:
        """Refuse to be saved in the middle of a gradient accumulation.

        Raises:
            StateError: FSDP2 holds gradients that it has not reduced yet.
        """
        unreduced = unreduced_parameter(self._module)
        if unreduced is not None:
            raise mid_accumulation(self.parameter_names().get(id(unreduced), ("a parameter",))[0])

    def capture(self) -> Captured:
        collector = StateCollector()
        for entry in self._names.tensors():
            for name in entry.names:
                collector.add_tensor((*self._prefix, name), entry.tensor)
        for names, module in self._names.extra_states():
            state = module.get_extra_state()
            for name in names:
                collector.add_object((*self._prefix, name), state)
        return collector.captured()

    def targets(self, stored: StoredState) -> Targets:
        """The live tensors under their stored names.

        A tied tensor is found under any of its names. Where several stored tensors belong into one memory
        here, all but the first are read beside it, since what was not tied may differ; `install` compares.
        """
        tensors: dict[str, torch.Tensor] = {}
        values: set[str] = set()
        problems: list[Problem] = []
        known: set[str] = set()
        fillable = Fillable(stored)
        for entry in self._names.tensors():
            known.update(self._stored_names(entry))
            found = self._payloads(stored, entry)
            if not found:
                problems.append(missing(join_path((*self._prefix, entry.name)), _HOLDER))
            if reason := unsuitable(entry.tensor):
                problems.append(unfillable(join_path((*self._prefix, entry.name)), reason))
                continue
            for name in found:
                is_taken = fillable.take(entry.tensor, name)
                tensors[name] = entry.tensor if is_taken else writable_like(entry.tensor)
        for names, _ in self._names.extra_states():
            extras = [tree_targets(stored, (*self._prefix, name), {}, fillable) for name in names]
            if not any(extra.tensors or extra.values for extra in extras):
                problems.append(missing(join_path((*self._prefix, names[0])), _HOLDER))
            for extra in extras:
                tensors.update(extra.tensors)
                values.update(extra.values)
        known.update(tensors, values)
        problems += [
            unexpected(name, _HOLDER) for name in stored_under(stored, self._prefix) if name not in known
        ]
        return Targets(tensors=tensors, values=frozenset(values), problems=tuple(problems))

    def _stored_names(self, entry: NamedTensor) -> list[str]:
        return [join_path((*self._prefix, name)) for name in entry.names]

    def _payloads(self, stored: StoredState, entry: NamedTensor) -> list[str]:
        """One name for each payload that is stored for this tensor: several where it was not tied."""
        found: dict[str, str] = {}
        for name in self._stored_names(entry):
            if name in stored.tensors:
                found.setdefault(stored.aliases.get(name, name), name)
        return list(found.values())

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        """Hand extra state over; parameters and buffers are filled in place already.

        Raises:
            LoadError: what is one memory here was stored with different contents.
        """
        for entry in self._names.tensors():
            filled = [name for name in self._payloads(stored, entry) if name in targets.tensors]
            if filled and shares_elements(entry.tensor):
                fill_shared(entry.tensor, targets.tensors[filled[0]])
            for name in filled:
                target = targets.tensors[name]
                if target is not entry.tensor and not same_bits(target, entry.tensor):
                    raise _differs(name, entry)
        for names, module in self._names.extra_states():
            for name in names:
                path = (*self._prefix, name)
                below = stored_under(stored, path, (*targets.values, *targets.tensors))
                if below:
                    state = rebuild(stored, targets, below, depth=len(path))
                    if stored.is_partial:
                        state = with_unselected(state, module.get_extra_state(), stored, path)
                    module.set_extra_state(state)
                    break
        return []


def parameter_names(models: Iterable[tuple[ModelComponent, Path]]) -> dict[int, tuple[str, ...]]:
    """The names of all models' parameters by id, each model's with its path in front."""
    found: dict[int, tuple[str, ...]] = {}
    for model, path in models:
        for key, names in model.parameter_names().items():
            found[key] = (*found.get(key, ()), *(join_path((*path, name)) for name in names))
    return found


def _differs(key: str, entry: NamedTensor) -> LoadError:
    others = ", ".join(entry.names) if entry.aliases else "other tensors or with itself (expand)"
    return LoadError(
        f"{key} shares its memory with {others} in this model, and the checkpoint has different contents for "
        "them: load it into a model where they have memory of their own, and make them equal there",
        phase="install",
    )

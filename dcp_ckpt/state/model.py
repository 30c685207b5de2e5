"""The state of a model: live parameters and persistent buffers under canonical names.

Knows modules and names; knows nothing of optimizers, files or ranks. Saves no copy: staging reads
the live tensors, a load fills them in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dcp_ckpt.errors import LoadError
from dcp_ckpt.state.component import Captured, Path, Problem, StoredState, Targets
from dcp_ckpt.state.names import ModuleNames, NamedTensor
from dcp_ckpt.state.tensors import fill_shared, same_bits, shares_elements, writable_like
from dcp_ckpt.state.tree import StateCollector, join_path, names_under, rebuild, tree_targets

__all__ = ["ModelComponent", "parameter_names"]


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

        A tied tensor is found under any of its names. One that is stored several times is read as often,
        since what was not tied may differ; `install` compares.
        """
        tensors: dict[str, torch.Tensor] = {}
        values: set[str] = set()
        problems: list[Problem] = []
        known: set[str] = set()
        for entry in self._names.tensors():
            known.update(self._stored_names(entry))
            found = self._payloads(stored, entry)
            if not found:
                problems.append(_missing(join_path((*self._prefix, entry.name))))
            for index, name in enumerate(found):
                is_live = index == 0 and not shares_elements(entry.tensor)
                tensors[name] = entry.tensor if is_live else writable_like(entry.tensor)
        for names, _ in self._names.extra_states():
            extras = [tree_targets(stored, (*self._prefix, name), {}) for name in names]
            if not any(extra.tensors or extra.values for extra in extras):
                problems.append(_missing(join_path((*self._prefix, names[0]))))
            for extra in extras:
                tensors.update(extra.tensors)
                values.update(extra.values)
        known.update(tensors, values)
        problems += [
            Problem(kind="unexpected", key=name, detail="the checkpoint has it, the model does not")
            for name in names_under((*stored.tensors, *stored.values), self._prefix)
            if name not in known
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
            LoadError: a tensor that is one here, or expanded from fewer elements, was stored with different
                contents.
        """
        for entry in self._names.tensors():
            filled = {
                name: targets.tensors[name]
                for name in self._payloads(stored, entry)
                if name in targets.tensors
            }
            if filled:
                _require_one_content(filled)
                _fill_expanded(entry.tensor, *next(iter(filled.items())))
        for names, module in self._names.extra_states():
            for name in names:
                path = (*self._prefix, name)
                below = names_under((*targets.values, *targets.tensors), path)
                if below:
                    module.set_extra_state(rebuild(stored, targets, below, depth=len(path)))
                    break
        return []


def parameter_names(models: Iterable[tuple[ModelComponent, Path]]) -> dict[int, tuple[str, ...]]:
    """The names of all models' parameters by id, each model's with its path in front."""
    found: dict[int, tuple[str, ...]] = {}
    for model, path in models:
        for key, names in model.parameter_names().items():
            found[key] = (*found.get(key, ()), *(join_path((*path, name)) for name in names))
    return found


def _require_one_content(filled: Mapping[str, torch.Tensor]) -> None:
    """Make sure that what was filled for one live tensor, from one payload each, is the same."""
    (first, tensor), *others = filled.items()
    for name, other in others:
        if not same_bits(tensor, other):
            raise LoadError(
                f"{first} and {name} are one tensor in this model (tied), and differ in the checkpoint; load "
                "it into a model where they are two, and make them equal there",
                phase="install",
            )


def _fill_expanded(live: torch.Tensor, name: str, filled: torch.Tensor) -> None:
    """Write what was filled in the place of a tensor whose elements share memory."""
    if live is not filled and not fill_shared(live, filled):
        raise LoadError(
            f"{name} is expanded in this model (several of its elements are one in memory), and those "
            "elements differ in the checkpoint; make it a buffer with memory of its own, by contiguous()",
            phase="install",
        )


def _missing(key: str) -> Problem:
    return Problem(kind="missing", key=key, detail="the model has it, the checkpoint does not")

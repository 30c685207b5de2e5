"""The state of a model: live parameters and persistent buffers under canonical names.

Knows modules and names; knows nothing of optimizers, files or ranks. Saves no copy: staging reads
the live tensors, a load fills them in place.
"""

from __future__ import annotations

import torch
from torch import nn

from dcp_ckpt.state.component import Captured, Path, Problem, StoredState, Targets
from dcp_ckpt.state.names import ModuleNames
from dcp_ckpt.state.tree import StateCollector, join_path, rebuild, stored_under, tree_targets

__all__ = ["ModelComponent"]


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

    def parameter_names(self) -> dict[int, str]:
        """The full name of every parameter, by `id()` of the live object, for the optimizer."""
        return self._names.parameter_names()

    def capture(self) -> Captured:
        collector = StateCollector()
        for entry in self._names.tensors():
            collector.add_tensor((*self._prefix, entry.name), entry.tensor)
        for name, module in self._names.extra_states():
            collector.add_object((*self._prefix, name), module.get_extra_state())
        return collector.captured()

    def targets(self, stored: StoredState) -> Targets:
        """The live tensors under their stored names; a tied tensor is found under any of its names."""
        tensors: dict[str, torch.Tensor] = {}
        values: set[str] = set()
        problems: list[Problem] = []
        known: set[str] = set()
        for entry in self._names.tensors():
            names = [join_path((*self._prefix, name)) for name in (entry.name, *entry.aliases)]
            known.update(names)
            present = [name for name in names if name in stored.tensors]
            if present:
                tensors[present[0]] = entry.tensor
            else:
                problems.append(_missing(names[0]))
        for name, _ in self._names.extra_states():
            path = (*self._prefix, name)
            extra = tree_targets(stored, path, {})
            if not extra.tensors and not extra.values:
                problems.append(_missing(join_path(path)))
            tensors.update(extra.tensors)
            values.update(extra.values)
        known.update(tensors, values)
        problems += [
            Problem(kind="unexpected", key=name, detail="the checkpoint has it, the model does not")
            for name in stored_under(stored, self._prefix)
            if name not in known
        ]
        return Targets(tensors=tensors, values=frozenset(values), problems=tuple(problems))

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        """Hand extra state over; parameters and buffers are filled in place already."""
        for name, module in self._names.extra_states():
            path = (*self._prefix, name)
            names = stored_under(stored, path, (*targets.values, *targets.tensors))
            if names:
                module.set_extra_state(rebuild(stored, targets, names, depth=len(path)))
        return []


def _missing(key: str) -> Problem:
    return Problem(kind="missing", key=key, detail="the model has it, the checkpoint does not")

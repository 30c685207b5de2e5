"""The state of a `torch.optim` optimizer, by parameter name.

Reads and writes `optimizer.state` and `param_groups` directly: no step is taken, no gradient touched, nothing
cast. Knows parameter names from its caller; knows nothing of modules, files or ranks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.state.component import Captured, Path, Problem, StoredState, StoredTensor, Targets
from dcp_ckpt.state.tensors import fits
from dcp_ckpt.state.tree import (
    StateCollector,
    attach_tensors,
    join_path,
    path_of,
    rebuild,
    referenced_names,
    stored_under,
)

__all__ = ["OptimizerComponent"]

# How the step is computed here, not what was learned: a run that moves to other hardware keeps its own.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
_MAX_NAMES_SHOWN = 5


class OptimizerComponent:
    """Moments and hyper-parameters of one optimizer.

    Args:
        prefix: where it is stored: moments under `<prefix>.state.<parameter>.<key>`, all hyper-parameters as
            one value `<prefix>.param_groups`.
        optimizer: any `torch.optim.Optimizer`, before or after its first step, with or without gradients.
        param_names: `id(parameter)` to its names: its own, and further ones where it is tied, under which a
            checkpoint may know it. A snapshot: build the component anew for each save or load.
    """

    def __init__(
        self, prefix: Path, optimizer: torch.optim.Optimizer, param_names: Mapping[int, tuple[str, ...]]
    ) -> None:
        self._prefix = prefix
        self._optimizer = optimizer
        self._param_names = param_names

    @property
    def prefix(self) -> Path:
        return self._prefix

    @property
    def _groups_path(self) -> Path:
        return (*self._prefix, "param_groups")

    @property
    def _groups_name(self) -> str:
        return join_path(self._groups_path)

    def capture(self) -> Captured:
        """Describe moments and groups.

        Raises:
            StateError: a parameter that the model does not name, or state that belongs to no parameter.
        """
        collector = StateCollector()
        groups, num_states = [], 0
        for group, members in zip(self._optimizer.param_groups, self._named_groups(), strict=True):
            groups.append({**group, "params": list(members)})
            for name, parameter in members.items():
                # `state` is a defaultdict: get() does not create what a step would create otherwise.
                state = self._optimizer.state.get(parameter)
                if state is None:
                    continue
                num_states += 1
                self._capture_state(collector, name, state)
        if num_states != len(self._optimizer.state):
            raise StateError(
                f"{join_path(self._prefix)}: the optimizer holds state for something that is not in its "
                "param_groups; remove that entry from optimizer.state, or keep it in TrainState(extra=...)"
            )
        collector.add_value(self._groups_path, groups)
        captured = replace(collector.captured(), joins={self._groups_path: "params"})
        if not _runs_hooks(self._optimizer):
            return captured
        return replace(captured, optimizers=(self._optimizer,), step_writes=self._step_writes(captured))

    def _step_writes(self, captured: Captured) -> frozenset[int]:
        """Parameters that are trained, and their moments: of frozen ones a step writes nothing."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        frozen = {
            id(value)
            for parameter, state in self._optimizer.state.items()
            if id(parameter) not in trained
            for value in state.values()
        }
        return frozenset(trained.union(map(id, captured.tensors.values())) - frozen)

    def _capture_state(self, collector: StateCollector, name: str, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            if not isinstance(key, str):
                raise StateError(
                    f"{join_path(self._prefix)}: the state of {name} has the key {key!r}; use strings"
                )
            path = (*self._prefix, "state", name, key)
            if isinstance(value, torch.Tensor):
                collector.add_tensor(path, value)
            else:
                collector.add_tree(path, value)

    def _named_groups(self, stored_params: Container[str] = ()) -> list[dict[str, torch.Tensor]]:
        """The parameters of each group by name, in the optimizer's order.

        Args:
            stored_params: names that a tied parameter is rather called by.
        """
        groups: list[dict[str, torch.Tensor]] = []
        for index, group in enumerate(self._optimizer.param_groups):
            members = {}
            for position, parameter in enumerate(group["params"]):
                names = self._param_names.get(id(parameter))
                if names is None:
                    raise StateError(
                        f"{join_path(self._prefix)}: parameter {position} of group {index}, of shape "
                        f"{tuple(parameter.shape)}, belongs to no model in this state; pass the model that "
                        "owns it, and make the optimizer after the model is sharded or given new layers"
                    )
                members[next((name for name in names if name in stored_params), names[0])] = parameter
            groups.append(members)
        return groups

    def targets(self, stored: StoredState) -> Targets:
        """Ask for all moments that are stored for this optimizer's parameters.

        A moment is filled into the live tensor if one fits, else into a new one that is sharded and placed
        like its parameter (`step` counters and tensors of other shapes are plain). What the optimizer holds
        beyond the checkpoint is no problem: `install` removes it.
        """
        index = _by_parameter(stored, self._prefix)
        groups = self._named_groups({*index, *_params(stored.values.get(self._groups_name))})
        tensors: dict[str, torch.Tensor] = {}
        values: set[str] = set()
        for group, members in zip(self._optimizer.param_groups, groups, strict=True):
            on_device = bool(group.get("fused") or group.get("capturable"))
            for name, parameter in members.items():
                for stored_name in index.get(name, ()):
                    if stored_name in stored.values:
                        values.add(stored_name)
                        continue
                    tensors[stored_name] = self._state_target(
                        parameter, stored.tensors[stored_name], step_on_device=on_device
                    )
        problems = self._problems(stored, index, groups)
        if self._groups_name in stored.values:
            values.add(self._groups_name)
            for name in referenced_names(stored.values[self._groups_name]):
                if name in stored.tensors:
                    entry = stored.tensors[name]
                    tensors[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        known = {*tensors, *values, *(name for names in index.values() for name in names)}
        problems += [
            _unexpected(name, "the checkpoint has it, the optimizer does not use it")
            for name in stored_under(stored, self._prefix)
            if name not in known
        ]
        return Targets(tensors=tensors, values=frozenset(values), problems=tuple(problems))

    def _state_target(
        self, parameter: torch.Tensor, entry: StoredTensor, *, step_on_device: bool
    ) -> torch.Tensor:
        key, *rest = entry.path[len(self._prefix) + 2 :]
        live = self._optimizer.state.get(parameter, {}).get(key)
        if not rest and isinstance(live, torch.Tensor) and fits(live, entry):
            return live
        with torch.no_grad():
            if key == "step":
                device = parameter.device if step_on_device else torch.device("cpu")
                return torch.empty(entry.shape, dtype=entry.dtype, device=device)
            if entry.shape == tuple(parameter.shape):
                return torch.empty_like(parameter, dtype=entry.dtype, requires_grad=False)
            return torch.empty(entry.shape, dtype=entry.dtype, device=parameter.device)

    def _problems(
        self, stored: StoredState, index: Mapping[str, list[str]], groups: Sequence[Mapping[str, Any]]
    ) -> list[Problem]:
        saved = stored.values.get(self._groups_name)
        if saved is None:
            return [
                Problem(kind="missing", key=self._groups_name, detail="the checkpoint has no such optimizer")
            ]
        depth = len(self._prefix) + 2
        state_path = (*self._prefix, "state")
        live = {name for members in groups for name in members}
        problems = _group_problems(self._groups_name, saved, groups)
        problems += _kind_problems(self._groups_name, saved, self._optimizer.param_groups)
        problems += [
            _unexpected(join_path((*state_path, name)), "the optimizer has no such parameter")
            for name in index
            if name not in live
        ]
        for members in groups:
            keys = {
                name: frozenset(path_of(stored, stored_name)[depth] for stored_name in index[name])
                for name in members
                if name in index
            }
            problems += [
                Problem(
                    kind="missing",
                    key=join_path((*state_path, name, key)),
                    detail="other parameters of its group have it in the checkpoint",
                )
                for name, missing in _partial_keys(keys).items()
                for key in missing
            ]
        return problems

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        """Put moments and hyper-parameters in place; state that the checkpoint does not have is removed."""
        index = _by_parameter(stored, self._prefix)
        groups = self._named_groups({*index, *_params(stored.values.get(self._groups_name))})
        notes = []
        for members in groups:
            for name, parameter in members.items():
                names = index.get(name, [])
                lacking = [n for n in names if n not in targets.tensors and n not in targets.values]
                if lacking:
                    notes.append(f"optimizer state of {name} was reset: {lacking[0]} was not restored")
                if not names or lacking:
                    self._optimizer.state.pop(parameter, None)
                    continue
                self._optimizer.state[parameter] = rebuild(
                    stored, targets, names, depth=len(self._prefix) + 2
                )
        if self._groups_name in targets.values:
            saved = attach_tensors(stored.values[self._groups_name], targets.tensors)
            # What other ranks' parts of the model have in these groups is no reason.
            if any(found.kind == "other" for found in _group_problems(self._groups_name, saved, groups)):
                return [*notes, f"{self._groups_name} was kept: its groups are not those of the checkpoint"]
            notes += self._install_groups(saved)
        return notes

    def _install_groups(self, saved: Iterable[Mapping[str, Any]]) -> list[str]:
        notes = []
        for index, (group, values) in enumerate(zip(self._optimizer.param_groups, saved, strict=True)):
            for key, value in values.items():
                if key == "params":
                    continue
                if key in _IMPLEMENTATION and key in group:
                    if group[key] != value:
                        notes.append(
                            f"{self._groups_name}[{index}]: kept {key}={group[key]} (checkpoint: {value})"
                        )
                    continue
                group[key] = _merged(group.get(key), value)
        return notes


def _runs_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step()` calls the hooks that are registered; a wrapper may skip `Optimizer.__init__`."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)


def _merged(live: Any, value: Any) -> Any:
    """`value`, inside of the live tensors where there are any: captured graphs hold on to these objects."""
    if type(live) is type(value) is tuple and len(live) == len(value):
        return tuple(map(_merged, live, value))
    if not isinstance(live, torch.Tensor):
        return value
    with torch.no_grad():
        if isinstance(value, torch.Tensor) and fits(live, _described(value)):
            return live.copy_(value)
        if isinstance(value, (int, float)):
            return live.fill_(value)
    return value


def _described(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(path=(), dtype=tensor.dtype, shape=tuple(tensor.shape))


def _by_parameter(stored: StoredState, prefix: Path) -> dict[str, list[str]]:
    """Stored names of the state of each parameter."""
    state_path, depth = (*prefix, "state"), len(prefix) + 1
    index: dict[str, list[str]] = {}
    for name in stored_under(stored, state_path):
        path = path_of(stored, name)
        if path[:depth] == state_path and len(path) > depth + 1:
            index.setdefault(path[depth], []).append(name)
    return index


def _partial_keys(keys: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    """What parameters lack, by name: those whose keys are a part only of another parameter's keys.

    Optimizers that give parameters of one group different keys (Adafactor) do not nest them.
    """
    kinds = set(keys.values())
    lacking = {kind: max((k for k in kinds if kind < k), key=len, default=kind) - kind for kind in kinds}
    return {name: sorted(lacking[kind]) for name, kind in keys.items() if lacking[kind]}


def _params(saved: Any) -> list[str]:
    """The names of all parameters in stored groups; none where these are not what this module stores."""
    return [name for group in saved for name in group["params"]] if _are_groups(saved) else []


def _are_groups(saved: Any) -> bool:
    return isinstance(saved, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in saved
    )


def _group_problems(key: str, saved: Any, groups: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """What keeps the stored groups from being these; `unexpected` are parameters that these do not have."""
    if not _are_groups(saved):
        return [Problem(kind="other", key=key, detail="is not a list of groups with named params")]
    if len(saved) != len(groups):
        detail = f"the checkpoint has {len(saved)} groups, the optimizer has {len(groups)}"
        return [Problem(kind="other", key=key, detail=detail)]
    problems = []
    for index, (group, members) in enumerate(zip(saved, groups, strict=True)):
        stored_names = set(group["params"])
        problems += [
            _unexpected(f"{key}[{index}].{name}", "the optimizer does not have this parameter in the group")
            for name in group["params"]
            if name not in members
        ]
        live_only = [name for name in members if name not in stored_names]
        if live_only:
            detail = f"only in the optimizer: {_listed(live_only)}"
            problems.append(Problem(kind="other", key=f"{key}[{index}]", detail=detail))
    return problems


def _kind_problems(key: str, saved: Any, groups: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Where each side has settings that the other does not know, two kinds of optimizers met.

    On one side alone there may be more: schedulers leave settings in groups, and versions of torch add some.
    """
    problems = []
    for index, (group, live) in enumerate(zip(saved, groups, strict=False)) if _are_groups(saved) else ():
        stored_only = sorted(group.keys() - live.keys() - _IMPLEMENTATION)
        live_only = sorted(live.keys() - group.keys() - _IMPLEMENTATION)
        if stored_only and live_only:
            detail = (
                f"another kind of optimizer: only the checkpoint has {_listed(stored_only)}, only this one "
                f"has {_listed(live_only)}"
            )
            problems.append(Problem(kind="other", key=f"{key}[{index}]", detail=detail))
    return problems


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN]) or "none"
    more = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _unexpected(key: str, detail: str) -> Problem:
    return Problem(kind="unexpected", key=key, detail=detail)

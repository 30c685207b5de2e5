"""The state of a `torch.optim` optimizer, by parameter name.

Reads and writes `optimizer.state` and `param_groups` directly: no step is taken, no gradient touched, nothing
cast. Knows parameter names from its caller; knows nothing of modules, files or ranks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.state.accumulation import StepWatch, mid_accumulation, runs_hooks, watch_steps
from dcp_ckpt.state.component import Captured, Path, Problem, StoredState, StoredTensor, Targets
from dcp_ckpt.state.moments import ParameterState, lacking
from dcp_ckpt.state.param_groups import (
    GroupMatch,
    are_named_groups,
    kind_problems,
    listed_params,
    match_groups,
)
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
# What an optimizer of named parameters calls them, in the order of the live group; others on each stage of a
# pipeline. The names that are stored are canonical, in `params`.
_LIVE_NAMES = "param_names"
# What schedulers leave in groups says nothing about the kind of the optimizer.
_OF_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})


class OptimizerComponent:
    """Moments and hyper-parameters of one optimizer.

    Args:
        prefix: where it is stored: moments under `<prefix>.state.<parameter>.<key>`, all hyper-parameters as
            one value `<prefix>.param_groups`.
        optimizer: any `torch.optim.Optimizer`, before or after its first step, with or without gradients.
        param_names: `id(parameter)` to its names: its own, and further ones where it is tied, under which a
            checkpoint may know it. A snapshot: build the component anew for each save or load.
        watch: over the steps of all optimizers of the state; None means of this one.
    """

    def __init__(
        self,
        prefix: Path,
        optimizer: torch.optim.Optimizer,
        param_names: Mapping[int, tuple[str, ...]],
        watch: StepWatch | None = None,
    ) -> None:
        self._prefix = prefix
        self._optimizer = optimizer
        self._param_names = param_names
        self._watch = watch or watch_steps([optimizer])

    @property
    def prefix(self) -> Path:
        return self._prefix

    @property
    def param_names(self) -> Mapping[int, tuple[str, ...]]:
        """The names of each parameter of the models, by `id()` of the live object."""
        return self._param_names

    def state_paths(self) -> list[tuple[Path, ...]]:
        """Where the state of each of its parameters may be stored, whether it has any or not.

        Several paths of a parameter are those of its names; its state is under one of them.
        """
        return [
            tuple((*self._prefix, "state", name) for name in self._param_names.get(id(parameter), ()))
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        ]

    @property
    def _groups_path(self) -> Path:
        return (*self._prefix, "param_groups")

    @property
    def _groups_name(self) -> str:
        return join_path(self._groups_path)

    def require_step_boundary(self) -> None:
        """Refuse to be saved in the middle of a gradient accumulation.

        Raises:
            StateError: a parameter has gradients that no step has used.
        """
        pending = self._watch.pending()
        if pending is not None:
            raise mid_accumulation(self._param_names.get(id(pending), ("a parameter",))[0])

    def capture(self) -> Captured:
        """Describe moments and groups.

        Raises:
            StateError: a parameter that the model does not name, or state that belongs to no parameter.
        """
        collector = StateCollector()
        groups, num_states = [], 0
        for group, members in zip(self._optimizer.param_groups, self._named_groups(), strict=True):
            settings = {key: value for key, value in group.items() if key != _LIVE_NAMES}
            groups.append({**settings, "params": list(members)})
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
        if not runs_hooks(self._optimizer):
            return captured
        return replace(captured, optimizers=(self._optimizer,), step_writes=self._step_writes(captured))

    def _step_writes(self, captured: Captured) -> frozenset[int]:
        """Parameters that are trained, and their moments: of frozen ones a step writes nothing.

        Settings that are tensors are not among them: schedulers write the learning rate.
        """
        section = (*self._prefix, "state")
        moments = {id(t) for path, t in captured.tensors.items() if path[: len(section)] == section}
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        frozen = {
            id(value)
            for parameter, state in self._optimizer.state.items()
            if id(parameter) not in trained
            for value in state.values()
        }
        return frozenset((trained | moments) - frozen)

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

    def _groups_by_stored_names(
        self, stored: StoredState, index: Mapping[str, Any]
    ) -> list[dict[str, torch.Tensor]]:
        return self._named_groups({*index, *listed_params(stored.values.get(self._groups_name))})

    def targets(self, stored: StoredState) -> Targets:
        """Ask for all moments that are stored for this optimizer's parameters.

        A moment is filled into the live tensor if one fits, else into a new one that is sharded and placed
        like its parameter (`step` counters and tensors of other shapes are plain). State of parameters for
        which the checkpoint holds none is reinitialised: `install` removes it.
        """
        index = _by_parameter(stored, self._prefix)
        groups = self._groups_by_stored_names(stored, index)
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
                        parameter, stored, stored_name, step_on_device=on_device
                    )
        if self._groups_name in stored.values:
            values.add(self._groups_name)
            for name in referenced_names(stored.values[self._groups_name]):
                if name in stored.tensors:
                    entry = stored.tensors[name]
                    tensors[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        known = {*tensors, *values, *(name for names in index.values() for name in names)}
        problems = self._problems(stored, index, groups)
        problems += [
            _unexpected(name, "the checkpoint has it, the optimizer does not use it")
            for name in stored_under(stored, self._prefix)
            if name not in known
        ]
        return Targets(
            tensors=tensors,
            values=frozenset(values),
            problems=tuple(problems),
            reinitialised={
                self._state_name(name): "the checkpoint holds no state of it"
                for members in groups
                for name, parameter in members.items()
                if name not in index and len(self._kept(stored, name, parameter)) < len(self._live(parameter))
            },
        )

    def _state_target(
        self, parameter: torch.Tensor, stored: StoredState, name: str, *, step_on_device: bool
    ) -> torch.Tensor:
        entry, casts = stored.tensors[name], stored.casts(name)
        key, *rest = entry.path[len(self._prefix) + 2 :]
        live = self._live(parameter).get(key)
        if not rest and isinstance(live, torch.Tensor) and fits(live, entry, any_dtype=casts):
            return live
        with torch.no_grad():
            if key == "step":
                device = parameter.device if step_on_device else torch.device("cpu")
                return torch.empty(entry.shape, dtype=entry.dtype, device=device)
            if entry.shape == tuple(parameter.shape):
                # Integers, of a quantized moment, are no numbers in the parameter's precision.
                dtype = parameter.dtype if casts and _is_alike(entry.dtype, parameter.dtype) else entry.dtype
                return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            return torch.empty(entry.shape, dtype=entry.dtype, device=parameter.device)

    def _live(self, parameter: torch.Tensor) -> Mapping[str, Any]:
        # `state` is a defaultdict: get() does not create what a step would create otherwise.
        state: Mapping[str, Any] = self._optimizer.state.get(parameter) or {}
        return state

    def _state_name(self, *path: str) -> str:
        return join_path((*self._prefix, "state", *path))

    def _kept(self, stored: StoredState, name: str, parameter: torch.Tensor) -> dict[str, Any]:
        """The live state of a parameter that this load is not to touch."""
        live = self._live(parameter)
        return {key: value for key, value in live.items() if not stored.selects(self._state_name(name, key))}

    def _problems(
        self,
        stored: StoredState,
        index: Mapping[str, list[str]],
        groups: Sequence[Mapping[str, torch.Tensor]],
    ) -> list[Problem]:
        saved = stored.values.get(self._groups_name)
        if saved is None and stored.selects(self._groups_name):
            detail = "the checkpoint has no such optimizer"
            return [Problem(kind="missing", key=self._groups_name, detail=detail)]
        if saved is not None and not are_named_groups(saved):
            detail = "is not a list of groups with named params"
            return [Problem(kind="other", key=self._groups_name, detail=detail)]
        live = {name for members in groups for name in members}
        known = {*index, *listed_params(saved)}
        problems = [
            Problem(
                kind="unexpected", key=self._state_name(name), detail="the optimizer has no such parameter"
            )
            for name in sorted(known - live)
            if self._restores(stored, name)
        ]
        if saved is not None:
            detail = "the optimizer has this parameter, the checkpoint's has not"
            problems += [
                Problem(kind="missing", key=self._state_name(name), detail=detail)
                for name in sorted(live - known)
                if self._restores(stored, name)
            ]
            match, live_groups = self._match_groups(saved, stored, groups), self._optimizer.param_groups
            problems += match.problems
            ignored = _IMPLEMENTATION | _OF_SCHEDULERS | {_LIVE_NAMES}
            problems += kind_problems(self._groups_name, saved, live_groups, match.partners, ignored=ignored)
        for members in groups:
            problems += self._incomplete(stored, index, members)
        return problems

    def _restores(self, stored: StoredState, name: str) -> bool:
        """Whether anything of a parameter's state may be restored."""
        return stored.selects(self._state_name(name) + ".")

    def _match_groups(
        self, saved: Sequence[Mapping[str, Any]], stored: StoredState, groups: Sequence[Mapping[str, Any]]
    ) -> GroupMatch:
        return match_groups(
            self._groups_name,
            [group["params"] for group in saved],
            [list(members) for members in groups],
            lambda name: self._restores(stored, name),
        )

    def _incomplete(
        self, stored: StoredState, index: Mapping[str, list[str]], members: Mapping[str, torch.Tensor]
    ) -> list[Problem]:
        """State that would be a part only of what a parameter needs."""
        depth = len(self._prefix) + 2
        left_out = self._left_out_keys(stored, members)
        states = {
            name: ParameterState(
                restored=frozenset(path_of(stored, found)[depth] for found in index.get(name, ())),
                left_out=frozenset(left_out.get(name, ())),
                live=frozenset(self._live(parameter)),
                kept=frozenset(self._kept(stored, name, parameter)),
            )
            for name, parameter in members.items()
        }
        return [
            Problem(
                kind="other" if lack.is_asked else "missing",
                key=self._state_name(lack.parameter, lack.key),
                detail=lack.why,
            )
            for lack in lacking(states)
        ]

    def _left_out_keys(self, stored: StoredState, members: Mapping[str, Any]) -> dict[str, set[str]]:
        """The keys of each parameter's stored state that are not selected."""
        root = self._state_name("")
        found: dict[str, set[str]] = {}
        for left_out in stored.left_out:
            if not left_out.startswith(root):
                continue
            name, _, key = left_out.removeprefix(root).rpartition(".")
            while name and name not in members:
                name, _, key = name.rpartition(".")
            found.setdefault(name, set()).add(key)
        return found

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        """Put moments and hyper-parameters in place; state that the checkpoint does not have is removed."""
        self._watch.forget()
        index = _by_parameter(stored, self._prefix)
        groups = self._groups_by_stored_names(stored, index)
        for members in groups:
            for name, parameter in members.items():
                kept = self._kept(stored, name, parameter)
                names = index.get(name, [])
                restored = rebuild(stored, targets, names, depth=len(self._prefix) + 2)
                if restored or kept:
                    self._optimizer.state[parameter] = {**kept, **restored}
                else:
                    self._optimizer.state.pop(parameter, None)
        if self._groups_name not in targets.values:
            return []
        saved = attach_tensors(stored.values[self._groups_name], targets.tensors)
        return self._install_groups(saved, self._match_groups(saved, stored, groups).partners)

    def _install_groups(self, saved: Sequence[Mapping[str, Any]], partners: Mapping[int, int]) -> list[str]:
        kept = _IMPLEMENTATION
        if isinstance(self._optimizer, torch.optim.AdamW):
            kept |= {"decoupled_weight_decay"}  # an Adam otherwise, as torch knows, too
        notes = []
        for index, partner in partners.items():
            group = self._optimizer.param_groups[index]
            for key, value in saved[partner].items():
                if key in ("params", _LIVE_NAMES):
                    continue
                if key in kept and key in group:
                    if group[key] != value:
                        notes.append(
                            f"{self._groups_name}[{index}]: kept {key}={group[key]} (checkpoint: {value})"
                        )
                    continue
                group[key] = _merged(group.get(key), value)
        return notes


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


def _is_alike(a: torch.dtype, b: torch.dtype) -> bool:
    return (a.is_floating_point, a.is_complex) == (b.is_floating_point, b.is_complex)


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


def _unexpected(key: str, detail: str) -> Problem:
    return Problem(kind="unexpected", key=key, detail=detail)

"""The state of a `torch.optim` optimizer, by parameter name.

Reads and writes `optimizer.state` and `param_groups` directly: no step is taken, no gradient touched, nothing
cast. Knows parameter names from its caller; knows nothing of modules, files or ranks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.references import referenced_names
from dcp_ckpt.state.accumulation import StepWatch, mid_accumulation, runs_hooks, watch_steps
from dcp_ckpt.state.collector import StateCollector
from dcp_ckpt.state.component import Captured, Path, Problem, StoredState, StoredTensor, Targets
from dcp_ckpt.state.moments import ParameterState, lacking
from dcp_ckpt.state.param_groups import (
    GroupMatch,
    are_named_groups,
    kind_problems,
    match_groups,
)
from dcp_ckpt.state.paths import join_path, stored_under
from dcp_ckpt.state.rebuild import attach_tensors, rebuild
from dcp_ckpt.state.stored_optimizer import StoredOptimizer
from dcp_ckpt.state.tensors import fits

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

    def targets(self, stored: StoredState) -> Targets:
        """Ask for all moments that are stored for this optimizer's parameters.

        A moment is filled into the live tensor if one fits, else into a new one that is sharded and placed
        like its parameter (`step` counters and tensors of other shapes are plain). State of parameters for
        which the checkpoint holds none is reinitialised: `install` removes it.
        """
        own = StoredOptimizer(stored, self._prefix)
        groups = self._named_groups(own.parameters)
        tensors: dict[str, torch.Tensor] = {}
        values: set[str] = set()
        for group, members in zip(self._optimizer.param_groups, groups, strict=True):
            on_device = bool(group.get("fused") or group.get("capturable"))
            for name, parameter in members.items():
                for stored_name in own.names_by_parameter.get(name, ()):
                    if stored_name in stored.values:
                        values.add(stored_name)
                        continue
                    tensors[stored_name] = self._state_target(
                        parameter, stored, stored_name, own.key_of(stored_name), step_on_device=on_device
                    )
        if own.groups_name in stored.values:
            values.add(own.groups_name)
            for name in referenced_names(own.groups):
                if name in stored.tensors:
                    entry = stored.tensors[name]
                    tensors[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        known = {*tensors, *values, *chain.from_iterable(own.names_by_parameter.values())}
        problems = self._problems(stored, own, groups)
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
                own.state_name(name): "the checkpoint holds no state of it"
                for members in groups
                for name, parameter in members.items()
                if name not in own.names_by_parameter and self._loses_state(own, name, parameter)
            },
        )

    def _loses_state(self, own: StoredOptimizer, name: str, parameter: torch.Tensor) -> bool:
        live = self._live(parameter)
        return len(own.kept(name, live)) < len(live)

    def _state_target(
        self,
        parameter: torch.Tensor,
        stored: StoredState,
        name: str,
        path: Path,
        *,
        step_on_device: bool,
    ) -> torch.Tensor:
        entry, casts = stored.tensors[name], stored.casts(name)
        key, *rest = path
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

    def _problems(
        self, stored: StoredState, own: StoredOptimizer, groups: Sequence[Mapping[str, torch.Tensor]]
    ) -> list[Problem]:
        key, saved = own.groups_name, own.groups
        if saved is None and stored.selects(key):
            return [Problem(kind="missing", key=key, detail="the checkpoint has no such optimizer")]
        if saved is not None and not are_named_groups(saved):
            return [Problem(kind="other", key=key, detail="is not a list of groups with named params")]
        live, known = {name for members in groups for name in members}, own.parameters
        problems = [
            _unexpected(own.state_name(name), "the optimizer has no such parameter")
            for name in sorted(known - live)
            if own.restores(name)
        ]
        if saved is not None:
            detail = "the optimizer has this parameter, the checkpoint's has not"
            problems += [
                Problem(kind="missing", key=own.state_name(name), detail=detail)
                for name in sorted(live - known)
                if own.restores(name)
            ]
            match = _match_groups(own, groups)
            problems += match.problems
            ignored = _IMPLEMENTATION | _OF_SCHEDULERS | {_LIVE_NAMES}
            live_groups = self._optimizer.param_groups
            problems += kind_problems(key, saved, live_groups, match.partners, ignored=ignored)
        for members in groups:
            problems += self._incomplete(own, members)
        return problems

    def _incomplete(self, own: StoredOptimizer, members: Mapping[str, torch.Tensor]) -> list[Problem]:
        """State that would be a part only of what a parameter needs."""
        left_out = own.left_out_keys(members)
        states = {
            name: ParameterState(
                restored=own.keys(name),
                left_out=frozenset(left_out.get(name, ())),
                live=frozenset(self._live(parameter)),
                kept=frozenset(own.kept(name, self._live(parameter))),
            )
            for name, parameter in members.items()
        }
        return [
            Problem(
                kind="other" if lack.is_asked else "missing",
                key=own.state_name(lack.parameter, lack.key),
                detail=lack.why,
            )
            for lack in lacking(states)
        ]

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        """Put moments and hyper-parameters in place; state that the checkpoint does not have is removed."""
        self._watch.forget()
        own = StoredOptimizer(stored, self._prefix)
        groups = self._named_groups(own.parameters)
        for members in groups:
            for name, parameter in members.items():
                kept = own.kept(name, self._live(parameter))
                names = own.names_by_parameter.get(name, [])
                restored = rebuild(stored, targets, names, depth=len(self._prefix) + 2)
                if restored or kept:
                    self._optimizer.state[parameter] = {**kept, **restored}
                else:
                    self._optimizer.state.pop(parameter, None)
        if own.groups_name not in targets.values:
            return []
        saved = attach_tensors(own.groups, targets.tensors)
        return self._install_groups(saved, _match_groups(own, groups).partners)

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
                        where = f"{join_path(self._groups_path)}[{index}]"
                        notes.append(f"{where}: kept {key}={group[key]} (checkpoint: {value})")
                    continue
                group[key] = _set_inside(group.get(key), value)
        return notes


def _match_groups(own: StoredOptimizer, groups: Sequence[Mapping[str, Any]]) -> GroupMatch:
    return match_groups(
        own.groups_name,
        [group["params"] for group in own.groups],
        [list(members) for members in groups],
        own.restores,
    )


def _set_inside(live: Any, value: Any) -> Any:
    """`value`, inside of the live tensors where there are any: captured graphs hold on to these objects."""
    if type(live) is type(value) is tuple and len(live) == len(value):
        return tuple(map(_set_inside, live, value))
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


def _unexpected(key: str, detail: str) -> Problem:
    return Problem(kind="unexpected", key=key, detail=detail)

"""One checkpoint against the live state of this rank, before any payload is read.

Owns the order in which names are settled: renamed, regrouped where DCP flattened them, selected; then every
component says what it wants. Changes nothing. Called by `load.restore`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.dotted import is_below, roots
from dcp_ckpt.format.dtypes import dtype_name
from dcp_ckpt.format.references import inside_of_values, outlined
from dcp_ckpt.load.diff import memory_problems, tensor_problems
from dcp_ckpt.load.flattened import regroup
from dcp_ckpt.load.rename import renamed
from dcp_ckpt.load.report import CastTensor
from dcp_ckpt.load.selection import Selection
from dcp_ckpt.load.source import Source
from dcp_ckpt.state.component import Component, Problem, StoredState, Targets
from dcp_ckpt.state.inventory import Inventory, take_inventory
from dcp_ckpt.state.paths import join_path, names_under

__all__ = ["Fitted", "fit"]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a load does on this rank, if it fits.

    Args:
        state: what is to be restored.
        stored_names: of tensors that the checkpoint has under another name.
        components: those of which anything is restored.
        targets: of each of them.
        problems: what does not fit.
        names: all that globs could match.
        unmatched: globs that match none of them.
        unasked: names of tensors and values that are selected, and this rank has no use for; and those of
            state that starts anew on all ranks.
        left_alone: names of what is not selected.
    """

    source: Source
    state: StoredState
    stored_names: Mapping[str, str]
    components: tuple[Component, ...]
    targets: tuple[Targets, ...]
    problems: tuple[Problem, ...]
    names: frozenset[str]
    unmatched: tuple[str, ...]
    unasked: frozenset[str]
    left_alone: frozenset[str]

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for targets in self.targets for name, tensor in targets.tensors.items()}

    @property
    def state_names(self) -> tuple[str, ...]:
        """All tensors and values that are to be restored, on this rank or another."""
        return _names(self.state)

    @property
    def elsewhere(self) -> dict[str, Problem] | None:
        """What does not fit unless another rank has a use for it; None where every rank judges for itself."""
        if all(targets.elsewhere is None for targets in self.targets):
            return None
        return {problem.key: problem for targets in self.targets for problem in targets.elsewhere or ()}

    @property
    def reinitialised(self) -> dict[str, str]:
        return {name: why for targets in self.targets for name, why in targets.reinitialised.items()}

    @property
    def cast(self) -> tuple[CastTensor, ...]:
        found = [
            CastTensor(name=name, stored=dtype_name(stored.dtype), live=dtype_name(tensor.dtype))
            for name, tensor in self.tensors.items()
            if (stored := self.state.tensors[name]).dtype != tensor.dtype
        ]
        return tuple(sorted(found, key=lambda item: item.name))


@dataclass(frozen=True, kw_only=True)
class _Named:
    """A stored state under live names.

    Args:
        names: of everything on either side; not looked up where all is restored.
        live: what there is, where it was looked up.
        unreadable: values that are stored and cannot be read, with the reason.
    """

    state: StoredState
    stored_names: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    live: Inventory | None = None
    unreadable: Mapping[str, str]


def fit(
    source: Source, components: Sequence[Component], selection: Selection, *, rank: int, world_size: int
) -> Fitted:
    """Settle what is restored, and find everything that does not fit.

    Raises:
        ConfigError: a renaming that cannot be, or a selection of some names of a tied tensor only.
        CorruptCheckpoint: something that is needed to know it is missing or damaged.
    """
    named = _named(source, components, selection, rank=rank, world_size=world_size)
    state = named.state if selection.is_everything else _selected(named.state, selection)
    taking = tuple(part for part in components if _takes_part(part, named.names, selection))
    targets = tuple(component.targets(state) for component in taking)
    problems = [
        _with_reason(problem, named.unreadable)
        for wanted in targets
        for problem in (*wanted.problems, *tensor_problems(wanted.tensors, state))
        if problem.kind != "missing" or selection.selects(problem.key)
    ]
    problems += memory_problems((wanted.tensors for wanted in targets), state.aliases)
    if problems or not selection.is_everything:
        live = named.live or take_inventory(components)
        problems += _reshaped(named.state, state, live)
        problems += _of_other_names(problems, live.ties)
    return Fitted(
        source=source,
        state=state,
        stored_names=named.stored_names,
        components=taking,
        targets=targets,
        problems=tuple(problems),
        names=named.names,
        unmatched=() if selection.is_everything else tuple(selection.unmatched(named.names)),
        unasked=_unasked(state, targets),
        left_alone=_left_alone(named, state, targets, selection),
    )


def _named(
    source: Source, components: Sequence[Component], selection: Selection, *, rank: int, world_size: int
) -> _Named:
    state = source.state(rank=rank, world_size=world_size)
    flat_paths, unreadable = source.flat_paths, source.unreadable
    if flat_paths is None and selection.is_everything:
        return _Named(state=state, unreadable=unreadable)
    live = take_inventory(components)
    if split := selection.split_tie(live.ties):
        raise ConfigError(
            "{} is selected and {} is not, and both are names of one tensor here, or of what is kept for it; "
            "select all of its names or none".format(*split),
            phase="diff",
        )
    stored_names: dict[str, str] = {}
    if selection.rename:
        result = renamed(state, flat_paths, selection.rename, live, others=unreadable)
        state, flat_paths = result.state, result.flat_paths
        stored_names = {new: old for old, new in result.names.items() if new != old}
        unreadable = {result.names[name]: reason for name, reason in unreadable.items()}
    if flat_paths is not None:
        regrouped = regroup(state, flat_paths, live.values)
        state = regrouped.state
        stored_names |= {new: stored_names.get(old, old) for new, old in regrouped.stored_names.items()}
    names = live.names.union(state.tensors, state.values, state.per_rank_names, unreadable)
    names -= inside_of_values(state.values).keys()
    return _Named(state=state, stored_names=stored_names, names=names, live=live, unreadable=unreadable)


def _reshaped(stored: StoredState, state: StoredState, live: Inventory) -> Iterator[Problem]:
    """State that optimizers kept for a parameter of another shape: it is not that of the live one.

    Args:
        stored: everything.
        state: what is to be restored.
    """
    kept = (*state.tensors, *state.values)
    for name, parameter in live.parameters.items():
        entry = stored.tensors.get(name)
        if entry is None or entry.shape == parameter.shape:
            continue
        for prefix in live.optimizers:
            path = (*prefix, "state", parameter.key)
            if names_under(kept, path):
                detail = f"kept for a parameter of shape {list(entry.shape)}, not {list(parameter.shape)}"
                yield Problem(kind="shape", key=join_path(path), detail=detail)


def _of_other_names(problems: Sequence[Problem], ties: Iterable[Sequence[str]]) -> list[Problem]:
    """The same problems under the other names of tied tensors: who leaves out one has to leave out all."""
    found = {problem.key: problem for problem in problems}
    return [
        replace(found[known], key=name, detail=f"the same as {known}")
        for names in ties
        if (known := next((name for name in names if name in found), None)) is not None
        for name in names
        if name not in found
    ]


def _selected(state: StoredState, selection: Selection) -> StoredState:
    """The part of a stored state that is to be restored."""
    inside = inside_of_values(state.values)
    chosen = {name for name in _names(state) if selection.selects(inside.get(name, name))}
    # An outline tells the order of all its leaves or of none.
    chosen -= {name for name, value in state.values.items() if not chosen.issuperset(outlined(value))}
    return replace(
        state,
        tensors={name: entry for name, entry in state.tensors.items() if name in chosen},
        aliases={name: stored for name, stored in state.aliases.items() if name in chosen},
        values={name: value for name, value in state.values.items() if name in chosen},
        value_paths={name: path for name, path in state.value_paths.items() if name in chosen},
        per_rank_of=lambda rank: {
            name: value for name, value in state.per_rank_of(rank).items() if selection.selects(name)
        },
        is_partial=True,
        left_out=frozenset(_names(state)) - chosen,
        selects=selection.selects,
        casts=selection.casts,
    )


def _takes_part(component: Component, names: Iterable[str], selection: Selection) -> bool:
    """Whether anything of a component is restored; what has no names has nothing to lose."""
    own = names_under(names, component.prefix) or [join_path(component.prefix)]
    return any(map(selection.selects, own))


def _unasked(state: StoredState, targets: Sequence[Targets]) -> frozenset[str]:
    """What is to be restored and no target of this rank takes, under whichever of its names."""
    aliases = state.aliases
    asked = {aliases.get(name, name) for wanted in targets for name in (*wanted.tensors, *wanted.values)}
    return frozenset(name for name in _names(state) if aliases.get(name, name) not in asked)


def _names(state: StoredState) -> tuple[str, ...]:
    return (*state.tensors, *state.values, *state.per_rank_names)


def _left_alone(
    named: _Named, state: StoredState, targets: Sequence[Targets], selection: Selection
) -> frozenset[str]:
    """The names that are not selected; without those above others.

    A further name of a stored tensor counts where it is a tensor of its own here, or none is restored.
    """
    aliases = named.state.aliases
    filled = {aliases.get(name, name) for wanted in targets for name in wanted.tensors}
    live = named.live.names if named.live else frozenset()
    names = {
        name
        for name in named.names
        if not selection.selects(name) and (name in live or aliases.get(name, name) not in filled)
    }
    above = {root for name in names for root in roots(name)[:-1]}
    return frozenset(names - above)


def _with_reason(problem: Problem, unreadable: Mapping[str, str]) -> Problem:
    """A value is not missing when it is there and cannot be read."""
    if problem.kind != "missing":
        return problem
    reasons = [why for name, why in unreadable.items() if is_below(name, problem.key)]
    return replace(problem, detail=f"cannot be read: {reasons[0]}") if reasons else problem

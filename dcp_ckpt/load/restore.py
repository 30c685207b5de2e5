"""Restoring one checkpoint into live components: diff, read, install; one verdict of all ranks per phase.

Runs on the main thread of every rank. Nothing is changed before the diff has passed on all ranks; values are
installed only after every rank has read and checked all its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from dcp_ckpt.coordination import Channel, agree, raise_first
from dcp_ckpt.errors import CheckpointError, LoadError, StateError, StateMismatch
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.load.diff import memory_problems, mismatch_error, tensor_problems
from dcp_ckpt.load.elsewhere import common_to_all
from dcp_ckpt.load.fill import Target, fill
from dcp_ckpt.load.flattened import regroup
from dcp_ckpt.load.source import Origin, Source
from dcp_ckpt.state.component import Component, Path, Problem, StoredState, Targets
from dcp_ckpt.state.placements import local_tensor, placements_of
from dcp_ckpt.state.tree import join_path

__all__ = ["Components", "Restored", "restore"]

_Result = TypeVar("_Result")

_MIXTURE = "the state is a mixture now, load another checkpoint or end this process"

Components = Callable[[], Sequence[Component]]
"""Makes the components. Called where a failure reaches all ranks, since the user's objects may refuse."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was put back."""

    names: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_read: int
    unverified: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """A checkpoint that fits the live state, before its payload is read.

    Args:
        stored_names: of tensors that the checkpoint has under another name.
    """

    source: Source
    state: StoredState
    stored_names: Mapping[str, str]
    components: tuple[Component, ...]
    targets: tuple[Targets, ...]

    @property
    def state_names(self) -> tuple[str, ...]:
        """All tensors and values that are stored."""
        return (*self.state.tensors, *self.state.values)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for targets in self.targets for name, tensor in targets.tensors.items()}


# What is made in the inference mode of a caller could not be written outside of it.
@torch.inference_mode(False)
def restore(
    open_source: Callable[[], Source],
    components: Components,
    channel: Channel,
    *,
    tag: str,
    verify: bool,
    concurrency: int,
    timeout_seconds: float,
) -> Restored:
    """Load one checkpoint into the components. Called on all ranks; blocks.

    Args:
        open_source: opens the checkpoint; called where a failure reaches all ranks.
        components: makes what is to be restored, in the order of installing.
        tag: unique in the life of the channel.

    Raises:
        StateMismatch: it does not fit on some rank; nothing was changed anywhere.
        CorruptCheckpoint: it is damaged; tensors may hold checked bytes of it, so load another one whole.
    """

    def phase(name: str, act: Callable[[], _Result]) -> _Result:
        result, failures = agree(channel, f"{tag}/{name}", act, timeout_seconds=timeout_seconds)
        raise_first(sorted(failures, key=lambda failure: not isinstance(failure, LoadError)))
        assert result is not None, "no rank failed"
        return result

    fitted = phase("fit", lambda: _fit(open_source, components, channel))
    left_over = _left_over(fitted, channel, tag=f"{tag}/elsewhere", timeout_seconds=timeout_seconds)
    bytes_read = phase("read", lambda: _fill(fitted, verify=verify, concurrency=concurrency))
    notes = phase("install", lambda: _install(fitted))
    origin = fitted.source.origin
    unasked = () if verify or not fitted.source.has_digests else ("digests: CheckpointConfig(verify=False)",)
    return Restored(
        names=tuple(sorted(name for name in fitted.state_names if name not in left_over)),
        notes=(*notes, *origin.notes),
        skipped=tuple(name for name in fitted.state_names if name in left_over),
        bytes_read=bytes_read,
        unverified=(*origin.unverified, *unasked),
        origin=origin,
    )


def _fit(open_source: Callable[[], Source], make: Components, channel: Channel) -> _Fitted:
    """Open the checkpoint and find everything that does not fit."""
    components = tuple(make())
    source = open_source()
    state = source.state(rank=channel.rank, world_size=channel.world_size)
    stored_names: Mapping[str, str] = {}
    if source.flat_paths is not None:
        regrouped = regroup(state, source.flat_paths, _live_values(components))
        state, stored_names = regrouped.state, regrouped.stored_names
    targets = tuple(component.targets(state) for component in components)
    problems: list[Problem] = []
    for wanted in targets:
        problems += wanted.problems
        problems += tensor_problems(wanted.tensors, state.tensors)
    problems += memory_problems((wanted.tensors for wanted in targets), state.aliases)
    if problems:
        raise _mismatch(problems, source, state)
    return _Fitted(
        source=source, state=state, stored_names=stored_names, components=components, targets=targets
    )


def _mismatch(problems: Sequence[Problem], source: Source, state: StoredState) -> StateMismatch:
    return mismatch_error(
        [_with_reason(problem, source.unreadable) for problem in problems],
        source.names(),
        step=state.step,
        path=f"{source.storage.url}/{source.directory}",
    )


def _left_over(fitted: _Fitted, channel: Channel, *, tag: str, timeout_seconds: float) -> frozenset[str]:
    """The stored names that no rank asks for. Blocks where a rank cannot say that by itself.

    Raises:
        StateMismatch: some of them, or other things that no rank uses, should be used; on all ranks.
    """
    aliases = fitted.state.aliases
    asked = {
        aliases.get(name, name) for targets in fitted.targets for name in (*targets.tensors, *targets.values)
    }
    unasked = {name for name in fitted.state_names if aliases.get(name, name) not in asked}
    if all(targets.elsewhere is None for targets in fitted.targets):
        return frozenset(unasked)
    elsewhere = {problem.key: problem for targets in fitted.targets for problem in targets.elsewhere or ()}
    common = common_to_all(channel, tag, {*unasked, *elsewhere}, timeout_seconds=timeout_seconds)
    problems = [elsewhere[key] for key in sorted(common) if key in elsewhere]
    if problems:
        raise _mismatch(problems, fitted.source, fitted.state)
    return common & unasked


def _live_values(components: Sequence[Component]) -> list[tuple[Path, Any]]:
    """Path and content of every value that a save would store now."""
    found: list[tuple[Path, Any]] = []
    for component in components:
        try:
            captured = component.capture()
        except StateError:
            continue  # what cannot be saved as it is now may well be loaded into, under the names stored
        found += [
            (path, decode_value(value, path=join_path(path))) for path, value in captured.values.items()
        ]
    return found


def _with_reason(problem: Problem, unreadable: Mapping[str, str]) -> Problem:
    """A value is not missing when it is there and cannot be read."""
    if problem.kind != "missing":
        return problem
    below = f"{problem.key}."
    reasons = [why for name, why in unreadable.items() if name == problem.key or name.startswith(below)]
    return replace(problem, detail=f"cannot be read: {reasons[0]}") if reasons else problem


def _fill(fitted: _Fitted, *, verify: bool, concurrency: int) -> int:
    targets = {
        fitted.stored_names.get(name, name): Target(local=local_tensor(tensor), box=_held_box(name, tensor))
        for name, tensor in fitted.tensors.items()
    }
    return fill(fitted.source, targets, verify=verify, concurrency=concurrency)


def _held_box(name: str, tensor: torch.Tensor) -> Box:
    """The box of the global tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tuple(tensor.shape))
    return placements_of(tensor, name)[1]


def _install(fitted: _Fitted) -> list[str]:
    notes: list[str] = []
    for component, targets in zip(fitted.components, fitted.targets, strict=True):
        try:
            notes += component.install(fitted.state, targets)
        except CheckpointError as error:
            error.message += f"; {_MIXTURE}"
            raise
        except Exception as error:
            name = ".".join(component.prefix)
            raise LoadError(
                f"{name} refused what was loaded for it: {error!r}; {_MIXTURE}",
                step=fitted.state.step,
                phase="install",
            ) from error
    return notes

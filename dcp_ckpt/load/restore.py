"""Restoring one checkpoint into live components: diff, read, install; one verdict of all ranks per phase.

Runs on the main thread of every rank. Nothing is changed before the diff has passed on all ranks; values are
installed only after every rank has read and checked all its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.distributed.tensor import DTensor

from dcp_ckpt.coordination import Channel, agree, raise_first
from dcp_ckpt.errors import CheckpointError, LoadError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.fragment import ValueEntry
from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.load.diff import mismatch_error, tensor_problems
from dcp_ckpt.load.fill import Target, fill
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.state.component import Component, Problem, StoredState, StoredTensor, Targets
from dcp_ckpt.state.placements import local_tensor, placements_of
from dcp_ckpt.storage.base import Storage

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


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """A checkpoint that fits the live state, before its payload is read."""

    stored: StoredCheckpoint
    state: StoredState
    components: tuple[Component, ...]
    targets: tuple[Targets, ...]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for targets in self.targets for name, tensor in targets.tensors.items()}


def restore(
    storage: Storage,
    directory: str,
    manifest: Manifest,
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
        directory: of the checkpoint, below the root of `storage`.
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

    fitted = phase("fit", lambda: _fit(storage, directory, manifest, components, channel))
    bytes_read = phase("read", lambda: _fill(fitted, verify=verify, concurrency=concurrency))
    notes = phase("install", lambda: _install(fitted))
    asked = {name for targets in fitted.targets for name in (*targets.tensors, *targets.values)}
    return Restored(
        names=tuple(sorted(asked)),
        notes=tuple(notes),
        skipped=tuple(name for name in fitted.stored.names() if name not in asked),
        bytes_read=bytes_read,
    )


def _fit(storage: Storage, directory: str, manifest: Manifest, make: Components, channel: Channel) -> _Fitted:
    """Open the checkpoint and find everything that does not fit."""
    components = tuple(make())
    stored = StoredCheckpoint(storage, directory, manifest)
    state = _stored_state(stored, channel)
    targets = tuple(component.targets(state) for component in components)
    problems: list[Problem] = []
    for wanted in targets:
        problems += wanted.problems
        problems += tensor_problems(wanted.tensors, state.tensors)
    if problems:
        raise mismatch_error(problems, stored.names(), step=manifest.step, path=f"{storage.url}/{directory}")
    return _Fitted(stored=stored, state=state, components=components, targets=targets)


def _stored_state(stored: StoredCheckpoint, channel: Channel) -> StoredState:
    manifest = stored.manifest
    per_rank: Mapping[str, ValueEntry] = {}
    if manifest.world_size == channel.world_size:
        per_rank = stored.per_rank(channel.rank)
    return StoredState(
        tensors={
            name: StoredTensor(
                path=tuple(entry.path), dtype=getattr(torch, entry.dtype), shape=tuple(entry.shape)
            )
            for name, entry in stored.tensors.items()
        },
        values={name: decode_value(entry.value, path=name) for name, entry in stored.values.items()},
        value_paths={name: tuple(entry.path) for name, entry in stored.values.items()},
        per_rank={name: decode_value(entry.value, path=name) for name, entry in per_rank.items()},
        step=manifest.step,
        saved_world_size=manifest.world_size,
        rank=channel.rank,
        world_size=channel.world_size,
        seed_material=f"{manifest.run_id}/{manifest.attempt}/{manifest.step}",
    )


def _fill(fitted: _Fitted, *, verify: bool, concurrency: int) -> int:
    targets = {
        name: Target(local=local_tensor(tensor), box=_held_box(name, tensor))
        for name, tensor in fitted.tensors.items()
    }
    return fill(fitted.stored, targets, verify=verify, concurrency=concurrency)


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

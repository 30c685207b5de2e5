"""Restoring one checkpoint into live components: fit, read, install; one verdict of all ranks per phase.

Runs on the main thread of every rank. Nothing is changed before it is known to fit on all ranks; values are
installed only after every rank has read and checked all its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.distributed.tensor import DTensor

from dcp_ckpt.coordination import Channel, agree
from dcp_ckpt.errors import CheckpointError, LoadError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.load.fit import Fitted, fit
from dcp_ckpt.load.fit_verdict import agreed_fit
from dcp_ckpt.load.passing import fill_together
from dcp_ckpt.load.read_plan import Target
from dcp_ckpt.load.report import CastTensor
from dcp_ckpt.load.selection import Selection
from dcp_ckpt.load.source import Origin, Source
from dcp_ckpt.state.component import Component
from dcp_ckpt.state.placements import local_tensor, placements_of

__all__ = ["Components", "Restored", "restore"]

_Result = TypeVar("_Result")

_MIXTURE = "the state is a mixture now, load another checkpoint or end this process"

Components = Callable[[], Sequence[Component]]
"""Makes the components. Called where a failure reaches all ranks, since the user's objects may refuse."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was put back; fields as in `LoadReport`."""

    names: tuple[str, ...]
    reinitialised: Mapping[str, str]
    cast: tuple[CastTensor, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_read: int
    unverified: tuple[str, ...]
    origin: Origin


# What is made in the inference mode of a caller could not be written outside of it.
@torch.inference_mode(False)
def restore(
    open_source: Callable[[], Source],
    components: Components,
    channel: Channel,
    *,
    selection: Selection,
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
        ConfigError: a glob or a renaming that fits nothing; nothing was changed anywhere.
        StateMismatch: it does not fit on some rank; nothing was changed anywhere.
        CorruptCheckpoint: it is damaged; tensors may hold bytes of it, so load another one whole.
    """

    def phase(name: str, act: Callable[[], _Result]) -> _Result:
        result, failures = agree(channel, f"{tag}/{name}", act, timeout_seconds=timeout_seconds)
        # Rather what says something of the checkpoint: then there may be another one to load.
        failures.raise_first(rather=LoadError)
        assert result is not None, "no rank failed"
        return result

    def fit_here() -> Fitted:
        made = tuple(components())
        return fit(open_source(), made, selection, rank=channel.rank, world_size=channel.world_size)

    fitted, left_over = agreed_fit(channel, fit_here, tag=tag, timeout_seconds=timeout_seconds)
    bytes_read = phase(
        "read",
        lambda: fill_together(
            fitted.source,
            _targets(fitted),
            channel,
            tag=f"{tag}/together",
            verify=verify,
            concurrency=concurrency,
            timeout_seconds=timeout_seconds,
        ),
    )
    notes = phase("install", lambda: _install(fitted))
    origin = fitted.source.origin
    unasked = () if verify or not fitted.source.has_digests else ("digests: CheckpointConfig(verify=False)",)
    return Restored(
        names=tuple(sorted(name for name in fitted.state_names if name not in left_over)),
        reinitialised=fitted.reinitialised,
        cast=fitted.cast,
        notes=(*notes, *origin.notes),
        skipped=tuple(sorted((left_over | fitted.left_alone) - fitted.reinitialised.keys())),
        bytes_read=bytes_read,
        unverified=(*origin.unverified, *unasked),
        origin=origin,
    )


def _targets(fitted: Fitted) -> dict[str, Target]:
    """What is to be filled, by stored name."""
    # The layers of a model are laid out alike.
    known: dict[object, Box] = {}
    targets = {}
    for name, tensor in fitted.tensors.items():
        local = local_tensor(tensor)
        layout = tensor.shape, local.shape, *_sharding(tensor)
        if layout not in known:
            known[layout] = _held_box(name, tensor)
        targets[fitted.stored_names.get(name, name)] = Target(
            local=local, box=known[layout], has_copies=_has_copies(tensor)
        )
    return targets


def _sharding(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()


def _held_box(name: str, tensor: torch.Tensor) -> Box:
    """The box of the global tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tuple(tensor.shape))
    return placements_of(tensor, name)[1]


def _has_copies(tensor: torch.Tensor) -> bool:
    """Whether other ranks may hold the same part of it."""
    if not isinstance(tensor, DTensor):
        return True
    sizes = tensor.device_mesh.shape
    return any(
        placement.is_replicate() and size > 1
        for placement, size in zip(tensor.placements, sizes, strict=True)
    )


def _install(fitted: Fitted) -> list[str]:
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

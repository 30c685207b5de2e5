"""The seam between what is saved and how it is saved: captured state, stored state, targets.

A component adapts one kind of training object (model, optimizer, RNG, ...). It knows torch and its object; it
knows nothing of files, ranks' ownership or collectives. `save` calls `capture`, `load` calls `targets`, fills
the returned tensors in place and then calls `install`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from dcp_ckpt.state.keying import Keying

from dcp_ckpt.state.mesh_roles import Holders

__all__ = ["Captured", "Component", "Path", "Problem", "StoredState", "StoredTensor", "Targets"]

Path = tuple[str, ...]
"""Where a leaf sits in the state; its name is the path joined with dots."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What one component holds now.

    Args:
        tensors: live tensors (plain or DTensor), not copied. Staging copies them.
        values: replicated values, already encoded by `dcp_ckpt.format.values.encode_value`.
        per_rank: values of this rank only, encoded.
        stock: replicated values as plain Python objects, for stock DCP readers; same keys as `values`.
        aliases: the other paths of tensors that were found under several, which are then not in `tensors`;
            known once the components are put together.
        optimizers: those whose `step()` can be held until a copy is done.
        step_writes: `id()` of the live tensors that nothing but the `step()` of one of `optimizers` writes,
            of whichever component: they may be copied after `save()` has returned.
        holders: of the tensors and values that belong to a part of the model; all others are the same on all
            ranks.
        joins: of values that may be stored in parts, each by the ranks that have it: how the parts are put
            together (`dcp_ckpt.format.joining`).
    """

    tensors: Mapping[Path, torch.Tensor] = field(default_factory=dict)
    values: Mapping[Path, Any] = field(default_factory=dict)
    per_rank: Mapping[Path, Any] = field(default_factory=dict)
    stock: Mapping[Path, Any] = field(default_factory=dict)
    aliases: Mapping[Path, tuple[Path, ...]] = field(default_factory=dict)
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    step_writes: frozenset[int] = frozenset()
    holders: Mapping[Path, Holders] = field(default_factory=dict)
    joins: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint: path, dtype and global shape."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def _everything(name: str) -> bool:
    return True


def _nothing(name: str) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class StoredState:
    """What a checkpoint holds that this load is to restore, before any payload is read.

    All names are those of the live state, also where the checkpoint has other ones.

    Args:
        tensors: by name; a tensor that was found under several names is here under each of them.
        aliases: name -> the name under which the same tensor is stored, of those further names.
        values: replicated values by name, decoded (tensors inside are `TensorRef`).
        value_paths: the path of each replicated value.
        keying: the places of the ranks that saved; None where each was a data-parallel coordinate of its own.
        per_rank_of: the values of one saved rank by name, decoded. Reads its fragment at the first call, and
            raises CorruptCheckpoint when that is missing or damaged.
        step: training step.
        saved_world_size: number of ranks that saved; 0 for a checkpoint of plain `dcp.save`, which holds
            nothing of single ranks.
        rank: this process's rank.
        world_size: number of ranks that load.
        seed_material: a value that is the same on all ranks and differs between checkpoints and
            between steps; for deriving streams of ranks that have none.
        is_partial: whether the user selected a part of the state.
        left_out: names that are stored and not selected; they are in none of the other fields.
        selects: whether the state of that name is to be restored. What is not stays exactly as it is. With a
            dot behind the name: whether all below it is.
        casts: whether a tensor of that name may be cast to the dtype of the live one.
    """

    tensors: Mapping[str, StoredTensor]
    values: Mapping[str, Any]
    value_paths: Mapping[str, Path]
    per_rank_of: Callable[[int], Mapping[str, Any]]
    step: int
    saved_world_size: int
    rank: int
    world_size: int
    seed_material: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    keying: Keying | None = None
    is_partial: bool = False
    left_out: frozenset[str] = frozenset()
    selects: Callable[[str], bool] = _everything
    casts: Callable[[str], bool] = _nothing

    @property
    def per_rank_names(self) -> tuple[str, ...]:
        """The names of the values that the first rank has for itself; mostly, all have the same."""
        return tuple(self.per_rank_of(0)) if self.saved_world_size else ()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One way in which the checkpoint does not fit.

    Args:
        kind: "missing" (this rank needs it, the checkpoint does not have it), "unexpected" (the checkpoint
            has it, this rank has no use for it), "shape", "dtype" or "other".
        key: the name in the live state.
        detail: what is wrong, for the message.
    """

    kind: str
    key: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a component wants to be filled.

    Args:
        tensors: stored name -> tensor to fill in place (plain or DTensor, of this rank's sharding).
            Shape and dtype are compared with what is stored by the caller.
        values: names of the stored values that `install` will use, those of single ranks among them.
        problems: what does not fit, other than shape and dtype of `tensors`.
        elsewhere: what does not fit unless it is another rank's: of a part of the model that is not held
            here. None where every rank judges for itself.
        reinitialised: name -> reason, of live state that the checkpoint has nothing for, or not for all of
            it or all ranks, and that `install` will start anew.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    values: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()
    elsewhere: tuple[Problem, ...] | None = None
    reinitialised: Mapping[str, str] = field(default_factory=dict)


class Component(Protocol):
    """Adapts one training object. All methods are local to the rank and run on the main thread."""

    @property
    def prefix(self) -> Path:
        """The path under which everything of this component is stored."""
        ...

    def capture(self) -> Captured:
        """Describe the state as it is now, without changing or copying it."""
        ...

    def targets(self, stored: StoredState) -> Targets:
        """Say what to fill from `stored`, without changing the live object."""
        ...

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        """Put the filled tensors and the values in place.

        Returns:
            Notes for the load report: what the user should know and no list of names says.
        """
        ...

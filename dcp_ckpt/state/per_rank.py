"""What every rank has for itself, and whose it is after a load on another world.

Owns `per_rank` values, and how a value of one rank is encoded. Ranks are known by their place: see `keying`.
Knows no file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.dtypes import dtype_name
from dcp_ckpt.format.values import InlineTensor, encode_value
from dcp_ckpt.state.component import Captured, Path, Problem, StoredState, Targets
from dcp_ckpt.state.inline import to_inline
from dcp_ckpt.state.keying import (
    NOTHING_SHARED,
    all_places_known,
    live_keying,
    saved_keying,
    source_rank,
)
from dcp_ckpt.state.mesh_roles import MeshRoles
from dcp_ckpt.state.paths import join_path, names_under
from dcp_ckpt.state.problems import missing, other_dtype, other_shape, unexpected, value_for_tensor
from dcp_ckpt.state.rebuild import attach_tensors
from dcp_ckpt.state.stateful import Stateful, load_into, put
from dcp_ckpt.state.tensors import check_tensor
from dcp_ckpt.state.tree import replace_tensors

__all__ = ["INLINE_BYTES_MAX", "Inliner", "PerRankComponent"]

INLINE_BYTES_MAX = 1 << 20
"""How many bytes of tensors one rank may keep for itself: they are a part of what describes the
checkpoint."""


class PerRankComponent:
    """Values of this rank only: one per entry of a dictionary, or the state of an object in it.

    A world in which every rank stands where one stood at the save gets them back rank by rank, by
    data-parallel coordinate and place among the peers that share it; so does, by rank, one of the same size.
    On any other, nobody can say whose values are whose: they are left untouched, on all ranks.

    Args:
        roles: which ranks share their data, where it is not "none".
    """

    def __init__(self, prefix: Path, mapping: dict[str, Any], roles: MeshRoles | None = None) -> None:
        self._prefix = prefix
        self._mapping = mapping
        self._roles = roles

    @property
    def prefix(self) -> Path:
        return self._prefix

    def capture(self) -> Captured:
        """Encode the values.

        Raises:
            StateError: too large or unsuitable tensors, or a type that cannot be stored exactly.
        """
        inliner = Inliner(join_path(self._prefix))
        return Captured(
            per_rank={
                (*self._prefix, key): inliner.encode((*self._prefix, key), item)
                for key, item in self._mapping.items()
            }
        )

    def targets(self, stored: StoredState) -> Targets:
        source = self._source(stored)
        if source is None:
            return Targets()
        values = stored.per_rank_of(source)
        problems = []
        for key, item in self._mapping.items():
            name = self._name(key)
            if name not in values:
                problems.append(missing(name))
            elif isinstance(item, torch.Tensor):
                problems += _tensor_problems(name, item, values[name])
        known = {self._name(key) for key in self._mapping}
        problems += [
            unexpected(name, "per_rank") for name in names_under(values, self._prefix) if name not in known
        ]
        # Other ranks may have other ones; what is told is the same on all.
        told = names_under((*values, *stored.per_rank_names), self._prefix)
        return Targets(values=frozenset(told), problems=tuple(problems))

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        name = join_path(self._prefix)
        if not stored.saved_world_size:
            return [f"{name}: not restored, plain dcp.save stores nothing of single ranks"]
        worlds = f"saved on {stored.saved_world_size} rank(s), loaded on {stored.world_size}"
        source = self._source(stored)
        if source is None:
            return [f"{name}: {worlds}; left untouched"]
        values = stored.per_rank_of(source)
        for key, live in list(self._mapping.items()):
            if self._name(key) in values:
                self._restore(key, live, attach_tensors(values[self._name(key)], {}))
        moved = saved_keying(stored) != live_keying(stored, self._roles)
        return [f"{name}: {worlds}; taken from the ranks at the same places"] if moved else []

    def _restore(self, key: str, live: Any, value: Any) -> None:
        if isinstance(live, Stateful):
            load_into(live, value, self._name(key))
        elif isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
            with torch.no_grad():
                live.copy_(value)
        else:
            put(self._mapping, key, live, value)

    def _source(self, stored: StoredState) -> int | None:
        """The saved rank whose values this rank gets; None on one rank is None on all."""
        if not stored.saved_world_size:
            return None
        saved, live = saved_keying(stored), live_keying(stored, self._roles)
        if all_places_known(live, saved) and live.peers.keys() <= saved.peers.keys():
            return source_rank(stored.rank, live, saved, NOTHING_SHARED)
        return stored.rank if stored.saved_world_size == stored.world_size else None

    def _name(self, key: str) -> str:
        return join_path((*self._prefix, key))


def _tensor_problems(name: str, live: torch.Tensor, stored: Any) -> list[Problem]:
    if not isinstance(stored, InlineTensor):
        return [value_for_tensor(name)]
    if tuple(live.shape) != stored.shape:
        return [other_shape(name, stored.shape, live.shape)]
    if dtype_name(live.dtype) != stored.dtype:
        return [other_dtype(name, f"torch.{stored.dtype}", live.dtype)]
    return []


class Inliner:
    """Encodes values of one rank with the tensors in them, as long as these are small.

    Args:
        name: of all that it encodes, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_bytes = 0

    def encode(self, path: Path, item: Any) -> Any:
        """A value, or the state of an object, as typed JSON.

        Raises:
            StateError: a type that cannot be stored exactly, or too many bytes of tensors.
        """
        value = item.state_dict() if isinstance(item, Stateful) else item
        return encode_value(replace_tensors(value, path, self._inline), path=join_path(path))

    def _inline(self, path: Path, tensor: torch.Tensor) -> InlineTensor:
        name = join_path(path)
        if isinstance(tensor, DTensor):
            raise StateError(
                f"{name} is a DTensor, which is not one rank's own; keep it in TrainState(extra=...)"
            )
        check_tensor(tensor, name)
        self._num_bytes += tensor.numel() * tensor.element_size()
        if self._num_bytes > INLINE_BYTES_MAX:
            raise StateError(
                f"{name}: up to here, the tensors in {self._name} are {self._num_bytes} bytes, and one rank "
                f"may keep {INLINE_BYTES_MAX} of its own; make large ones DTensors, or keep what is equal on "
                "all ranks in TrainState(extra=...)"
            )
        return to_inline(tensor)

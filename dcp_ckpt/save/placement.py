"""Who writes what: a pure rule that every rank computes alone, from placements only.

No plan is exchanged between ranks. A sharded box that one rank holds is written by that rank. A box that
several ranks hold (DDP, HSDP, plain tensors) is split among them: large ones into boxes along dimension 0,
and each box goes to the member with the fewest bytes so far. All members see the same boxes in the same
order, so they agree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from dcp_ckpt.format.boxes import Box, Mesh, Placement, shard_box, split_rows

__all__ = ["SPLIT_BYTES", "OwnedBox", "Ownership", "TensorSpec", "assign_owners"]

SPLIT_BYTES = 4 << 20
"""A replicated box larger than this is split, so that one huge embedding does not make one rank the last."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What placement needs to know of one tensor.

    Args:
        path: where it sits in the state.
        dtype: torch's name, without `torch.`.
        item_bytes: bytes per element.
        shape: global shape.
        mesh: its device mesh, or None when every rank holds it whole.
        dim_names: names of the mesh dimensions.
        placements: one per mesh dimension.
    """

    path: tuple[str, ...]
    dtype: str
    item_bytes: int
    shape: tuple[int, ...]
    mesh: Mesh | None
    dim_names: tuple[str, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, kw_only=True)
class OwnedBox:
    """A box this rank writes, in global and local coordinates: part or all of what it holds of a tensor."""

    tensor: int
    box: Box
    local: Box
    is_part: bool


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """What one rank writes.

    Args:
        owned: the boxes.
        owners: for each tensor, the ranks that may hold chunks of it.
        groups: for each tensor, the ranks that hold the same box of it as this one.
    """

    owned: tuple[OwnedBox, ...]
    owners: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]


def assign_owners(specs: Sequence[TensorSpec], *, rank: int, world_size: int) -> Ownership:
    """Decide what `rank` writes.

    Args:
        specs: all tensors this rank holds, sorted by path; members of one replica group pass the same boxes.
        rank: this rank.
        world_size: the number of ranks that save.
    """
    owned: list[OwnedBox] = []
    owners: list[tuple[int, ...]] = []
    groups: list[tuple[int, ...]] = []
    known = _Groups(rank, world_size)
    for index, spec in enumerate(specs):
        held, group = _held_box(spec, rank), known.of(spec)
        candidates = known.world if spec.mesh is None else spec.mesh.ranks
        writers = set()
        for part in _parts(held, spec.item_bytes, len(group.ranks)):
            writer = group.take(max(part.num_elements * spec.item_bytes, 1))
            writers.add(writer)
            if writer == rank:
                owned.append(
                    OwnedBox(tensor=index, box=part, local=_relative(part, held), is_part=part != held)
                )
        owners.append(tuple(sorted(writers)) if candidates == group.ranks else candidates)
        groups.append(group.ranks)
    return Ownership(owned=tuple(owned), owners=tuple(owners), groups=tuple(groups))


def _held_box(spec: TensorSpec, rank: int) -> Box:
    """The box that this rank holds."""
    if spec.mesh is None:
        return Box.whole(spec.shape)
    own = spec.mesh.coordinate(rank)
    assert own is not None, "a rank outside of the mesh holds no part of the tensor"
    return shard_box(spec.shape, spec.mesh.shape, spec.placements, own)


class _Group:
    """The ranks that hold the same boxes, and how many bytes of these each of them writes."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self._loads = [(0, rank) for rank in sorted(ranks)]

    def take(self, num_bytes: int) -> int:
        """The member with the fewest bytes so far, who writes these; the lowest where several have as few."""
        load, writer = self._loads[0]
        heapq.heapreplace(self._loads, (load + num_bytes, writer))
        return writer


class _Groups:
    """The groups of one rank. Most tensors have that of another one, so each is looked for once."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self.world = tuple(range(world_size))
        self._found: dict[tuple[Mesh | None, tuple[int, ...]], _Group] = {}
        self._by_ranks: dict[tuple[int, ...], _Group] = {}

    def of(self, spec: TensorSpec) -> _Group:
        """The ranks that hold the same box of a tensor as this one."""
        sharded = tuple(i for i, placement in enumerate(spec.placements) if placement.dim is not None)
        key = spec.mesh, sharded
        if key not in self._found:
            ranks = self.world if spec.mesh is None else self._alike(spec.mesh, sharded)
            self._found[key] = self._by_ranks.setdefault(ranks, _Group(ranks))
        return self._found[key]

    def _alike(self, mesh: Mesh, sharded: tuple[int, ...]) -> tuple[int, ...]:
        own = mesh.coordinate(self._rank)
        assert own is not None, "its box was found"
        if len(sharded) == len(mesh.shape):
            return (self._rank,)
        return tuple(
            member
            for member, coordinate in zip(mesh.ranks, mesh.coordinates(), strict=True)
            if all(coordinate[i] == own[i] for i in sharded)
        )


def _parts(box: Box, item_bytes: int, num_members: int) -> list[Box]:
    if box.num_elements == 0:
        return []
    if num_members == 1:
        return [box]
    return split_rows(box, min(num_members, -(-box.num_elements * item_bytes // SPLIT_BYTES)))


def _relative(part: Box, held: Box) -> Box:
    offsets = tuple(a - b for a, b in zip(part.offsets, held.offsets, strict=True))
    return Box(offsets, part.sizes)

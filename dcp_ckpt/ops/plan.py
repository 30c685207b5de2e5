"""Plan: what each rank of some world would read, ask for and hold to load a checkpoint. Reads tables only.

Asks the functions that a load uses (boxes, ranges), so its numbers are those of a load whose tensors are
placed like the stored ones, on the other world. Needs no torch, GPU or process group. Called by the command
line and by users who size a restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dcp_ckpt.errors import ConfigError, LoadError
from dcp_ckpt.format.boxes import Box, Mesh, expand_ranks
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.load.ranges import Piece, cover, pieces_of
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.ops.checkpoint import Checkpoint
from dcp_ckpt.ops.layout import TensorLayout, coordinates
from dcp_ckpt.ops.stock import StockCheckpoint

__all__ = ["LoadPlan", "RankLoad", "plan_load"]

_READERS = 4
"""Threads of a rank that read, check and copy, as many as a load uses at most."""


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What one rank needs.

    Args:
        needed_bytes: of the parts of tensors that it holds.
        read_bytes: of data files: whole blocks.
        num_reads: reads of data files.
        num_fragments: fragments that it reads to know what is where.
        fragment_bytes: of those.
        memory_bytes: the most that it holds on the host: its tensors, the fragments, the buffers of reads.
    """

    rank: int
    needed_bytes: int
    read_bytes: int
    num_reads: int
    num_fragments: int
    fragment_bytes: int
    memory_bytes: int

    @property
    def num_requests(self) -> int:
        """To the storage, the manifest left out: rank 0 reads it for all."""
        return self.num_reads + self.num_fragments


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a load on `world_size` ranks costs.

    Args:
        directory: path or URL of the checkpoint.
        step, stored_world_size: its step, and the number of ranks that saved it.
        mesh: dimension name -> size of the new mesh, outermost first; ranks are counted row by row.
        tensor_bytes: of all tensors, each once.
        num_partial: tensors that only some of the saving ranks had (pipeline stages). They are planned as if
            every rank had a part of them, which is the most that they can cost.
    """

    directory: str
    step: int
    stored_world_size: int
    world_size: int
    mesh: Mapping[str, int]
    tensor_bytes: int
    num_partial: int
    ranks: tuple[RankLoad, ...]

    @property
    def needed_bytes(self) -> int:
        """What all ranks need, copies on several ranks counted on each."""
        return sum(rank.needed_bytes for rank in self.ranks)

    @property
    def read_bytes(self) -> int:
        """What all ranks read; more than they need where a block that is checked holds more."""
        return sum(rank.read_bytes for rank in self.ranks)

    @property
    def num_requests(self) -> int:
        """Of all ranks, the one for the manifest included."""
        return 1 + sum(rank.num_requests for rank in self.ranks)

    @property
    def read_amplification(self) -> float:
        """Bytes read over bytes needed; 1 when nothing is needed."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else 1.0


def plan_load(checkpoint: Checkpoint, world_size: int, *, mesh: Mapping[str, int] | None = None) -> LoadPlan:
    """Plan a load of everything in the checkpoint. Blocks on reading fragments; no data is read.

    A tensor keeps its placements; each dimension of its mesh gets the size that the new mesh has under that
    name, or 1. Replicated tensors are needed whole by every rank.

    Args:
        world_size: ranks that load.
        mesh: name -> size of each dimension of their mesh, outermost first; dimensions without a name are
            called `dim0`, `dim1`, ... By default there is one dimension, along which all that is sharded is
            spread over all ranks.

    Raises:
        ConfigError: the sizes do not make up `world_size`, or no stored mesh has a dimension of that name.
        LoadError: it is a stock DCP checkpoint, which has no placements.
        CorruptCheckpoint: a fragment is missing or damaged.
        StorageError: one could not be read.
    """
    if world_size < 1:
        raise ConfigError(f"world_size must be at least 1, not {world_size}")
    if isinstance(checkpoint, StockCheckpoint):
        raise LoadError(
            "a stock DCP checkpoint does not say how its tensors were placed, so its load cannot be planned",
            path=checkpoint.directory,
        )
    layouts = {
        name: TensorLayout.of(entry, checkpoint.mesh(name)) for name, entry in checkpoint.tensors.items()
    }
    if mesh is None:
        mesh, layouts = _one_dimension(layouts, world_size)
    _check_mesh(mesh, world_size, layouts)
    stored = _NotingStored(checkpoint)
    costs: dict[tuple[Box, ...], _Cost] = {}
    ranks = []
    for rank, coordinate in enumerate(coordinates(mesh)):
        wanted = {name: layout.box(mesh, coordinate) for name, layout in layouts.items()}
        # Ranks that hold the same parts read the same.
        held = tuple(wanted.values())
        if held not in costs:
            costs[held] = _cost(stored, wanted)
        ranks.append(_rank_load(costs[held], rank, checkpoint, world_size))
    num_saving = checkpoint.manifest.world_size
    return LoadPlan(
        directory=checkpoint.directory,
        step=checkpoint.manifest.step,
        stored_world_size=num_saving,
        world_size=world_size,
        mesh=dict(mesh),
        tensor_bytes=sum(
            _num_bytes(entry.dtype, Box.whole(entry.shape)) for entry in checkpoint.tensors.values()
        ),
        num_partial=sum(layout.num_ranks not in (None, num_saving) for layout in layouts.values()),
        ranks=tuple(ranks),
    )


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What holding certain parts costs, on whichever rank."""

    needed_bytes: int
    read_bytes: int
    num_reads: int
    buffer_bytes: int
    fragments: frozenset[int]


class _NotingStored(StoredCheckpoint):
    """The tables as a load reads them. Notes whose fragments it asks for; equal questions cost once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._known: dict[tuple[Box, Mesh | None, str], list[int]] = {}
        self.asked = set(expand_ranks(checkpoint.manifest.index))
        super().__init__(checkpoint.storage, checkpoint.directory, checkpoint.manifest)

    def holders(self, name: str, box: Box) -> list[int]:
        entry = self.tensors[name]
        question = (box, self._meshes[name], f"{entry.shape} {entry.placements} {entry.owners}")
        if question not in self._known:
            self._known[question] = super().holders(name, box)
        self.asked.update(self._known[question])
        return self._known[question]


def _cost(stored: _NotingStored, wanted: Mapping[str, Box]) -> _Cost:
    """Ask what a load asks: whose fragments, which pieces, which reads."""
    stored.asked = set(expand_ranks(stored.manifest.index))
    pieces: list[Piece] = []
    for name, chunks in stored.chunks(wanted).items():
        pieces += pieces_of(name, stored.tensors[name].dtype, wanted[name], chunks)
    files = {(piece.rank, piece.file) for piece in pieces}
    reads = cover(pieces, {file: stored.file_bytes(*file) for file in files})
    largest_bytes = max((read.num_bytes for read in reads), default=0)
    return _Cost(
        needed_bytes=sum(_num_bytes(stored.tensors[name].dtype, box) for name, box in wanted.items()),
        read_bytes=sum(read.num_bytes for read in reads),
        num_reads=len(reads),
        buffer_bytes=min(_READERS, len(reads)) * largest_bytes,
        fragments=frozenset(stored.asked),
    )


def _rank_load(cost: _Cost, rank: int, checkpoint: Checkpoint, world_size: int) -> RankLoad:
    manifest = checkpoint.manifest
    # Its own values of the same world, the state of its generators for one, are in its own fragment.
    own = {rank} if world_size == manifest.world_size else frozenset()
    fragments = cost.fragments | own
    fragment_bytes = sum(manifest.fragments[one].size_bytes for one in fragments)
    return RankLoad(
        rank=rank,
        needed_bytes=cost.needed_bytes,
        read_bytes=cost.read_bytes,
        num_reads=cost.num_reads,
        num_fragments=len(fragments),
        fragment_bytes=fragment_bytes,
        memory_bytes=cost.needed_bytes + fragment_bytes + cost.buffer_bytes,
    )


def _one_dimension(
    layouts: Mapping[str, TensorLayout], world_size: int
) -> tuple[dict[str, int], dict[str, TensorLayout]]:
    """The mesh of a world that nobody described: all ranks along the first dimension that shards.

    Named as where the most dimensions are; a tensor whose mesh lacks that one (experts) is spread along its
    own.
    """
    sharded = [layout for layout in layouts.values() if layout.sharding_dim]
    widest = max(sharded, key=lambda layout: len(layout.dims), default=None)
    name = widest.sharding_dim if widest is not None and widest.sharding_dim else "ranks"
    return {name: world_size}, {key: layout.along(name) for key, layout in layouts.items()}


def _check_mesh(mesh: Mapping[str, int], world_size: int, layouts: Mapping[str, TensorLayout]) -> None:
    shown = " x ".join(f"{name}={size}" for name, size in mesh.items())
    if any(size < 1 for size in mesh.values()) or math.prod(mesh.values()) != world_size:
        raise ConfigError(f"a mesh of {shown} has not {world_size} ranks: the sizes must multiply to that")
    stored = sorted({dim for layout in layouts.values() for dim in layout.dims})
    unknown = [name for name, size in mesh.items() if name not in stored and size > 1]
    if unknown and stored:
        raise ConfigError(
            f"no tensor of the checkpoint has a mesh dimension {', '.join(unknown)}; "
            f"there are: {', '.join(stored)}"
        )


def _num_bytes(dtype: str, box: Box) -> int:
    return box.num_elements * dtype_info(dtype).item_bytes

"""The save plan: everything of a save that does not change while the layout does not.

Built once per layout and reused: ownership, file layout, the fragment's tables. A steady save copies payload
and fills in values; it plans nothing and asks no other rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.boxes import Mesh, compress_ranks
from dcp_ckpt.format.fragment import ChunkEntry, MeshEntry, TensorEntry, layout_digest
from dcp_ckpt.save.describe import describe
from dcp_ckpt.save.layout import FileLayout, PlacedChunk, plan_file
from dcp_ckpt.save.placement import Ownership, TensorSpec, assign_owners

__all__ = ["LayoutKey", "SavePlan", "layout_key", "make_plan"]

LayoutKey = tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """One layout's plan.

    Args:
        names: all tensors of the state, sorted by path; sources are passed to staging in this order.
        sources: for each owned chunk: index of its tensor, and the local part to copy (None: all of it).
        dtypes: for each owned chunk.
        layout: where each owned chunk lies in the file, when all of them are written.
        replicated: indices of the tensors that every rank holds whole.
        meshes, tensors, chunks, digest: the fragment's tables and their digest, likewise.
    """

    names: tuple[str, ...]
    sources: tuple[tuple[int, tuple[slice, ...] | None], ...]
    dtypes: tuple[torch.dtype, ...]
    layout: FileLayout
    replicated: tuple[int, ...]
    meshes: list[MeshEntry]
    tensors: list[TensorEntry]
    chunks: list[ChunkEntry]
    digest: str

    def part(self, number: int, locals_: Sequence[torch.Tensor]) -> torch.Tensor:
        """What of the local tensors a chunk holds."""
        index, part = self.sources[number]
        return locals_[index] if part is None else locals_[index][part]

    def dtype_name(self, number: int) -> str:
        """The dtype of a chunk, without `torch.`."""
        return str(self.dtypes[number]).removeprefix("torch.")


def layout_key(tensors: Mapping[tuple[str, ...], torch.Tensor]) -> LayoutKey:
    """Equal for two states exactly when one plan serves both; cheap, computed at every save."""
    return tuple(
        (
            path,
            tensor.dtype,
            tensor.shape,
            getattr(tensor, "placements", None),
            getattr(tensor, "device_mesh", None),
        )
        for path, tensor in tensors.items()
    )


def make_plan(
    tensors: Mapping[tuple[str, ...], torch.Tensor],
    *,
    rank: int,
    world_size: int,
    global_ranks: Sequence[int],
) -> SavePlan:
    """Plan the saves of one layout.

    Args:
        tensors: live tensors, sorted by path.
        rank: this rank within the group that saves.
        world_size: its size.
        global_ranks: the group's ranks as device meshes number them, in group order.

    Raises:
        StateError: a tensor cannot be stored, or two have the same name.
    """
    specs = [_in_group_ranks(spec, global_ranks) for spec in describe(tensors)]
    names = tuple(".".join(spec.path) for spec in specs)
    _refuse_collisions(specs, names)
    ownership = assign_owners(specs, rank=rank, world_size=world_size)
    layout = plan_file(specs, ownership.owned)
    meshes, entries = _tables(specs, ownership, rank)
    chunks = [
        ChunkEntry(
            tensor=names[chunk.owned.tensor],
            offsets=list(chunk.owned.box.offsets),
            sizes=list(chunk.owned.box.sizes),
            file=0,
            payload_offset=chunk.payload_offset,
            container_offset=chunk.container_offset,
            container_bytes=chunk.framing.container_bytes,
        )
        for chunk in layout.chunks
    ]
    return SavePlan(
        names=names,
        sources=tuple((chunk.owned.tensor, _local_slices(chunk)) for chunk in layout.chunks),
        dtypes=tuple(getattr(torch, specs[chunk.owned.tensor].dtype) for chunk in layout.chunks),
        layout=layout,
        replicated=tuple(i for i, spec in enumerate(specs) if spec.mesh is None),
        meshes=meshes,
        tensors=entries,
        chunks=chunks,
        digest=layout_digest(meshes, entries, chunks),
    )


def _local_slices(chunk: PlacedChunk) -> tuple[slice, ...] | None:
    """The part of the local tensor to copy; None when it is all of it."""
    if not chunk.owned.is_part:
        return None
    local = chunk.owned.local
    return tuple(
        slice(offset, offset + size) for offset, size in zip(local.offsets, local.sizes, strict=True)
    )


def _in_group_ranks(spec: TensorSpec, global_ranks: Sequence[int]) -> TensorSpec:
    """Number the mesh's ranks as the saving group does."""
    if spec.mesh is None:
        return spec
    position = {rank: index for index, rank in enumerate(global_ranks)}
    outside = [rank for rank in spec.mesh.ranks if rank not in position]
    if outside:
        raise StateError(
            f"{'.'.join(spec.path)} is sharded over rank(s) {outside} outside of the process group that saves"
        )
    return replace(spec, mesh=Mesh(spec.mesh.shape, tuple(position[rank] for rank in spec.mesh.ranks)))


def _refuse_collisions(specs: Sequence[TensorSpec], names: Sequence[str]) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for spec, name in zip(specs, names, strict=True):
        if name in seen:
            raise StateError(f"{seen[name]} and {spec.path} have the same name {name!r}; rename one of them")
        seen[name] = spec.path


def _tables(
    specs: Sequence[TensorSpec], ownership: Ownership, rank: int
) -> tuple[list[MeshEntry], list[TensorEntry]]:
    """The meshes and tensors that this rank indexes: those whose mesh has it as the lowest member."""
    meshes: list[MeshEntry] = []
    numbers: dict[tuple[Mesh, tuple[str, ...]], int] = {}
    entries = []
    for spec, owners in zip(specs, ownership.owners, strict=True):
        if rank != (0 if spec.mesh is None else min(spec.mesh.ranks)):
            continue
        number = None
        if spec.mesh is not None:
            number = numbers.setdefault((spec.mesh, spec.dim_names), len(meshes))
            if number == len(meshes):
                meshes.append(
                    MeshEntry(
                        shape=list(spec.mesh.shape),
                        ranks=compress_ranks(spec.mesh.ranks),
                        dim_names=list(spec.dim_names),
                    )
                )
        entries.append(
            TensorEntry(
                path=list(spec.path),
                dtype=spec.dtype,
                shape=list(spec.shape),
                mesh=number,
                placements=[str(placement) for placement in spec.placements],
                owners=compress_ranks(owners),
            )
        )
    return meshes, entries

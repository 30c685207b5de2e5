"""The save plan: everything of a save that does not change while the layout does not.

Built once per layout and reused: ownership, file layout, the fragment's tables. A steady save copies payload
and fills in values; it plans nothing and asks no other rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.boxes import Mesh, Placement, compress_ranks
from dcp_ckpt.format.dtypes import dtype_name
from dcp_ckpt.format.fragment import ChunkEntry, MeshEntry, TensorEntry, layout_digest
from dcp_ckpt.save.describe import describe
from dcp_ckpt.save.layout import FileLayout, PlacedChunk, plan_file
from dcp_ckpt.save.placement import Ownership, TensorSpec, assign_owners
from dcp_ckpt.state.component import Captured, Path
from dcp_ckpt.state.mesh_roles import Holders

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
        replicas: for the tensors of which this rank compares a sample with others: which ranks hold the same,
            in order; none for all ranks.
        meshes, tensors, chunks, digest: the fragment's tables and their digest, likewise.
    """

    names: tuple[str, ...]
    sources: tuple[tuple[int, tuple[slice, ...] | None], ...]
    dtypes: tuple[torch.dtype, ...]
    layout: FileLayout
    replicas: Mapping[int, tuple[int, ...]]
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
        return dtype_name(self.dtypes[number])


def layout_key(captured: Captured) -> LayoutKey:
    """Equal for two states exactly when one plan serves both; cheap, computed at every save."""
    return tuple(
        (
            path,
            tensor.dtype,
            tensor.shape,
            getattr(tensor, "placements", None),
            getattr(tensor, "device_mesh", None),
            captured.holders.get(path),
        )
        for path, tensor in captured.tensors.items()
    )


def make_plan(
    captured: Captured,
    *,
    rank: int,
    world_size: int,
    global_ranks: Sequence[int],
) -> SavePlan:
    """Plan the saves of one layout.

    Args:
        captured: live tensors, sorted by path, and their holders.
        rank: this rank within the group that saves.
        world_size: its size.
        global_ranks: the group's ranks as device meshes number them, in group order.

    Raises:
        StateError: a tensor cannot be stored, or two have the same name.
    """
    described = describe(captured.tensors)
    spread = _with_copies(described, captured.holders, own=global_ranks[rank], world_size=world_size)
    specs = _in_group_ranks(spread, global_ranks)
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
        replicas={
            index: () if specs[index].mesh is None else tuple(sorted(group))
            for index, group in enumerate(ownership.groups)
            # DTensor keeps its own replicas equal.
            if len(group) > 1 and (described[index].mesh is None or spread[index] is not described[index])
        },
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


def _with_copies(
    specs: Sequence[TensorSpec], holders: Mapping[Path, Holders], *, own: int, world_size: int
) -> list[TensorSpec]:
    """The tensors on the meshes of all ranks that hold them or copies of them; ranks are global ones."""
    known: dict[tuple[Holders, Mesh], Mesh | None] = {}
    found = []
    for spec in specs:
        held_by = holders.get(spec.path)
        if held_by is None:
            found.append(spec)
            continue
        held = Mesh((), (own,)) if spec.mesh is None else spec.mesh
        if (held_by, held) not in known:
            copies = held_by.copies(held.ranks)
            is_known = len(copies) == (world_size if spec.mesh is None else 1)
            ranks = tuple(chain.from_iterable(copies))
            known[held_by, held] = None if is_known else Mesh((len(copies), *held.shape), ranks)
        mesh = known[held_by, held]
        if mesh is None:
            found.append(spec)
            continue
        found.append(
            replace(
                spec,
                mesh=mesh,
                dim_names=("copies", *spec.dim_names) if len(spec.dim_names) == len(held.shape) else (),
                placements=(Placement(), *spec.placements),
            )
        )
    return found


def _in_group_ranks(specs: Sequence[TensorSpec], global_ranks: Sequence[int]) -> list[TensorSpec]:
    """Number the ranks of meshes as the saving group does; each mesh once, since many tensors share it."""
    position = {rank: index for index, rank in enumerate(global_ranks)}
    known: dict[Mesh, Mesh] = {}
    for spec in specs:
        if spec.mesh is None or spec.mesh in known:
            continue
        outside = [rank for rank in spec.mesh.ranks if rank not in position]
        if outside:
            raise StateError(
                f"{'.'.join(spec.path)} is sharded over rank(s) {outside} outside of the process group that "
                "saves"
            )
        known[spec.mesh] = Mesh(spec.mesh.shape, tuple(position[rank] for rank in spec.mesh.ranks))
    return [spec if spec.mesh is None else replace(spec, mesh=known[spec.mesh]) for spec in specs]


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
    lowest = {mesh: min(mesh.ranks) for mesh in {spec.mesh for spec in specs} if mesh is not None}
    runs: dict[int, list[list[int]]] = {}
    for spec, owners in zip(specs, ownership.owners, strict=True):
        if rank != (0 if spec.mesh is None else lowest[spec.mesh]):
            continue
        # By identity: all tensors of a mesh have one tuple, as long as there are ranks.
        if id(owners) not in runs:
            runs[id(owners)] = compress_ranks(owners)
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
                owners=runs[id(owners)],
            )
        )
    return meshes, entries

"""DTensor placements in the format's terms, and the local part of a tensor; for save and load alike."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.boxes import Box, Mesh, Placement, shard_box, strided_problem

__all__ = ["layout_of", "local_tensor", "mesh_of", "placements_of"]


def layout_of(mesh: DeviceMesh) -> Mesh:
    """The shape and the ranks of a device mesh."""
    return Mesh(tuple(mesh.shape), tuple(int(rank) for rank in mesh.mesh.flatten().tolist()))


def mesh_of(tensor: DTensor) -> tuple[Mesh, tuple[str, ...]]:
    """The mesh of a DTensor, with its ranks, and the names of its dimensions."""
    mesh = tensor.device_mesh
    return layout_of(mesh), tuple(mesh.mesh_dim_names or ())


def placements_of(tensor: DTensor, name: str) -> tuple[tuple[Placement, ...], Box]:
    """The placements of a DTensor in the format's terms, and the box of it that this rank holds.

    Raises:
        StateError: `Partial` or unknown placements, ones that can be read in two ways, or a local shape that
            does not follow from them.
    """
    placements = []
    for placement in tensor.placements:
        if isinstance(placement, _StridedShard):
            placements.append(Placement(placement.dim % tensor.ndim, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            placements.append(Placement(placement.dim % tensor.ndim))
        elif isinstance(placement, Replicate):
            placements.append(Placement())
        else:
            kind = "a partial sum" if isinstance(placement, Partial) else str(placement)
            raise StateError(f"{name} has the placement {kind}, which cannot be saved; redistribute it first")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise StateError(f"{name} lives on a mesh that this rank is not part of")
    # Not device_mesh.mesh: that builds a tensor at each call (benchmarks/NOTES.md).
    if problem := strided_problem(tensor.shape, tensor.device_mesh.shape, placements):
        raise StateError(f"{name} has strided shards whose order is not known: {problem}; redistribute it")
    expected = shard_box(tensor.shape, tensor.device_mesh.shape, placements, coordinate)
    if expected.sizes != tuple(local_tensor(tensor).shape):
        raise StateError(
            f"{name} has local shape {tuple(local_tensor(tensor).shape)} where its placements give "
            f"{expected.sizes}; uneven shards must be those of torch.chunk"
        )
    return tuple(placements), expected


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, or the tensor itself; no copy, no autograd."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor  # to_local() records autograd: 6 us a tensor
    return tensor.detach() if tensor.requires_grad else tensor

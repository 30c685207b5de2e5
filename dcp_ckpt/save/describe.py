"""From live tensors to what placement knows of them, and to the local bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.boxes import Mesh, Placement, shard_box
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.save.placement import TensorSpec

__all__ = ["describe", "local_tensor", "mesh_of", "placements_of"]


def describe(tensors: Mapping[tuple[str, ...], torch.Tensor]) -> list[TensorSpec]:
    """The specs of live tensors, in the order given.

    Raises:
        StateError: a tensor that cannot be stored, by name and reason.
    """
    return [_spec(path, tensor) for path, tensor in tensors.items()]


def _spec(path: tuple[str, ...], tensor: torch.Tensor) -> TensorSpec:
    name = ".".join(path)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise StateError(
            f"{name} is a {'meta' if tensor.is_meta else str(tensor.layout)} tensor; only dense tensors with data "
            "can be saved",
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        item_bytes = dtype_info(dtype).item_bytes
    except StateError as error:
        raise StateError(f"{name}: {error.message}") from error
    mesh, dim_names, placements = None, (), ()
    if isinstance(tensor, DTensor):
        mesh, dim_names = mesh_of(tensor)
        placements = placements_of(tensor, name)
    return TensorSpec(
        path=path,
        dtype=dtype,
        item_bytes=item_bytes,
        shape=tuple(tensor.shape),
        mesh=mesh,
        dim_names=dim_names,
        placements=placements,
    )


def mesh_of(tensor: DTensor) -> tuple[Mesh, tuple[str, ...]]:
    """The mesh of a DTensor, with its ranks, and the names of its dimensions."""
    mesh = tensor.device_mesh
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    return Mesh(tuple(mesh.mesh.shape), ranks), tuple(mesh.mesh_dim_names or ())


def placements_of(tensor: DTensor, name: str) -> tuple[Placement, ...]:
    """The placements of a DTensor in the format's terms.

    Raises:
        StateError: `Partial` or unknown placements, or a local shape that does not follow from them.
    """
    placements = []
    for placement in tensor.placements:
        if isinstance(placement, _StridedShard):
            placements.append(Placement(placement.dim % tensor.ndim, placement.split_factor))
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
    expected = shard_box(tensor.shape, tuple(tensor.device_mesh.mesh.shape), placements, coordinate)
    if expected.sizes != tuple(local_tensor(tensor).shape):
        raise StateError(
            f"{name} has local shape {tuple(local_tensor(tensor).shape)} where its placements give {expected.sizes}; "
            "uneven shards must be those of torch.chunk"
        )
    return tuple(placements)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, or the tensor itself; no copy, no autograd."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor  # to_local() records autograd and costs 10 us a tensor
    return tensor.detach() if tensor.requires_grad else tensor

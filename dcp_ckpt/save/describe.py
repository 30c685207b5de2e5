"""From live tensors to what placement needs to know of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.boxes import Mesh, Placement
from dcp_ckpt.format.dtypes import dtype_info, dtype_name
from dcp_ckpt.save.placement import TensorSpec
from dcp_ckpt.state.placements import mesh_of, placements_of

__all__ = ["describe"]


def describe(tensors: Mapping[tuple[str, ...], torch.Tensor]) -> list[TensorSpec]:
    """The specs of live tensors, in the order given.

    Raises:
        StateError: a tensor that cannot be stored, by name and reason.
    """
    meshes: dict[DeviceMesh, tuple[Mesh, tuple[str, ...]]] = {}
    return [_spec(path, tensor, meshes) for path, tensor in tensors.items()]


def _spec(
    path: tuple[str, ...], tensor: torch.Tensor, meshes: dict[DeviceMesh, tuple[Mesh, tuple[str, ...]]]
) -> TensorSpec:
    """One tensor's; `meshes` are those that were seen before: a mesh is as long as there are ranks."""
    name = ".".join(path)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise StateError(
            f"{name} is a {'meta' if tensor.is_meta else str(tensor.layout)} tensor; "
            "only dense tensors with data can be saved"
        )
    dtype = dtype_name(tensor.dtype)
    try:
        item_bytes = dtype_info(dtype).item_bytes
    except StateError as error:
        raise StateError(f"{name}: {error.message}") from error
    mesh: Mesh | None = None
    dim_names: tuple[str, ...] = ()
    placements: tuple[Placement, ...] = ()
    if isinstance(tensor, DTensor):
        if tensor.device_mesh not in meshes:
            meshes[tensor.device_mesh] = mesh_of(tensor)
        mesh, dim_names = meshes[tensor.device_mesh]
        placements, _ = placements_of(tensor, name)
    return TensorSpec(
        path=path,
        dtype=dtype,
        item_bytes=item_bytes,
        shape=tuple(tensor.shape),
        mesh=mesh,
        dim_names=dim_names,
        placements=placements,
    )

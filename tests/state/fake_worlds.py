"""Meshes of worlds that are not there, over the fake process group that torch has for such arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_ckpt import MeshRoles

Dims = tuple[tuple[str, int], ...]


@contextmanager
def fake_world(*, rank: int, world_size: int) -> Iterator[None]:
    """A process group in which nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def mesh_roles(dims: Dims, *, data: tuple[str, ...] = ("dp",), rank: int = 0) -> Iterator[MeshRoles]:
    """The roles of a mesh with these dimensions, outermost first, seen from one of its ranks."""
    shape, names = tuple(size for _, size in dims), tuple(name for name, _ in dims)
    with fake_world(rank=rank, world_size=prod(shape)):
        yield MeshRoles(mesh=init_device_mesh("cpu", shape, mesh_dim_names=names), data=data)

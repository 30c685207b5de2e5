"""A model with every kind of tensor, cut and sharded in every way, whose bytes follow from its names.

What a rank holds is made by torch alone: the whole model is filled with known bytes, then cut and sharded. So
the right local part of any parameter, buffer or moment in any layout is known without our own arithmetic.
Imported by the ranks of the pool as well as by the tests.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dcp_ckpt import MeshRoles

__all__ = ["PIECES", "Experts", "Layout", "Model", "known", "same_bits"]

WIDTH = 6


class Experts(nn.Module):
    """Five experts: no multiple of the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, WIDTH, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = Experts()


class Model(nn.Module):
    """Odd sizes, sizes below the number of ranks, a scalar, bfloat16, and buffers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleDict({str(index): Block() for index in range(3)})
        self.low = nn.Linear(WIDTH, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(WIDTH, 3)
        self.gain = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.zeros(5, 3, dtype=torch.complex64))
        self.register_buffer("none", torch.zeros(0, 3))


PIECES = (
    "embed", "blocks.0", "blocks.1", "gain", "calls", "blocks.2", "low", "table", "none", "scale", "head",
)  # fmt: skip
"""What a pipeline is cut from, in order."""


def known(name: str, kind: str, like: torch.Tensor) -> torch.Tensor:
    """The bytes of a whole tensor: the same on every rank, at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{kind}".encode()))
    data = torch.randint(0, 256, (like.numel() * like.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(like.dtype).reshape(like.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether local parts are of equal shape, dtype and bytes."""
    a, b = _local(a), _local(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


class Layout:
    """One way to spread the model over the ranks that are up, named like `pp2.fsdp2`, outermost first.

    `pp` (stages), `ddp`, `rep` (the replicas of HSDP), `fsdp`, `tp` (norms stay plain), `sp` (the same with
    norms as DTensors), and `efsdp` with `ep`: experts on a mesh of their own, all else FSDP over all ranks.
    `alone` is the model as it is, in one process.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dims = {match[1]: int(match[2]) for match in re.finditer(r"([a-z]+)([0-9])", name)}

    @property
    def world_size(self) -> int:
        return math.prod(self.dims.values())

    @cached_property
    def _mesh(self) -> DeviceMesh:
        mesh = init_device_mesh("cpu", tuple(self.dims.values()), mesh_dim_names=tuple(self.dims))
        if "ep" in self.dims:
            mesh["efsdp", "ep"]._flatten("dense")
        return mesh

    @property
    def roles(self) -> MeshRoles | None:
        """None where there is nothing to say: all ranks have the whole model, and each its own data."""
        if not self.dims.keys() & {"pp", "tp", "sp", "ep"}:
            return None
        data = tuple(dim for dim in self.dims if dim in ("ddp", "rep", "fsdp", "efsdp", "ep"))
        return MeshRoles(mesh=self._mesh, data=data, pipeline=("pp",) if "pp" in self.dims else ())

    def model(self, kind: str = "parameter") -> nn.Module:
        """This rank's part of the model whose whole tensors are `known(name, kind)`."""
        model: nn.Module = Model()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(known(name, kind, tensor))
        if "pp" in self.dims:
            _cut(model, self._mesh.get_local_rank("pp"), self.dims["pp"])
        if tensor_parallel := self.dims.keys() & {"tp", "sp"}:
            (dim,) = tensor_parallel
            _spread_matrices(model, self._mesh[dim])
            if dim == "sp":
                for norm in _modules(model, nn.LayerNorm):
                    _distribute(norm, self._mesh[dim], weight=Replicate(), bias=Replicate())
        if "ep" in self.dims:
            for experts in _modules(model, Experts):
                _distribute(experts, self._mesh["ep"], weight=Shard(0))
                fully_shard(experts, mesh=self._mesh["efsdp"])
            _fully_shard(model, self._mesh["dense"])
        if "fsdp" in self.dims:
            _fully_shard(model, self._mesh["rep", "fsdp"] if "rep" in self.dims else self._mesh["fsdp"])
        if "ddp" in self.dims and not tensor_parallel and kind == "parameter":
            # It takes no DTensors; and what is only compared needs no wrapper.
            model = DistributedDataParallel(model, process_group=self._mesh.get_group("ddp"))
        return model


def _modules(model: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, kind))


def _cut(model: nn.Module, stage: int, num_stages: int) -> None:
    """Leave the pieces of one stage, under the names that they have in the whole model."""
    for index, piece in enumerate(PIECES):
        if index * num_stages // len(PIECES) != stage:
            parent, _, name = piece.rpartition(".")
            delattr(model.get_submodule(parent), name)


def _spread_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Columns of what goes up, rows of what comes down."""
    for block in _modules(model, Block):
        _distribute(block.get_submodule("up"), mesh, weight=Shard(0), bias=Shard(0))
        _distribute(block.get_submodule("down"), mesh, weight=Shard(1), bias=Replicate())
    for module in _modules(model, nn.Embedding):
        _distribute(module, mesh, weight=Shard(0))


def _distribute(module: nn.Module, mesh: DeviceMesh, **placements: Placement) -> None:
    for name, placement in placements.items():
        whole = module.get_parameter(name).data
        spread = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(spread))


def _fully_shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every module with parameters of its own; a scalar stays as it is, since FSDP2 takes none."""
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for module in (*_modules(model, nn.Linear), *_modules(model, Block)):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)

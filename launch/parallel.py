"""The process group, the device, and how a model is spread over the ranks.

Works in three surroundings: plain `python` (one process, no process group), torchrun on CPU and on GPUs.
Called by `train.py`; knows nothing of data or checkpoints, but says what the dimensions of its mesh are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dcp_ckpt import MeshRoles
from dcp_ckpt.errors import ConfigError
from launch.model import GPT

__all__ = ["LAYOUTS", "Topology", "arrange", "global_sum", "join", "parallelise"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The dimensions of a device mesh, outermost first, and what they are for.

    In a layout of two dimensions, the one in `paired` has two ranks, the other all the rest.
    """

    dims: tuple[str, ...]
    data: tuple[str, ...]
    pipeline: tuple[str, ...] = ()
    paired: str | None = None


LAYOUTS: Mapping[str, Layout] = {
    "fsdp": Layout(dims=("shard",), data=("shard",)),
    "ddp": Layout(dims=("replicate",), data=("replicate",)),
    # Two replicas, each sharded over half of the ranks: on two hosts, only gradients cross the network.
    "hsdp": Layout(dims=("replicate", "shard"), data=("replicate", "shard"), paired="replicate"),
    # Tensor parallelism talks most, so its ranks are neighbours.
    "fsdp+tp": Layout(dims=("shard", "tensor"), data=("shard",), paired="tensor"),
    "pp": Layout(dims=("stage", "shard"), data=("shard",), pipeline=("stage",), paired="stage"),
}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this process stands. Without torchrun: rank 0 of 1, and no mesh.

    Args:
        layout: a key of `LAYOUTS`.
        roles: the mesh of all ranks, and what its dimensions are for.
    """

    rank: int
    world_size: int
    device: torch.device
    layout: str
    roles: MeshRoles | None = None

    @property
    def mesh(self) -> DeviceMesh | None:
        return None if self.roles is None else self.roles.mesh

    @property
    def data_size(self) -> int:
        """The number of parts that a global batch is cut into."""
        return 1 if self.roles is None else self.roles.data_size

    @property
    def data_rank(self) -> int:
        """Which of them is this rank's. Ranks of one tensor-parallel group or pipeline have the same."""
        return 0 if self.roles is None else self.roles.data_coordinate

    @property
    def stage(self) -> int:
        """The stage of the pipeline that this rank holds; 0 of 1 without a pipeline."""
        return self._coordinate("stage")

    @property
    def num_stages(self) -> int:
        return 1 if self.mesh is None or self.layout != "pp" else self.mesh["stage"].size()

    @property
    def stream(self) -> int:
        """Ranks with the same number draw the same dropout: those of one tensor-parallel group."""
        return self.stage * self.data_size + self.data_rank

    @property
    def has_loss(self) -> bool:
        """Whether this rank's loss counts: that of one rank for each part of a batch, at a pipeline's end."""
        return self.stage == self.num_stages - 1 and self._coordinate("tensor") == 0

    def _coordinate(self, dim: str) -> int:
        if self.mesh is None or dim not in LAYOUTS[self.layout].dims:
            return 0
        return self.mesh.get_local_rank(dim)


@contextmanager
def join(environment: Mapping[str, str], layout: str) -> Iterator[Topology]:
    """Join the process group that torchrun describes in `environment`; on leaving, destroy it.

    GPUs are used when there is one for each local rank.

    Raises:
        ConfigError: the layout does not fit the number of ranks.
    """
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    use_gpus = torch.cuda.device_count() >= int(environment.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if use_gpus else torch.device("cpu")
    if use_gpus:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in environment:
        _mesh_shape(layout, world_size=1)
        yield Topology(rank=0, world_size=1, device=device, layout=layout)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpus else "gloo")
    yield arrange(layout, device)
    # Not in a finally: after an error the other ranks may be inside of a collective and never come here;
    # torchrun ends them.
    dist.destroy_process_group()


def arrange(layout: str, device: torch.device) -> Topology:
    """The ranks of the process group in the mesh of a layout. All ranks call it; it blocks.

    Raises:
        ConfigError: the layout does not fit the number of ranks.
    """
    world_size = dist.get_world_size()
    shape = _mesh_shape(layout, world_size)
    dims = LAYOUTS[layout]
    roles = MeshRoles(
        mesh=init_device_mesh(device.type, shape, mesh_dim_names=dims.dims),
        data=dims.data,
        pipeline=dims.pipeline,
    )
    return Topology(rank=dist.get_rank(), world_size=world_size, device=device, layout=layout, roles=roles)


def _mesh_shape(layout: str, world_size: int) -> tuple[int, ...]:
    dims, paired = LAYOUTS[layout].dims, LAYOUTS[layout].paired
    if paired is None:
        return (world_size,)
    if world_size % 2:
        raise ConfigError(
            f"--parallel {layout} needs an even number of ranks, not {world_size}: "
            f"two of them along {paired!r} (torchrun --nproc_per_node)"
        )
    return tuple(2 if dim == paired else world_size // 2 for dim in dims)


def parallelise(model: GPT, topology: Topology, *, compiled: bool = False) -> nn.Module:
    """Spread `model`, which is equal on all ranks, over their devices in the way of the layout.

    With `compiled`, its blocks are compiled in place, so that no name changes. Gradients are averaged over
    the ranks that hold different samples, and over no others. Without a process group the model stays whole.
    """
    mesh, layout = topology.mesh, topology.layout
    if mesh is not None and layout == "pp":
        model.keep_stage(topology.stage, topology.num_stages)
    model.to(topology.device)
    if mesh is not None and layout == "fsdp+tp":
        for block in model.blocks.values():
            parallelize_module(block, mesh["tensor"], _TENSOR_PARALLEL)
    if compiled:
        for block in model.blocks.values():
            block.compile()
    if mesh is None:
        return model
    if layout == "ddp":
        # Default DDP rebuilds its buckets after the first backward and so sums in another order from
        # then on: a resumed run on three or more ranks would differ in the last bits. With this it does not.
        return DistributedDataParallel(model, find_unused_parameters=True)
    sharding = mesh if layout == "hsdp" else mesh["shard"]
    for block in model.blocks.values():
        fully_shard(block, mesh=sharding)
    fully_shard(model, mesh=sharding)
    return model


# Heads and hidden units are spread; norms, embeddings and the residual stream stay whole on every rank.
_TENSOR_PARALLEL = {
    "attention.qkv": ColwiseParallel(),
    "attention.out": RowwiseParallel(),
    "mlp_in": ColwiseParallel(),
    "mlp_out": RowwiseParallel(),
}


def global_sum(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sum `values` over the ranks whose loss counts, in place; blocks. All ranks call it."""
    if topology.mesh is not None:
        values *= topology.has_loss
        dist.all_reduce(values)
    return values

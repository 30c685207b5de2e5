"""The process group, the device, and how the model is spread over ranks.

Works in three surroundings: plain `python` (one process, no process group), torchrun on CPU and on GPUs.
Called by `train.py`; knows nothing of data or checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Topology", "global_sum", "join", "parallelise"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this process stands. Without torchrun: rank 0 of 1, and `distributed` is false."""

    rank: int
    world_size: int
    device: torch.device
    distributed: bool


@contextmanager
def join(environment: Mapping[str, str]) -> Iterator[Topology]:
    """Join the process group that torchrun describes in `environment`; on leaving, destroy it.

    GPUs are used when there is one for each local rank.
    """
    distributed = "WORLD_SIZE" in environment
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    use_gpus = torch.cuda.device_count() >= int(environment.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if use_gpus else torch.device("cpu")
    if use_gpus:
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpus else "gloo")
    yield Topology(
        rank=dist.get_rank() if distributed else 0,
        world_size=dist.get_world_size() if distributed else 1,
        device=device,
        distributed=distributed,
    )
    # Not in a finally: after an error the other ranks may be inside of a collective and never come here;
    # torchrun ends them.
    if distributed:
        dist.destroy_process_group()


def parallelise(model: nn.Module, blocks: nn.ModuleList, kind: str, topology: Topology) -> nn.Module:
    """Spread `model`, which is equal on all ranks, in the way `kind` says (`fsdp` or `ddp`).

    Gradients are averaged over ranks by both. Without a process group the model stays as it is.
    """
    if not topology.distributed:
        return model
    if kind == "ddp":
        # Default DDP rebuilds its buckets after the first backward and so sums in another order from
        # then on: a resumed run on three or more ranks would differ in the last bits. With this it does not.
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh(topology.device.type, (topology.world_size,), mesh_dim_names=("fsdp",))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def global_sum(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sum `values` over all ranks, in place; blocks. All ranks call it."""
    if topology.distributed:
        dist.all_reduce(values)
    return values

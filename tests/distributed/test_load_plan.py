"""A plan made without any process tells what a load on that many ranks reads, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_ckpt import Checkpointer, load_checkpoint, open_checkpoint, plan_load
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

ROWS = 1031


def state() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    large = torch.arange(ROWS * 2000, dtype=torch.float32).reshape(ROWS, 2000)
    return {
        "rows": distribute_tensor(large, mesh, [Shard(0)], src_data_rank=None),
        "columns": distribute_tensor(large[:, :700].contiguous(), mesh, [Shard(1)], src_data_rank=None),
        "whole": torch.arange(1_200_000),
        "lr": 0.5,
    }


def save(path: str) -> None:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state(), step=1).result(30)


def load(directory: str) -> int:
    return load_checkpoint(directory, state(), config=worlds.config()).bytes_read


@pytest.mark.parametrize("world_size", [4, 3, 2, 1])
def test_a_load_reads_no_more_than_planned(pool, tmp_path_factory, saved, world_size):
    with open_checkpoint(saved) as checkpoint:
        planned = plan_load(checkpoint, world_size)
    alone = [rank.read_bytes for rank in planned.ranks]
    read = pool.run(load, world_size, str(saved))
    if world_size == 1:
        assert read == alone
    else:  # ranks of one host read for each other what all of them hold
        assert sum(read) < sum(alone)
        assert all(mine <= planned for mine, planned in zip(read, alone, strict=True))


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("planned")
    pool.run(save, 4, str(path))
    return path / "step-00000001"

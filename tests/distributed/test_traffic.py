"""What a save writes and a load reads stays close to what is needed, measured by real ranks on real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_ckpt import Checkpointer
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

SHAPES = [(1000, 1024)] * 8 + [(1024,)] * 8
PAYLOAD_BYTES = sum(4 * torch.Size(shape).numel() for shape in SHAPES)


def state_of(value: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        f"t{number:02}": distribute_tensor(torch.full(shape, value), mesh, [Shard(0)], src_data_rank=None)
        for number, shape in enumerate(SHAPES)
    }


def save(path: str) -> None:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state_of(1.0), step=1).result(30)


def load(path: str) -> int:
    state = state_of(0.0)
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        report = checkpointer.load(state)
    assert report is not None
    assert all(tensor.to_local().eq(1.0).all() for tensor in state.values())
    return report.bytes_read


def test_same_world_reads_what_it_needs_and_a_smaller_one_each_block_once_per_rank(pool, tmp_path):
    pool.run(save, 4, str(tmp_path))
    stored = sum(file.stat().st_size for file in Path(tmp_path, "step-00000001").glob("*.distcp"))
    assert stored <= 1.05 * PAYLOAD_BYTES
    assert sum(pool.run(load, 4, str(tmp_path))) <= 1.05 * PAYLOAD_BYTES
    assert sum(pool.run(load, 1, str(tmp_path))) <= 1.05 * PAYLOAD_BYTES
    for bytes_read in pool.run(load, 3, str(tmp_path)):
        assert bytes_read <= stored


def messages_left(path: str) -> list[bool]:
    """Which messages of this rank's first and last save are in the store after the last."""
    rank = dist.get_rank()
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(state_of(1.0), step=step).result(30)
        told = ["report/1"] if rank else ["report/0", "record", "verdict"]
        keys = [f"save/{call}/{name}" for call in (1, 3) for name in told]
        return checkpointer._channel.present(keys)


def test_each_rank_frees_its_own_messages_of_earlier_saves(pool, tmp_path):
    first, second = pool.run(messages_left, 2, str(tmp_path))
    assert first == [False] * 3 + [True] * 3
    assert second == [False, True]

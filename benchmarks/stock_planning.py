"""What stock DCP does for a steady save beside its data, with its plan cache: simulated ranks in one process.

Uses the planner and the writer of DCP as `dcp.save` does, but for the collectives between them: what these
carry is pickled and unpickled, as they do. Knows nothing of this project. Used by `planning_scale` and
`catalog_scale`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.scale_report import timed_result

__all__ = ["StockSaves", "stock_saves"]

COLUMNS = 64
ITEM_BYTES = 1500


class StockSaves:
    """Saves of one world with one row of each tensor on each rank, seen from rank 0.

    The first save, which makes the plans, is over when it is made.

    Args:
        directory: where the metadata is written, without fsync.
    """

    def __init__(self, directory: Path, *, world_size: int, num_tensors: int) -> None:
        mesh = DeviceMesh("cpu", torch.arange(world_size))
        self._world_size = world_size
        self._state = {
            f"layers.{number // 10}.weight_{number:03}": DTensor.from_local(
                torch.zeros(1, COLUMNS),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size((world_size, COLUMNS)),
                stride=(COLUMNS, 1),
            )
            for number in range(num_tensors)
        }
        self._planner = DefaultSavePlanner(enable_plan_caching=True)
        self._writer = FileSystemWriter(directory, sync_files=False)
        first = self._local_plan()
        self._names = [item.index.fqn for item in first.items]
        plans, _ = self._planner.create_global_plan([_of_rank(first, rank) for rank in range(world_size)])
        self._planner.finish_plan(plans[0])
        self._results = [pickle.dumps(self._written_by(rank)) for rank in range(world_size)]
        self.metadata_bytes = 0

    def rank_seconds(self) -> float:
        """What each rank does: its plan, compared with the one before, and what it tells of its writes."""
        written = self._written_by(0)

        def act() -> SavePlan:
            plan = self._local_plan()
            pickle.dumps(plan)
            self._planner.finish_plan(SavePlan([], usable=False))
            pickle.dumps(written)
            return plan

        seconds, plan = timed_result(act)
        assert not plan.usable, "the cached plan was not found"
        return seconds

    def coordinator_seconds(self) -> float:
        """What rank 0 does beyond that: all ranks' plans and results, and `.metadata` made of them."""
        told = [pickle.dumps(SavePlan([], usable=False))] * self._world_size

        def act() -> bytes:
            _, metadata = self._planner.create_global_plan([pickle.loads(plan) for plan in told])
            self._writer.finish(metadata, [pickle.loads(result) for result in self._results])
            assert len(metadata.storage_data or ()) == self._world_size * len(self._names)
            return pickle.dumps(metadata)  # to be told to all ranks

        seconds, data = timed_result(act)
        self.metadata_bytes = len(data)
        self._data = data
        return seconds

    def read_seconds(self) -> float:
        """What every rank of a load does with `.metadata`."""
        seconds, metadata = timed_result(lambda: pickle.loads(self._data))
        assert len(metadata.state_dict_metadata) == len(self._names)
        return seconds

    def _local_plan(self) -> SavePlan:
        self._planner.set_up_planner(self._state, None, True)
        return self._planner.create_local_plan()

    def _written_by(self, rank: int) -> list[WriteResult]:
        return [
            WriteResult(
                index=MetadataIndex(name, torch.Size((rank, 0))),
                size_in_bytes=ITEM_BYTES,
                storage_data=_StorageInfo(f"__{rank}_0.distcp", ITEM_BYTES * number, ITEM_BYTES),
            )
            for number, name in enumerate(self._names)
        ]


@contextmanager
def stock_saves(directory: Path, *, world_size: int, num_tensors: int) -> Iterator[StockSaves]:
    """On a process group in which nothing is sent; the caches of DCP are empty before and after."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield StockSaves(directory, world_size=world_size, num_tensors=num_tensors)
    finally:
        dist.destroy_process_group()
        for cache in (
            SavePlanner._cached_save_plan,
            SavePlanner._cached_final_save_plan,
            SavePlanner._cached_all_plans,
            SavePlanner._cached_global_plan,
            SavePlanner._cached_metadata,
        ):
            cache.clear()


def _of_rank(plan: SavePlan, rank: int) -> SavePlan:
    """The plan of rank 0 as another rank makes it."""
    return replace(plan, items=[_item_of_rank(item, rank) for item in plan.items])


def _item_of_rank(item: WriteItem, rank: int) -> WriteItem:
    offsets = torch.Size((rank, 0))
    assert item.tensor_data is not None, "there are tensors only"
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((1, COLUMNS)))
    return replace(
        item,
        index=MetadataIndex(item.index.fqn, offsets),
        tensor_data=replace(item.tensor_data, chunk=chunk),
    )

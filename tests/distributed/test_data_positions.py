"""The position in the data on any number of ranks: every sample exactly once, or refused with advice."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from dcp_ckpt import Checkpointer, MeshRoles, TrainState
from dcp_ckpt.data import ElasticLoader, ElasticSampler
from dcp_ckpt.errors import CheckpointError
from tests.data.datasets import Numbers, as_list
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

SIZE, BATCH = 41, 8
WORKERS: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 4, "collate_fn": as_list}


def zeros() -> nn.Module:
    """A model that is the same on all ranks."""
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def elastic_part(path: str, num_steps: int, persistent: bool) -> tuple[list[int], int]:
    """Some steps from where the run stands, and a save; the samples of this rank, and the workers' lead."""
    sampler = ElasticSampler(SIZE, BATCH, dist.get_rank(), dist.get_world_size(), seed=5, drop_last=False)
    with ElasticLoader(Numbers(SIZE), sampler, persistent_workers=persistent, **WORKERS) as loader:
        state = TrainState(model=zeros(), dataloader=loader)
        with Checkpointer(path, config=worlds.config()) as checkpointer:
            report = checkpointer.load(state)
            done = report.step if report else 0
            before = torch.get_rng_state()
            seen: list[int] = []
            for step, batch in enumerate(loader, start=done + 1):
                seen += batch
                if step == done + num_steps:
                    break
            assert torch.equal(torch.get_rng_state(), before)
            checkpointer.save(state, step=step).result(30)
    return seen, step


@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "persistent workers"])
def test_an_epoch_over_4_2_and_3_ranks_has_every_sample_exactly_once(pool, tmp_path, persistent):
    seen: list[int] = []
    for world_size, num_steps, last in ((4, 2, 2), (2, 1, 3), (3, 99, 6)):
        parts = pool.run(elastic_part, world_size, str(tmp_path), num_steps, persistent)
        assert {step for _, step in parts} == {last}
        seen += chain(*(part for part, _ in parts))
    assert sorted(seen) == list(range(SIZE))


def stateful(
    path: str, num_batches: int, dims: tuple[tuple[str, int], ...]
) -> tuple[str, list[int], list[int]]:
    """torchdata's loader: load (without it if refused), some batches, a save, and the rest of them."""
    roles = None
    if dims:
        shape, names = tuple(size for _, size in dims), tuple(name for name, _ in dims)
        roles = MeshRoles(mesh=init_device_mesh("cpu", shape, mesh_dim_names=names), data=("dp",))
    share, size = (
        (dist.get_rank(), dist.get_world_size())
        if roles is None
        else (roles.data_coordinate, roles.data_size)
    )
    dataset = Numbers(SIZE)
    sampler: Any = StatefulDistributedSampler(dataset, num_replicas=size, rank=share, seed=3)
    loader = StatefulDataLoader(dataset, batch_size=2, sampler=sampler, num_workers=2)
    state = TrainState(model=zeros(), dataloader=loader, mesh_roles=roles)
    seen: list[int] = []
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        told = ""
        try:
            report = checkpointer.load(state)
        except CheckpointError as error:
            told = str(error)
            report = checkpointer.load(state, exclude=("dataloader",))
        batches = iter(loader)
        for _ in range(num_batches):
            seen += next(batches).tolist()
        checkpointer.save(state, step=(report.step if report else 0) + num_batches).result(30)
    return told, seen, [sample for batch in batches for sample in batch.tolist()]


def test_a_loader_with_positions_of_every_rank_goes_on_where_the_data_size_is_the_same(pool, tmp_path):
    path = str(tmp_path)
    grid = (("dp", 2), ("tp", 2))
    first = pool.run(stateful, 2, path, 3, ())
    then = pool.run(stateful, 2, path, 2, ())
    peers = pool.run(stateful, 4, path, 1, grid)
    for rank in range(2):
        _, seen, rest = first[rank]
        assert len(seen) == 6
        assert then[rank][1] + then[rank][2] == rest
        for peer in (2 * rank, 2 * rank + 1):
            assert peers[peer][1] + peers[peer][2] == then[rank][2]
    anew = pool.run(stateful, 3, path, 1, ())
    for told, *_ in anew:
        assert "2 data-parallel rank(s), and there are 3 here; load on 2" in told
        assert 'exclude=("dataloader",)' in told
        assert "dcp_ckpt.data.ElasticLoader" in told
    whole = {sample for _, seen, rest in anew for sample in (*seen, *rest)}
    assert whole == set(range(SIZE)), "without its position it starts at the beginning, as was advised"

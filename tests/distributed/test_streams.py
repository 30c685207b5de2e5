"""What every rank has for itself follows its data-parallel coordinate: random streams and per-rank values."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dcp_ckpt import Checkpointer, MeshRoles, TrainState
from dcp_ckpt.errors import CorruptCheckpoint
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

Dims = tuple[tuple[str, int], ...]
GRID: Dims = (("dp", 2), ("tp", 2))
"""Two data-parallel coordinates of two ranks each that share their data."""


def roles_of(dims: Dims) -> MeshRoles | None:
    if not dims:
        return None
    shape, names = tuple(size for _, size in dims), tuple(name for name, _ in dims)
    return MeshRoles(mesh=init_device_mesh("cpu", shape, mesh_dim_names=names), data=("dp",))


def zeros() -> nn.Module:
    """A model that is the same on all ranks."""
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(numpy.random.randn()), torch.randn(()).item()


def state_of(dims: Dims, mine: Any) -> TrainState:
    own = {"mine": mine, "noise": torch.full((3,), -1.0 if mine is None else mine, dtype=torch.bfloat16)}
    return TrainState(model=zeros(), per_rank=own, mesh_roles=roles_of(dims))


def save_streams(path: str, dims: Dims) -> tuple[float, float, float]:
    """Python is seeded by rank, NumPy the same everywhere, torch by data coordinate; what comes next."""
    rank = dist.get_rank()
    state = state_of(dims, rank)
    random.seed(rank), numpy.random.seed(7)
    torch.manual_seed(100 + (rank if state.mesh_roles is None else state.mesh_roles.data_coordinate))
    draw()
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state, step=1).result(30)
    return draw()


def load_streams(path: str, dims: Dims) -> tuple[tuple[float, float, float], Any, list[float], str]:
    """What comes next on a rank, its values, and what was told."""
    state = state_of(dims, None)
    assert isinstance(state.per_rank, dict)
    random.seed(9), numpy.random.seed(9), torch.manual_seed(9)
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        report = checkpointer.load(state)
        assert report is not None
    return draw(), state.per_rank["mine"], state.per_rank["noise"].tolist(), "\n".join(report.deviations)


def test_streams_and_values_on_every_kind_of_world(pool, tmp_path):
    by_rank = str(tmp_path / "by rank")
    saved = pool.run(save_streams, 2, by_rank, ())
    assert pool.run(load_streams, 2, by_rank, ()) == [
        (saved[rank], rank, [float(rank)] * 3, "") for rank in range(2)
    ]

    first = pool.run(load_streams, 3, by_rank, ())
    assert pool.run(load_streams, 3, by_rank, ()) == first, "the same at every attempt"
    streams = [drawn for drawn, *_ in first]
    assert {drawn[1] for drawn in streams} == {saved[0][1]}, "all shared NumPy's, and all continue it"
    for kind in (0, 2):
        assert len({*(drawn[kind] for drawn in streams), *(drawn[kind] for drawn in saved)}) == 5
    for *_, mine, noise, told in first:
        assert (mine, noise) == (None, [-1.0] * 3)
        assert "rng: reinitialised (python, torch derived from step and data coordinate)" in told
        assert "random numbers: numpy continued, the same on all data coordinates" in told
        assert "per_rank.*: 2 skipped" in told
        assert "per_rank: saved on 2 rank(s), loaded on 3; left untouched" in told

    wider = pool.run(load_streams, 4, by_rank, GRID)
    assert [drawn for drawn, *_ in wider] == [saved[0], saved[0], saved[1], saved[1]]
    assert all("kept, by data coordinate" in told and "left untouched" in told for *_, told in wider)

    four = str(tmp_path / "four")
    saved = pool.run(save_streams, 4, four, ())
    drawn = [found for found, *_ in pool.run(load_streams, 4, four, GRID)]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert {found[1] for found in drawn} == {saved[0][1]}

    grid = str(tmp_path / "grid")
    saved = pool.run(save_streams, 4, grid, GRID)
    assert [found[2] == saved[0][2] for found in saved] == [True, True, False, False]
    found = pool.run(load_streams, 4, grid, GRID)
    assert found == [(saved[rank], rank, [float(rank)] * 3, "") for rank in range(4)]
    found = pool.run(load_streams, 2, grid, ())
    assert [(drawn, mine) for drawn, mine, *_ in found] == [(saved[0], 0), (saved[2], 2)]
    found = pool.run(load_streams, 5, grid, ())
    assert len({drawn[2] for drawn, *_ in found}) == 5


def test_a_fragment_that_is_needed_to_decide_and_damaged_is_damage(pool, tmp_path):
    pool.run(save_streams, 2, str(tmp_path), ())
    (fragment,) = Path(tmp_path, "step-00000001").glob("rank-00001.*")
    fragment.write_bytes(fragment.read_bytes()[:-9] + b"\0" * 9)
    with Checkpointer(tmp_path, config=worlds.config()) as checkpointer, pytest.raises(CorruptCheckpoint):
        checkpointer.load(state_of((), None))

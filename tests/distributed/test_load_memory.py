"""A load takes little memory beside what it fills, however it spreads, casts or lays out the tensors anew."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dcp_ckpt import Checkpointer, load_checkpoint
from dcp_ckpt.testing.ranks import RankPool
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

BOUND_BYTES = 64 << 20

SHAPES = {"tall": (6144, 8192), "wide": (4, 6 << 20)}
"""192 MiB of float32, so a rank's chunk is larger than the bound; and 96, in rows of 24."""


@pytest.fixture(scope="module")
def fresh() -> Iterator[RankPool]:
    """Processes that have loaded nothing yet, and give back at once what they free."""
    with RankPool(2, environment={"MALLOC_MMAP_THRESHOLD_": "65536"}) as ranks:
        yield ranks


def fill(local: torch.Tensor, first_row: int, first_column: int) -> None:
    """Give every element a value that tells its place, exact in every dtype used here."""
    for index, row in enumerate(local):
        columns = torch.arange(first_column, first_column + row.numel())
        row.copy_((columns + 31 * (first_row + index)) % 251)


def spread(
    name: str, dim: int, dtype: torch.dtype, *, is_transposed: bool = False
) -> tuple[DTensor, int, int]:
    """This rank's half of a tensor along one dimension, and the place of its first element."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    sizes, first = list(SHAPES[name]), [0, 0]
    sizes[dim] //= 2
    first[dim] = mesh.get_rank() * sizes[dim]
    local = (
        torch.full(sizes[::-1], -1.0, dtype=dtype).t()
        if is_transposed
        else torch.full(sizes, -1.0, dtype=dtype)
    )
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False), first[0], first[1]


def save(path: str) -> None:
    state = {}
    for name in SHAPES:
        tensor, *first = spread(name, 0, torch.float32)
        fill(tensor.to_local(), *first)
        state[name] = tensor
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state, step=1).result(120)


@pytest.fixture(scope="module")
def stored(fresh: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    fresh.run(save, 2, str(path), timeout_seconds=180)
    return path / "step-00000001"


def memory_bytes(field: str) -> int:
    """VmRSS or VmHWM, its peak, of this process."""
    found = re.search(rf"{field}:\s+([0-9]+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def load(directory: str, name: str, dim: int, dtype: torch.dtype, is_transposed: bool) -> tuple[int, bool]:
    """The most memory that a load takes beside its target, and whether every element is right."""
    # As on a host with many cores: four threads read, check and copy.
    os.sched_getaffinity = lambda _: set(range(8))
    target, first_row, first_column = spread(name, dim, dtype, is_transposed=is_transposed)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what there is now
    before = memory_bytes("VmRSS")
    others = tuple(other for other in SHAPES if other != name)
    report = load_checkpoint(directory, {name: target}, cast=(name,), exclude=others, config=worlds.config())
    taken = memory_bytes("VmHWM") - before
    assert bool(report.cast) == (dtype != torch.float32)
    local = target.to_local()
    wanted = torch.empty_like(local[:2])
    for index in (0, local.shape[0] // 2, local.shape[0] - 2):
        fill(wanted, first_row + index, first_column)
        if not torch.equal(local[index : index + 2], wanted):
            return taken, False
    return taken, bool((local >= 0).all())


@pytest.mark.parametrize(
    ("name", "dim", "dtype", "is_transposed"),
    [
        ("tall", 0, torch.float32, False),
        ("tall", 1, torch.float32, False),
        ("wide", 1, torch.float32, False),
        ("tall", 0, torch.float32, True),
        ("tall", 0, torch.bfloat16, False),
        ("tall", 1, torch.float64, True),
    ],
    ids=["same", "columns", "parts of long rows", "transposed", "cast", "columns transposed and cast"],
)
def test_a_load_takes_less_than_the_bound(
    fresh: RankPool, stored: Path, name: str, dim: int, dtype: torch.dtype, is_transposed: bool
) -> None:
    results = fresh.run(load, 2, str(stored), name, dim, dtype, is_transposed)
    assert all(is_right for _, is_right in results)
    assert max(taken for taken, _ in results) < BOUND_BYTES


def load_whole(directory: str) -> tuple[int, bool]:
    """As `load`, of a plain tensor, which every rank has: read together, through memory that they share."""
    os.sched_getaffinity = lambda _: set(range(8))
    target = torch.full(SHAPES["tall"], -1.0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    report = load_checkpoint(directory, {"tall": target}, exclude=("wide",), config=worlds.config())
    taken = memory_bytes("VmHWM") - before
    expected = torch.empty_like(target)
    fill(expected, 0, 0)
    assert report.bytes_read < 0.6 * target.nbytes
    return taken, torch.equal(target, expected)


def test_replicas_that_read_together_take_less_than_the_bound(fresh: RankPool, stored: Path) -> None:
    results = fresh.run(load_whole, 2, str(stored))
    assert all(is_right for _, is_right in results)
    assert max(taken for taken, _ in results) < 2 * BOUND_BYTES

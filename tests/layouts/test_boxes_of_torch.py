"""The box that we think a rank holds is the one that it holds, in hundreds of random layouts.

Without processes: torch's own arithmetic where it can be asked, else tensors that torch shards over its fake
process group, one rank after the other, whose elements say where they belong.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.boxes import Box, Placement, shard_box, tiling_problem
from dcp_ckpt.state.placements import local_tensor, placements_of

SIZES = (0, 1, 2, 3, 5, 7, 8, 12, 17)


def random_case(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...], list[TorchPlacement]]:
    """Shape, mesh and placements; strided only where all parts are equal, so there is one reading."""
    shape = tuple(rng.choice(SIZES) for _ in range(rng.randint(1, 3)))
    mesh = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
    dims = [rng.choice([None, *range(len(shape))]) for _ in mesh]
    placements: list[TorchPlacement] = []
    for index, dim in enumerate(dims):
        if dim is None:
            placements.append(Replicate())
            continue
        later = math.prod(mesh[i] for i in range(index + 1, len(mesh)) if dims[i] == dim)
        parts = math.prod(mesh[i] for i in range(len(mesh)) if dims[i] == dim)
        is_strided = later > 1 and shape[dim] % parts == 0 and rng.random() < 0.5
        placements.append(_StridedShard(dim, split_factor=later) if is_strided else Shard(dim))
    return shape, mesh, placements


def ours(placements: Sequence[TorchPlacement]) -> list[Placement]:
    return [
        Placement()
        if isinstance(one, Replicate)
        else Placement(one.dim, int(getattr(one, "split_factor", 1)))  # type: ignore[attr-defined]
        for one in placements
    ]


def test_boxes_are_those_of_torch_and_tile():
    rng = random.Random(0)
    for _ in range(600):
        shape, mesh, placements = random_case(rng)
        held = {}
        for coordinate in itertools.product(*map(range, mesh)):
            box = held[coordinate] = shard_box(shape, mesh, ours(placements), coordinate)
            sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
            assert box.sizes == tuple(sizes), (shape, mesh, placements, coordinate)
            if box.num_elements:
                assert box.offsets == tuple(offsets), (shape, mesh, placements, coordinate)
        replicas: dict[tuple[int, ...], set[Box]] = {}
        for coordinate, box in held.items():
            key = tuple(c for c, one in zip(coordinate, placements, strict=True) if not one.is_replicate())
            replicas.setdefault(key, set()).add(box)
        assert all(len(boxes) == 1 for boxes in replicas.values())
        assert tiling_problem(shape, itertools.chain.from_iterable(replicas.values())) is None


@contextmanager
def rank_of(mesh: dict[str, int], rank: int) -> Iterator[DeviceMesh]:
    """One rank's view of a mesh, with nobody else there."""
    # It remembers meshes together with the coordinate of the rank that asked first.
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh.values()))
    try:
        yield init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    finally:
        dist.destroy_process_group()


def numbered(rows: int, columns: int) -> torch.Tensor:
    """Every element says where it belongs."""
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


def by_fully_shard(whole: torch.Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """As training makes it: sharded by tensor parallelism, then by FSDP."""
    module = nn.Linear(1, 1, bias=False)
    tensor_parallel = mesh["tp"]
    spread = distribute_tensor(whole, tensor_parallel, [Shard(dim)], src_data_rank=None)
    module.weight = nn.Parameter(spread)
    fully_shard(module, mesh=mesh["rep", "fsdp"] if "rep" in (mesh.mesh_dim_names or ()) else mesh["fsdp"])
    assert isinstance(module.weight, DTensor)
    return module.weight


def by_distribute_tensor(whole: torch.Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """As DTensor reads the same placements."""
    shards: list[TorchPlacement] = [_StridedShard(dim, split_factor=mesh["tp"].size()), Shard(dim)]
    replicas: list[TorchPlacement] = [Replicate()] * (mesh.ndim - 2)
    return distribute_tensor(whole, mesh, replicas + shards, src_data_rank=None)


Maker = Callable[[torch.Tensor, DeviceMesh, int], DTensor]


def refused_or_right(make: Maker, mesh: dict[str, int], rows: int, columns: int, dim: int) -> bool:
    """Whether all ranks would save the tensor; each that would has to hold what it says that it holds."""
    accepted: list[bool | None] = []
    for rank in range(math.prod(mesh.values())):
        with rank_of(mesh, rank) as device_mesh:
            whole = numbered(rows, columns)
            tensor = make(whole, device_mesh, dim)
            try:
                _, box = placements_of(tensor, "weight")
            except StateError:
                accepted.append(None)
                continue
            part = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
            accepted.append(torch.equal(local_tensor(tensor), part))
    if None in accepted:
        return False
    assert all(accepted), (mesh, rows, columns, dim)
    return True


def meshes(rng: random.Random) -> dict[str, int]:
    mesh = {"fsdp": rng.randint(1, 4), "tp": rng.randint(2, 4)}
    return mesh if rng.random() < 0.7 else {"rep": 2, "fsdp": rng.randint(1, 2), "tp": 2}


def test_what_fully_shard_makes_of_tensor_parallel_weights_is_saved_as_it_is():
    """Also where nothing divides: there DTensor itself would read the same placements in another way."""
    rng = random.Random(1)
    for _ in range(40):
        rows, columns = rng.choice(SIZES[1:]), rng.choice((1, 3, 6))
        assert refused_or_right(by_fully_shard, meshes(rng), rows, columns, dim=0)


def test_strided_shards_are_saved_where_they_belong_or_not_at_all():
    rng = random.Random(2)
    results = [
        refused_or_right(by_distribute_tensor, meshes(rng), rng.choice(SIZES[1:]), 2, dim=0)
        for _ in range(60)
    ]
    assert 10 < sum(results) < 60, "some are refused, and most are not"


@pytest.mark.parametrize(
    ("rows", "factor"), [(8, 2), (6, 3), (9, 2)], ids=["no later split", "factor of another", "uneven"]
)
def test_strides_over_parts_that_no_later_dimension_makes_are_refused(rows, factor):
    """One mesh dimension: a rank holds rows that are not next to each other, in as many as one chunk has."""
    with rank_of({"dp": 2}, 0) as mesh:
        tensor = distribute_tensor(
            numbered(rows, 2), mesh, [_StridedShard(0, split_factor=factor)], src_data_rank=None
        )
        with pytest.raises(StateError, match="order is not known"):
            placements_of(tensor, "weight")


def test_three_uneven_splits_of_one_dimension_are_refused():
    """fully_shard and distribute_tensor give each rank as many rows, and not the same ones."""
    with rank_of({"fsdp": 2, "ep": 2, "tp": 3}, 0) as mesh:
        placements = [_StridedShard(0, split_factor=6), Shard(0), Shard(0)]
        uneven = distribute_tensor(numbered(9, 1), mesh, placements, src_data_rank=None)
        with pytest.raises(StateError, match="into unequal parts"):
            placements_of(uneven, "weight")
        even = distribute_tensor(numbered(12, 1), mesh, placements, src_data_rank=None)
        assert placements_of(even, "weight")[1] == Box((0, 0), (1, 1))

"""Who writes what: all ranks agree without a word, everything is written once, and the work is shared."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from dcp_ckpt.format.boxes import Box, Mesh, Placement, shard_box, tiling_problem
from dcp_ckpt.save.placement import SPLIT_BYTES, Ownership, TensorSpec, assign_owners


def spec(name: str, shape: tuple[int, ...], mesh: Mesh | None = None, *placements: Placement) -> TensorSpec:
    return TensorSpec(
        path=(name,),
        dtype="float32",
        item_bytes=4,
        shape=shape,
        mesh=mesh,
        dim_names=tuple(f"d{i}" for i in range(len(placements))),
        placements=placements,
    )


def on_all(specs: list[TensorSpec], world_size: int) -> list[Ownership]:
    return [assign_owners(specs, rank=rank, world_size=world_size) for rank in range(world_size)]


def written(ownerships: list[Ownership]) -> list[int]:
    """Elements by rank."""
    return [sum(owned.box.num_elements for owned in ownership.owned) for ownership in ownerships]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[TensorSpec], tuple[int, ...]]:
    """Tensors of one world: plain ones and ones on its mesh."""
    mesh_shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple))
    mesh = Mesh(mesh_shape, tuple(range(math.prod(mesh_shape))))
    specs = []
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 9), max_size=3).map(tuple))
        if not shape or draw(st.booleans()):
            specs.append(spec(f"t{number}", shape))
            continue
        dims = st.none() | st.integers(0, len(shape) - 1)
        specs.append(spec(f"t{number}", shape, mesh, *(Placement(draw(dims)) for _ in mesh_shape)))
    return specs, mesh_shape


@given(worlds())
def test_everything_is_written_once_by_ranks_that_everybody_knows(world):
    specs, mesh_shape = world
    world_size = math.prod(mesh_shape)
    ownerships = on_all(specs, world_size)
    for index, one in enumerate(specs):
        boxes = [owned.box for ownership in ownerships for owned in ownership.owned if owned.tensor == index]
        assert tiling_problem(one.shape, boxes) is None
        for rank, ownership in enumerate(ownerships):
            if any(owned.tensor == index for owned in ownership.owned):
                assert all(rank in other.owners[index] for other in ownerships)


@given(worlds())
def test_a_rank_writes_only_what_it_holds(world):
    specs, mesh_shape = world
    for rank, ownership in enumerate(on_all(specs, math.prod(mesh_shape))):
        for owned in ownership.owned:
            one = specs[owned.tensor]
            held = Box.whole(one.shape)
            if one.mesh is not None:
                at = one.mesh.coordinate(rank)
                assert at is not None
                held = shard_box(one.shape, one.mesh.shape, one.placements, at)
            assert owned.is_part == (owned.box != held)
            assert owned.local.sizes == owned.box.sizes
            back = tuple(a + b for a, b in zip(owned.local.offsets, held.offsets, strict=True))
            assert back == owned.box.offsets
            assert all(
                offset >= 0 and offset + size <= limit
                for offset, size, limit in zip(
                    owned.local.offsets, owned.local.sizes, held.sizes, strict=True
                )
            )


def test_replicated_tensors_are_shared_evenly():
    specs = [spec(f"t{number:02}", (1000,)) for number in range(32)]
    assert written(on_all(specs, 8)) == [4000] * 8


def test_one_large_replicated_tensor_is_split():
    rows = 8 * SPLIT_BYTES // 4 // 1024
    ownerships = on_all([spec("embedding", (rows, 1024))], 4)
    assert written(ownerships) == [rows * 1024 // 4] * 4
    assert ownerships[0].owners == ((0, 1, 2, 3),)
    (owned,) = ownerships[1].owned
    assert owned.is_part


def test_a_small_replicated_tensor_is_not_split():
    ownerships = on_all([spec("bias", (1024,))], 4)
    assert written(ownerships) == [1024, 0, 0, 0]
    assert ownerships[3].owners == ((0,),)


def test_replicas_of_shards_share_within_their_group():
    """HSDP: two groups of replicas, each writes its own half once."""
    mesh = Mesh((2, 2), (0, 1, 2, 3))
    specs = [spec(f"t{number}", (8, 100), mesh, Placement(), Placement(0)) for number in range(4)]
    assert written(on_all(specs, 4)) == [800] * 4


def test_a_sharded_tensor_is_written_where_it_is():
    mesh = Mesh((4,), (0, 1, 2, 3))
    ownerships = on_all([spec("weight", (6, 2), mesh, Placement(0))], 4)
    assert written(ownerships) == [4, 4, 4, 0]
    assert ownerships[3].owned == ()
    assert {ownership.owners for ownership in ownerships} == {((0, 1, 2, 3),)}

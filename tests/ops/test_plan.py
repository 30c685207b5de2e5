"""Plan: the numbers are those of a real load, and no data is read for them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dcp_ckpt import open_checkpoint, plan_load
from dcp_ckpt.errors import ConfigError, CorruptCheckpoint
from dcp_ckpt.format.boxes import Box, Placement, tiling_problem
from dcp_ckpt.format.digests import BLOCK_BYTES
from dcp_ckpt.format.fragment import MeshEntry, TensorEntry
from dcp_ckpt.ops.layout import TensorLayout, coordinates
from dcp_ckpt.ops.plan import LoadPlan
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

SHAPE = (1200, 1000)
WEIGHT_BYTES = 4 * math.prod(SHAPE)
OTHER_BYTES = 3 * 2 + 8
"""`model.bias` and `model.count`, which every rank holds whole."""


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved on 4 ranks: 1.2 MB of each in one tensor."""
    run = tmp_path_factory.mktemp("run")
    write_tiny_checkpoint(LocalStorage(run), step=10, ranks=4, shape=SHAPE)
    return run / "step-00000010"


def plan(step: Path, world_size: int, mesh: dict[str, int] | None = None) -> LoadPlan:
    with open_checkpoint(step) as checkpoint:
        return plan_load(checkpoint, world_size, mesh=mesh)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_what_is_needed_is_every_tensor_once_and_replicas_on_all(step: Path, world_size: int) -> None:
    found = plan(step, world_size)
    assert found.mesh == {"dp": world_size}
    assert [rank.rank for rank in found.ranks] == list(range(world_size))
    assert found.needed_bytes == WEIGHT_BYTES + world_size * OTHER_BYTES
    assert found.tensor_bytes == WEIGHT_BYTES + OTHER_BYTES
    assert found.stored_world_size == 4
    assert found.read_bytes >= found.needed_bytes
    assert found.read_amplification == found.read_bytes / found.needed_bytes
    for rank in found.ranks:
        assert rank.memory_bytes > rank.needed_bytes
        assert rank.read_bytes % 4096 == 0
    assert found.num_requests == 1 + sum(rank.num_reads + rank.num_fragments for rank in found.ranks)


def test_the_same_world_reads_its_own_files(step: Path) -> None:
    sizes = [(step / f"__{rank}_0.e0001-s000001.distcp").stat().st_size for rank in range(4)]
    found = plan(step, 4)
    # The bias is in the first file and the count in the last: their blocks are needed by all.
    count_block = min(sizes[3], BLOCK_BYTES) if sizes[3] <= BLOCK_BYTES else sizes[3] - BLOCK_BYTES
    assert found.ranks[1].read_bytes == sizes[1] + (sizes[0] - BLOCK_BYTES) + count_block
    assert found.ranks[1].num_fragments == 3, "the index with the bias, its own, and that of the count"
    assert found.ranks[3].num_fragments == 2
    assert found.num_partial == 0


def test_no_byte_of_the_data_is_read(step: Path, tmp_path: Path) -> None:
    expected = plan(step, 3)
    for data in step.glob("*.distcp"):
        data.rename(tmp_path / data.name)
    try:
        assert plan(step, 3) == expected
    finally:
        for data in tmp_path.glob("*.distcp"):
            data.rename(step / data.name)


@pytest.mark.parametrize(
    ("world_size", "mesh", "message"),
    [
        (0, None, "world_size must be at least 1"),
        (8, {"dp": 4}, "dp=4 has not 8 ranks"),
        (8, {"dp": 0}, "dp=0 has not 8 ranks"),
        (8, {"dp": 4, "tp": 2}, "no tensor .* dimension tp; there are: dp"),
    ],
)
def test_what_cannot_be_is_refused(
    step: Path, world_size: int, mesh: dict[str, int] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(step, world_size, mesh)


def test_a_damaged_table_is_not_planned_with(step: Path) -> None:
    fragment = step / "rank-00002.e0001-s000001.json"
    good = fragment.read_bytes()
    fragment.write_bytes(good.replace(b"model", b"modem"))
    try:
        with pytest.raises(CorruptCheckpoint):
            plan(step, 3)
    finally:
        fragment.write_bytes(good)


def layout(shape: list[int], placements: list[str], mesh: MeshEntry) -> TensorLayout:
    entry = TensorEntry(
        path=["weight"], dtype="float32", shape=shape, mesh=0, placements=placements, owners=[[0, 1]]
    )
    return TensorLayout.of(entry, mesh)


GRID = MeshEntry(shape=[2, 2], ranks=[[0, 4]], dim_names=["dp", "tp"])


@pytest.mark.parametrize(
    "placements", [["S0", "S1"], ["S0", "S0"], ["S0/2", "S0"], ["S1", "R"], ["R", "R"]], ids=str
)
@pytest.mark.parametrize(
    "mesh", [{"dp": 3, "tp": 2}, {"tp": 4, "dp": 2}, {"dp": 5}, {"tp": 3}, {"pp": 2, "dp": 2}], ids=str
)
def test_the_boxes_of_any_mesh_tile_the_tensor(placements: list[str], mesh: dict[str, int]) -> None:
    one = layout([11, 7], placements, GRID)
    boxes = {one.box(mesh, coordinate) for coordinate in coordinates(mesh)}
    assert tiling_problem((11, 7), boxes) is None


def test_a_strided_dimension_strides_over_the_new_sizes() -> None:
    """FSDP over TP: rows are split by tp first, then each part by dp."""
    one = layout([8, 1], ["S0/2", "S0"], GRID)
    found = [
        one.box({"dp": 2, "tp": 4}, coordinate).offsets[0] for coordinate in coordinates({"dp": 2, "tp": 4})
    ]
    assert found == [0, 2, 4, 6, 1, 3, 5, 7]
    assert one.box({"dp": 8}, {"dp": 3}) == Box((3, 0), (1, 1))


def test_dimensions_without_names_get_some() -> None:
    one = layout([4], ["S0"], MeshEntry(shape=[2], ranks=[[0, 2]], dim_names=[]))
    assert one.dims == ("dim0",)
    assert one.placements == (Placement(0),)


def test_by_default_the_dimension_that_shards_has_all_ranks() -> None:
    hybrid = layout(
        [8], ["R", "S0"], MeshEntry(shape=[2, 2], ranks=[[0, 4]], dim_names=["replicate", "shard"])
    )
    assert hybrid.sharding_dim == "shard"
    experts = layout([8], ["S0"], MeshEntry(shape=[4], ranks=[[0, 4]], dim_names=["ep"]))
    assert experts.along("shard").box({"shard": 8}, {"shard": 7}) == Box((7,), (1,))

"""A checkpoint loads on any number of ranks, any mesh and any placement, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_ckpt import CheckpointConfig, Checkpointer, open_checkpoint, verify
from tests.distributed import worlds

pytestmark = pytest.mark.distributed


def save_known(path: str) -> int:
    state = worlds.known_state(blank=False) | {"values": dict(worlds.VALUES)}
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        return checkpointer.save(state, step=1).result(30).bytes


def load_known(path: str) -> tuple[list[str], Any, int]:
    state = worlds.known_state(blank=True) | {"values": worlds.blank_values()}
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        report = checkpointer.load(state)
        assert report is not None
    return worlds.differing(state), state["values"], report.saved_world_size


@pytest.fixture(scope="module", params=[4, 3], ids=["from 4", "from 3"])
def saved(request, pool, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("known"))
    pool.run(save_known, request.param, path)
    return path, request.param


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_every_kind_of_tensor_loads_on_every_world(pool, saved, world):
    path, saved_world = saved
    for differing, values, known_world in pool.run(load_known, world, path):
        assert differing == []
        assert values == worlds.VALUES
        assert list(values["by_int"]) == [3, 1]
        assert known_world == saved_world


def test_what_is_stored_is_readable_without_ranks_and_verifies(saved):
    path, _ = saved
    step = Path(path, "step-00000001")
    assert verify(step).ok
    checkpoint = open_checkpoint(step)
    for name, known in worlds.KNOWN.items():
        assert worlds.same_bits(checkpoint.read_tensor(name), known.whole(name)), name


def test_every_byte_is_stored_once(saved):
    path, _ = saved
    step = Path(path, "step-00000001")
    payload = sum(known.whole(name).nbytes for name, known in worlds.KNOWN.items())
    stored = sum(file.stat().st_size for file in step.glob("*.distcp"))
    framing = 2048 * len(worlds.KNOWN) * 5
    assert payload <= stored <= payload + framing


def test_replicas_are_split_evenly_over_the_ranks(saved):
    path, world = saved
    sizes = [file.stat().st_size for file in Path(path, "step-00000001").glob("*.distcp")]
    assert len(sizes) == world
    assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize(
    "kinds", [["fsdp"] * 5, ["fsdp", "ddp", "hsdp", "ddp", "fsdp"]], ids=["fsdp", "mixed"]
)
def test_chain_of_worlds_is_the_identity(pool, tmp_path, kinds):
    path = str(tmp_path)
    chain = list(zip((3, 2, 4, 1, 3), kinds, strict=True))
    world, kind = chain[0]
    (expected, *others) = pool.run(worlds.save_trained, world, path, kind, 2)
    assert all(other == expected for other in others)
    assert sum("/exp_avg" in name for name in expected) == 2 * 8
    for step, (world, kind) in enumerate(chain[1:], start=3):
        for found in pool.run(worlds.load_and_save, world, path, kind, step):
            assert found == expected, f"on {world} ranks, {kind}"


def save_awkward(path: str) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    sharded = distribute_tensor(base, DeviceMesh("cpu", [0, 1]), [Shard(0)], src_data_rank=None)
    local = sharded.to_local().t().contiguous().t()
    assert not local.is_contiguous()
    state = {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": torch.arange(5).expand(3, 5),
        "view": torch.arange(1 << 20)[1000:1010],
        "sharded": DTensor.from_local(local, sharded.device_mesh, [Shard(0)]),
    }
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state, step=1).result(30)


def load_awkward(path: str) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    buffer = torch.zeros(8, 8)
    state = {
        "transposed": torch.zeros(4, 6).t(),
        "strided": buffer[1:8:4, 2:7:2],
        "expanded": torch.zeros(3, 5, dtype=torch.int64),
        "view": torch.zeros(100, dtype=torch.int64)[10:20],
        "sharded": torch.zeros(6, 4).t(),
    }
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.load(state)
    assert torch.equal(state["transposed"], base.t())
    assert torch.equal(state["strided"], base[::2, 1::2])
    assert buffer.count_nonzero() == 6, "only the view was written"
    assert torch.equal(state["expanded"], torch.arange(5).expand(3, 5))
    assert torch.equal(state["view"], torch.arange(1000, 1010))
    assert torch.equal(state["sharded"], base)


def test_memory_layouts_come_and_go_without_their_strides(pool, tmp_path):
    pool.run(save_awkward, 2, str(tmp_path))
    pool.run(load_awkward, 1, str(tmp_path))
    step = tmp_path / "step-00000001"
    stored = sum(file.stat().st_size for file in step.glob("*.distcp"))
    assert stored <= 3 * 4096, "a view of a large storage costs what the view holds"


def save_expert(path: str) -> None:
    rank = dist.get_rank()
    state: dict[str, Any] = {"shared": torch.arange(3)}
    for name, members in (("low", [0, 1]), ("high", [2, 3])):
        mesh = DeviceMesh("cpu", members)  # a group of its own: all ranks take part in making it
        if rank in members:
            whole = torch.arange(10.0) + members[0]
            state[name] = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state, step=1).result(30)


def test_tensors_that_live_on_some_ranks_only_are_stored_whole(pool, tmp_path):
    pool.run(save_expert, 4, str(tmp_path))
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    assert torch.equal(checkpoint.read_tensor("low"), torch.arange(10.0))
    assert torch.equal(checkpoint.read_tensor("high"), torch.arange(10.0) + 2)
    state = {"shared": torch.zeros(3, dtype=torch.int64), "low": torch.zeros(10), "high": torch.zeros(10)}
    with Checkpointer(tmp_path, config=CheckpointConfig()) as checkpointer:
        checkpointer.load(state)
    assert torch.equal(state["high"], torch.arange(10.0) + 2)


def save_in_subgroup(path: str) -> str | None:
    """Ranks 1 and 3 of 4 save together; the others do not take part."""
    members = [1, 3]
    group = dist.new_group(members)
    mesh = DeviceMesh("cpu", members)
    if dist.get_rank() not in members:
        return None
    whole = torch.arange(7.0)
    state = {"t": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), "plain": whole.clone()}
    with Checkpointer(path, config=worlds.config(), process_group=group) as checkpointer:
        checkpointer.save(state, step=1).result(30)
        target = {"t": torch.zeros_like(state["t"]), "plain": torch.zeros(7)}
        checkpointer.load(target)
        assert worlds.same_bits(target["t"], state["t"])
        return worlds.fingerprint(target["plain"])


def test_part_of_the_ranks_saves_in_a_group_of_its_own(pool, tmp_path):
    results = pool.run(save_in_subgroup, 4, str(tmp_path))
    assert results[0] is None
    assert results[1] == results[3] == worlds.fingerprint(torch.arange(7.0))
    assert torch.equal(open_checkpoint(tmp_path / "step-00000001").read_tensor("t"), torch.arange(7.0))

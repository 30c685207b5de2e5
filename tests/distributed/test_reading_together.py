"""What several ranks of a host hold alike is read from storage once, whatever it is and wherever it lies."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dcp_ckpt import Checkpointer, load_checkpoint
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

ROWS = 5000
"""Of 1000 float32: 19 MiB, which no number of ranks and no block divides."""


def whole(seed: int) -> torch.Tensor:
    return torch.rand(ROWS, 1000, generator=torch.Generator().manual_seed(seed))


def state_of(layout: str, seed: int) -> dict[str, Any]:
    """`plain` as in DDP, `hybrid` as in HSDP with two replicas, and both side by side."""
    state: dict[str, Any] = {}
    if layout in ("plain", "both"):
        state |= {"w": whole(seed), "half": whole(seed + 1)[:999].bfloat16()}
    if layout in ("hybrid", "both"):
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))
        state["s"] = distribute_tensor(whole(seed + 2), mesh, [Replicate(), Shard(0)], src_data_rank=None)
    return state


def save(url: str, layout: str, environment: Mapping[str, str], steps: tuple[int, ...] = (1,)) -> None:
    os.environ.update(environment)
    with Checkpointer(url, config=worlds.config(timeout_seconds=100.0)) as checkpointer:
        for step in steps:
            checkpointer.save(state_of(layout, step), step=step).result(100)


def load(url: str, layout: str, environment: Mapping[str, str], is_odd: bool = False) -> tuple[int, bool]:
    """Bytes that this rank read, and whether all bits are right."""
    os.environ.update(environment)
    state, expected = state_of(layout, 50), state_of(layout, 1)
    if is_odd and dist.get_rank() == 1:
        state["w"] = torch.zeros(1000, ROWS).t()
    report = load_checkpoint(f"{url}/step-00000001", state, config=worlds.config())
    return report.bytes_read, all(worlds.same_bits(state[name], expected[name]) for name in expected)


def num_bytes(layout: str) -> int:
    plain = ROWS * 1000 * 4 + 999 * 1000 * 2
    return {"plain": plain, "hybrid": ROWS * 1000 * 4, "both": plain + ROWS * 1000 * 4}[layout]


@pytest.mark.parametrize("layout", ["plain", "hybrid", "both"])
def test_all_ranks_together_read_the_state_once(pool, tmp_path, layout):
    pool.run(save, 4, str(tmp_path), layout, {})
    found = pool.run(load, 4, str(tmp_path), layout, {})
    assert all(is_right for _, is_right in found)
    # Where each pair has a shard of its own, plain tensors are read by both pairs.
    times = 2 if layout == "both" else 1
    assert sum(read for read, _ in found) < times * num_bytes(layout) + 4 * 4 * (1 << 20)
    if layout == "plain":
        assert max(read for read, _ in found) < 0.45 * num_bytes(layout)


def test_targets_of_another_form_are_filled_alike(pool, tmp_path):
    pool.run(save, 3, str(tmp_path), "plain", {})
    found = pool.run(load, 3, str(tmp_path), "plain", {}, True)
    assert all(is_right for _, is_right in found)
    assert sum(read for read, _ in found) < 1.1 * num_bytes("plain") + (4 << 20)


def test_a_rank_that_wants_something_else_reads_for_itself(pool, tmp_path):
    pool.run(save, 3, str(tmp_path), "plain", {})
    found = pool.run(load_partly, 3, str(tmp_path))
    assert all(is_right for _, is_right in found)
    one, other, third = (read for read, _ in found)
    assert one + third < num_bytes("plain") + (4 << 20)
    assert ROWS * 1000 * 4 <= other < num_bytes("plain")


def load_partly(url: str) -> tuple[int, bool]:
    include = ("w",) if dist.get_rank() == 1 else None
    state, expected = state_of("plain", 50), state_of("plain", 1)
    report = load_checkpoint(f"{url}/step-00000001", state, config=worlds.config(), include=include)
    names = ("w",) if include else tuple(state)
    return report.bytes_read, all(worlds.same_bits(state[name], expected[name]) for name in names)


def test_an_object_store_is_asked_once(pool, s3_prefix, s3_environment):
    pool.run(save, 3, s3_prefix, "plain", s3_environment, timeout_seconds=110)
    found = pool.run(load, 3, s3_prefix, "plain", s3_environment, timeout_seconds=110)
    assert all(is_right for _, is_right in found)
    assert sum(read for read, _ in found) < num_bytes("plain") + (4 << 20)


def load_newest(url: str) -> tuple[tuple[str, str], int, str, bool]:
    state = state_of("plain", 50)
    with Checkpointer(url, config=worlds.config()) as checkpointer:
        reports: list[Any] = []
        told = worlds.outcome(lambda: reports.append(checkpointer.load(state)))
    expected = state_of("plain", 1)
    is_right = all(worlds.same_bits(state[name], expected[name]) for name in expected)
    return told, reports[0].step, reports[0].rejected[0].reason, is_right


def test_damage_in_one_ranks_share_sends_all_to_the_step_before(pool, tmp_path):
    pool.run(save, 3, str(tmp_path), "plain", {}, (1, 2))
    (file,) = Path(tmp_path, "step-00000002").glob("__1_0.*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for told, step, reason, is_right in pool.run(load_newest, 3, str(tmp_path)):
        assert told == ("ok", "")
        assert step == 1
        assert file.name in reason
        assert "differs from its digest" in reason
        assert is_right


def read_with_a_late_rank(url: str) -> tuple[str, str]:
    """Rank 2 fails before it has met the others."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 2:
            patch.setattr("dcp_ckpt.load.passing.meet", out_of_descriptors)
        return worlds.outcome(
            lambda: load_checkpoint(
                f"{url}/step-00000001", state_of("plain", 50), config=worlds.config(timeout_seconds=3.0)
            )
        )


def out_of_descriptors(*arguments: Any, **settings: Any) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_rank_that_never_comes_is_named_by_all(pool, tmp_path):
    pool.run(save, 3, str(tmp_path), "plain", {})
    for kind, message in pool.run(read_with_a_late_rank, 3, str(tmp_path)):
        assert kind != "ok"
        assert "rank 2" in message or "rank(s) 2" in message


def load_from_a_bad_disk(url: str) -> tuple[tuple[str, str], list[bool]]:
    """On rank 2 no data can be read; what all ranks are told, and whether what they hold is spoiled."""
    state = state_of("plain", 50) | {"own": torch.ones(7)}
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 2:
            patch.setattr("dcp_ckpt.storage.local_reader.os.preadv", read_no_data)
        told = worlds.outcome(
            lambda: load_checkpoint(f"{url}/step-00000001", state, config=worlds.config(), exclude=("own",))
        )
    assert torch.equal(state.pop("own"), torch.ones(7))
    return told, [bool(tensor.isnan().all()) for tensor in state.values()]


def read_no_data(descriptor: int, *arguments: Any) -> int:
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".distcp"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return preadv(descriptor, *arguments)


preadv = os.preadv


def test_a_disk_that_fails_one_rank_is_named_by_all_and_leaves_no_mixture(pool, tmp_path):
    pool.run(save, 3, str(tmp_path), "plain", {})
    for (kind, message), is_spoiled in pool.run(load_from_a_bad_disk, 3, str(tmp_path)):
        assert kind == "StorageError"
        for part in ("rank 2", ".distcp", f"errno {errno.EIO}"):
            assert part in message
        assert all(is_spoiled)

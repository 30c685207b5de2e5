"""The pool of ranks that ships to users: results, first errors, stuck ranks, and nothing left running."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_ckpt import errors
from dcp_ckpt.testing.ranks import RankDied, RankPool, RankTimeout

pytestmark = pytest.mark.distributed


def describe(scale: int) -> tuple[int, int, float, str, int]:
    total = torch.ones(1) * dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item() * scale, os.environ["WORLD_SIZE"], os.getpid()


def sum_of_shards() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = distribute_tensor(torch.arange(10.0), mesh, [Shard(0)])
    total = (tensor * 2).sum()
    assert isinstance(total, DTensor)
    return total.full_tensor().item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise errors.StateError("this key is wrong", rank=rank, step=7)


def wait_forever(rank: int) -> None:
    if dist.get_rank() == rank:
        threading.Event().wait()


def end_while_others_wait(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(9)
    threading.Event().wait()


def fail_strangely() -> None:
    class Strange(Exception):
        def __reduce__(self) -> str:
            return "nowhere"

    raise Strange("cannot travel")


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_run_has_a_world_of_its_own_on_the_same_processes(pool):
    first = pool.run(describe, 3, 2)
    second = pool.run("test_rank_pool:describe", 5, 1)
    assert [row[:4] for row in first] == [(rank, 3, 6.0, "3") for rank in range(3)]
    assert [row[:4] for row in second] == [(rank, 5, 10.0, "5") for rank in range(5)]
    assert [row[4] for row in first] == [row[4] for row in second[:3]]


def test_device_meshes_of_changing_worlds_do_not_meet(pool):
    assert [pool.run(sum_of_shards, world) for world in (4, 2, 4, 3)] == [
        [90.0] * world for world in (4, 2, 4, 3)
    ]


def test_error_arrives_with_its_type_fields_rank_and_traceback(pool):
    with pytest.raises(errors.StateError, match="this key is wrong") as caught:
        pool.run(fail_on, 3, 1)
    assert (caught.value.rank, caught.value.step) == (1, 7)
    notes = "\n".join(caught.value.__notes__)
    assert "on rank 1" in notes
    assert "in fail_on" in notes


def test_error_that_cannot_be_pickled_is_described(pool):
    with pytest.raises(RuntimeError, match="Strange: cannot travel"):
        pool.run(fail_strangely, 2)


def test_world_larger_than_the_pool_is_refused(pool):
    with pytest.raises(ValueError, match="a pool of 5 ranks has no 6"):
        pool.run(describe, 6, 1)


def test_stuck_and_dead_ranks_are_named_and_replaced_and_nothing_is_left_running():
    with RankPool(2, preload=()) as small:
        first = pids(small)
        with pytest.raises(RankTimeout, match=r"rank\(s\) 1 did not end") as stuck:
            small.run(wait_forever, 2, 1, timeout_seconds=1.0)
        assert "in wait_forever" in str(stuck.value)
        second = pids(small)
        with pytest.raises(RankDied, match="ended with code 9") as died:
            small.run(end_while_others_wait, 2, 0)
        assert any("rank 1 was stuck" in note for note in died.value.__notes__)
        small.close()
    assert not {*first} & {*second}, "after a failure of a process the next run starts on new ones"
    assert not any(is_running(pid) for pid in (*first, *second))
    with pytest.raises(ValueError, match="a pool of 0 ranks"):
        small.run(describe, 1, 1)


def pids(small: RankPool) -> list[int]:
    return [row[4] for row in small.run(describe, 2, 1)]

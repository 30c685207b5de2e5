"""What saves and resumes ask of S3, counted by a proxy in front of a real server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_ckpt import Checkpointer, LatestN
from dcp_ckpt.testing.fault_proxy import FaultProxy, Request
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

WORLD_SIZE = 4
ROWS = 1024  # of 1024 float32: the data file of a rank goes up in three parts
NUM_TENSORS = 26
PART_BYTES = 8 << 20
STORE_WITHOUT_HOLDING = ("LIST", "LIST_UPLOADS", "COPY", "HEAD")


@pytest.fixture
def proxy(s3_prefix: str, s3_environment: dict[str, str]) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy


@pytest.fixture
def environment(proxy: FaultProxy, s3_environment: dict[str, str]) -> dict[str, str]:
    return {**s3_environment, "AWS_ENDPOINT_URL": proxy.endpoint_url}


def state_of(step: int) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        f"t{number:02}": distribute_tensor(
            torch.full((ROWS, 1024), float(100 * step + number)), mesh, [Shard(0)], src_data_rank=None
        )
        for number in range(NUM_TENSORS)
    }


def save_steps(url: str, environment: dict[str, str], steps: Sequence[int]) -> int:
    """Save each step; returns the bytes of one."""
    os.environ.update(environment)
    with Checkpointer(url, config=worlds.config(timeout_seconds=100.0)) as checkpointer:
        infos = [checkpointer.save(state_of(step), step=step).result(100) for step in steps]
    return infos[-1].bytes


def resume(url: str, environment: dict[str, str]) -> int:
    os.environ.update(environment)
    state = state_of(0)
    with Checkpointer(url, config=worlds.config()) as checkpointer:
        report = checkpointer.load(state)
    assert report is not None
    expected = state_of(report.step)
    assert all(worlds.same_bits(state[name], expected[name]) for name in state)
    return report.step


def save_and_remove(url: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with Checkpointer(url, config=worlds.config(keep=LatestN(1))) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save({"x": torch.ones(3)}, step=step).result(30)


def of_step(requests: Sequence[Request], step: int) -> list[Request]:
    return [request for request in requests if f"/step-{step:08}/" in request.path]


def without_leases(requests: Sequence[Request]) -> list[Request]:
    return [request for request in requests if not request.path.endswith(".lease")]


def test_a_steady_save_costs_its_parts_and_little_more(pool, proxy, environment, s3_prefix):
    (num_bytes, *_) = pool.run(save_steps, WORLD_SIZE, s3_prefix, environment, [1, 2, 3], timeout_seconds=110)
    requests = without_leases(proxy.requests())
    # The first save checks the layout of all ranks; from the second on nothing is looked at any more.
    steady = Counter(str(request.kind) for step in (2, 3) for request in of_step(requests, step))
    epochs = [request for request in requests if "/epochs/" in request.path and request.kind == "GET"]

    num_parts = steady["UPLOAD_PART"]
    num_objects = 2 * (2 * WORLD_SIZE + 2)  # data and fragment of each rank, manifest, .metadata; two saves
    assert num_parts == 2 * WORLD_SIZE * (num_bytes // WORLD_SIZE // PART_BYTES)
    assert steady.total() <= num_parts + 2 * num_objects, steady
    assert not [kind for kind in STORE_WITHOUT_HOLDING if steady[kind]], steady
    assert steady["PUT"] == 2 * (WORLD_SIZE + 2), "each fragment, manifest and .metadata is one request"
    manifests = [request for request in of_step(requests, 2) if request.path.endswith("manifest.json")]
    assert [(request.kind, request.status) for request in manifests] == [("PUT", 200)]
    # One look per commit whether a newer start took over, and one per writer at its first save.
    assert len(epochs) <= 3 + WORLD_SIZE


def test_a_resume_lists_the_run_once(pool, proxy, environment, s3_prefix):
    (num_bytes, *_) = pool.run(save_steps, WORLD_SIZE, s3_prefix, environment, [1, 2], timeout_seconds=110)
    proxy.reset_log()
    assert pool.run(resume, 3, s3_prefix, environment, timeout_seconds=110) == [2, 2, 2]
    requests = without_leases(proxy.requests())
    counts = Counter(str(request.kind) for request in requests)
    assert counts["LIST"] == 1, counts
    assert not {"HEAD", "LIST_UPLOADS", "COPY"} & set(counts), counts
    gets = [request for request in requests if request.kind == "GET"]
    read = Counter(request.path.rpartition("/")[2] for request in of_step(gets, 2))
    assert {request.path.rpartition("/")[2] for request in of_step(gets, 1)} == {"manifest.json"}
    assert read["manifest.json"] == 1
    num_ranges = sum(count for name, count in read.items() if name.endswith(".distcp"))
    # Reads of at most 8 MiB; a rank's share may begin and end within one.
    assert num_ranges <= num_bytes // PART_BYTES + 3 * WORLD_SIZE
    num_fragments = sum(count for name, count in read.items() if name.startswith("rank-"))
    assert num_fragments <= 3 * WORLD_SIZE


def test_what_was_removed_is_asked_for_by_no_later_start(pool, proxy, environment, s3_prefix):
    pool.run(save_and_remove, 2, s3_prefix, environment)
    proxy.reset_log()
    pool.run(save_and_remove_nothing, 2, s3_prefix, environment)
    paths = [request.path for request in proxy.requests()]
    assert not [path for path in paths if "/step-00000001/" in path or "/step-00000002/" in path]


def save_and_remove_nothing(url: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with Checkpointer(url, config=worlds.config()) as checkpointer:
        report = checkpointer.load({"x": torch.zeros(3)})
        assert report is not None
        assert report.step == 3

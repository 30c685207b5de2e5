"""A store that goes away: every save and the close have an end, soon after the deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, verify
from dcp_ckpt.errors import CommitUnknown, StorageTransient
from dcp_ckpt.save.deadlines import CONCLUDE_SECONDS, REPORT_SLACK_SECONDS, WRITER_END_SECONDS
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.testing.fault_proxy import FaultProxy
from dcp_ckpt.testing.proxy_faults import SLOW_DOWN, Arrival, Fault, Hang

TIMEOUT_SECONDS = 4.0
BUSY_SECONDS = 3.0
"""What a busy machine adds."""
HANDLE_SECONDS = TIMEOUT_SECONDS + REPORT_SLACK_SECONDS + CONCLUDE_SECONDS + BUSY_SECONDS
FAULTS: dict[str, Fault] = {"hangs": Hang(), "refuses": SLOW_DOWN}


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(1000)}


def close_in_time(checkpointer: Checkpointer) -> None:
    started = time.monotonic()
    checkpointer.close()
    assert time.monotonic() - started < WRITER_END_SECONDS + BUSY_SECONDS


@pytest.mark.parametrize("how", FAULTS)
def test_nothing_is_asked_of_a_store_after_the_deadline(proxy, s3_prefix, how):
    with closing(open_storage(s3_prefix)) as storage:
        storage.put("here", b"1")
        assert storage.until(math.inf).read("here") == b"1"
        proxy.set_faults(lambda arrival: FAULTS[how])
        started = time.monotonic()
        view = storage.until(started + 1.0)
        for ask in (lambda: view.read("here"), lambda: upload(view), lambda: view.put("x", b"1")):
            with pytest.raises(StorageTransient):
                ask()
        assert time.monotonic() - started < 1.0 + BUSY_SECONDS
        proxy.set_faults()
        proxy.reset_log()
        with pytest.raises(StorageTransient, match="the time for this is over"):
            storage.until(time.monotonic()).read("here")
        assert proxy.requests() == []
        assert storage.read("here") == b"1", "the storage itself has no deadline"


def upload(storage: Storage) -> None:
    writer = storage.open_writer("large", size_bytes=5, direct=False)
    writer.write_segment(0, memoryview(b"large"))
    writer.finish()


@pytest.mark.crash
@pytest.mark.parametrize("how", FAULTS)
def test_a_store_that_is_gone_fails_the_save_with_its_cause_in_time(proxy, s3_prefix, how):
    config = CheckpointConfig(keep=LatestN(1), grace_seconds=0.0, timeout_seconds=TIMEOUT_SECONDS)
    checkpointer = Checkpointer(s3_prefix, config=config)
    checkpointer.save(state(), step=1).result(60)
    proxy.set_faults(lambda arrival: FAULTS[how])
    started = time.monotonic()
    handle = checkpointer.save(state(), step=2)
    with pytest.raises(StorageTransient) as caught:
        handle.result(60)
    assert time.monotonic() - started < HANDLE_SECONDS
    assert (caught.value.rank, caught.value.step, caught.value.phase) == (0, 2, "write")
    # Whether rank 0's fragment is gone could not be made sure of.
    assert handle.outcome == "unknown"
    close_in_time(checkpointer)


@pytest.mark.crash
def test_a_store_that_goes_before_the_commit_leaves_it_unknown_in_time(proxy, s3_prefix):
    config = CheckpointConfig(keep=None, timeout_seconds=TIMEOUT_SECONDS)
    checkpointer = Checkpointer(s3_prefix, config=config)
    checkpointer.load(state())

    def lose_manifests(arrival: Arrival) -> Fault | None:
        return Hang() if arrival.path.endswith("manifest.json") else None

    proxy.set_faults(lose_manifests)
    started = time.monotonic()
    handle = checkpointer.save(state(), step=1)
    with pytest.raises(CommitUnknown):
        handle.result(60)
    assert time.monotonic() - started < HANDLE_SECONDS
    assert handle.outcome == "unknown"
    proxy.set_faults()
    close_in_time(checkpointer)
    with Checkpointer(s3_prefix, config=config) as checkpointer:
        report = checkpointer.load(state())
    assert report is not None, "what was unknown was complete: the next start has committed it"
    assert [checked.step for checked in verify(s3_prefix).checkpoints] == [1]


def test_a_short_outage_within_the_deadline_harms_nothing(proxy, s3_prefix):
    config = CheckpointConfig(keep=None, timeout_seconds=30.0)
    with Checkpointer(s3_prefix, config=config) as checkpointer:
        checkpointer.load(state())
        proxy.set_faults(lambda arrival: SLOW_DOWN if arrival.number <= 6 else None)
        checkpointer.save(state(), step=1).result(60)
    assert [checked.step for checked in verify(s3_prefix).checkpoints] == [1]

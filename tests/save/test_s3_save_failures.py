"""A save that a store refuses fails alone: it leaves nothing, and the next ones go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, verify
from dcp_ckpt.errors import StorageError
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.fault_proxy import FaultProxy
from dcp_ckpt.testing.proxy_faults import Answer, Arrival, Fault

MIB = 1 << 20


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy


def refuse_the_second_part(arrival: Arrival) -> Fault | None:
    is_it = arrival.kind == "UPLOAD_PART" and "partNumber=2" in arrival.query
    return Answer(status=403, code="AccessDenied") if is_it else None


def state(num_mib: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((num_mib, MIB // 4), float(num_mib))}


def test_saves_of_any_size_succeed_after_one_that_failed(proxy, s3_prefix):
    config = CheckpointConfig(keep=None, timeout_seconds=60.0)
    with Checkpointer(s3_prefix, config=config) as checkpointer:
        checkpointer.save(state(20), step=1).result(60)
        proxy.set_faults(refuse_the_second_part)
        for step in (2, 3):
            with pytest.raises(StorageError, match="AccessDenied") as caught:
                checkpointer.save(state(20), step=step).result(60)
            assert (caught.value.step, caught.value.phase) == (step, "write")
            assert f"{s3_prefix}/step-0000000{step}/" in str(caught.value.path)
        proxy.set_faults()
        # Another size is another arena, in the same writer.
        for step, num_mib in ((4, 33), (5, 3)):
            checkpointer.save(state(num_mib), step=step).result(60)
    assert [checked.step for checked in verify(s3_prefix).checkpoints if not checked.problems] == [1, 4, 5]
    with closing(open_storage(s3_prefix)) as storage:
        assert not [
            info.key for info in storage.list("") if info.key.startswith(("step-00000002", "step-00000003"))
        ]
        assert not storage.abort_uploads("", lambda key: True)
    assert proxy.counts()["ABORT_UPLOAD"] == 2

"""A rank whose writer hangs: rank 0 says who is waited for, and all ranks hear the cause, not only a name."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import Checkpointer, verify
from dcp_ckpt.save import watch
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

Told = tuple[str, str, list[str]]


def save_with_a_stopped_writer(path: str, bad: int) -> Told:
    """Class and message of what this rank hears, and what it logged meanwhile."""
    before, watch.WATCH_SECONDS = watch.WATCH_SECONDS, 0.3
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dcp_ckpt.save")
    logger.addHandler(handler)
    try:
        with Checkpointer(path, config=worlds.config(timeout_seconds=4.0)) as checkpointer:
            checkpointer.load({"x": torch.zeros(9)})
            dist.barrier()
            if dist.get_rank() == bad:
                assert checkpointer._link._process is not None
                os.kill(checkpointer._link._process.pid, signal.SIGSTOP)
            dist.barrier()
            handle = checkpointer.save({"x": torch.ones(9)}, step=1)
            kind, message = worlds.outcome(lambda: handle.result(30))
            checkpointer.save({"x": torch.ones(9)}, step=2).result(30)
    finally:
        logger.removeHandler(handler)
        watch.WATCH_SECONDS = before
    return kind, message, lines


@pytest.mark.parametrize("bad", [0, 2])
def test_what_a_rank_says_at_its_deadline_wins_over_its_silence(pool, tmp_path, bad):
    results = pool.run(save_with_a_stopped_writer, 3, str(tmp_path), bad)
    for kind, message, _ in results:
        assert kind == "SaveFailed"
        assert "did not finish within" in message
        assert "it has not begun, and nothing has moved for" in message
        assert f"rank {bad}, step 1, phase write" in message
        assert "not called, stuck or dead" not in message
    own = [line for line in results[bad][2] if "does not move" in line]
    assert f"rank {bad}, attempt e0001-s000001" in own[0]
    if bad:
        waited = [line for line in results[0][2] if "waits for rank(s)" in line]
        assert f"save of step 1 (attempt e0001-s000001) waits for rank(s) {bad};" in waited[0]
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [2]

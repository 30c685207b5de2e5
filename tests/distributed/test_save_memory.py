"""What a save takes beside the state: one staged copy of what this rank stores, and no more that grows."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState
from dcp_ckpt.testing.ranks import RankPool

pytestmark = pytest.mark.distributed

MIB = 1 << 20
NUM_LAYERS, LAYER_BYTES = 48, 4 * MIB
STATE_BYTES = NUM_LAYERS * LAYER_BYTES
SLACK_BYTES = 8 * MIB
"""For code that is first used during a save, and what its allocator keeps. A second copy is far more."""


@dataclass(frozen=True)
class Footprint:
    """Resident memory of one process: now, and the most since `forget_peak`."""

    now_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        fields = {line[0]: int(line[1]) << 10 for line in lines if line[0] in ("VmRSS:", "VmHWM:")}
        return cls(fields["VmRSS:"], fields["VmHWM:"])


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def shared_fairly_bytes(*pids: int) -> int:
    """What the processes hold together, with memory that they share counted once."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


@dataclass(frozen=True)
class Measured:
    """Growth over the state at rest, in bytes: of each process at most, and of both together at the end."""

    trainer: int
    writer: int
    together: int
    again: int


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(1024, LAYER_BYTES // 4096, bias=False) for _ in range(NUM_LAYERS)]
    made = nn.Sequential(*layers)
    if kind == "fsdp":
        for layer in layers:
            fully_shard(layer)
        fully_shard(made)
    return made


def measure(path: str, kind: str, overlap: Any) -> Measured:
    state = TrainState(model=model(kind), rng=False)
    small = TrainState(model=nn.Linear(2, 2), rng=False)
    config = CheckpointConfig(overlap=overlap, keep=None, dcp_metadata="never")
    with Checkpointer(path, config=config) as checkpointer:
        checkpointer.save(small, step=1).result(30)  # code is loaded, threads have their stacks
        process = checkpointer._link._process
        assert process is not None
        trainer, writer = os.getpid(), process.pid
        gc.collect()
        before = [Footprint.of(pid).now_bytes for pid in (trainer, writer)]
        together = shared_fairly_bytes(trainer, writer)
        dist.barrier()
        for pid in (trainer, writer):
            forget_peak(pid)
        checkpointer.save(state, step=2).result(30)
        peaks = [Footprint.of(pid).peak_bytes for pid in (trainer, writer)]
        grown = shared_fairly_bytes(trainer, writer) - together
        checkpointer.save(state, step=3).result(30)
        again = [Footprint.of(pid).peak_bytes for pid in (trainer, writer)]
        dist.barrier()
    return Measured(
        trainer=peaks[0] - before[0],
        writer=peaks[1] - before[1],
        together=grown,
        again=max(a - b for a, b in zip(again, peaks, strict=True)),
    )


@pytest.fixture(scope="module")
def fresh_pool() -> Iterator[RankPool]:
    """Processes that held nothing before."""
    with RankPool(2) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("kind", "world", "overlap"),
    [("plain", 1, "off"), ("plain", 1, "step"), ("plain", 2, "off"), ("fsdp", 2, "step")],
    ids=["alone", "alone with overlap", "replicas", "fsdp with overlap"],
)
def test_one_staged_copy_of_what_this_rank_stores(fresh_pool, tmp_path, kind, world, overlap):
    share = STATE_BYTES // world
    for measured in fresh_pool.run(measure, world, str(tmp_path), kind, overlap):
        # The arena is mapped by both; neither holds anything of that size beside it.
        assert share <= measured.trainer <= share + SLACK_BYTES
        assert measured.writer <= share + SLACK_BYTES
        assert share <= measured.together <= share * 1.02 + SLACK_BYTES
        assert measured.again <= SLACK_BYTES
    files = sorted(Path(tmp_path, "step-00000002").glob("*.distcp"))
    assert len(files) == world
    assert all(share <= file.stat().st_size <= share * 1.02 for file in files)

"""Stock DCP and this package on the same checkpoints in a bucket, bit for bit, in both directions."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import Checkpointer, load_checkpoint, verify
from dcp_ckpt.dcp import Reader, Writer
from dcp_ckpt.errors import CheckpointError
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

STEP = "step-00000001"
VALUES = {"lr": 3e-4, "name": "run"}


def known_state(*, blank: bool) -> dict[str, Any]:
    values = dict.fromkeys(VALUES) if blank else dict(VALUES)
    return worlds.known_state(blank=blank) | {"values": values}


def save_with_checkpointer(run: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with Checkpointer(run, config=worlds.config(timeout_seconds=60.0)) as checkpointer:
        checkpointer.save(known_state(blank=False), step=1).result(60)


def save_with_dcp(path: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    stock_save(known_state(blank=False), storage_writer=Writer(path))


def load(path: str, environment: dict[str, str], how: str) -> tuple[list[str], Any]:
    """What differs from what was saved, and the values."""
    os.environ.update(environment)
    state = known_state(blank=True)
    if how == "FsspecReader":
        stock_load(state, storage_reader=FsspecReader(path))
    elif how == "dcp.load":
        stock_load(state, checkpoint_id=path)
    elif how == "Reader":
        stock_load(state, storage_reader=Reader(path))
    else:
        load_checkpoint(path, state, config=worlds.config())
    return worlds.differing(state), state["values"]


@pytest.fixture
def saved(pool, s3_prefix, s3_environment) -> str:
    """A checkpoint of 4 ranks in a run."""
    pool.run(save_with_checkpointer, 4, s3_prefix, s3_environment, timeout_seconds=100)
    return f"{s3_prefix}/{STEP}"


def test_stock_dcp_reads_what_the_checkpointer_saved(pool, saved, s3_environment):
    for world, how in ((2, "FsspecReader"), (4, "dcp.load"), (3, "Reader")):
        for differing, values in pool.run(load, world, saved, s3_environment, how, timeout_seconds=60):
            assert differing == []
            assert values == VALUES


def test_what_dcp_saves_with_our_writer_loads_everywhere(pool, s3_prefix, s3_environment):
    path = f"{s3_prefix}/{STEP}"
    pool.run(save_with_dcp, 4, path, s3_environment, timeout_seconds=60)
    assert verify(path).ok
    for world, how in ((3, "Reader"), (2, "load_checkpoint"), (2, "FsspecReader")):
        for differing, values in pool.run(load, world, path, s3_environment, how, timeout_seconds=60):
            assert differing == []
            assert values == VALUES


def test_a_checkpoint_is_never_written_over(pool, s3_prefix, s3_environment):
    path = f"{s3_prefix}/{STEP}"
    pool.run(save_with_dcp, 2, path, s3_environment, timeout_seconds=60)
    outcomes = pool.run(save_again, 2, path, s3_environment, timeout_seconds=60)
    assert all("StepAlreadySaved" in outcome for outcome in outcomes)
    assert verify(path).ok


def save_again(path: str, environment: dict[str, str]) -> str:
    os.environ.update(environment)
    try:
        stock_save({"x": torch.ones(3)}, storage_writer=Writer(path))
    except CheckpointError as error:
        return repr(error)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        return repr(getattr(error, "failures", error))
    return "saved"

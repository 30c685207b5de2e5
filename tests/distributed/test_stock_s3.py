"""Stock DCP and this package on the same checkpoints in a bucket, bit for bit, in both directions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, cast

import pytest
import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import Checkpointer, load_checkpoint, open_checkpoint, verify
from dcp_ckpt.dcp import Reader, Writer
from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.testing.ranks import RankPool
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


def save_with_dcp(path: str, environment: dict[str, str], how: str = "save") -> None:
    os.environ.update(environment)
    state = known_state(blank=False)
    if how == "save":
        stock_save(state, storage_writer=Writer(path))
    elif how == "stock":
        stock_save(state, storage_writer=FsspecWriter(path))
    else:
        kind = AsyncCheckpointerType(how)
        future = async_save(state, storage_writer=Writer(path), async_checkpointer_type=kind)
        cast("Future[Any]", future).result(60)


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


@pytest.fixture(scope="module")
def own_pool() -> Iterator[RankPool]:
    """Ranks of their own, since DCP's writer processes stay until their ranks end."""
    with RankPool(4) as ranks:
        yield ranks


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


@pytest.mark.parametrize("how", ["save", "thread", "process"])
def test_what_dcp_saves_with_our_writer_loads_everywhere(own_pool, s3_prefix, s3_environment, how):
    pool, path = own_pool, f"{s3_prefix}/{STEP}"
    pool.run(save_with_dcp, 4, path, s3_environment, how, timeout_seconds=90)
    assert verify(path).ok
    for world, how in ((3, "Reader"), (2, "load_checkpoint"), (2, "FsspecReader")):
        for differing, values in pool.run(load, world, path, s3_environment, how, timeout_seconds=60):
            assert differing == []
            assert values == VALUES


def test_what_stock_dcp_saved_loads_here(pool, s3_prefix, s3_environment):
    path = f"{s3_prefix}/{STEP}"
    pool.run(save_with_dcp, 4, path, s3_environment, "stock", timeout_seconds=90)
    for world, how in ((3, "load_checkpoint"), (2, "Reader")):
        for differing, values in pool.run(load, world, path, s3_environment, how, timeout_seconds=60):
            assert differing == []
            assert values == VALUES
    with open_checkpoint(path) as checkpoint:
        name = "plain.matrix"
        assert worlds.same_bits(checkpoint.read_tensor(name), worlds.KNOWN[name].whole(name))


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

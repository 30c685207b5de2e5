"""A stock DCP checkpoint of 8 ranks loads here on 3, and ours in stock on 3: model and AdamW, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import Checkpointer, LoadReport, TrainState, load_checkpoint
from dcp_ckpt.dcp import Reader, Writer
from dcp_ckpt.load.stock import STOCK_UNVERIFIED
from dcp_ckpt.testing.ranks import RankPool
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

STEP = "step-00000003"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(8) as ranks:
        yield ranks


def train_and_save(path: str, writer: str) -> dict[str, str]:
    """Three steps under FSDP2; saved by stock DCP, by `Writer` or by `Checkpointer`."""
    model, optimizer = worlds.build("fsdp", seed=0)
    torch.manual_seed(int(os.environ["RANK"]))
    for _ in range(3):
        worlds.train_step(model, optimizer, torch.randint(0, 11, (4,)))
    if writer == "checkpointer":
        with Checkpointer(path, config=worlds.config()) as checkpointer:
            checkpointer.save(TrainState(model=model, optimizer=optimizer), step=3).result(30)
    else:
        state = stateful(model, optimizer)
        target = f"{path}/{STEP}"
        if writer == "stock":
            stock_save(state, checkpoint_id=target)
        else:
            stock_save(state, storage_writer=Writer(target))
    return worlds.snapshot(model, optimizer)


def stateful(model: Any, optimizer: Any) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def load_ours(path: str, how: str) -> tuple[dict[str, str], LoadReport | None]:
    """Into a model of another seed that has stepped, so that everything differs before."""
    model, optimizer = worlds.build("fsdp", seed=1)
    worlds.train_step(model, optimizer, torch.arange(4))
    state = TrainState(model=model, optimizer=optimizer)
    if how == "checkpointer":
        with Checkpointer(f"{path}-run", config=worlds.config()) as checkpointer:
            report = checkpointer.load(state, which=f"{path}/{STEP}")
    else:
        report = load_checkpoint(f"{path}/{STEP}", state, config=worlds.config())
    return worlds.snapshot(model, optimizer), report


def load_stock(path: str, how: str) -> dict[str, str]:
    model, optimizer = worlds.build("fsdp", seed=1)
    worlds.train_step(model, optimizer, torch.arange(4))
    state = stateful(model, optimizer)
    if how == "reader":
        stock_load(state, storage_reader=Reader(f"{path}/{STEP}"))
    else:
        stock_load(state, checkpoint_id=f"{path}/{STEP}")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return worlds.snapshot(model, optimizer)


@pytest.fixture(scope="module")
def stock(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    path = tmp_path_factory.mktemp("stock")
    return path, pool.run(train_and_save, 8, str(path), "stock")[0]


@pytest.mark.parametrize("how", ["load_checkpoint", "checkpointer"])
@pytest.mark.parametrize("world", [3, 8])
def test_stock_on_8_ranks_loads_here(
    pool: RankPool, stock: tuple[Path, dict[str, str]], world: int, how: str
) -> None:
    path, saved = stock
    for found, report in pool.run(load_ours, world, str(path), how):
        assert found == saved
        assert report is not None
        assert report.step == 3
        assert report.unverified == (STOCK_UNVERIFIED,)
        assert any("random numbers: not restored" in note for note in report.notes)


def test_stock_on_8_ranks_loads_through_reader(pool: RankPool, stock: tuple[Path, dict[str, str]]) -> None:
    path, saved = stock
    for found in pool.run(load_stock, 3, str(path), "reader"):
        assert found == saved


def test_writer_on_4_ranks_loads_in_stock_on_3(pool: RankPool, tmp_path: Path) -> None:
    saved = pool.run(train_and_save, 4, str(tmp_path), "writer")[0]
    for how in ("stock", "reader"):
        for found in pool.run(load_stock, 3, str(tmp_path), how):
            assert found == saved, how
    for found, report in pool.run(load_ours, 3, str(tmp_path), "load_checkpoint"):
        assert found == saved
        assert report is not None
        assert report.unverified == ()


def load_stock_model(path: str) -> dict[str, str]:
    model, optimizer = worlds.build("fsdp", seed=1)
    worlds.train_step(model, optimizer, torch.arange(4))
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": {"state": get_optimizer_state_dict(model, optimizer)["state"]},
    }
    stock_load(state, checkpoint_id=f"{path}/{STEP}")
    set_model_state_dict(model, state["model"])
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"param_groups": groups, "state": state["optimizer"]["state"]})
    return worlds.snapshot(model, optimizer)


def test_checkpointer_on_4_ranks_loads_in_stock_on_3(pool: RankPool, tmp_path: Path) -> None:
    saved = pool.run(train_and_save, 4, str(tmp_path), "checkpointer")[0]
    for found in pool.run(load_stock_model, 3, str(tmp_path)):
        assert found == saved

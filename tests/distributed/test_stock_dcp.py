"""A checkpoint is an ordinary DCP checkpoint: stock readers see every byte, on another world too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from dcp_ckpt import Checkpointer, TrainState
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

STEP = "step-00000001"


def save_known(path: str) -> None:
    state = worlds.known_state(blank=False) | {"values": dict(worlds.VALUES)}
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state, step=1).result(30)


def load_known(directory: str) -> tuple[list[str], Any]:
    state = worlds.known_state(blank=True) | {"values": worlds.blank_values()}
    state["values"]["nested"] = dict.fromkeys(worlds.VALUES["nested"])
    stock_load(state, checkpoint_id=directory)
    return worlds.differing(state), state["values"]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("stock")
    pool.run(save_known, 4, str(path))
    return path / STEP


@pytest.mark.parametrize("world", [3, 1])
def test_dcp_load_reads_tensors_and_values_on_another_world(pool, saved, world):
    for differing, values in pool.run(load_known, world, str(saved)):
        assert differing == []
        assert values == worlds.VALUES


def test_dcp_to_torch_save_gives_one_file_of_everything(saved, tmp_path):
    dcp_to_torch_save(saved, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    assert found.pop("values") == worlds.VALUES
    assert set(found) == set(worlds.KNOWN)
    for name, known in worlds.KNOWN.items():
        assert worlds.same_bits(found[name], known.whole(name)), name


def save_and_read_back_model(path: str) -> None:
    model, optimizer = worlds.build("fsdp", seed=0)
    worlds.train_step(model, optimizer, torch.full((4,), dist.get_rank()))
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), step=1).result(30)
    target = {"model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()}}
    stock_load(target, checkpoint_id=f"{path}/{STEP}")
    for name, value in model.state_dict().items():
        assert worlds.same_bits(target["model"][name], value), name


def test_model_keys_are_those_of_dcp(pool, tmp_path):
    pool.run(save_and_read_back_model, 2, str(tmp_path))

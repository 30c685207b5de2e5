"""What four ranks saved, in every placement, is exported whole by one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from dcp_ckpt import Checkpointer, TrainState, export
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

STEP = "step-00000001"


def save(path: str) -> dict[str, torch.Tensor]:
    """Known tensors in one run and a trained FSDP model in another; returns the whole model."""
    with Checkpointer(f"{path}/known", config=worlds.config()) as checkpointer:
        checkpointer.save(worlds.known_state(blank=False), step=1).result(30)
    model, optimizer = worlds.build("fsdp", seed=0)
    worlds.train_step(model, optimizer, torch.full((4,), dist.get_rank()))
    with Checkpointer(f"{path}/trained", config=worlds.config()) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), step=1).result(30)
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def load_known(directory: str) -> list[str]:
    state = worlds.known_state(blank=True)
    stock_load(state, checkpoint_id=directory)
    return worlds.differing(state)


def test_every_placement(pool, tmp_path):
    model = pool.run(save, 4, str(tmp_path))[0]
    export(tmp_path / "known" / STEP, tmp_path / "known.pt", format="torch", include="*")
    found = torch.load(tmp_path / "known.pt", weights_only=True)
    assert found.keys() == worlds.KNOWN.keys()
    for name, known in worlds.KNOWN.items():
        assert worlds.same_bits(found[name], known.whole(name)), name
    export(tmp_path / "known" / STEP, tmp_path / "stock", format="dcp")
    for differing in pool.run(load_known, 3, str(tmp_path / "stock")):
        assert differing == []
    export(f"{tmp_path / 'trained'}@1", tmp_path / "model.pt", format="torch")
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert found.keys() == model.keys()
    for name, value in model.items():
        assert worlds.same_bits(found[name], value), name
    worlds.Net(seed=1).load_state_dict(found)

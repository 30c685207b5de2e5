"""Training state that stock DCP saved in each of its usual forms comes back through a TrainState."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import TrainState, load_checkpoint
from dcp_ckpt.dcp import Writer
from dcp_ckpt.errors import StateMismatch


def trained(seed: int, *, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.1},
        {"params": list(model[2].parameters()), "lr": 0.2, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
    rest = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [3])
    for _ in range(steps):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model, optimizer, scheduler


FORMS = {
    "nested": lambda model, optimizer: get_optimizer_state_dict(model, optimizer),
    "flat": lambda model, optimizer: get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    ),
    "numbered": lambda model, optimizer: optimizer.state_dict(),
}


@pytest.mark.parametrize("writer", ["stock", "ours"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_stepped", [True, False])
def test_model_optimizer_and_scheduler(tmp_path: Path, form: str, writer: str, has_stepped: bool) -> None:
    model, optimizer, scheduler = trained(0, steps=5)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": FORMS[form](model, optimizer),
        "lr_scheduler": scheduler,
    }
    path = tmp_path / "step-00000005"
    if writer == "stock":
        stock_save(state, checkpoint_id=path)
    else:
        stock_save(state, storage_writer=Writer(path))
    wanted = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))

    model, optimizer, scheduler = trained(1, steps=2 if has_stepped else 0)
    before = torch.get_rng_state()
    report = load_checkpoint(path, TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler))
    found = model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert report.step == 5
    assert any("random numbers: not restored" in note for note in report.notes)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("writer", ["stock", "ours"])
def test_what_single_ranks_hold_is_said_to_be_not_restored(tmp_path: Path, writer: str) -> None:
    model, _, _ = trained(0, steps=0)
    storage_writer = Writer(tmp_path / "c") if writer == "ours" else None
    stock_save({"model": model.state_dict()}, checkpoint_id=tmp_path / "c", storage_writer=storage_writer)
    mine = {"counter": 5}
    report = load_checkpoint(tmp_path / "c", TrainState(model=model, per_rank=mine))
    assert mine == {"counter": 5}
    assert any("per_rank: not restored" in note for note in report.notes)


def test_live_objects_in_a_plain_dictionary(tmp_path: Path) -> None:
    model, optimizer, _ = trained(0, steps=3)
    state = {"net": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, optimizer), "n": 3}
    stock_save(state, checkpoint_id=tmp_path / "c")
    wanted = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer, _ = trained(1, steps=1)
    live = {"net": model, "opt": optimizer, "n": 0}
    load_checkpoint(tmp_path / "c", live)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), wanted, rtol=0, atol=0)
    assert live["n"] == 3


def test_a_raw_optimizer_state_dict_as_a_template(tmp_path: Path) -> None:
    _, optimizer, _ = trained(0, steps=3)
    stock_save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "c")
    wanted = copy.deepcopy(optimizer.state_dict())
    _, other, _ = trained(1, steps=1)
    template = {"optimizer": other.state_dict()}
    load_checkpoint(tmp_path / "c", template)
    torch.testing.assert_close(template["optimizer"], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_with_other_groups_is_refused(tmp_path: Path, form: str) -> None:
    model, optimizer, _ = trained(0, steps=3)
    stock_save(
        {"model": model.state_dict(), "optimizer": FORMS[form](model, optimizer)},
        checkpoint_id=tmp_path / "c",
    )
    joined = torch.optim.AdamW(model.parameters())
    before = copy.deepcopy(joined.state_dict())
    with pytest.raises(StateMismatch, match="param_groups"):
        load_checkpoint(tmp_path / "c", TrainState(model=model, optimizer=joined))
    assert joined.state_dict() == before

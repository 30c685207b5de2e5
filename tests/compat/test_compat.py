"""Checkpoints of every released format version load forever.

`format-1` was saved by two ranks (FSDP2, AdamW, MultiStepLR) with version 0.1.0; what it holds is written
down here.
"""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from dcp_ckpt import TrainState, load_checkpoint, open_checkpoint, verify

HERE = Path(__file__).parent

BIAS = [-0.14684227108955383, 0.21808847784996033, -0.40280085802078247]
LAST_BIAS = [0.0031640660017728806, 0.08663270622491837]
LAST_WEIGHT = [
    [0.5635159611701965, -0.4738035798072815, 0.4630306363105774],
    [-0.07922487705945969, 0.2759105861186981, 0.24595782160758972],
]
BIAS_MOMENT = [0.2513359785079956, -0.09609512239694595, 0.3731338083744049]


@pytest.fixture
def step_dir(tmp_path: Path) -> Path:
    """A copy, so that the test proves that a checkpoint may be copied, and leaves the fixture as it is."""
    return Path(shutil.copytree(HERE / "format-1" / "step-00000003", tmp_path / "copied"))


def test_format_1_loads_into_a_model(step_dir: Path) -> None:
    first, last = torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)
    model = torch.nn.Sequential(first, last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 9])
    extra = {"history": [0.0], "odd": {}}
    state = TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler, extra=extra, rng=False)

    report = load_checkpoint(step_dir, state)

    assert (report.step, report.saved_world_size, report.skipped) == (3, 2, ())
    assert first.bias.tolist() == BIAS
    assert last.bias.tolist() == LAST_BIAS
    assert last.weight.tolist() == LAST_WEIGHT
    assert optimizer.state[first.bias]["exp_avg"].tolist() == BIAS_MOMENT
    assert optimizer.state[first.bias]["step"].item() == 3.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert dict(scheduler.milestones) == {2: 1, 5: 1}
    history = extra["history"]
    assert isinstance(history, list)
    assert history[0] == 1.5
    assert math.isnan(history[1])
    assert math.copysign(1.0, history[2]) == -1.0
    assert extra["odd"] == {3: (1, 2), "b": b"\x00\xff"}


def test_format_1_opens_without_a_model(step_dir: Path) -> None:
    with open_checkpoint(step_dir) as checkpoint:
        assert checkpoint.manifest.tags == ["fixture"]
        assert checkpoint.manifest.metrics == {"loss": 0.25}
        assert checkpoint.read_tensor("model.1.bias").tolist() == LAST_BIAS
        assert checkpoint.read_value("lr_scheduler")["last_epoch"] == 3


def test_format_1_verifies() -> None:
    assert verify(HERE / "format-1").ok


def test_format_1_is_a_stock_checkpoint(step_dir: Path) -> None:
    state = {"model": {"0.bias": torch.zeros(3), "1.bias": torch.zeros(2)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        stock_load(state, checkpoint_id=step_dir, no_dist=True)
    assert state["model"]["0.bias"].tolist() == BIAS
    assert state["model"]["1.bias"].tolist() == LAST_BIAS

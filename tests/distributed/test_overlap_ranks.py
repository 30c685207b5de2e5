"""Saves with overlap="step" on several ranks: FSDP2 and DDP beside the copy, and one rank's late failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dcp_ckpt import Checkpointer, TrainState, verify
from tests.distributed import worlds
from tests.save.slow_tensors import Gate, slow_parameter

pytestmark = pytest.mark.distributed

WAIT = 30.0


class Slow(nn.Module):
    """One parameter, plain on every rank, that is copied last: it holds back what is copied with it."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.weight = slow_parameter(torch.ones(3), gate)


class Training:
    def __init__(self, kind: str, seed: int = 0) -> None:
        self.gate = Gate()
        self.slow = Slow(self.gate)
        self.model, self.optimizer = worlds.build(kind, seed)
        self.other = torch.optim.SGD(self.slow.parameters(), lr=0.1)
        worlds.train_step(self.model, self.optimizer, torch.arange(4))

    @property
    def state(self) -> TrainState:
        return TrainState(
            model={"net": self.model, "slow": self.slow},
            optimizer={"net": self.optimizer, "slow": self.other},
            rng=False,
        )

    def snapshot(self) -> dict[str, str]:
        return worlds.snapshot(self.model, self.optimizer)


def save_while_training(kind: str, path: str) -> list[str]:
    """Forward and backward while no byte can be copied; then the step, which waits."""
    training = Training(kind)
    expected = training.snapshot()
    with Checkpointer(path, config=worlds.config(overlap="step")) as checkpointer:
        handle = checkpointer.save(training.state, step=1)
        assert training.gate.reached.wait(WAIT)
        training.model(torch.arange(4)).square().mean().backward()
        assert not handle.wait_staged(0.0)
        training.gate.open()
        training.optimizer.step()
        info = handle.result(WAIT)
    assert training.snapshot() != expected
    restored = Training(kind, seed=1)
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        report = checkpointer.load(restored.state)
        assert report is not None
        assert report.path == info.path
    return [name for name, found in restored.snapshot().items() if found != expected[name]]


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "hsdp"])
def test_forward_and_backward_run_beside_the_copy(pool, tmp_path, kind):
    assert pool.run(save_while_training, 4, kind, str(tmp_path)) == [[]] * 4


def change_on_one_rank(kind: str, path: str, rank: int) -> tuple[str, str, int | None]:
    """One rank changes a parameter between save() and its copy; the next save is a checkpoint again."""
    training = Training(kind)
    name = "first.weight"
    weight = dict(training.model.named_parameters())["module." * (kind == "ddp") + name]
    with Checkpointer(path, config=worlds.config(overlap="step")) as checkpointer:
        handle = checkpointer.save(training.state, step=1)
        assert training.gate.reached.wait(WAIT)
        if dist.get_rank() == rank:
            local: Any = weight.to_local() if hasattr(weight, "to_local") else weight
            with torch.no_grad():
                local.mul_(0.5)
        training.gate.open()
        checkpointer.fence()
        failure = worlds.outcome(lambda: handle.result(WAIT))
        assert handle.error is not None
        with torch.no_grad():
            if dist.get_rank() == rank:
                local.mul_(2.0)
        checkpointer.save(training.state, step=2).result(WAIT)
    return *failure, handle.error.rank


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_change_on_one_rank_fails_the_save_on_all_by_name(pool, tmp_path, kind, rank):
    results = pool.run(change_on_one_rank, 3, kind, str(tmp_path), rank)
    assert len(set(results)) == 1
    kind_of_error, message, named_rank = results[0]
    assert (kind_of_error, named_rank) == ("SaveFailed", rank)
    assert "model.net.first.weight; " in message
    assert "step=1" in message.replace(" ", "") or "step 1" in message
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [2]

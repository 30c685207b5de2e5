"""Whatever follows `save()`: the checkpoint holds the state of the call, or the save names a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, load_checkpoint
from dcp_ckpt.errors import SaveFailed
from tests.format.exact_values import same
from tests.save.slow_tensors import Gate, slow_parameter

WAIT = 30.0


class Net(nn.Module):
    mean: torch.Tensor

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.slow = slow_parameter(torch.arange(6.0), gate)
        self.quick = nn.Parameter(torch.ones(5))
        self.register_buffer("mean", torch.zeros(4))


class Training:
    """A run in the middle, with something of every kind; `gate` holds what is copied late."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.gate.open()
        self.net = Net(self.gate)
        self.ema = {name: parameter.detach().clone() + 1 for name, parameter in self.net.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=torch.tensor(0.1), foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.extra: dict[str, Any] = {
            "losses": [1.0],
            "seen": {3},
            "nested": {"counts": {1: [2]}, "raw": bytearray(b"abc")},
            "array": numpy.arange(3),
            "ema": self.ema,
        }
        self.mine = {"ids": [1, 2]}
        self.step()

    @property
    def state(self) -> TrainState:
        return TrainState(
            model=self.net,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            extra=self.extra,
            per_rank=self.mine,
        )

    def step(self) -> None:
        for parameter in self.net.parameters():
            parameter.grad = torch.full_like(parameter, 0.5).as_subclass(torch.Tensor)
        self.optimizer.step()
        self.scheduler.step()
        self.extra["losses"].append(float(len(self.extra["losses"])))

    def content(self) -> Any:
        """Copies of everything that a checkpoint holds."""

        def copied(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.detach().as_subclass(torch.Tensor).clone()
            if isinstance(value, dict):
                return {key: copied(item) for key, item in value.items()}
            return type(value)(value) if isinstance(value, (list, set, bytearray)) else value

        moments = [
            dict(sorted(self.optimizer.state[parameter].items())) for parameter in self.net.parameters()
        ]
        return copied(
            {
                "net": dict(self.net.state_dict()),
                "moments": dict(enumerate(moments)),
                "lr": self.optimizer.param_groups[0]["lr"],
                "beta": self.optimizer.param_groups[0]["betas"],
                "scheduler": self.scheduler.state_dict()["last_epoch"],
                "extra": {**self.extra, "array": self.extra["array"].tolist()},
                "mine": self.mine,
                "random": torch.get_rng_state(),
            }
        )


def load_other(training: Training) -> None:
    shapes = {name: tensor.shape for name, tensor in training.net.state_dict().items()}
    training.net.load_state_dict({name: torch.full(shape, 5.0) for name, shape in shapes.items()})


def swap_average(training: Training) -> None:
    for name, parameter in training.net.named_parameters():
        parameter.data, training.ema[name] = training.ema[name], parameter.data


def replace_moments(training: Training) -> None:
    for parameter in training.net.parameters():
        state = training.optimizer.state[parameter]
        training.optimizer.state[parameter] = {key: tensor * 3 for key, tensor in state.items()}


def load_optimizer(training: Training) -> None:
    other = Training()
    other.step()
    training.optimizer.load_state_dict(other.optimizer.state_dict())


def grow_storage(training: Training) -> None:
    training.net.quick.untyped_storage().resize_(1 << 16)
    training.net.quick.fill_(7.0)


def flip_gradients(training: Training) -> None:
    for parameter in training.net.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


def change_python(training: Training) -> None:
    extra = training.extra
    extra["losses"].append(9.0)
    extra["losses"][0] = 8.0
    extra["seen"].add(4)
    extra["nested"]["counts"][1].append(3)
    extra["nested"]["counts"][5] = []
    extra["nested"]["raw"][0] = 0
    extra["array"][:] = 7
    extra["new"] = 1
    training.mine["ids"].clear()


def change_settings(training: Training) -> None:
    group = training.optimizer.param_groups[0]
    group["lr"].fill_(9.0)
    group["betas"] = (0.1, 0.2)
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    training.scheduler.last_epoch = 77
    torch.rand(10)


PARAMETERS = {"model.quick", "model.slow"}
MOMENTS = {f"optimizer.state.{p}.{k}" for p in ("quick", "slow") for k in ("exp_avg", "exp_avg_sq", "step")}
MUTATIONS: dict[str, tuple[set[str], Callable[[Training], object]]] = {
    "average swapped in": (PARAMETERS, swap_average),
    "buffer and average in place": (set(), lambda t: (t.net.mean.add_(1), t.ema["quick"].zero_())),
    "data cloned": ({"model.quick"}, lambda t: setattr(t.net.quick, "data", t.net.quick.data.clone())),
    "data replaced": ({"model.quick"}, lambda t: setattr(t.net.quick, "data", torch.zeros(5))),
    "gradients switched": (set(), flip_gradients),
    "in place": ({"model.quick", "model.slow"}, lambda t: (t.net.quick.zero_(), t.net.slow.mul_(3))),
    "model loaded": (PARAMETERS, load_other),
    "moments in place": (MOMENTS, lambda t: [s.zero_() for s in t.optimizer.state[t.net.quick].values()]),
    "moments replaced": (set(), replace_moments),
    "moments thrown away": (set(), lambda t: t.optimizer.state.clear()),
    "optimizer loaded": (set(), load_optimizer),
    "parameter replaced": (set(), lambda t: setattr(t.net, "quick", nn.Parameter(torch.zeros(5)))),
    "python state": (set(), change_python),
    "settings": (set(), change_settings),
    "storage resized": ({"model.quick"}, grow_storage),
}


def settings(overlap: Any) -> CheckpointConfig:
    return CheckpointConfig(keep=None, timeout_seconds=WAIT, overlap=overlap, dcp_metadata="never")


def stored(path: str) -> Any:
    into = Training()
    load_checkpoint(path, into.state)
    return into.content()


def save_and_mutate(
    checkpointer: Checkpointer, step: int, mutate: Callable[[Training], object], overlap: str
) -> set[str]:
    """The tensors that the save names; none when it became a checkpoint of the state at the call."""
    training = Training()
    training.gate.shut()
    expected = training.content()
    handle = checkpointer.save(training.state, step=step)
    assert overlap == "off" or training.gate.reached.wait(WAIT)
    try:
        with torch.no_grad():
            mutate(training)
    finally:
        training.gate.open()
    try:
        info = handle.result(WAIT)
    except SaveFailed as error:
        return set(error.message.partition(": ")[2].partition(";")[0].split(", "))
    assert same(stored(info.path), expected)
    return set()


@pytest.mark.parametrize("overlap", ["off", "step"])
def test_what_happens_after_the_call_is_absent_or_named(tmp_path, overlap):
    with Checkpointer(tmp_path, config=settings(overlap)) as checkpointer:
        for step, (name, (detectable, mutate)) in enumerate(MUTATIONS.items(), start=1):
            named = save_and_mutate(checkpointer, step, mutate, overlap)
            assert named <= detectable, name
            assert bool(named) == (overlap == "step" and bool(detectable)), name


@pytest.mark.parametrize("overlap", ["off", "step"])
def test_consecutive_saves_hold_what_each_was_given(tmp_path, overlap):
    training = Training()
    contents, paths = [], []
    with Checkpointer(tmp_path, config=settings(overlap)) as checkpointer:
        for step in range(1, 5):
            contents.append(training.content())
            handle = checkpointer.save(training.state, step=step)
            training.step()
            paths.append(handle.result(WAIT).path)
    for path, content in zip(paths, contents, strict=True):
        assert same(stored(path), content)
    files = [hashlib.sha256(next(Path(path).glob("*.distcp")).read_bytes()).hexdigest() for path in paths]
    assert len(set(files)) == 4

"""Schedules, scalers, averages and histories, really saved and loaded: each goes on as if never stopped."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, load_checkpoint, open_checkpoint

STOP, END = 5, 14


class Halving:
    """A schedule that is an object and counts for itself."""

    def __init__(self) -> None:
        self.asked = 0
        self.floor = 0.01

    def __call__(self, epoch: int) -> float:
        self.asked += 1
        return max(self.floor, 0.5 ** (self.asked // 3))


def warm_up(epoch: int) -> float:
    return (epoch + 1) / 7


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts: list[Any] = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3, 10])


def chained(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=7),
            lr_scheduler.MultiStepLR(optimizer, [2, 2, 6]),
        ]
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "chained": chained,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=END),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "cyclic-function": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=4, scale_fn=lambda x: 1 / x
    ),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.93),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, warm_up),
    "lambda-groups": lambda o: lr_scheduler.LambdaLR(o, [warm_up, Halving()]),
    "lambda-object": lambda o: lr_scheduler.LambdaLR(o, Halving()),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 7, 7, 11]),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=END),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=END, power=2),
    "sequential": sequential,
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "swa": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=8),
    "warm-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
}


class Training:
    def __init__(self, kind: str, lr: Any = 0.1) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 2)
        groups = [{"params": [self.model.weight]}, {"params": [self.model.bias], "lr": lr * 2}]
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        self.scheduler = SCHEDULERS[kind](self.optimizer)

    @property
    def state(self) -> TrainState:
        return TrainState(model=self.model, optimizer=self.optimizer, lr_scheduler=self.scheduler, rng=False)

    def step(self, number: int) -> None:
        self.model(torch.ones(1, 2)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step([5.0, 4.0, 4.0, 4.0][number % 4])
        else:
            self.scheduler.step()

    def rates(self) -> list[dict[str, str]]:
        """All numbers of all groups, exactly; the names of bounds that schedulers leave there included."""
        return [
            {
                key: float(value).hex()
                for key, value in group.items()
                if isinstance(value, (float, torch.Tensor))
            }
            for group in self.optimizer.param_groups
        ]


def step_dir(root: Path, kind: str) -> Path:
    return root / f"step-{list(SCHEDULERS).index(kind):08}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Training]]:
    """One run whose steps are the trainings of all kinds; they go on in their tests."""
    root = tmp_path_factory.mktemp("schedules")
    trainings = {}
    with Checkpointer(root, config=CheckpointConfig(keep=None)) as checkpointer:
        for number, kind in enumerate(SCHEDULERS):
            trainings[kind] = Training(kind)
            for step in range(STOP):
                trainings[kind].step(step)
            checkpointer.save(trainings[kind].state, step=number).result(30)
    return root, trainings


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_rate_of_every_later_step_is_the_same(saved, kind):
    root, trainings = saved
    training, resumed = trainings[kind], Training(kind)
    resumed.step(3)  # had begun to go its own way
    load_checkpoint(step_dir(root, kind), resumed.state)
    seen = []
    for number in range(STOP, END):
        for one in (training, resumed):
            one.step(number)
        seen.append(training.rates())
        assert resumed.rates() == seen[-1], f"step {number}"
    assert torch.equal(resumed.model.weight, training.model.weight)
    assert len({str(rates) for rates in seen}) > 1, "the rate changes after the resume"


def save(path: Path, state: Any) -> str:
    with Checkpointer(path) as checkpointer:
        return checkpointer.save(state, step=STOP).result(30).path


def test_a_rate_that_is_a_tensor_stays_that_tensor(tmp_path):
    training, resumed = (Training("one-cycle", torch.tensor(0.1)) for _ in range(2))
    for number in range(STOP):
        training.step(number)
    tensors = [group["lr"] for group in resumed.optimizer.param_groups]
    load_checkpoint(save(tmp_path, training.state), resumed.state)
    assert all(g["lr"] is t for g, t in zip(resumed.optimizer.param_groups, tensors, strict=True))
    for number in range(STOP, END):
        training.step(number)
        resumed.step(number)
        assert resumed.rates() == training.rates(), f"step {number}"


class Scaled:
    """A training in half precision whose gradients overflow now and then."""

    def __init__(self, *, enabled: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3, enabled=enabled)

    @property
    def state(self) -> TrainState:
        return TrainState(model=self.model, optimizer=self.optimizer, scaler=self.scaler, rng=False)

    def step(self, number: int) -> float:
        inputs = torch.full((1, 4), math.inf if number in (3, 9, 10) else 1.0)
        self.scaler.scale(self.model(inputs).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return self.scaler.get_scale()


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
def test_the_scale_of_every_later_step_is_the_same(tmp_path, enabled):
    training, resumed = Scaled(enabled=enabled), Scaled(enabled=enabled)
    for number in range(STOP):
        training.step(number)
    load_checkpoint(save(tmp_path, training.state), resumed.state)
    scales = [training.step(number) for number in range(STOP, END)]
    assert [resumed.step(number) for number in range(STOP, END)] == scales
    assert set(scales) == ({128.0, 256.0, 512.0} if enabled else {1.0})
    assert torch.equal(training.model.weight, resumed.model.weight)


class Averaged:
    """An average of the weights beside the weights; where it is kept is up to the user."""

    def __init__(self, place: str, *, use_buffers: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
        )
        self.place = place

    @property
    def state(self) -> TrainState:
        if self.place == "extra":
            return TrainState(
                model=self.model, optimizer=self.optimizer, extra={"ema": self.average}, rng=False
            )
        models = {"net": self.model, "ema": self.average}
        return TrainState(model=models, optimizer=self.optimizer, rng=False)

    def step(self, number: int) -> list[float]:
        inputs = torch.arange(12.0).reshape(4, 3).sin() * number
        self.model(inputs).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        return [value.item() for tensor in self.average.state_dict().values() for value in tensor.flatten()]


@pytest.mark.parametrize("use_buffers", [True, False], ids=["with buffers", "without"])
@pytest.mark.parametrize("place", ["model", "extra"])
def test_an_average_of_weights_goes_on(tmp_path, place, use_buffers):
    training, resumed = (Averaged(place, use_buffers=use_buffers) for _ in range(2))
    for number in range(STOP):
        training.step(number)
    step = save(tmp_path, training.state)
    name = "model.ema" if place == "model" else "extra.ema"
    keys = open_checkpoint(step).keys()
    assert {f"{name}.module.0.weight", f"{name}.n_averaged"} <= set(keys)
    load_checkpoint(step, resumed.state)
    for number in range(STOP, END):
        assert resumed.step(number) == training.step(number), f"step {number}"


class Shadow:
    """An average as users write it: it relies on the order of its tensors."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        shadow = OrderedDict((f"layer.{index}", tensor) for index, tensor in enumerate(self.tensors))
        return {"shadow": shadow, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert list(state) == ["shadow", "count"]
        assert type(state["shadow"]) is OrderedDict
        self.tensors = list(state["shadow"].values())
        self.count = state["count"]


def test_an_object_gets_its_dictionaries_in_their_order_and_kind(tmp_path):
    source = Shadow([torch.tensor(float(index)) for index in range(12)])
    source.count = 7
    step = save(tmp_path, {"shadow": source})
    target = Shadow([torch.tensor(0.0)] * 12)
    load_checkpoint(step, {"shadow": target})
    assert [tensor.item() for tensor in target.tensors] == list(range(12))
    assert target.count == 7
    # Whoever reads single keys, as stock DCP does, finds them under the names of their paths.
    found = {"shadow": {"shadow": {"layer.10": torch.zeros(())}, "count": None}}
    stock_load(found, checkpoint_id=step)
    assert found == {"shadow": {"shadow": {"layer.10": torch.tensor(10.0)}, "count": 7}}


def test_histories_and_best_values_come_back_as_they_were(tmp_path):
    def blank() -> dict[str, Any]:
        return {
            "losses": [],
            "recent": deque(maxlen=3),
            "curve": None,
            "best": {"value": math.inf, "step": -1, "weights": torch.zeros(2)},
            "per_class": {},
            "last": torch.zeros(()),
        }

    source = blank()
    source["losses"] += [0.1, float("nan"), -0.0, 1e-310]
    source["recent"].extend(range(5))
    source["curve"] = numpy.linspace(0, 1, 7, dtype=numpy.float32)[::2]
    source["best"].update(value=0.25, step=3, weights=torch.tensor([1.0, 2.0]))
    source["per_class"].update({3: (1, 2), "all": [numpy.float64(0.1)]})
    source["last"] = torch.tensor(0.5, requires_grad=True) * 2
    target = blank()
    losses, recent = target["losses"], target["recent"]
    load_checkpoint(save(tmp_path, source), target)
    assert target["losses"] is losses
    assert [value.hex() for value in losses] == [value.hex() for value in source["losses"]]
    assert (type(target["recent"]), target["recent"].maxlen, list(target["recent"])) == (deque, 3, [2, 3, 4])
    assert recent is not None
    assert target["curve"].dtype == numpy.float32
    assert target["curve"].tolist() == source["curve"].tolist()
    assert (target["best"]["value"], target["best"]["step"]) == (0.25, 3)
    assert target["best"]["weights"].tolist() == [1.0, 2.0]
    assert target["per_class"] == {3: (1, 2), "all": [0.1]}
    assert type(target["per_class"]["all"][0]) is numpy.float64
    assert target["last"].item() == 1.0

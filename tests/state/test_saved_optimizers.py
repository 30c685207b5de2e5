"""Every kind of optimizer, really saved and loaded: saving changes nothing, a resumed run is the same run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, load_checkpoint, open_checkpoint
from dcp_ckpt.errors import CheckpointError, StateMismatch

BEFORE, AMID, AFTER = range(3)
"""What is saved of each kind: before the first step, with live gradients, and after some steps."""


class Elaborate(torch.optim.Optimizer):
    """State of all kinds, nested, as third-party optimizers keep it; each part of it counts."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(
            params, {"lr": lr, "schedule": [(0, 1.0), (4, 0.5)], "names": {"kind": "x", 3: None}}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"])

    def _step(self, parameter: torch.Tensor, lr: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["count"] = 0
            state["stats"] = {
                "axes": [torch.zeros(size) for size in parameter.shape],
                "by_number": {2: torch.zeros(()), 10: 0.0},
                "z": {"a": torch.zeros_like(parameter), "Z": (1, "two")},
            }
            state["norms"] = deque(maxlen=3)
            state["flag"] = False
        state["count"] += 1
        state["flag"] = not state["flag"]
        state["norms"].append(parameter.grad.norm().item())
        stats = state["stats"]
        for dim, axis in enumerate(stats["axes"]):
            others = [other for other in range(parameter.ndim) if other != dim]
            axis.add_(parameter.grad.square().sum(others) if others else parameter.grad.square())
        stats["by_number"][2].add_(parameter.grad.sum())
        stats["by_number"][10] += 1.5
        stats["z"]["a"].lerp_(parameter.grad, 0.1 if state["flag"] else 0.2)
        scale = 1 + sum(axis.sum().item() for axis in stats["axes"]) + sum(state["norms"])
        push = stats["by_number"][2].abs().item() + stats["by_number"][10] + state["count"]
        parameter.sub_(stats["z"]["a"] * (lr * math.log1p(push) / math.sqrt(scale)))


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-tensors": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
    ),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=2),
    "elaborate": Elaborate,
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
}


class Training:
    def __init__(self, kind: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = KINDS[kind](list(self.model.parameters()))
        if kind not in ("lbfgs",):  # which takes one group only
            self.added = nn.Linear(2, 2, bias=False)
            self.model.append(self.added)
            self.optimizer.add_param_group({"params": [], "tag": ("empty", 1)})
            self.optimizer.add_param_group({"params": [self.added.weight], "lr": 0.01, "initial_lr": 0.02})
        self.numbers = torch.Generator().manual_seed(7)

    @property
    def state(self) -> TrainState:
        return TrainState(model=self.model, optimizer=self.optimizer, rng=False)

    def backward(self, number: int) -> torch.Tensor:
        inputs = torch.arange(15.0).reshape(5, 3).add(number).sin()
        loss: torch.Tensor = self.model(inputs).square().sum()
        loss.backward()
        return loss

    def step(self, number: int) -> None:
        if isinstance(self.optimizer, torch.optim.LBFGS):

            def closure() -> float:
                self.optimizer.zero_grad()
                return self.backward(number).item()

            self.optimizer.step(closure)
        else:
            self.backward(number)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def same(a: Training, b: Training) -> bool:
    return all(map(torch.equal, a.weights(), b.weights()))


def step_dir(root: Path, kind: str, moment: int) -> Path:
    return root / f"step-{list(KINDS).index(kind) * 3 + moment:08}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Training]]:
    """One run that holds trainings of all kinds, each saved three times; they go on in their tests."""
    root = tmp_path_factory.mktemp("optimizers")
    trainings = {kind: Training(kind) for kind in KINDS}
    with Checkpointer(root, config=CheckpointConfig(keep=None, dcp_metadata="never")) as checkpointer:
        for index, (kind, training) in enumerate(trainings.items()):

            def save(moment: int, training: Training = training, index: int = index) -> None:
                checkpointer.save(training.state, step=index * 3 + moment).result(30)

            save(BEFORE, Training(kind))
            # Before the first state is made: later ones would be the beginning of an accumulation.
            training.backward(99)
            gradients = [parameter.grad for parameter in training.model.parameters()]
            before = [gradient.clone() for gradient in gradients]
            save(AMID)
            assert [parameter.grad for parameter in training.model.parameters()] == gradients
            assert all(map(torch.equal, gradients, before))
            training.optimizer.zero_grad()
            for number in range(3):
                training.step(number)
            save(AFTER)
    return root, trainings


@pytest.mark.parametrize("kind", KINDS)
def test_saving_changes_nothing_and_resuming_continues(saved, kind):
    root, trainings = saved
    training, undisturbed, resumed = trainings[kind], Training(kind), Training(kind, seed=1)
    for number in range(3):
        undisturbed.step(number)
    assert same(training, undisturbed), "the run that was saved is the run that was not"
    resumed.step(0)
    load_checkpoint(step_dir(root, kind, AFTER), resumed.state)
    fresh = Training(kind, seed=2)
    load_checkpoint(step_dir(root, kind, AFTER), fresh.state)
    for number in range(3, 6):
        for one in (training, undisturbed, resumed, fresh):
            one.step(number)
        assert same(resumed, undisturbed)
        assert same(fresh, undisturbed)
    assert same(training, undisturbed)


@pytest.mark.parametrize("moment", [BEFORE, AMID], ids=["before the first step", "with live gradients"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_had_no_moments_yet_comes_back_without(saved, kind, moment):
    root, _ = saved
    undisturbed, resumed = Training(kind), Training(kind, seed=1)
    for number in range(2):
        resumed.step(number)
    load_checkpoint(step_dir(root, kind, moment), resumed.state)
    # Adagrad makes its state when it is made itself.
    early = list(resumed.model.parameters())[:4] if kind == "adagrad" else []
    assert resumed.optimizer.state.keys() == set(early)
    for number in range(3):
        for one in (undisturbed, resumed):
            one.step(number)
    assert same(resumed, undisturbed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lbfgs"])
def test_all_hyper_parameters_are_there(saved, kind):
    root, _ = saved
    resumed = Training(kind, seed=1)
    for group in resumed.optimizer.param_groups:
        group["lr"] = group["lr"] * 2
    betas = resumed.optimizer.param_groups[0].get("betas", ())
    load_checkpoint(step_dir(root, kind, AFTER), resumed.state)
    expected = Training(kind)
    for number in range(3):
        expected.step(number)
    for group, other in zip(resumed.optimizer.param_groups, expected.optimizer.param_groups, strict=True):
        assert list(group) == list(other)
        assert all(group[key] == other[key] for key in group if key != "params")
    if kind == "adamw-tensors":
        found = resumed.optimizer.param_groups[0]["betas"]
        assert all(a is b for a, b in zip(found, betas, strict=True)), "graphs hold on to these tensors"
    with open_checkpoint(step_dir(root, kind, AFTER)) as checkpoint:
        groups = checkpoint.read_value("optimizer.param_groups")
    assert [group["params"] for group in groups] == [
        ["0.weight", "0.bias", "2.weight", "2.bias"],
        [],
        ["3.weight"],
    ]


@pytest.mark.parametrize("stored", ["sgd-momentum", "adam", "rmsprop", "adafactor", "elaborate"])
def test_another_kind_of_optimizer_is_refused_before_anything_changes(saved, stored):
    root, _ = saved
    for kind in ("adamw-foreach", "sgd-fused", "adagrad", "nadam", "asgd"):
        live = Training(kind)
        before = live.weights()
        if {stored, kind} in ({"adam", "adamw-foreach"}, {"sgd-momentum", "sgd-fused"}):
            load_checkpoint(step_dir(root, stored, AFTER), live.state)
            if kind == "adamw-foreach":
                assert all(group["decoupled_weight_decay"] for group in live.optimizer.param_groups)
            live.step(0)
            continue
        with pytest.raises(StateMismatch, match="another kind of optimizer: only the checkpoint has"):
            load_checkpoint(step_dir(root, stored, AFTER), live.state)
        assert all(map(torch.equal, live.weights(), before))


def test_what_no_group_can_hold_is_refused_by_its_place(tmp_path):
    training = Training("sgd")
    training.optimizer.param_groups[2]["scale"] = lambda step: 1 / step
    with Checkpointer(tmp_path) as checkpointer:
        handle = checkpointer.save(training.state, step=1)
        with pytest.raises(CheckpointError, match=r"optimizer\.param_groups\[2\]\['scale'\] is of type"):
            handle.result(30)


def test_muon_beside_adamw(tmp_path):
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        flat = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
        optimizers = {"muon": torch.optim.Muon(flat, lr=0.1), "adamw": torch.optim.AdamW(rest, lr=0.1)}
        return TrainState(model=model, optimizer=optimizers, rng=False)

    def step(state: Any) -> None:
        state.model(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
        for optimizer in state.optimizer.values():
            optimizer.step()
            optimizer.zero_grad()

    training, resumed = make(0), make(1)
    step(training)
    with Checkpointer(tmp_path) as checkpointer:
        path = checkpointer.save(training, step=1).result(30).path
    load_checkpoint(path, resumed)
    for _ in range(2):
        step(training)
        step(resumed)
    for a, b in zip(training.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)

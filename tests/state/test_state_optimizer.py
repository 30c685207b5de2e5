from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dcp_ckpt.errors import StateError
from dcp_ckpt.state import Component, ModelComponent, OptimizerComponent
from tests.state import in_memory

# Any, since indexing a Sequential has the type Tensor | Module.
Net = Any
Make = Callable[[Net], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1),
    "adamw-foreach": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, foreach=True),
    "adamw-fused": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, fused=True),
    "adamw-amsgrad": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, amsgrad=True),
    "adamw-tensor-lr": lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1)),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "sgd-momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "adafactor": lambda net: torch.optim.Adafactor(net.parameters(), lr=0.1),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.1, centered=True),
}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    module(inputs).square().sum().backward()
    optimizer.step()


def components(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Component]:
    model = ModelComponent(("model",), module)
    return [model, OptimizerComponent(("optimizer",), optimizer, model.parameter_names())]


def assert_equal_parameters(left: nn.Module, right: nn.Module) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh-target", "stepped-target"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_run_continues_bit_for_bit(kind, warm):
    source, target = net(0), net(1)
    optimizer, restored = OPTIMIZERS[kind](source), OPTIMIZERS[kind](target)
    for seed in range(3):
        step(source, optimizer, seed)
    if warm:
        step(target, restored, 99)
    parameters = list(target.parameters())
    in_memory.load(in_memory.save(components(source, optimizer)), components(target, restored))
    assert all(a is b for a, b in zip(restored.param_groups[0]["params"], parameters, strict=True))
    for seed in range(3, 6):
        step(source, optimizer, seed)
        step(target, restored, seed)
    assert_equal_parameters(source, target)


@pytest.mark.parametrize("num_steps", [0, 1], ids=["before-first-step", "with-live-gradients"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_capture_leaves_training_bitwise_unchanged(kind, num_steps):
    plain, captured = net(0), net(0)
    undisturbed, optimizer = OPTIMIZERS[kind](plain), OPTIMIZERS[kind](captured)
    for seed in range(num_steps):
        step(plain, undisturbed, seed)
        step(captured, optimizer, seed)
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in captured.parameters()]
    for component in components(captured, optimizer):
        component.capture()
    assert len(optimizer.state) == len(undisturbed.state)
    for parameter, before in zip(captured.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    for seed in range(num_steps, num_steps + 2):
        step(plain, undisturbed, seed)
        step(captured, optimizer, seed)
    assert_equal_parameters(plain, captured)


def test_names_are_those_that_dcp_gives():
    module = net()
    optimizer = OPTIMIZERS["adamw"](module)
    step(module, optimizer, 0)
    names = in_memory.save(components(module, optimizer)).names
    assert {
        "optimizer.state.0.weight.exp_avg",
        "optimizer.state.2.bias.step",
        "optimizer.param_groups",
    } <= names


def test_captured_moments_are_the_live_tensors():
    module = net()
    optimizer = OPTIMIZERS["adamw"](module)
    step(module, optimizer, 0)
    captured = components(module, optimizer)[1].capture()
    live = optimizer.state[module[0].weight]["exp_avg"]
    assert captured.tensors["optimizer", "state", "0.weight", "exp_avg"] is live


def test_groups_keep_all_hyper_parameters_and_empty_groups():
    def make(module: Net, lr: float) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [module[0].weight], "lr": lr, "tag": ("x", {1: 2}), "initial_lr": lr},
            {"params": []},
            {"params": [module[2].weight], "weight_decay": lr},
        ]
        return torch.optim.AdamW(groups, lr=0.5, betas=(0.8, 0.9))

    source, target = net(0), net(1)
    optimizer, restored = make(source, 0.1), make(target, 0.7)
    saved = in_memory.save(components(source, optimizer))
    in_memory.load(saved, components(target, restored))

    def hyper(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    assert hyper(restored) == hyper(optimizer)
    assert saved.stored().values["optimizer.param_groups"][1]["params"] == []


def test_a_tensor_learning_rate_is_filled_in_place():
    source, target = net(0), net(1)
    optimizer, restored = OPTIMIZERS["adamw-tensor-lr"](source), OPTIMIZERS["adamw-tensor-lr"](target)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    live = restored.param_groups[0]["lr"]
    in_memory.load(in_memory.save(components(source, optimizer)), components(target, restored))
    assert restored.param_groups[0]["lr"] is live
    assert live.item() == 0.25


def test_frozen_and_never_touched_parameters_fit():
    source, target = net(0), net(1)
    source[0].requires_grad_(False)
    optimizer, restored = OPTIMIZERS["adamw"](source), OPTIMIZERS["adamw"](target)
    step(source, optimizer, 0)
    step(target, restored, 0)  # has moments for the frozen part, which the checkpoint has not
    in_memory.load(in_memory.save(components(source, optimizer)), components(target, restored))
    assert target[0].weight not in restored.state
    assert set(restored.state) == {target[2].weight, target[2].bias}


def test_live_moments_are_filled_in_place():
    source, target = net(0), net(1)
    optimizer, restored = OPTIMIZERS["adamw"](source), OPTIMIZERS["adamw"](target)
    step(source, optimizer, 0)
    step(target, restored, 0)
    live = restored.state[target[0].weight]["exp_avg"]
    in_memory.load(in_memory.save(components(source, optimizer)), components(target, restored))
    assert restored.state[target[0].weight]["exp_avg"] is live


def test_stored_dtypes_are_kept():
    """torch's load_state_dict casts moments to the parameter's dtype."""
    source, target = net(0).to(torch.bfloat16), net(1).to(torch.bfloat16)
    optimizer, restored = OPTIMIZERS["adamw"](source), OPTIMIZERS["adamw"](target)
    weight = source[0].weight
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": torch.rand(4, 3), "count": 3}
    in_memory.load(in_memory.save(components(source, optimizer)), components(target, restored))
    state = restored.state[target[0].weight]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert state["count"] == 3


def test_state_of_lists_of_tensors_comes_back():
    source, target = net(0), net(1)

    def make(module: nn.Module) -> torch.optim.LBFGS:
        return torch.optim.LBFGS(module.parameters(), max_iter=3, history_size=2)

    def train(module: nn.Module, optimizer: torch.optim.LBFGS) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = module(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    optimizer, restored = make(source), make(target)
    train(source, optimizer)
    in_memory.load(in_memory.save(components(source, optimizer)), components(target, restored))
    train(source, optimizer)
    train(target, restored)
    assert_equal_parameters(source, target)


def test_the_implementation_of_this_process_is_kept_and_noted():
    source, target = net(0), net(1)
    optimizer, restored = OPTIMIZERS["adamw-fused"](source), OPTIMIZERS["adamw-foreach"](target)
    notes = in_memory.load(in_memory.save(components(source, optimizer)), components(target, restored))
    assert (restored.param_groups[0]["fused"], restored.param_groups[0]["foreach"]) == (None, True)
    assert any("kept foreach=True" in note for note in notes)


def found(saved: in_memory.InMemory, live: list[Component]) -> set[tuple[str, str]]:
    return {(problem.kind, problem.key) for problem in in_memory.problems_of(saved, live[1:])}


def stepped() -> tuple[in_memory.InMemory, Net]:
    module = net()
    optimizer = OPTIMIZERS["adamw"](module)
    step(module, optimizer, 0)
    return in_memory.save(components(module, optimizer)), module


def test_other_parameters_are_problems():
    saved, _ = stepped()
    module = net()
    live = components(module, torch.optim.AdamW([module[0].weight]))
    assert found(saved, live) == {
        ("unexpected", "optimizer.state.0.bias"),
        ("unexpected", "optimizer.state.2.weight"),
        ("unexpected", "optimizer.state.2.bias"),
    }
    groups: list[dict[str, Any]] = [{"params": module.parameters()}, {"params": []}]
    one_more = torch.optim.AdamW(groups)
    assert found(saved, components(module, one_more)) == {("other", "optimizer.param_groups")}


def test_partly_stored_moments_are_missing():
    saved, module = stepped()
    del saved.payloads["optimizer.state.2.bias.exp_avg_sq"]
    live = components(module, OPTIMIZERS["adamw"](module))
    assert found(saved, live) == {("missing", "optimizer.state.2.bias.exp_avg_sq")}


def test_a_checkpoint_without_the_optimizer_is_missing_it():
    module = net()
    saved = in_memory.save([ModelComponent(("model",), module)])
    assert found(saved, components(module, OPTIMIZERS["sgd"](module))) == {
        ("missing", "optimizer.param_groups")
    }


def test_parameters_without_a_model_are_refused():
    module, other = net(), net()
    with pytest.raises(StateError, match="belongs to no model"):
        components(module, OPTIMIZERS["sgd"](other))[1].capture()


def test_state_of_nothing_known_is_refused():
    module = net()
    optimizer = OPTIMIZERS["sgd"](module)
    optimizer.state[torch.zeros(1)] = {"lost": 1}
    with pytest.raises(StateError, match="not in its param_groups"):
        components(module, optimizer)[1].capture()


def test_capture_is_not_changed_by_later_scheduling():
    module = net()
    optimizer = OPTIMIZERS["sgd"](module)
    captured = components(module, optimizer)[1].capture()
    before = copy.deepcopy((captured.values, captured.stock))
    optimizer.param_groups[0]["lr"] = 5.0
    assert (captured.values, captured.stock) == before

"""A save in the middle of an accumulation is refused; at a step boundary none is, whatever the program."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dcp_ckpt import Checkpointer, TrainState
from dcp_ckpt.errors import StateError
from dcp_ckpt.state import accumulation
from dcp_ckpt.state.train_state import State, components_of, components_to_save
from tests.state import in_memory

INPUTS = torch.arange(8.0).reshape(2, 4) / 8


class Net(nn.Module):
    """More parameters than are remembered, one of them never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
        self.unused = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(inputs)
        return output


def weight(model: Net, layer: int) -> torch.Tensor:
    found = model.layers[layer].weight
    assert isinstance(found, torch.Tensor)
    return found


def backward(model: nn.Module, scale: float = 1.0) -> None:
    (model(INPUTS).square().mean() * scale).backward()


def save(state: State) -> None:
    in_memory.save(components_to_save(state))


def refused(state: State, name: str = r"layers\.\d\.(weight|bias)") -> None:
    with pytest.raises(StateError, match=rf"^{name} has gradients that no optimizer step has used") as raised:
        save(state)
    assert "zero_grad() before the save" in str(raised.value)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "one by one": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=False),
}


@pytest.mark.parametrize("to_none", [True, False], ids=["to none", "to zero"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_only_the_middle_of_an_accumulation_is_refused(make, to_none):
    model = Net()
    optimizer = make(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    save(state)
    for _ in range(3):
        backward(model)
        refused(state)
        backward(model)
        refused(state)
        optimizer.step()
        save(state)  # the gradients are still there
        gc.collect()
        save(state)
        optimizer.zero_grad(set_to_none=to_none)
        save(state)


def test_a_state_made_for_each_save_knows_of_the_steps_before():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    backward(model)
    optimizer.step()
    for _ in range(3):
        save(TrainState(model=model, optimizer=optimizer))
        backward(model)
        refused(TrainState(model=model, optimizer=optimizer))
        optimizer.step()
        save({"model": model, "optimizer": optimizer})
        optimizer.zero_grad()
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_plain_dictionary_is_looked_at_as_well():
    model, optimizer = Net(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state: dict[str, Any] = {"models": {"net": model}, "optimizer": optimizer}
    save(state)
    backward(model)
    refused(state)
    optimizer.step()
    save(state)


@pytest.mark.parametrize("is_told", [True, False], ids=["scaler in the state", "scaler elsewhere"])
def test_a_step_that_a_scaler_skips_is_a_boundary(is_told):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    state = TrainState(model=model, optimizer=optimizer, scaler=scaler if is_told else None)
    for number in range(7):
        optimizer.zero_grad()
        for _ in range(2):
            scaler.scale(model(INPUTS).square().mean()).backward()
            if number not in (0, 3, 5):  # the first, and those that follow a skipped step, may be in doubt
                refused(state)
        if number in (2, 4):
            gradient = weight(model, 4).grad
            assert gradient is not None
            gradient[0, 0] = float("inf")
        before = weight(model, 0).detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if is_told and number == 2:  # as on a rank where all is finite, since another one has the shard
            assert gradient is not None
            gradient.nan_to_num_(posinf=0.0)
        assert torch.equal(before, weight(model, 0)) == (number in (2, 4))
        save(state)


def test_a_scaler_that_is_off_changes_nothing():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    backward(model)
    refused(state)
    optimizer.step()
    save(state)


def test_several_optimizers_may_step_at_different_times():
    """A GAN: a step of the generator leaves gradients in the discriminator, whose next step forgets them."""
    generator, discriminator = Net(), Net()
    optimizers = {
        "g": torch.optim.Adam(generator.parameters(), lr=0.01),
        "d": torch.optim.Adam(discriminator.parameters(), lr=0.01),
    }
    state = TrainState(model={"g": generator, "d": discriminator}, optimizer=optimizers)
    for number in range(6):
        if number % 3 == 0:
            optimizers["d"].zero_grad()
            discriminator(generator(INPUTS).detach()).square().mean().backward()
            refused(state, r"d\.layers\.\d\.(weight|bias)")
            optimizers["d"].step()
            save(state)
        optimizers["g"].zero_grad()
        discriminator(generator(INPUTS)).square().mean().backward()
        refused(state, r"[gd]\.layers\.\d\.(weight|bias)")
        optimizers["g"].step()
        save(state)


def test_optimizers_that_step_in_the_backward_leave_nothing_to_refuse():
    model = Net()
    optimizers = {name: torch.optim.SGD([p], lr=0.01) for name, p in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[names[id(parameter)]].step()
        optimizers[names[id(parameter)]].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    state = TrainState(model=model, optimizer={n.replace(".", "/"): o for n, o in optimizers.items()})
    for _ in range(3):
        backward(model)
        save(state)


def test_frozen_layers_and_parameters_of_no_optimizer_do_not_matter():
    model = Net()
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for layer in list(model.layers)[:5] for p in layer.parameters()], lr=0.01)
    state = TrainState(model=model, optimizer=optimizer)
    for _ in range(3):
        save(state)  # those of the other layers pile up, and nobody steps them
        backward(model)
        refused(state)
        optimizer.step()
        optimizer.zero_grad()
    save(TrainState(model=model))


def test_layers_that_thaw_are_looked_at_sooner_or_later(monkeypatch):
    monkeypatch.setattr(accumulation, "_RENEWAL_STEPS", 4)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer)
    layers = list(model.layers)
    for frozen in (layers[:8], layers[1:]):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for layer in frozen:
            layer.requires_grad_(False)
        for _ in range(5):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        backward(model)
        refused(state)
        optimizer.zero_grad()


def test_parameters_of_every_kind_can_be_watched(caplog):
    model = Net()
    model.lazy = nn.LazyLinear(3)
    with torch.inference_mode():
        model.fixed = nn.Linear(4, 4)
    model.fixed.requires_grad_(False)
    state = TrainState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    model.lazy(INPUTS)
    save(state)
    backward(model)
    refused(state)
    assert caplog.text == ""


def test_a_tensor_that_cannot_be_watched_breaks_no_step(monkeypatch, caplog):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer)

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no storage")

    monkeypatch.setattr(accumulation, "_own_part", refuse)
    backward(model)
    optimizer.step()
    assert "are not seen" in caplog.text
    backward(model)
    save(state)


def test_sparse_gradients_are_gradients():
    model = nn.EmbeddingBag(10, 3, mode="sum", sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer)
    for _ in range(3):
        model(torch.tensor([[1, 2]])).sum().backward()
        refused(state, "weight")
        optimizer.step()
        save(state)
        optimizer.zero_grad()


class Twice(torch.optim.Optimizer):
    """Steps in two halves of its own (as SAM does), so no hook of its `step()` ever runs."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def second_half(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad


class NoHooks(torch.optim.Optimizer):
    """A wrapper that is an optimizer in name only."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step()


def test_steps_that_cannot_be_seen_make_no_false_alarm():
    model = Net()
    halves = Twice(model.parameters())
    hidden = NoHooks(torch.optim.SGD(model.parameters(), lr=0.01))
    for optimizer, step in ((halves, halves.second_half), (hidden, hidden.step)):
        train_with(model, optimizer, step)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_step_makes_no_false_alarm():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    train_with(model, optimizer, torch.compile(optimizer.step, backend="eager"))


def train_with(model: Net, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> None:
    """Steps and saves, with the gradients of each step still there."""
    state = TrainState(model=model, optimizer=optimizer)
    for _ in range(3):
        model.zero_grad()
        backward(model)
        step()
        save(state)


def test_a_closure_may_run_several_backwards_in_one_step():
    model = Net()
    optimizer = torch.optim.LBFGS(model.layers.parameters(), max_iter=3)
    state = TrainState(model=model, optimizer=optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(INPUTS).square().mean()
        loss.backward()
        return float(loss.detach())

    for _ in range(2):
        optimizer.step(closure)
        save(state)


def test_gradients_from_before_a_load_are_those_of_nobody():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = TrainState(model=model, optimizer=optimizer)
    saved = in_memory.save(components_to_save(state))
    backward(model)
    refused(state)
    in_memory.load(saved, components_of(state))
    save(state)
    backward(model)
    refused(state)


def test_a_scale_that_is_loaded_back_is_no_step_that_was_skipped():
    model = Net()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(model=model, optimizer=optimizer, scaler=scaler)
    scaler.scale(model(INPUTS).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    saved = in_memory.save(components_to_save(state))
    in_memory.load(saved, components_of(state))
    optimizer.zero_grad()
    scaler.scale(model(INPUTS).square().mean()).backward()
    refused(state)


def test_nothing_is_kept_alive():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    backward(model)
    optimizer.step()
    components_to_save(state)
    (watch,) = optimizer._optimizer_step_post_hooks.values()
    assert isinstance(watch, accumulation.StepWatch)
    assert weight(model, 0).grad is not None
    gradient: Any = weakref.ref(weight(model, 0).grad)
    model.zero_grad()
    assert gradient() is None
    parameter = weakref.ref(weight(model, 0))
    stepper = weakref.ref(optimizer)
    del model, optimizer, state
    gc.collect()
    assert parameter() is None
    assert stepper() is None
    assert watch.pending() is None


def test_the_save_fails_by_name_and_the_next_one_succeeds(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer)
    with Checkpointer(tmp_path) as checkpointer:
        backward(model)
        assert checkpointer.load(state) is None, "making ready to save is no save"
        failed = checkpointer.save(state, step=1)
        with pytest.raises(StateError, match=r"layers\..* has gradients that no optimizer step has used"):
            failed.result(30)
        optimizer.step()
        assert checkpointer.save(state, step=1).result(30).step == 1

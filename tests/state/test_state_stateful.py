from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dcp_ckpt.errors import LoadError, StateError
from dcp_ckpt.state import DictComponent, StatefulComponent, components_of
from tests.state import in_memory


class Counter:
    def __init__(self, count: Any = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Refusing(Counter):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError("not today")


def sgd(lr: Any = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr, momentum=0.9)


SCHEDULERS: dict[str, Any] = {
    "multistep": lambda: lr_scheduler.MultiStepLR(sgd(), [2, 2, 5]),
    "onecycle": lambda: lr_scheduler.OneCycleLR(sgd(), max_lr=0.3, total_steps=20),
    "lambda": lambda: lr_scheduler.LambdaLR(sgd(), lambda epoch: 1 / (epoch + 1)),
    "tensor-lr": lambda: lr_scheduler.ExponentialLR(sgd(torch.tensor(0.1)), 0.9),
    "plateau": lambda: lr_scheduler.ReduceLROnPlateau(sgd()),
    "sequential": lambda: (
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            milestones=[2],
        )
    )(sgd()),
}


def advance(scheduler: Any, num_steps: int) -> list[float]:
    rates = []
    for _ in range(num_steps):
        scheduler.optimizer.step()
        scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
        rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_continue_exactly(kind):
    source, target = SCHEDULERS[kind](), SCHEDULERS[kind]()
    advance(source, 4)
    in_memory.load(in_memory.save([StatefulComponent(("s",), source)]), [StatefulComponent(("s",), target)])
    for group, restored in zip(source.optimizer.param_groups, target.optimizer.param_groups, strict=True):
        restored.update({k: copy.deepcopy(v) for k, v in group.items() if k != "params"})
    assert target.state_dict() == source.state_dict()
    assert advance(source, 8) == advance(target, 8)


def test_a_grad_scaler_comes_back():
    source, target = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu")
    in_memory.load(in_memory.save([StatefulComponent(("s",), source)]), [StatefulComponent(("s",), target)])
    assert target.state_dict() == source.state_dict()


def test_nothing_stored_is_missing():
    (problem,) = in_memory.problems_of(in_memory.InMemory(), [StatefulComponent(("scaler",), Counter())])
    assert (problem.kind, problem.key) == ("missing", "scaler")


def test_a_refusal_names_the_key_and_keeps_the_cause():
    saved = in_memory.save([StatefulComponent(("s",), Counter())])
    with pytest.raises(LoadError, match=r"s: Refusing.*not today") as caught:
        in_memory.load(saved, [StatefulComponent(("s",), Refusing())])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_dictionary_is_loaded_in_place():
    def make(value: int) -> dict[str, Any]:
        return {
            "history": [float(value)] * value,
            "weights": torch.full((2,), float(value)),
            "inside": {"step": value, "counter": Counter(value), "none": None if value else {}},
            "pair": [torch.full((2,), float(value)), value],
            "ints": {value: value},
            "seen": {value},
        }

    live = make(1)
    objects = dict(live)
    tensor = live["pair"][0]
    counter = live["inside"]["counter"]
    saved = in_memory.save([DictComponent(("extra",), make(3))])
    in_memory.load(saved, [DictComponent(("extra",), live)])
    for key in ("history", "weights", "inside", "pair", "ints", "seen"):
        assert live[key] is objects[key]
    assert live["history"] == [3.0] * 3
    assert live["weights"].tolist() == [3.0, 3.0]
    assert live["inside"]["step"] == 3
    assert live["inside"]["counter"] is counter
    assert counter.count == 3
    assert live["pair"][0] is tensor
    assert tensor.tolist() == [3.0, 3.0]
    assert (live["ints"], live["seen"]) == ({3: 3}, {3})


def test_an_empty_dictionary_inside_takes_what_is_stored():
    saved = in_memory.save([DictComponent(("extra",), {"best": {"loss": 0.5, "t": torch.ones(2)}})])
    best: dict[str, Any] = {}
    in_memory.load(saved, [DictComponent(("extra",), {"best": best})])
    assert best["loss"] == 0.5
    assert torch.equal(best["t"], torch.ones(2))


def test_keys_on_one_side_only_are_problems():
    saved = in_memory.save([DictComponent(("extra",), {"a": 1, "t": torch.ones(1), "both": 1})])
    live = DictComponent(("extra",), {"b": 1, "both": torch.ones(1)})
    found = {(problem.kind, problem.key) for problem in in_memory.problems_of(saved, [live])}
    assert found == {
        ("unexpected", "extra.a"),
        ("unexpected", "extra.t"),
        ("missing", "extra.b"),
        ("other", "extra.both"),
    }


def test_a_plain_dictionary_may_hold_modules_and_optimizers():
    def make() -> dict[str, Any]:
        module = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return {"optimizer": optimizer, "model": module, "step": 3, "raw": nn.Linear(1, 1).state_dict()}

    source, target = make(), make()
    saved = in_memory.save(components_of(source))
    assert {"model.weight", "optimizer.state.weight.momentum_buffer", "raw.bias", "step"} <= saved.names
    in_memory.load(saved, components_of(target))
    assert torch.equal(target["model"].weight, source["model"].weight)
    assert torch.equal(target["raw"]["weight"], source["raw"]["weight"])


def test_names_of_objects_and_entries_may_not_collide():
    with pytest.raises(StateError, match=r"model\.weight"):
        in_memory.save(components_of({"model": nn.Linear(1, 1), "model.weight": 1}))


def test_keys_at_the_top_must_be_strings():
    with pytest.raises(StateError, match="keys at this level"):
        in_memory.save(components_of({1: 2}))  # type: ignore[dict-item]

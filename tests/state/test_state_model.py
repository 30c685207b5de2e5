from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dcp_ckpt.state import ModelComponent
from tests.state import in_memory


def net(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)).to(torch.bfloat16)


def component(module: nn.Module) -> ModelComponent:
    return ModelComponent(("model",), module)


class WithExtra(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_capture_holds_the_live_tensors():
    module = net(0)
    captured = component(module).capture()
    expected = {("model", name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    assert captured.tensors.keys() == expected.keys()
    assert all(captured.tensors[path] is expected[path] for path in expected)


def test_round_trip_fills_the_live_tensors_in_place():
    source, target = net(0), net(1)
    source[1].num_batches_tracked += 3
    addresses = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    in_memory.load(in_memory.save([component(source)]), [component(target)])
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])
        assert tensor.data_ptr() == addresses[name]


def test_extra_state_comes_back_with_and_without_tensors():
    source = nn.Sequential(WithExtra({"scale": [torch.ones(2), 1], "n": 1}), WithExtra({4: "x"}))
    saved = in_memory.save([component(source)])
    assert "model.1._extra_state" in saved.values
    target: Any = nn.Sequential(WithExtra(None), WithExtra(None))
    in_memory.load(saved, [component(target)])
    assert torch.equal(target[0].extra["scale"][0], torch.ones(2))
    assert target[0].extra["n"] == 1
    assert target[1].extra == {4: "x"}


def test_everything_that_does_not_fit_is_reported_at_once():
    saved = in_memory.save([component(nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}))])
    live = component(nn.ModuleDict({"a": nn.Linear(1, 1), "c": WithExtra(1)}))
    found = {(problem.kind, problem.key) for problem in in_memory.problems_of(saved, [live])}
    assert found == {
        ("unexpected", "model.b.weight"),
        ("unexpected", "model.b.bias"),
        ("missing", "model.c.weight"),
        ("missing", "model.c.bias"),
        ("missing", "model.c._extra_state"),
    }


def tied(first: str, second: str) -> Any:
    modules = nn.ModuleDict({first: nn.Linear(2, 2, bias=False), second: nn.Linear(2, 2, bias=False)})
    modules[second].weight = modules[first].weight
    return modules


def test_tied_weights_are_stored_once_and_found_under_either_name():
    saved = in_memory.save([component(tied("wte", "head"))])
    assert saved.names == {"model.wte.weight"}
    target = tied("head", "wte")
    in_memory.load(saved, [component(target)])
    assert torch.equal(target["head"].weight, saved.payloads["model.wte.weight"])


def test_a_checkpoint_that_stores_both_names_of_a_tied_weight_fits():
    untied = nn.ModuleDict({"wte": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    assert in_memory.problems_of(in_memory.save([component(untied)]), [component(tied("wte", "head"))]) == []

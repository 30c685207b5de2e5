from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from dcp_ckpt.errors import StateError
from dcp_ckpt.state.names import ModuleNames


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)  # a real submodule with a wrapper's name
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.norm(self.module(x))


def names(module: nn.Module) -> list[str]:
    return [entry.name for entry in ModuleNames(module).tensors()]


def test_plain_names_are_those_of_the_state_dict():
    net = Net()
    assert set(names(net)) == set(net.state_dict())
    assert "module.weight" in names(net)
    assert "scratch" not in names(net)


def test_wrappers_vanish_in_any_nesting(process_group):
    net = Net()
    plain = names(net)
    net.module = checkpoint_wrapper(net.module)  # type: ignore[assignment]
    assert names(net) == plain
    wrapped: Any = torch.compile(nn.parallel.DistributedDataParallel(net), backend="eager")
    assert names(wrapped) == plain
    compiled: Any = torch.compile(net, backend="eager")
    assert names(nn.parallel.DistributedDataParallel(compiled)) == plain


def test_wrapper_names_on_other_modules_survive():
    net = nn.Module()
    net._orig_mod = nn.Linear(1, 1, bias=False)
    net._checkpoint_wrapped_module = nn.Linear(1, 1, bias=False)
    assert names(net) == ["_orig_mod.weight", "_checkpoint_wrapped_module.weight"]


def test_collision_between_wrapper_and_wrapped_is_refused():
    wrapper = checkpoint_wrapper(nn.Linear(2, 2))
    wrapper._parameters["weight"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(StateError, match="weight"):
        names(wrapper)


def test_tied_parameters_are_named_once_and_keep_their_aliases():
    net = nn.ModuleDict({"wte": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    net["head"].weight = net["wte"].weight
    (entry,) = ModuleNames(net).tensors()
    assert (entry.name, entry.aliases) == ("wte.weight", ("head.weight",))


def test_a_shared_module_is_named_once():
    layer = nn.Linear(2, 2, bias=False)
    (entry,) = ModuleNames(nn.Sequential(layer, layer)).tensors()
    assert (entry.name, entry.aliases) == ("0.weight", ("1.weight",))


def test_changes_of_the_tree_and_of_tensors_are_seen():
    net: Any = nn.Sequential(nn.Linear(2, 2, bias=False))
    walk = ModuleNames(net)
    walk.tensors()
    net[0].weight = nn.Parameter(torch.ones(2, 2))
    assert walk.tensors()[0].tensor is net[0].weight
    net.append(nn.Linear(2, 1))
    assert [e.name for e in walk.tensors()] == ["0.weight", "1.weight", "1.bias"]
    net[1].bias = None
    net[0].register_buffer("mask", torch.ones(1))
    assert [e.name for e in walk.tensors()] == ["0.weight", "0.mask", "1.weight"]
    net[0].register_buffer("mask", torch.ones(1), persistent=False)
    assert [e.name for e in walk.tensors()] == ["0.weight", "1.weight"]


@pytest.mark.filterwarnings("ignore")  # torch deprecates FSDP1
@pytest.mark.parametrize("use_orig_params", [True, False], ids=["original", "flat"])
def test_fsdp1_is_refused_with_advice_wherever_it_is(process_group, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    part = FullyShardedDataParallel(
        nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    for net, where in (
        (part, r"\(root\)"),
        (nn.Sequential(nn.Tanh(), checkpoint_wrapper(part)), "module 1 "),
    ):
        with pytest.raises(StateError, match=rf"{where}.*fully_shard"):
            names(net)


def test_data_parallel_vanishes_and_an_average_keeps_its_module():
    net = Net()
    assert names(nn.DataParallel(net)) == names(net)
    for wrapped in (net, nn.DataParallel(net), checkpoint_wrapper(net)):
        average = AveragedModel(wrapped)
        assert set(names(average)) == {"n_averaged", *(f"module.{name}" for name in names(net))}

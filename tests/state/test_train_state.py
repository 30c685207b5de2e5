from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from dcp_ckpt.data import ElasticSampler
from dcp_ckpt.errors import ConfigError, StateError
from dcp_ckpt.state import ModelParts, TrainState, components_of
from tests.state import in_memory


def make(seed: int, **kwargs: Any) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50),
        scaler=torch.amp.GradScaler("cpu"),
        dataloader=ElasticSampler(64, 8, 0, 1, seed),
        extra={"loss_history": []},
        per_rank={"mine": seed},
        **kwargs,
    )


def train(state: Any, num_steps: int) -> None:
    batches = iter(state.dataloader)
    for _ in range(num_steps):
        inputs = torch.tensor(next(batches), dtype=torch.float32).reshape(2, 4) / 64
        loss = state.model(inputs).square().mean() * (1 + random.random())
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.lr_scheduler.step()
        state.extra["loss_history"].append(loss.item())


def test_a_run_resumed_from_all_its_state_is_bit_identical():
    source: Any = make(0)
    target: Any = make(1)
    train(source, 5)
    saved = in_memory.save(components_of(source))
    train(source, 5)
    train(target, 2)
    history = target.extra["loss_history"]
    in_memory.load(saved, components_of(target))
    train(target, 5)
    assert history == source.extra["loss_history"]
    for a, b in zip(source.model.parameters(), target.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_numbers_come_last_in_load_order():
    prefixes = [component.prefix[0] for component in make(0).components()]
    assert prefixes == [
        "model", "scaler", "optimizer", "lr_scheduler", "dataloader", "extra", "per_rank", "rng",
    ]  # fmt: skip
    assert "rng" not in {component.prefix[0] for component in make(0, rng=False).components()}


def test_several_models_and_optimizers_have_names_of_their_own():
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    shared = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1, momentum=0.9)
    state = TrainState(model={"a": a, "b": b}, optimizer=[shared], rng=False)
    (a.weight.sum() + b.weight.sum()).backward()
    shared.step()
    names = in_memory.save(components_of(state)).names
    assert {"model.a.weight", "model.b.bias", "optimizer.0.param_groups"} <= names
    assert "optimizer.0.state.b.weight.momentum_buffer" in names
    sequence = in_memory.save(TrainState(model=[a, b], rng=False).components())
    assert sequence.names == {"model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"}


class Nested(nn.Module):
    """A module with a parameter of its own beside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = nn.Linear(1, 1, bias=False)


def test_keys_may_be_module_names_that_begin_like_each_other():
    """One optimizer and scheduler for each module's own parameters."""

    def make(lr: float) -> Any:
        torch.manual_seed(0)
        model = nn.ModuleDict({"block": Nested()})
        own: dict[str, list[nn.Parameter]] = {
            name: list(module.parameters(recurse=False)) for name, module in model.named_modules()
        }
        optimizers = {
            name: torch.optim.SGD(p, lr=lr * len(name), momentum=0.9) for name, p in own.items() if p
        }
        schedulers = {
            name: torch.optim.lr_scheduler.StepLR(one, len(name)) for name, one in optimizers.items()
        }
        return TrainState(model=model, optimizer=optimizers, lr_scheduler=schedulers, rng=False)

    source, target = make(0.1), make(0.7)
    assert list(source.optimizer) == ["block", "block.inner"]
    for parameter in source.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    for optimizer in source.optimizer.values():
        optimizer.step()
    source.lr_scheduler["block.inner"].last_epoch = 5
    in_memory.load(in_memory.save(source.components()), target.components())
    for name in source.optimizer:
        for key in ("state", "param_groups"):
            assert target.optimizer[name].state_dict()[key] == source.optimizer[name].state_dict()[key]
        assert target.lr_scheduler[name].state_dict() == source.lr_scheduler[name].state_dict()


def test_a_parameter_of_two_optimizers_has_its_state_in_each():
    def make() -> Any:
        model = nn.Linear(1, 1, bias=False)
        optimizers = {
            "slow": torch.optim.AdamW(model.parameters(), lr=0.1),
            "fast": torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5),
        }
        return TrainState(model=model, optimizer=optimizers, rng=False)

    source, target = make(), make()
    source.model.weight.grad = torch.ones(1, 1)
    for optimizer in source.optimizer.values():
        optimizer.step()
    in_memory.load(in_memory.save(source.components()), target.components())
    assert target.optimizer["slow"].state[target.model.weight]["step"] == 1
    assert torch.equal(
        target.optimizer["fast"].state[target.model.weight]["momentum_buffer"], torch.ones(1, 1)
    )


def test_parts_of_a_model_make_one_space_of_names():
    first, second = (nn.ModuleDict({"layers": nn.ModuleDict({key: nn.Linear(1, 1)})}) for key in "05")
    state = TrainState(model=ModelParts([first, second]), rng=False)
    assert in_memory.save(state.components()).names == {
        "model.layers.0.weight", "model.layers.0.bias", "model.layers.5.weight", "model.layers.5.bias",
    }  # fmt: skip
    with pytest.raises(StateError, match=r"two tensors of the model have the name 'layers\.0\.weight'"):
        TrainState(
            model=ModelParts([first, nn.ModuleDict({"layers": nn.ModuleDict({"0": nn.Linear(1, 1)})})])
        ).components()


def test_a_model_container_is_one_model():
    state = TrainState(model=nn.ModuleList([nn.Linear(1, 1, bias=False)]), rng=False)
    assert in_memory.save(state.components()).names == {"model.0.weight"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": 3},
        {"model": [nn.Linear(1, 1), "x"]},
        {"model": nn.Linear(1, 1), "lr_scheduler": object()},
        {"model": nn.Linear(1, 1), "scaler": object()},
        {"model": {"1": nn.Linear(1, 1), 1: nn.Linear(1, 1)}},
    ],
    ids=["model", "part", "scheduler", "scaler", "repeated"],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ConfigError):
        TrainState(**arguments).components()


def test_other_states_are_refused():
    with pytest.raises(ConfigError, match="TrainState or a dict"):
        components_of([1])  # type: ignore[arg-type]


def test_an_optimizer_made_before_the_parameters_were_replaced_is_refused():
    model = nn.Linear(1, 1)
    state = TrainState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    in_memory.save(state.components())
    model.weight = nn.Parameter(torch.ones(1, 1))
    with pytest.raises(StateError, match="belongs to no model"):
        in_memory.save(state.components())


def sharded(seed: int) -> TrainState:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    fully_shard(model[0])
    fully_shard(model)
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1))


def run_sharded(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        source: Any = sharded(0)
        target: Any = sharded(1)

        def step(state: Any, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed + rank)
            state.optimizer.zero_grad()
            state.model(torch.randn(3, 4, generator=generator)).square().sum().backward()
            state.optimizer.step()

        step(source, 0)
        with torch.no_grad():
            source.model(torch.ones(1, 4))  # leaves the root unsharded
        components = source.components()
        moment = components[1].capture().tensors["optimizer", "state", "0.weight", "exp_avg"]
        weights = components[0].capture().tensors
        assert isinstance(moment, DTensor)
        assert all(isinstance(tensor, DTensor) for tensor in weights.values())
        with torch.no_grad():
            target.model(torch.ones(1, 4))
        in_memory.load(in_memory.save(components, world_size=2), target.components(), rank=rank, world_size=2)
        restored = target.optimizer.state[target.model[1].weight]["exp_avg"]
        assert isinstance(restored, DTensor)
        assert restored.placements == moment.placements
        step(source, 2)
        step(target, 2)
        for a, b in zip(source.model.parameters(), target.model.parameters(), strict=True):
            assert torch.equal(a.full_tensor(), b.full_tensor())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_fsdp2_state_is_captured_and_restored_sharded(tmp_path):
    spawn(run_sharded, args=(f"{tmp_path}/rendezvous",), nprocs=2)

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from dcp_ckpt.errors import ConfigError, StateError
from dcp_ckpt.state import ElasticSampler, TrainState, components_of
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
        "model", "optimizer", "lr_scheduler", "scaler", "dataloader", "extra", "per_rank", "rng",
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

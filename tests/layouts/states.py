"""Small states of two stages, and what is wrong with some of them. Programs of the ranks of the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from dcp_ckpt import CheckpointConfig, Checkpointer, MeshRoles, TrainState, load_checkpoint
from dcp_ckpt.errors import CheckpointError
from tests.layouts.models import same_bits

__all__ = ["STEP", "Part", "load_right", "load_unfit", "save_outside", "save_right", "save_wrong"]

CONFIG = CheckpointConfig(keep=None, timeout_seconds=20.0)
STEP = "step-00000001"
RATE = 0.1


class Part(nn.Module):
    """The layers that a rank has; the same name means the same numbers, whoever has it."""

    def __init__(self, *names: str, seed: int = 0) -> None:
        super().__init__()
        for name in names:
            torch.manual_seed(seed + sum(map(ord, name)))
            self.register_module(name, nn.Linear(3, 3))


class Place:
    """Where this rank stands: two stages, each on as many ranks as there are for it."""

    def __init__(self) -> None:
        self.mesh: DeviceMesh = init_device_mesh(
            "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp")
        )
        self.stage: int = self.mesh.get_local_rank("pp")

    def roles(self, **shared: tuple[int, ...]) -> MeshRoles:
        named = {f"{name}.{kind}": stages for name, stages in shared.items() for kind in ("weight", "bias")}
        return MeshRoles(mesh=self.mesh, data=("dp",), pipeline=("pp",), shared=named)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """After one step along gradients that follow from shapes alone."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def of_stage(place: Place, *names: str, seed: int = 0, lr: float = RATE, **settings: Any) -> Any:
    """A state in which each stage has a layer of its own, and others by name."""
    model = Part(f"own{place.stage}", *names, seed=seed)
    optimizer = stepped(torch.optim.AdamW(model.parameters(), lr=lr))
    settings.setdefault("mesh_roles", place.roles())
    return TrainState(model=model, optimizer=optimizer, rng=False, **settings)


# States that cannot be saved.


def other_learning_rate(place: Place) -> Any:
    return of_stage(place, lr=RATE + place.stage)


def drifted_within_a_stage(place: Place) -> Any:
    state = of_stage(place)
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            state.model.own1.bias += 1
    return state


def drifted_on_all_ranks(place: Place) -> Any:
    return of_stage(place, extra={"note": dist.get_rank()})


def undeclared(place: Place) -> Any:
    return of_stage(place, "both")


def tied_to_the_name_of_another_stage(place: Place) -> Any:
    """The first stage has the name of a layer of the last one as another name of its own layer."""
    state = of_stage(place)
    if place.stage == 0:
        state.model.own1 = state.model.own0
    return state


def declared_and_different(place: Place) -> Any:
    return of_stage(place, "both", seed=place.stage, mesh_roles=place.roles(both=(0, 1)))


def without_roles(place: Place) -> Any:
    return of_stage(place, mesh_roles=None)


def a_partial_sum(place: Place) -> Any:
    return of_stage(place, extra={"sum": DTensor.from_local(torch.ones(3), place.mesh["dp"], [Partial()])})


WRONG: Mapping[str, Callable[[Place], Any]] = {
    make.__name__: make
    for make in (
        other_learning_rate,
        drifted_within_a_stage,
        drifted_on_all_ranks,
        undeclared,
        tied_to_the_name_of_another_stage,
        declared_and_different,
        without_roles,
        a_partial_sum,
    )
}


def save_wrong(base: str) -> dict[str, str]:
    """What each of the states above is refused with, on this rank, after one that is right."""
    place = Place()
    found = {}
    with Checkpointer(base, config=CONFIG) as checkpointer:
        saved(checkpointer, of_stage(place), 0)
        for step, (name, make) in enumerate(WRONG.items(), 1):
            found[name] = refusal(partial(saved, checkpointer, make(place), step))
    return found


def saved(checkpointer: Checkpointer, state: Any, step: int) -> None:
    checkpointer.save(state, step=step).result(30)


def refusal(act: Callable[[], object]) -> str:
    """What is said against it; empty where it is done."""
    try:
        act()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


# States that can be saved, though parts of the model have something in common or lack something.


def one_embedding(place: Place, seed: int) -> Any:
    """A layer that both stages use."""
    return of_stage(place, "both", seed=seed, mesh_roles=place.roles(both=(0, 1)))


def one_sharded_embedding(place: Place, seed: int) -> Any:
    """The same, and FSDP shards it on each of them."""
    model = Part(f"own{place.stage}", "both", seed=seed)
    fully_shard(model, mesh=place.mesh["dp"])
    optimizer = stepped(torch.optim.AdamW(model.parameters(), lr=RATE))
    roles = place.roles(both=(0, 1))
    return TrainState(model=model, optimizer=optimizer, rng=False, mesh_roles=roles)


def nothing_on_the_last_stage(place: Place, seed: int) -> Any:
    if place.stage == 0:
        return of_stage(place, "both", seed=seed)
    return TrainState(model=nn.Module(), rng=False, mesh_roles=place.roles())


def untrained_on_the_last_stage(place: Place, seed: int) -> Any:
    if place.stage == 0:
        return of_stage(place, seed=seed)
    return TrainState(model=Part("own1", seed=seed), rng=False, mesh_roles=place.roles())


def a_rate_that_is_a_tensor(place: Place, seed: int) -> Any:
    state = of_stage(place, seed=seed)
    optimizer: Any = state.optimizer
    optimizer.param_groups[0]["lr"] = torch.tensor(RATE + seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    return replace(state, lr_scheduler=scheduler)


RIGHT: Mapping[str, Callable[[Place, int], Any]] = {
    make.__name__: make
    for make in (
        one_embedding,
        one_sharded_embedding,
        nothing_on_the_last_stage,
        untrained_on_the_last_stage,
        a_rate_that_is_a_tensor,
    )
}


def save_right(base: str) -> None:
    """Each of them twice: nothing has changed, so the second save shares the files of the first."""
    place = Place()
    for name, make in RIGHT.items():
        with Checkpointer(Path(base, name), config=replace(CONFIG, reuse=True)) as checkpointer:
            saved(checkpointer, make(place, 0), step=1)
            saved(checkpointer, make(place, 0), step=2)


def load_right(base: str, step: str) -> list[str]:
    """What is not as it was after loading each of them into a state that starts out different."""
    place = Place()
    found = []
    for name, make in RIGHT.items():
        state, right = make(place, 1), make(place, 0)
        load_checkpoint(Path(base, name, step), state, config=CONFIG)
        loaded, expected = tensors_of(state), tensors_of(right)
        assert loaded.keys() == expected.keys()
        found += [f"{name}: {key}" for key in loaded if not same_bits(loaded[key], expected[key])]
    return found


def tensors_of(state: Any) -> dict[str, torch.Tensor]:
    found = dict(state.model.named_parameters())
    if state.optimizer is not None:
        for name, parameter in state.model.named_parameters():
            found |= {f"{name}/{key}": moment for key, moment in state.optimizer.state[parameter].items()}
        found["lr"] = torch.as_tensor(state.optimizer.param_groups[0]["lr"])
    return found


# What does not fit when stages load.


def load_unfit(base: str) -> dict[str, tuple[str, bool]]:
    """How a pipelined load is refused that lacks something or leaves something over, and what it left."""
    place = Place()
    layers = {"more": ("own0", "own1", "over"), "less": ("own0",)}
    found = {}
    for name, names in layers.items():
        model = Part(*names)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Checkpointer(Path(base, name), config=CONFIG) as checkpointer:
            saved(checkpointer, TrainState(model=model, optimizer=optimizer, rng=False), step=1)
        state = of_stage(place, seed=1)
        before = {key: tensor.clone() for key, tensor in tensors_of(state).items()}
        refused = refusal(partial(load_checkpoint, Path(base, name, STEP), state, config=CONFIG))
        after = tensors_of(state)
        found[name] = refused, all(same_bits(after[key], before[key]) for key in before)
    return found


def save_outside(base: str) -> str:
    """Ranks 0 and 1 of 4 save; one of their tensors is spread over the others, too."""
    group = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (4,))
    spread = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)], src_data_rank=None)
    if dist.get_rank() > 1:
        return ""
    with Checkpointer(base, config=CONFIG, process_group=group) as checkpointer:
        return refusal(partial(saved, checkpointer, {"spread": spread}, 1))

"""Whatever wraps a model when it is saved, it loads into every other wrapping, by the plain model's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint, open_checkpoint
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

WORLD_SIZE = 2


class Block(nn.Module):
    """Its parts are called as wrappers call theirs."""

    calls: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.module = nn.Linear(width, width)
        self._orig_mod = nn.LayerNorm(width)
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = inputs + self._orig_mod(self.module(inputs)).tanh() + self.calls.sum()
        return output


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.Linear(3, 5)
        self.layers = nn.Sequential(Block(5), Block(5))
        with torch.no_grad():
            for buffer in self.buffers():
                buffer.uniform_()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(self.module(inputs))
        return output


NAMES = [name for name, _ in Net(0).named_parameters()]
BUFFERS = [name for name, _ in Net(0).named_buffers()]


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def each_block(net: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers: Any = net.layers
    for index, block in enumerate(layers):
        layers[index] = wrap(block)
    return net


def checkpointed(net: nn.Module) -> nn.Module:
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, Block))
    return net


def sharded(net: Any) -> nn.Module:
    for layer in net.layers:
        fully_shard(layer)
    fully_shard(net)
    return net  # type: ignore[no-any-return]


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "ddp": DistributedDataParallel,
    "fsdp": sharded,
    "compile": compiled,
    "compile in place": compiled_in_place,
    "checkpointed": checkpointed,
    "ddp(compile)": lambda net: DistributedDataParallel(compiled(net)),
    "compile(ddp)": lambda net: compiled(DistributedDataParallel(net)),
    "ac(compile)": lambda net: each_block(net, lambda block: checkpoint_wrapper(compiled(block))),
    "compile(fsdp(ac))": lambda net: compiled(sharded(each_block(net, checkpoint_wrapper))),
}


def make(kind: str, seed: int) -> TrainState:
    model = WRAPPINGS[kind](Net(seed))
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), rng=False)


def train(state: Any, num_steps: int) -> None:
    inputs = torch.arange(12.0).reshape(4, 3)
    for _ in range(num_steps):
        state.model(inputs).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()


def content(state: Any) -> dict[str, str]:
    """Fingerprints by the names that the plain model has at the same places; wrappers keep the order."""
    parameters = dict(zip(NAMES, state.model.parameters(), strict=True))
    buffers = dict(zip(BUFFERS, state.model.buffers(), strict=True))
    found = {name: worlds.fingerprint(tensor) for name, tensor in (parameters | buffers).items()}
    for name, parameter in parameters.items():
        for key, moment in state.optimizer.state[parameter].items():
            found[f"{name}/{key}"] = worlds.fingerprint(moment)
    return found


def step_dir(root: str, kind: str) -> str:
    return f"{root}/step-{list(WRAPPINGS).index(kind):08}"


def save_each(root: str) -> dict[str, dict[str, str]]:
    saved = {}
    with Checkpointer(root, config=worlds.config()) as checkpointer:
        for step, kind in enumerate(WRAPPINGS):
            state = make(kind, seed=step)
            train(state, 2)
            checkpointer.save(state, step=step).result(30)
            saved[kind] = content(state)
    return saved


def load_each(root: str) -> dict[tuple[str, str], dict[str, str]]:
    found = {}
    for kind in WRAPPINGS:
        state = make(kind, seed=99)
        train(state, 1)
        for source in WRAPPINGS:
            load_checkpoint(step_dir(root, source), state)
            found[source, kind] = content(state)
            train(state, 1)
    return found


def test_every_wrapping_loads_into_every_other(pool, tmp_path):
    saved, *others = pool.run(save_each, WORLD_SIZE, str(tmp_path), timeout_seconds=120)
    assert all(other == saved for other in others)
    assert len(saved["plain"]) == len(NAMES) * 4 + len(BUFFERS)
    assert len({content["module.weight"] for content in saved.values()}) == len(WRAPPINGS)
    expected = sorted([f"model.{name}" for name in (*NAMES, *BUFFERS)])
    for kind in WRAPPINGS:
        keys = open_checkpoint(step_dir(str(tmp_path), kind)).keys()
        assert [key for key in keys if key.startswith("model.")] == expected, kind
        moments = {key.rpartition(".")[0] for key in keys if key.startswith("optimizer.state.")}
        assert moments == {f"optimizer.state.{name}" for name in NAMES}, kind
    for found in pool.run(load_each, WORLD_SIZE, str(tmp_path), timeout_seconds=120):
        assert len(found) == len(WRAPPINGS) ** 2
        for (source, kind), loaded in found.items():
            assert loaded == saved[source], f"saved from {source}, loaded into {kind}"

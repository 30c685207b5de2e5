"""Small trainings of which a part, or another form, is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcp_ckpt import Checkpointer, LoadReport, TrainState, load_checkpoint

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def net(*, body: str = "blocks", depth: int = 2, head: str = "head", classes: int = 2, seed: int = 0) -> Any:
    """A body of `depth` blocks and a head, under these names."""
    torch.manual_seed(seed)
    module = nn.Module()
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(depth))
    module.add_module(body, blocks)
    module.add_module(head, nn.Linear(4, classes))
    return module


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices, which decay, and the rest, which does not."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.25, betas=(0.8, 0.9))


@dataclass(kw_only=True, eq=False)
class Training:
    """A model, its optimizer and what else a run holds."""

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    history: list[float]
    mine: dict[str, Any]

    @classmethod
    def make(cls, *, steps: int, optimizer: MakeOptimizer = adamw, lr: float = 0.5, **shape: Any) -> Training:
        model = net(**shape)
        made = optimizer(model)
        for group in made.param_groups:
            group["lr"] = lr
        training = cls(
            model=model,
            optimizer=made,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(made, 0.5),
            history=[float(step) for step in range(steps)],
            mine={"counter": steps},
        )
        training.step(steps)
        return training

    def step(self, count: int = 1) -> None:
        """Take steps with gradients that are the same in every training of this shape."""
        for number in range(count):
            for index, parameter in enumerate(self.model.parameters()):
                generator = torch.Generator().manual_seed(100 * number + index)
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            self.optimizer.step()
            self.scheduler.step()

    @property
    def state(self) -> TrainState:
        return TrainState(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            extra={"history": self.history},
            per_rank=self.mine,
        )

    def load(self, directory: Path, **selection: Any) -> LoadReport:
        return load_checkpoint(directory, self.state, **selection)

    def snapshot(self) -> dict[str, Any]:
        """Everything by name, copied: what a save would store, and the global generator."""
        found: dict[str, Any] = {"rng": torch.get_rng_state(), "lr_scheduler": self.scheduler.state_dict()}
        found |= {"extra.history": self.history, "per_rank.counter": self.mine["counter"]}
        found |= {f"model.{name}": tensor for name, tensor in self.model.named_parameters()}
        found |= dict(self._optimizer_state())
        return copy.deepcopy(found)

    def _optimizer_state(self) -> Iterator[tuple[str, Any]]:
        names = {id(tensor): name for name, tensor in self.model.named_parameters()}
        for index, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    yield f"optimizer.param_groups.{index}.{key}", value
            for parameter in group["params"]:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    yield f"optimizer.state.{names[id(parameter)]}.{key}", value


def save(path: Path, training: Training) -> Path:
    """Save, and give the checkpoint's directory."""
    with Checkpointer(path) as checkpointer:
        checkpointer.save(training.state, step=7).result(60)
    return path / "step-00000007"


def differing(left: dict[str, Any], right: dict[str, Any]) -> set[str]:
    """The names of what is not the same bit for bit, or on one side only."""
    return {
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not _same(left[name], right[name])
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)

"""What the tests of exports share: checkpoints of chosen tensors, and reading what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState
from dcp_ckpt.format.dtypes import DTYPES

__all__ = ["TiedModel", "every_dtype", "files", "read_safetensors", "same_bits", "saved"]


def saved(run: Path, state: TrainState | dict[str, Any], *, step: int = 10) -> str:
    """Save `state` as the one step of a run; a reference to it."""
    with Checkpointer(run, config=CheckpointConfig(timeout_seconds=30)) as checkpointer:
        checkpointer.save(state, step=step).result(30)
    return f"{run}@{step}"


def every_dtype() -> dict[str, torch.Tensor]:
    """A matrix of each dtype, whose bits are anything, a scalar and a tensor without elements."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {"scalar": torch.tensor(7), "nothing": torch.empty(0, 3)}
    for name, info in DTYPES.items():
        data = torch.randint(0, 256, (15 * info.item_bytes,), dtype=torch.uint8, generator=generator)
        data = data % 2 if name == "bool" else data
        found[f"of.{name}"] = data.view(getattr(torch, name)).reshape(5, 3)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and bytes are equal."""
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def read_safetensors(directory: Path) -> dict[str, torch.Tensor]:
    """As loaders of the Hugging Face layout read: the one file, or the shards that the index names."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists():
        return load_file(whole)
    weight_map = json.loads(index.read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in load_file(directory / shard).items():
            assert weight_map[name] == shard
            found[name] = tensor
    return found


def files(directory: Path) -> dict[str, bytes]:
    """Everything in a directory; nothing where there is none."""
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


class TiedModel(nn.Module):
    """Its head is its embedding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(11))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embedding(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        logits: torch.Tensor = self.head(hidden)
        return logits

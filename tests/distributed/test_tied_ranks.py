"""Tied embeddings on ranks: sharded and replicated, stored once, tied after every load on every world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

ROWS, WIDTH = 1001, 16  # no number of ranks divides the rows evenly


class Lm(nn.Module):
    def __init__(self, seed: int, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(ROWS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.hidden(self.embedding(tokens)).tanh())
        return output


def spread(kind: str, model: Lm) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model.hidden)
    fully_shard(model)
    return model


def make(kind: str, seed: int) -> Any:
    model = spread(kind, Lm(seed))
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), rng=False)


def weights(kind: str, seed: int, *, tied: bool) -> Any:
    return TrainState(model=spread(kind, Lm(seed, tied=tied)), rng=False)


def both(state: Any) -> tuple[Any, Any]:
    """The weights of embedding and head."""
    model = getattr(state.model, "module", state.model)
    return model.embedding.weight, model.head.weight


def content(state: Any) -> list[str]:
    embedding, head = both(state)
    assert embedding is head
    assert len(state.optimizer.state) == 3, "the weight, and two of the hidden layer"
    moments = [tensor for _, tensor in sorted(state.optimizer.state[embedding].items())]
    return [worlds.fingerprint(tensor) for tensor in (embedding, *moments)]


def save(path: str, kind: str) -> list[str]:
    """Step 1: a tied model and its optimizer; 2: tied weights; 3: two different weights."""
    state = make(kind, seed=0)
    worlds.train_step(state.model, state.optimizer, torch.arange(7))
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state, step=1).result(30)
        checkpointer.save(weights(kind, 0, tied=True), step=2).result(30)
        checkpointer.save(weights(kind, 0, tied=False), step=3).result(30)
    return content(state)


def load(path: str, kind: str) -> tuple[list[str], list[str], tuple[str, str]]:
    state, two = make(kind, seed=1), weights(kind, 1, tied=False)
    worlds.train_step(state.model, state.optimizer, torch.arange(7))
    load_checkpoint(f"{path}/step-00000001", state)
    found = content(state)
    worlds.train_step(state.model, state.optimizer, torch.arange(7))
    assert content(state)[0] != found[0]
    load_checkpoint(f"{path}/step-00000002", two)
    filled = [worlds.fingerprint(weight) for weight in both(two)]
    tied = weights(kind, 1, tied=True)
    return found, filled, worlds.outcome(lambda: load_checkpoint(f"{path}/step-00000003", tied))


@pytest.mark.parametrize("saved_kind", ["fsdp", "ddp"])
def test_tied_weights_stay_one_on_every_world(pool, tmp_path, saved_kind):
    expected, *others = pool.run(save, 3, str(tmp_path), saved_kind)
    assert all(other == expected for other in others)
    stored = sum(file.stat().st_size for file in Path(tmp_path, "step-00000001").glob("*.distcp"))
    assert stored < 3 * ROWS * WIDTH * 4 + 3 * 16_384, "the weight and two moments, each once"
    whole = worlds.fingerprint(Lm(0).head.weight)
    for world, kind in ((2, "fsdp"), (3, "ddp"), (1, "ddp")):
        for found, filled, (error, message) in pool.run(load, world, str(tmp_path), kind):
            assert found == expected, f"on {world} ranks, {kind}"
            assert filled == [whole, whole]
            assert error == "LoadError"
            assert "model.head.weight shares its memory with embedding.weight, head.weight" in message

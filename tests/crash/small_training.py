"""A training that crash tests kill: plain torch, deterministic, one or two ranks, a save after every step.

    python small_training.py RUN LOG_DIRECTORY --steps N [--rendezvous FILE] [--salt N]

Run as a program it writes what happens to `LOG_DIRECTORY/rank-<r>.jsonl`. `reference_digests` does the same
arithmetic in one process and without checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, TrainState
from dcp_ckpt.errors import CheckpointError
from tests.crash.run_files import files_of

__all__ = ["reference_digests"]

BALLAST_ELEMENTS = 2_300_000
"""Float32: more than one write of 8 MiB, so that a write can be cut in the middle."""


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        self.ballast: torch.Tensor
        self.register_buffer("ballast", torch.arange(BALLAST_ELEMENTS, dtype=torch.float32))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(batch).square().mean()
        return loss


@dataclass(kw_only=True)
class Seen:
    """What belongs to one rank alone: a digest chain of its batches."""

    chain: str = ""

    def add(self, batch: torch.Tensor) -> None:
        self.chain = hashlib.sha256(self.chain.encode() + batch.numpy().tobytes()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"chain": self.chain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chain = state["chain"]


@dataclass(kw_only=True)
class Training:
    """The state of one rank."""

    model: Model
    optimizer: torch.optim.SGD
    seen: Seen = field(default_factory=Seen)

    @property
    def state(self) -> TrainState:
        return TrainState(model=self.model, optimizer=self.optimizer, per_rank={"seen": self.seen})

    def gradients(self) -> list[torch.Tensor]:
        batch = torch.randn(8, 32)
        self.seen.add(batch)
        self.optimizer.zero_grad()
        self.model(batch).backward()
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def update(self, step: int) -> None:
        self.optimizer.step()
        self.model.ballast.add_(step)

    def digest(self) -> str:
        """Of all that must come back: weights, buffers, momentum, and what this rank has seen."""
        found = hashlib.sha256(self.seen.chain.encode())
        for tensor in self.model.state_dict().values():
            found.update(tensor.numpy().tobytes())
        for parameter in self.model.parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            found.update(b"" if momentum is None else momentum.numpy().tobytes())
        return found.hexdigest()


def make_training() -> Training:
    torch.manual_seed(0)
    model = Model()
    return Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def reference_digests(*, world_size: int, steps: int) -> list[list[str]]:
    """By rank and step (from 0, the untrained state): the digest of an uninterrupted training."""
    with torch.random.fork_rng():
        ranks = [make_training() for _ in range(world_size)]
        streams = []
        for rank in range(world_size):
            torch.manual_seed(100 + rank)
            streams.append(torch.get_rng_state())
        digests = [[training.digest()] for training in ranks]
        for step in range(1, steps + 1):
            per_rank = []
            for rank, training in enumerate(ranks):
                torch.set_rng_state(streams[rank])
                per_rank.append(training.gradients())
                streams[rank] = torch.get_rng_state()
            for index in range(len(per_rank[0])):
                total = sum((gradients[index] for gradients in per_rank[1:]), per_rank[0][index].clone())
                for gradients in per_rank:
                    gradients[index].copy_(total / world_size)
            for rank, training in enumerate(ranks):
                training.update(step)
                digests[rank].append(training.digest())
    return digests


class Log:
    """One line an event; what was written before a kill stays."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __call__(self, event: str, **fields: object) -> None:
        os.write(self._descriptor, (json.dumps({"event": event, **fields}) + "\n").encode())


def run(arguments: argparse.Namespace, *, rank: int, world_size: int, log: Log) -> None:
    training = make_training()
    torch.manual_seed(100 + rank)
    config = CheckpointConfig(
        keep=LatestN(2),
        grace_seconds=0.0,
        timeout_seconds=arguments.timeout,
        recover_wait_seconds=arguments.wait,
    )
    with Checkpointer(arguments.run, config=config) as checkpointer:
        report = checkpointer.load(training.state)
        done = report.step if report else 0
        log("resume", step=done, digest=training.digest(), files=files_of(arguments.run))
        for step in range(done + 1, arguments.steps + 1):
            for gradient in training.gradients():
                if world_size > 1:
                    dist.all_reduce(gradient)
                gradient.div_(world_size)
            training.update(step + arguments.salt)
            log("step", step=step, digest=training.digest())
            try:
                handle = checkpointer.save(training.state, step=step)
                handle.wait_staged()
                log("staged", step=step)
                handle.result()
                log("save", step=step, outcome="committed")
            except CheckpointError as error:
                kind = type(error).__name__
                log("save", step=step, outcome="failed", kind=kind, errno=error.errno, error=str(error))
    log("closed")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("log")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rendezvous")
    # Another number makes another training: what it saves is told from what others saved of the same step.
    parser.add_argument("--salt", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--wait", type=float, default=30.0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log = Log(Path(arguments.log) / f"rank-{rank}.jsonl")
    if world_size > 1:
        method = f"file://{arguments.rendezvous}"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world_size)
    try:
        run(arguments, rank=rank, world_size=world_size, log=log)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

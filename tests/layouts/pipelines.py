"""Real pipelined training on the ranks of the pool: stages and schedules of torch, saved and resumed.

Every stage keeps the names that its layers have in the whole model, so a checkpoint is the same however the
model was cut.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from dcp_ckpt import CheckpointConfig, Checkpointer, MeshRoles, ModelParts, TrainState

__all__ = ["Pipeline", "load_whole", "resume", "train"]

CONFIG = CheckpointConfig(keep=None, timeout_seconds=40.0, overlap="step")
WIDTH, NUM_LAYERS, NUM_MICROBATCHES, ROWS = 5, 6, 4, 8


class Trunk(nn.Module):
    """Layers "0" to "5", of which a stage has some; forward runs those that are there."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleDict({str(number): nn.Linear(WIDTH, WIDTH) for number in range(NUM_LAYERS)})
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            hidden = torch.tanh(layer(hidden))
        return self.norm(hidden) if hasattr(self, "norm") else hidden

    def cut(self, stage: int, num_stages: int) -> Trunk:
        """Leave one stage's layers; the last stage has the norm."""
        for number in range(NUM_LAYERS):
            if number * num_stages // NUM_LAYERS != stage:
                del self.layers[str(number)]
        if stage != num_stages - 1:
            del self.norm
        return self


class Pipeline:
    """One rank of a pipelined training.

    Args:
        num_chunks: stages per rank; more than one makes the schedule an interleaved one.
        num_shards: ranks over which FSDP spreads each stage.
    """

    def __init__(self, seed: int, *, num_chunks: int = 1, num_shards: int = 1) -> None:
        num_ranks = dist.get_world_size() // num_shards
        self._mesh: DeviceMesh = init_device_mesh(
            "cpu", (num_ranks, num_shards), mesh_dim_names=("pp", "fsdp")
        )
        group, place = self._mesh.get_group("pp"), self._mesh.get_local_rank("pp")
        num_stages = num_ranks * num_chunks
        numbers = range(place, num_stages, num_ranks)
        chunks = [Trunk(seed).cut(number, num_stages) for number in numbers]
        if num_shards > 1:
            for chunk in chunks:
                fully_shard(chunk, mesh=self._mesh["fsdp"])
        stages: list[Any] = [
            PipelineStage(chunk, number, num_stages, torch.device("cpu"), group=group)
            for number, chunk in zip(numbers, chunks, strict=True)
        ]
        loss = nn.MSELoss()
        self._schedule: Any = (
            Schedule1F1B(stages[0], NUM_MICROBATCHES, loss)
            if num_chunks == 1
            else ScheduleInterleaved1F1B(stages, NUM_MICROBATCHES, loss)
        )
        self._is_first, self._is_last = place == 0, place == num_ranks - 1
        self.model = chunks[0] if num_chunks == 1 else ModelParts(chunks)
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=0.01)
        self.state = TrainState(
            model=self.model,
            optimizer=self.optimizer,
            extra={"losses": []},
            mesh_roles=MeshRoles(mesh=self._mesh, data=("fsdp",), pipeline=("pp",)),
        )

    def step(self, number: int) -> None:
        """One optimizer step on this data coordinate's batch."""
        generator = torch.Generator().manual_seed(10 * number + self._mesh.get_local_rank("fsdp"))
        inputs, target = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
        arguments = (inputs,) if self._is_first else ()
        keywords = {"target": target, "losses": []} if self._is_last else {}
        self._schedule.step(*arguments, **keywords)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def digests(self) -> dict[str, str]:
        """Of this stage's whole parameters and moments, by name; collective within the stage."""
        found = {}
        parts = self.model if isinstance(self.model, ModelParts) else [self.model]
        for part in parts:
            for name, parameter in part.named_parameters():
                found[name] = _digest(parameter)
                for key, moment in self.optimizer.state[parameter].items():
                    found[f"{name}/{key}"] = _digest(moment)
        return found


def _digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def train(path: str, settings: dict[str, int]) -> tuple[dict[str, str], dict[str, str]]:
    """Train four steps, saving after the second; what this rank's stage had then, and at the end."""
    pipeline = Pipeline(0, **settings)
    with Checkpointer(path, config=CONFIG) as checkpointer:
        for number in (1, 2):
            pipeline.step(number)
        checkpointer.save(pipeline.state, step=2).result(40)
        saved = pipeline.digests()
        for number in (3, 4):
            pipeline.step(number)
    return saved, pipeline.digests()


def resume(path: str, settings: dict[str, int], num_steps: int) -> tuple[dict[str, str], dict[str, str]]:
    """The same from the checkpoint on, in objects that start out different."""
    pipeline = Pipeline(1, **settings)
    if num_steps:
        pipeline.step(9)  # so that there are moments already, which are wrong
    with Checkpointer(path, config=CONFIG) as checkpointer:
        report = checkpointer.load(pipeline.state)
        assert report is not None
        assert (report.step, report.skipped) == (2, ())
        loaded = pipeline.digests()
        for number in range(3, 3 + num_steps):
            pipeline.step(number)
    return loaded, pipeline.digests()


def load_whole(path: str) -> dict[str, str]:
    """The same in one process that has the whole model."""
    model = Trunk(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    with Checkpointer(path, config=CONFIG) as checkpointer:
        checkpointer.load(TrainState(model=model, optimizer=optimizer, extra={"losses": None}))
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = _digest(parameter)
        found |= {f"{name}/{key}": _digest(moment) for key, moment in optimizer.state[parameter].items()}
    return found

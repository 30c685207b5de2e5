"""The forward and backward passes of one batch: on a whole model, or through the stages of a pipeline.

Owns micro-batches and when gradients cross between ranks. Called by `train.py`, which owns the optimizer
step; knows nothing of checkpoints.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from launch.data import IGNORED, Batch, TextLoader
from launch.model import ModelConfig
from launch.parallel import Topology

__all__ = ["Passes", "Pipeline", "WholeModel", "make_passes"]


class Passes(Protocol):
    """How a batch goes through the model."""

    def backward(self, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
        """Add to the gradients those of `weight` times the loss of this rank's tokens.

        Returns:
            The sum of the losses of this rank's tokens, float64; 0 on the earlier stages of a pipeline.
        """

    def loss(self, batch: Batch) -> torch.Tensor:
        """The same sum, without gradients."""


def make_passes(model: nn.Module, config: ModelConfig, topology: Topology, text: TextLoader) -> Passes:
    """The passes of the batches of `text` through a model that `parallelise` has spread.

    Args:
        config: of the whole model.
    """
    if topology.num_stages == 1:
        return WholeModel(model, text.num_micro_batches)
    return Pipeline(model, config, topology, num_micro_batches=text.num_micro_batches, num_rows=text.num_rows)


def loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of the tokens that count, in float32."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


class WholeModel:
    """Every rank holds all layers, whole or sharded. Gradients cross after the last micro-batch only."""

    def __init__(self, model: nn.Module, num_micro_batches: int) -> None:
        self._model = model
        self._num_micro_batches = num_micro_batches

    def backward(self, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        inputs = batch.inputs.chunk(self._num_micro_batches)
        targets = batch.targets.chunk(self._num_micro_batches)
        for number in range(self._num_micro_batches):
            with self._gradients_cross(number == self._num_micro_batches - 1):
                loss = loss_sum(self._model(inputs[number]), targets[number])
                (loss * weight).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def loss(self, batch: Batch) -> torch.Tensor:
        return loss_sum(self._model(batch.inputs), batch.targets).double()

    def _gradients_cross(self, now: bool) -> AbstractContextManager[None]:
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(now)
        elif isinstance(self._model, DistributedDataParallel) and not now:
            return self._model.no_sync()
        return nullcontext()


class Pipeline:
    """One stage of a pipeline, in the order 1F1B: each backward as early as it can be."""

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        topology: Topology,
        *,
        num_micro_batches: int,
        num_rows: int,
    ) -> None:
        assert topology.mesh is not None, "there are several stages"
        rows = num_rows // num_micro_batches
        # Shapes that are stated need not be found out, which would take a step of its own.
        tokens = torch.empty(rows, config.context, dtype=torch.int64, device="meta")
        hidden = torch.empty(rows, config.context, config.width, device="meta", requires_grad=True)
        logits = torch.empty(rows, config.context, config.vocabulary, device="meta", requires_grad=True)
        self._device = topology.device
        self._is_first = topology.stage == 0
        self._is_last = topology.stage == topology.num_stages - 1
        stage = PipelineStage(
            model,
            topology.stage,
            topology.num_stages,
            topology.device,
            input_args=tokens if self._is_first else hidden,
            output_args=logits if self._is_last else hidden,
            group=topology.mesh.get_group("stage"),
        )
        self._schedule = Schedule1F1B(stage, num_micro_batches, loss_fn=_weighted_loss, scale_grads=False)

    def backward(self, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        self._schedule.step(
            *self._inputs(batch),
            target=batch.targets,
            losses=losses,
            return_outputs=False,
            loss_kwargs={"weight": weight},
        )
        return self._sum(losses) / weight

    def loss(self, batch: Batch) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        self._schedule.eval(
            *self._inputs(batch),
            target=batch.targets,
            losses=losses,
            return_outputs=False,
            loss_kwargs={"weight": 1.0},
        )
        return self._sum(losses)

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return (batch.inputs,) if self._is_first else ()

    def _sum(self, losses: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for loss in losses:
            total += loss.detach()
        return total


def _weighted_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, weight: torch.Tensor | float
) -> torch.Tensor:
    return loss_sum(logits, targets) * weight

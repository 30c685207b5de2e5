"""Gradient accumulation over several ranks: where DDP and FSDP2 keep gradients that no step has used yet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dcp_ckpt import TrainState
from dcp_ckpt.state.train_state import components_to_save
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

Without = Callable[[bool], Any]
"""Makes what the backward of one micro-batch runs in; the argument says whether it is the last."""


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def ddp(**settings: Any) -> tuple[nn.Module, Without]:
    model = DistributedDataParallel(base(), **settings)
    return model, lambda is_last: nullcontext() if is_last else model.no_sync()


def ddp_that_syncs_always() -> tuple[nn.Module, Without]:
    return DistributedDataParallel(base()), lambda is_last: nullcontext()


def fsdp(
    policy: MixedPrecisionPolicy | None = None, *, syncs_always: bool = False
) -> tuple[nn.Module, Without]:
    model: Any = base()
    for part in (*model, model):
        fully_shard(part, mp_policy=policy or MixedPrecisionPolicy())

    def without(is_last: bool) -> Any:
        model.set_requires_gradient_sync(is_last or syncs_always)
        return nullcontext()

    return model, without


def hsdp() -> tuple[nn.Module, Without]:
    model: Any = base()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))

    def without(is_last: bool) -> Any:
        model.set_requires_all_reduce(is_last)
        return nullcontext()

    return model, without


def is_refused(state: TrainState) -> bool:
    kind, message = worlds.outcome(lambda: components_to_save(state))
    assert kind == "ok" or message.startswith(("0.weight has gradients", "0.bias has gradients")), message
    return kind == "StateError"


def accumulate(model: nn.Module, without: Without, *, to_none: bool) -> list[str]:
    """Three steps of three micro-batches; what was saved or refused and should not have been."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer)
    wrong = []
    for step in range(3):
        for number in range(3):
            with without(number == 2):
                model(torch.ones(2, 4) * (dist.get_rank() + 1)).square().mean().backward()
            if not is_refused(state):
                wrong.append(f"step {step}: saved after micro-batch {number}")
        optimizer.step()
        if is_refused(state):
            wrong.append(f"step {step}: refused after the step")
        optimizer.zero_grad(set_to_none=to_none)
        if is_refused(state):
            wrong.append(f"step {step}: refused after zero_grad")
    return wrong


def accumulate_everywhere() -> dict[str, list[str]]:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kinds: dict[str, Callable[[], tuple[nn.Module, Without]]] = {
        "ddp": ddp,
        "ddp, gradients in buckets": lambda: ddp(gradient_as_bucket_view=True),
        "ddp that syncs always": ddp_that_syncs_always,
        "fsdp": fsdp,
        "fsdp in half precision": lambda: fsdp(half),
        "fsdp that syncs always": lambda: fsdp(syncs_always=True),
        "hsdp": hsdp,
    }
    return {
        f"{kind}, {to_none=}": accumulate(*make(), to_none=to_none)
        for kind, make in kinds.items()
        for to_none in (True, False)
    }


def test_only_the_middle_of_an_accumulation_is_refused(pool):
    for found in pool.run(accumulate_everywhere, 4):
        assert len(found) == 14
        assert {kind: wrong for kind, wrong in found.items() if wrong} == {}

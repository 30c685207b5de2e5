"""Automatic mixed precision: what `--amp` computes in, and a gradient scaler with one verdict for all ranks.

Called by `train.py`. Knows nothing of models or checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.amp import GradScaler

__all__ = ["AMP_DTYPES", "WorldGradScaler"]

AMP_DTYPES: Mapping[str | None, torch.dtype | None] = {
    None: None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class WorldGradScaler(GradScaler):
    """A GradScaler that leaves a step out on all ranks or on none.

    Each rank sees the gradients of its own shards or layers only, and they may overflow there alone.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        if self.is_enabled() and dist.is_initialized():
            for found_inf in self._found_inf_per_device(optimizer).values():
                dist.all_reduce(found_inf, dist.ReduceOp.MAX)

"""The learning rate: linear warm-up, cosine decay, then level.

Called by `train.py`. Knows nothing of checkpoints beyond what is worth keeping of a schedule.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["FINAL_LR_FRACTION", "WARM_UP_STEPS", "WarmUpCosine", "lr_factor"]

WARM_UP_STEPS = 20
FINAL_LR_FRACTION = 0.1


def lr_factor(step: int, lr_steps: int) -> float:
    """Share of the peak learning rate at `step`."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = min(1.0, (step - WARM_UP_STEPS) / max(1, lr_steps - WARM_UP_STEPS))
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmUpCosine(LambdaLR):
    """Sets the learning rate of every group; `step()` after each optimizer step.

    Its state is the step alone. Stock schedulers also keep the peak and would go on with it, whatever `--lr`
    says when the run goes on; here, peak and length are those of this start.

    Args:
        optimizer: its `lr` is the peak.
        lr_steps: the step from which on the rate is level.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr_steps: int) -> None:
        super().__init__(optimizer, lambda step: lr_factor(step, lr_steps))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step of `state_dict`; called after the optimizer was loaded, whose rates it replaces."""
        self.last_epoch = state_dict["step"]
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["initial_lr"] = peak
            group["lr"] = peak * self.lr_lambdas[0](self.last_epoch)

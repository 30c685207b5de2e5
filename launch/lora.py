"""Low-rank adapters: fine-tuning that trains two thin matrices beside each linear layer and nothing else.

Owns the adapters and their names. A linear layer keeps the names of its weight and bias, so that a checkpoint
of the model without adapters fits; the adapters come beside them as `lora_a`, `lora_b` and `lora_scale`.
Called by `train.py`; knows nothing of ranks or checkpoints. From Hu et al., "LoRA" (arXiv:2106.09685).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["ADAPTERS", "LoraLinear", "add_adapters"]

ADAPTERS = "*.lora_*"
"""Names of all that a model with adapters has beyond the one without."""

_ALPHA = 16.0


class LoraLinear(nn.Linear):
    """A linear layer whose frozen weight is corrected by `lora_scale * lora_b @ lora_a`.

    Args:
        linear: gives its parameters away.
        rank: of the correction, which is zero at first.
        generator: for `lora_a`.
    """

    lora_scale: torch.Tensor

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        down = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
        self.lora_a = nn.Parameter(down.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.register_buffer("lora_scale", self.weight.new_tensor(_ALPHA / rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        correction = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + correction * self.lora_scale


def add_adapters(model: nn.Module, layers: nn.Module, *, rank: int, seed: int) -> None:
    """Freeze `model` and give each linear layer below `layers` an adapter, in place; before it is spread.

    The same seed gives the same adapters on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for parent in [module for module in layers.modules() if not isinstance(module, LoraLinear)]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, LoraLinear(child, rank, generator))

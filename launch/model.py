"""A small byte-level GPT in plain torch: what the driver trains.

Its parts can be taken away without renaming the rest, so that each stage of a pipeline holds its own. Knows
nothing of ranks, data or checkpoints. Called by `train.py`, which spreads it with `parallel.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["GPT", "MODEL_SIZES", "Block", "ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model. `width` is divisible by `num_heads`; `context` is in bytes."""

    num_layers: int
    width: int
    num_heads: int
    context: int
    vocabulary: int = 256


MODEL_SIZES = {
    "tiny": ModelConfig(num_layers=2, width=64, num_heads=4, context=64),
    "small": ModelConfig(num_layers=4, width=128, num_heads=4, context=128),
    "base": ModelConfig(num_layers=8, width=512, num_heads=8, context=256),
}


class Attention(nn.Module):
    """Causal self-attention of all heads at once."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.head_width = config.width // config.num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Each head's q, k and v lie side by side, so that a tensor-parallel rank holds whole heads.
        heads = self.qkv(x).unflatten(-1, (-1, 3 * self.head_width))
        q, k, v = heads.transpose(1, 2).chunk(3, dim=-1)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).flatten(2)
        return F.dropout(self.out(y), self.dropout, self.training)


class Block(nn.Module):
    """One transformer layer, normalised before each half; the unit that FSDP shards."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config, dropout)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        hidden = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + F.dropout(hidden, self.dropout, self.training)


class GPT(nn.Module):
    """Predicts the next byte.

    Args:
        config: shape of the model.
        dropout: probability, used in training mode only.
        seed: of the initial weights; the same seed gives the same weights on every rank.
        autocast: dtype that matrix products are computed in; None: that of the parameters.
    """

    bytes: nn.Embedding | None
    positions: nn.Embedding | None
    norm: nn.LayerNorm | None
    head: nn.Linear | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.autocast = autocast
        self.bytes = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleDict({str(n): Block(config, dropout) for n in range(config.num_layers)})
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self._initialise(torch.Generator().manual_seed(seed))

    def keep_stage(self, stage: int, num_stages: int) -> None:
        """Drop what is not of this stage of a pipeline; what stays keeps its names."""
        num_layers = self.config.num_layers
        kept = range(num_layers * stage // num_stages, num_layers * (stage + 1) // num_stages)
        for name in [name for name in self.blocks if int(name) not in kept]:
            del self.blocks[name]
        if stage > 0:
            self.bytes = self.positions = None
        if stage < num_stages - 1:
            self.norm = self.head = None

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        residual = 1.0 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                scale = residual if name.endswith(("attention.out.weight", "mlp_out.weight")) else 1.0
                parameter.normal_(0.0, 0.02 * scale, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, vocabulary) of byte values (batch, length), int64.

        A stage of a pipeline takes and gives hidden states (batch, length, width) where it is not the first
        and not the last.
        """
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            if self.bytes is not None and self.positions is not None:
                positions = torch.arange(x.shape[1], device=x.device)
                x = F.dropout(self.bytes(x) + self.positions(positions), self.dropout, self.training)
            for block in self.blocks.values():
                x = block(x)
            return x if self.norm is None or self.head is None else self.head(self.norm(x))

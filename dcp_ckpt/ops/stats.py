"""Numbers about the elements of one tensor. Imports torch only when called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["TensorStats", "tensor_stats"]


@dataclass(frozen=True, kw_only=True)
class TensorStats:
    """Of the finite elements (magnitudes, where they are complex): None when there are none.

    Args:
        num_nonfinite: how many elements are nan or infinite.
    """

    min: float | None
    max: float | None
    mean: float | None
    num_nonfinite: int


def tensor_stats(tensor: torch.Tensor) -> TensorStats:
    """Minimum, maximum and mean in double precision.

    Args:
        tensor: on the CPU, of any shape and dtype. Memory: up to four times that of a float32 tensor.
    """
    import torch

    # complex32 has no absolute value on the CPU.
    numbers = tensor.to(torch.complex128).abs() if tensor.is_complex() else tensor.to(torch.float64)
    finite = numbers[torch.isfinite(numbers)]
    num_nonfinite = numbers.numel() - finite.numel()
    if finite.numel() == 0:
        return TensorStats(min=None, max=None, mean=None, num_nonfinite=num_nonfinite)
    return TensorStats(
        min=finite.min().item(),
        max=finite.max().item(),
        mean=finite.mean().item(),
        num_nonfinite=num_nonfinite,
    )

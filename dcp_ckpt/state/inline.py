"""Small tensors as typed values: to bytes and back, exactly. Knows nothing of what holds them."""

from __future__ import annotations

import ctypes

import torch

from dcp_ckpt.format.dtypes import dtype_name
from dcp_ckpt.format.values import InlineTensor

__all__ = ["from_inline", "to_inline"]


@torch.no_grad()
def to_inline(tensor: torch.Tensor) -> InlineTensor:
    """The elements of a plain tensor, from whatever device; waits for it."""
    # Not by way of numpy, which is not required and has no bfloat16.
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)
    data = ctypes.string_at(whole.data_ptr(), whole.nbytes) if whole.nbytes else b""
    return InlineTensor(dtype_name(tensor.dtype), tuple(tensor.shape), data)


def from_inline(inline: InlineTensor) -> torch.Tensor:
    """A new CPU tensor."""
    tensor = torch.empty(inline.shape, dtype=getattr(torch, inline.dtype), device="cpu")
    ctypes.memmove(tensor.data_ptr(), inline.data, len(inline.data))
    return tensor

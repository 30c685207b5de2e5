"""What ranks compare to see that state which must be equal on all of them is: one digest per name.

Values are compared whole, tensors by their first elements. Called by staging; the pilot compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.state.component import Path

__all__ = ["replica_digests", "sample_of"]

_SAMPLE_ELEMENTS = 64
"""How much of every unsharded tensor is compared between ranks: enough to see replicas that drifted apart."""


def sample_of(tensor: torch.Tensor) -> bytes:
    """Dtype, shape and the first elements of a tensor without autograd; waits for its device."""
    head = _first_elements(tensor).cpu().resolve_conj().resolve_neg().contiguous()
    kind = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    # Not by way of numpy, which is not required and has no bfloat16.
    data = ctypes.string_at(head.data_ptr(), head.nbytes) if head.nbytes else b""
    return encode_json(kind) + data


def replica_digests(values: Mapping[Path, Any], samples: Mapping[str, bytes]) -> dict[str, str]:
    """Name -> digest, of encoded values by path and of samples by name."""
    digests = {".".join(path): digest(encode_json(value)) for path, value in values.items()}
    digests.update((name, digest(sample)) for name, sample in samples.items())
    return digests


def _first_elements(tensor: torch.Tensor) -> torch.Tensor:
    """The first elements in row-major order, without copying the rest of a tensor that is not contiguous."""
    while tensor.ndim > 1 and tensor.shape[0] and tensor[0].numel() >= _SAMPLE_ELEMENTS:
        tensor = tensor[0]
    return tensor[:_SAMPLE_ELEMENTS].reshape(-1)[:_SAMPLE_ELEMENTS] if tensor.ndim else tensor.reshape(-1)

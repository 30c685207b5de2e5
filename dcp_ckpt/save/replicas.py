"""What ranks compare to see that state which must be equal on some of them is: one digest per name.

Values are compared whole, tensors by their first elements. Called by staging; the pilot lets ranks compare.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.dtypes import dtype_name
from dcp_ckpt.state.component import Path

__all__ = ["ReplicaSet", "replica_sets", "sample_of"]

_SAMPLE_ELEMENTS = 64
"""How much of every unsharded tensor is compared between ranks: enough to see replicas that drifted apart."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSet:
    """What is equal on some ranks, as one of them has it.

    Args:
        ranks: in order; none for all ranks.
        digests: by name.
    """

    ranks: tuple[int, ...]
    digests: Mapping[str, str]

    @property
    def leader(self) -> int:
        """With whom the others compare."""
        return self.ranks[0] if self.ranks else 0

    @cached_property
    def digest(self) -> str:
        return digest(encode_json(self.digests))


def sample_of(tensor: torch.Tensor) -> bytes:
    """Dtype, shape and the first elements of a tensor without autograd; waits for its device."""
    head = _first_elements(tensor).cpu().resolve_conj().resolve_neg().contiguous()
    kind = [dtype_name(tensor.dtype), list(tensor.shape)]
    # Not by way of numpy, which is not required and has no bfloat16.
    data = ctypes.string_at(head.data_ptr(), head.nbytes) if head.nbytes else b""
    return encode_json(kind) + data


def replica_sets(
    values: Mapping[Path, Any], samples: Mapping[str, bytes], held_by: Mapping[str, tuple[int, ...]]
) -> tuple[ReplicaSet, ...]:
    """What this rank has to compare, by the ranks that hold it: first what all ranks hold.

    Args:
        values: encoded, by path.
        samples: of tensors that other ranks hold, too, by name.
        held_by: name -> ranks, of what not all ranks hold; what one rank holds alone is left out.
    """
    found: dict[tuple[int, ...], dict[str, str]] = {(): {}}
    for path, value in values.items():
        name = ".".join(path)
        ranks = held_by.get(name, ())
        if len(ranks) != 1:
            found.setdefault(ranks, {})[name] = digest(encode_json(value))
    for name, sample in samples.items():
        found.setdefault(held_by.get(name, ()), {})[name] = digest(sample)
    return tuple(ReplicaSet(ranks=ranks, digests=digests) for ranks, digests in found.items())


def _first_elements(tensor: torch.Tensor) -> torch.Tensor:
    """The first elements in row-major order, without copying the rest of a tensor that is not contiguous."""
    while tensor.ndim > 1 and tensor.shape[0] and tensor[0].numel() >= _SAMPLE_ELEMENTS:
        tensor = tensor[0]
    return tensor[:_SAMPLE_ELEMENTS].reshape(-1)[:_SAMPLE_ELEMENTS] if tensor.ndim else tensor.reshape(-1)

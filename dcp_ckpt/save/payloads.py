"""Which live chunks are as they were in an older checkpoint: their digests, read where they are.

Owns how the bytes of a tensor are read without a copy of all of it. Called by staging, on the main thread,
before `save()` returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch

from dcp_ckpt.format.fragment import payload_digest
from dcp_ckpt.save.plan import SavePlan
from dcp_ckpt.save.reuse import Base, StoredChunk, chunk_key

__all__ = ["find_unchanged", "live_digest"]

_PIECE_BYTES = 16 << 20
"""What is on another device, or not in row-major order, is copied in pieces of at most so many bytes."""


def find_unchanged(
    plan: SavePlan, locals_: Sequence[torch.Tensor], is_late: Sequence[bool], base: Base
) -> dict[int, StoredChunk]:
    """The numbers of the plan's chunks that are in the base bit for bit, and where.

    Args:
        locals_: the local part of each tensor, without autograd.
        is_late: of each tensor: it is copied later, so nothing can be said of it now.
    """
    found = {}
    for number, (index, _) in enumerate(plan.sources):
        stored = None if is_late[index] else base.chunks.get(chunk_key(plan.chunks[number]))
        if stored and live_digest(plan.dtype_name(number), plan.part(number, locals_)) == stored.digest:
            found[number] = stored
    return found


def live_digest(dtype: str, part: torch.Tensor) -> str:
    """The payload digest of a part of a local tensor, without autograd; waits for its device.

    Args:
        dtype: its name, without `torch.`.
    """
    return payload_digest(dtype, part.shape, _bytes_of(part))


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """All bytes in row-major order; each view is valid until the next one is asked for."""
    is_plain = tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    if is_plain or tensor.ndim == 0 or tensor.nbytes <= _PIECE_BYTES:
        piece = tensor if is_plain else tensor.cpu().resolve_conj().resolve_neg().contiguous()
        if piece.nbytes:
            # Not by way of numpy, which is not required and has no bfloat16.
            yield memoryview((ctypes.c_char * piece.nbytes).from_address(piece.data_ptr())).cast("B")
        return
    if tensor.shape[0] == 1:
        yield from _bytes_of(tensor[0])
        return
    rows = max(_PIECE_BYTES * tensor.shape[0] // tensor.nbytes, 1)
    for start in range(0, tensor.shape[0], rows):
        yield from _bytes_of(tensor[start : start + rows])

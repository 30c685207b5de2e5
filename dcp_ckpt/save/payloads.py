"""Which live chunks are as they were in an older checkpoint: their digests, read where they are.

Owns how the bytes of a tensor are read without a copy of all of it. Called by staging, on the main thread,
before `save()` returns.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from dcp_ckpt.format.fragment import payload_digest
from dcp_ckpt.save.plan import SavePlan
from dcp_ckpt.save.reuse import Base, StoredChunk, chunk_key

__all__ = ["Comparer", "live_digest"]

_PIECE_BYTES = 16 << 20
"""What is on another device, or not in row-major order, is copied in pieces of at most so many bytes."""

_RESTLESS_CHANGES = 2
_ROUNDS = 8
"""What has changed so often in a row is looked at in one of so many saves: to digest it costs as much as to
copy it, and most of what is trained changes at every save."""


class Comparer:
    """Compares the states of one rank with bases, and remembers what changes all the time."""

    def __init__(self) -> None:
        self._plan: SavePlan | None = None
        self._changes: Counter[int] = Counter()
        self._round = 0

    def find_unchanged(
        self, plan: SavePlan, locals_: Sequence[torch.Tensor], is_late: Sequence[bool], base: Base
    ) -> dict[int, StoredChunk]:
        """The numbers of the plan's chunks that are in the base bit for bit, and where.

        Args:
            locals_: the local part of each tensor, without autograd.
            is_late: of each tensor: it is copied later, so nothing can be said of it now.
        """
        if plan is not self._plan:
            self._plan = plan
            self._changes.clear()
        self._round += 1
        found = {}
        for number, (index, _) in enumerate(plan.sources):
            stored = None if is_late[index] else base.chunks.get(chunk_key(plan.chunks[number]))
            if stored is None or self._is_left_out(number):
                continue
            if live_digest(plan.dtype_name(number), plan.part(number, locals_)) == stored.digest:
                found[number] = stored
                del self._changes[number]
            else:
                self._changes[number] += 1
        return found

    def _is_left_out(self, number: int) -> bool:
        return self._changes[number] >= _RESTLESS_CHANGES and bool((number + self._round) % _ROUNDS)


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

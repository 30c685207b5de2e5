"""The bytes of exported tensors: read, checked, with their adapters added, converted; a window at a time.

Owns the memory of an export: the tensors that are read together, and one window. Called by `ops.export`;
imports torch when the first tensor is read.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dcp_ckpt.errors import LoadError, StateMismatch
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.load.source import Source
from dcp_ckpt.ops.exporting.lora import Adapter
from dcp_ckpt.ops.exporting.plan import ExportTensor

if TYPE_CHECKING:
    import torch

__all__ = ["Payloads"]

_BATCH_BYTES = 32 << 20
"""Small tensors are read together: they share blocks, and an object store answers many requests at a time."""

_WINDOW_BYTES = 4 << 20
_READERS = 4


class Payloads:
    """The tensors of one checkpoint. Used by one thread.

    Memory: the largest exported tensor with its adapters, or 32 MiB of small ones; some windows and blocks.

    Args:
        source: the tables of the checkpoint.
        tensors: everything that will be asked for.
    """

    def __init__(self, source: Source, tensors: Sequence[ExportTensor]) -> None:
        self._source = source
        names = {name for tensor in tensors for name in tensor.stored_tensors}
        # Asked for once: finding the chunks of one tensor walks over those of all.
        self._chunks = source.chunks({name: Box.whole(source.tensors[name].shape) for name in sorted(names)})
        self.overflowed: dict[str, int] = {}
        """For each exported tensor: how many finite elements its dtype has no finite numbers for."""

    def read(self, tensors: Sequence[ExportTensor]) -> Iterator[Iterator[memoryview]]:
        """For each tensor its windows, in order; to be used up before the next is taken.

        Raises:
            CorruptCheckpoint: a file is missing or short, or a digest differs.
            LoadError: there is no memory for a tensor.
            StateMismatch: the scale of an adapter is not a finite number.
        """
        for batch in self._batches(tensors):
            held = self._fill(batch)
            for tensor in batch:
                yield self._windows(tensor, held)
            # Before the next ones are read: two of the largest tensor may not fit.
            held.clear()

    def _batches(self, tensors: Sequence[ExportTensor]) -> Iterator[list[ExportTensor]]:
        batch: list[ExportTensor] = []
        batch_bytes = 0
        for tensor in tensors:
            num_bytes = sum(map(self._stored_bytes, tensor.stored_tensors))
            if batch and batch_bytes + num_bytes > _BATCH_BYTES:
                yield batch
                batch, batch_bytes = [], 0
            batch.append(tensor)
            batch_bytes += num_bytes
        if batch:
            yield batch

    def _stored_bytes(self, name: str) -> int:
        entry = self._source.tensors[name]
        return math.prod(entry.shape) * dtype_info(entry.dtype).item_bytes

    def _fill(self, batch: Sequence[ExportTensor]) -> dict[str, _Held]:
        from dcp_ckpt.load.fill import fill_requests
        from dcp_ckpt.load.read_plan import Request, Target

        held = {name: _Held(self._source, name) for tensor in batch for name in tensor.stored_tensors}
        requests = [
            Request(
                name=name,
                target=Target(local=one.tensor, box=Box.whole(one.tensor.shape)),
                chunks=self._chunks[name],
            )
            for name, one in held.items()
        ]
        fill_requests(self._source, requests, verify=True, concurrency=_READERS)
        return held

    def _windows(self, tensor: ExportTensor, held: Mapping[str, _Held]) -> Iterator[memoryview]:
        stored = held[tensor.stored]
        if not tensor.num_bytes:
            return
        if tensor.adapter is not None:
            windows = _fused(stored.tensor, tensor.adapter, held)
        elif tensor.dtype != tensor.stored_dtype:
            windows = _slices(stored.tensor)
        else:
            for start in range(0, tensor.num_bytes, _WINDOW_BYTES):
                yield stored.bytes[start : start + _WINDOW_BYTES]
            return
        for window in windows:
            data, num_overflowed = _converted(window, tensor.dtype)
            if num_overflowed:
                self.overflowed[tensor.name] = self.overflowed.get(tensor.name, 0) + num_overflowed
            yield data


class _Held:
    """One stored tensor in memory that can also be seen as bytes."""

    def __init__(self, source: Source, name: str) -> None:
        import torch

        entry = source.tensors[name]
        dtype = getattr(torch, entry.dtype)
        num_bytes = math.prod(entry.shape) * dtype.itemsize
        # Mapped, so that it goes back to the system at once; an object store may still send it when the next
        # tensor is read, so it is never used again.
        try:
            self.bytes = memoryview(mmap.mmap(-1, num_bytes) if num_bytes else b"")
        except OSError as error:
            raise LoadError(
                f"no memory to read {name}, which has {num_bytes} bytes", phase="read", errno=error.errno
            ) from error
        self.tensor = (
            torch.frombuffer(self.bytes, dtype=torch.uint8).view(dtype).reshape(entry.shape)
            if num_bytes
            else torch.empty(entry.shape, dtype=dtype)
        )


def _slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    elements = tensor.reshape(-1)
    step = _WINDOW_BYTES // tensor.itemsize
    for start in range(0, elements.numel(), step):
        yield elements[start : start + step]


def _fused(weight: torch.Tensor, adapter: Adapter, held: Mapping[str, _Held]) -> Iterator[torch.Tensor]:
    """`weight + scale * up @ down` in float32, or float64 if the weight is; some rows at a time."""
    import torch

    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = held[adapter.scale].tensor.item() if isinstance(adapter.scale, str) else adapter.scale
    if not math.isfinite(scale):
        raise StateMismatch(f"the scale {adapter.scale} of an adapter is {scale}: it cannot be fused")
    down, up = held[adapter.down].tensor.to(compute), held[adapter.up].tensor
    step = max(1, _WINDOW_BYTES // (weight.shape[1] * compute.itemsize))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield (up[rows].to(compute) @ down).mul_(scale).add_(weight[rows])


def _converted(window: torch.Tensor, dtype: str) -> tuple[memoryview, int]:
    """The bytes of a window as another dtype, and how many finite elements became infinite."""
    import torch

    to = getattr(torch, dtype)
    data = bytearray(window.numel() * to.itemsize)
    converted = torch.frombuffer(data, dtype=to)
    converted.copy_(window.reshape(-1))
    num_overflowed = 0
    if not converted.isfinite().all():
        was_finite = window.reshape(-1).to(torch.float64).isfinite()
        num_overflowed = int((was_finite & ~converted.isfinite()).sum())
    return memoryview(data), num_overflowed

"""Tensors of a checkpoint in windows of bounded size, read and checked some at a time.

Owns how a tensor is cut, what is read together, and the memory of it. Knows nothing of what the windows are
for. Called by operations that go through all tensors: diff and average. Imports torch when it reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_ckpt.format.boxes import Box, intersect
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.fragment import TensorEntry
from dcp_ckpt.load.source import Source

if TYPE_CHECKING:
    import torch

__all__ = ["WINDOW_BYTES", "Window", "WindowReader", "batches", "windows_of"]

WINDOW_BYTES = 16 << 20
"""What is read together: a window of a large tensor, or many small tensors, which share blocks."""

_READERS = 4


@dataclass(frozen=True, kw_only=True)
class Window:
    """A box of one tensor; `number` says of which."""

    number: int
    box: Box


def windows_of(shape: Sequence[int], most_elements: int) -> Iterator[Box]:
    """Cut a tensor into boxes that follow each other in row-major order; none for one without elements."""
    if math.prod(shape) <= most_elements:
        if math.prod(shape):
            yield Box.whole(tuple(shape))
        return
    dim = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= most_elements)
    inner = tuple(shape[dim + 1 :])
    rows = most_elements // math.prod(inner)
    for outer in itertools.product(*map(range, shape[:dim])):
        for start in range(0, shape[dim], rows):
            yield Box(
                (*outer, start, *(0 for _ in inner)),
                (*(1 for _ in outer), min(rows, shape[dim] - start), *inner),
            )


def batches(tensors: Iterable[TensorEntry]) -> Iterator[list[Window]]:
    """The windows of all tensors in their order, those together that are to be read together. Pure."""
    batch: list[Window] = []
    batch_bytes = 0
    for number, entry in enumerate(tensors):
        item_bytes = dtype_info(entry.dtype).item_bytes
        for box in windows_of(entry.shape, WINDOW_BYTES // item_bytes):
            num_bytes = box.num_elements * item_bytes
            if batch and batch_bytes + num_bytes > WINDOW_BYTES:
                yield batch
                batch, batch_bytes = [], 0
            batch.append(Window(number=number, box=box))
            batch_bytes += num_bytes
    if batch:
        yield batch


class WindowReader:
    """Some tensors of one checkpoint. Used by one thread.

    Args:
        source: the tables of the checkpoint.
        names: of the tensors; windows name them by their position.
    """

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self._source = source
        self._names = names
        # Asked for once: finding the chunks of one tensor walks over those of all.
        self._chunks = source.chunks({name: Box.whole(tuple(source.tensors[name].shape)) for name in names})

    def read(self, batch: Sequence[Window]) -> list[torch.Tensor]:
        """The windows as contiguous tensors on the CPU, in the stored dtypes.

        Memory: that of the windows and some blocks.

        Raises:
            CorruptCheckpoint: a file is missing or short, a digest differs, or chunks do not make up a
                tensor.
        """
        import torch

        from dcp_ckpt.load.fill import fill_requests
        from dcp_ckpt.load.read_plan import Request, Target

        tensors, requests = [], []
        for window in batch:
            name = self._names[window.number]
            dtype = getattr(torch, self._source.tensors[name].dtype)
            tensors.append(torch.empty(window.box.sizes, dtype=dtype))
            chunks = [(rank, chunk) for rank, chunk in self._chunks[name] if intersect(chunk.box, window.box)]
            requests.append(
                Request(name=name, target=Target(local=tensors[-1], box=window.box), chunks=chunks)
            )
        fill_requests(self._source, requests, verify=True, concurrency=_READERS)
        return tensors

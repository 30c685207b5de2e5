"""Where the elements of one stored piece go in a target tensor.

Knows memory and strides, not storage. Local to a rank. Used by `load.fill`, from several threads at once for
different parts of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch.autograd.graph import increment_version

from dcp_ckpt.load.ranges import Piece, Read, parts_between

__all__ = ["Landing", "mark_written", "spoiling_on_failure"]


def mark_written(targets: Iterable[torch.Tensor]) -> None:
    """Let autograd, and whoever watches `_version`, see writes that go past torch."""
    increment_version([target for target in targets if not target.is_inference()])


@contextmanager
def spoiling_on_failure(targets: Iterable[torch.Tensor]) -> Iterator[None]:
    """Where the block fails, overwrite all targets: NaN, or all bits set where the type has none.

    What had arrived is good, and what had not is what was there before: a mixture that looks like a state.
    Whoever goes on with it in spite of the error shall see it at once. Nothing may go on reading into them
    behind the block.
    """
    try:
        yield
    except BaseException:
        for target in targets:
            with suppress(RuntimeError):  # of a device: it must not take the place of what failed
                _spoil(target)
        raise


@torch.no_grad()
def _spoil(target: torch.Tensor) -> None:
    has_nan = target.is_floating_point() or target.is_complex()
    with torch.inference_mode(target.is_inference()):
        target.fill_(math.nan if has_nan else -1)


class Landing:
    """Where one piece goes: each read's elements straight to their places, nothing kept in between.

    Args:
        local: the target, of which the piece fills a part.
        dtype: of the stored tensor; copies into another one are cast.
    """

    def __init__(self, piece: Piece, local: torch.Tensor, dtype: torch.dtype) -> None:
        region = local[piece.outer] if piece.outer else local
        sizes, strides = piece.sizes, piece.strides
        if piece.is_row_major and region.is_contiguous():
            region, sizes, strides = region.reshape(-1), (region.numel(),), (1,)
        else:
            order = sorted(range(len(sizes)), key=strides.__getitem__, reverse=True)
            region = region.permute(order)
            sizes, strides = tuple(sizes[dim] for dim in order), tuple(strides[dim] for dim in order)
        self._region, self._sizes, self._strides = region, sizes, strides
        self._dtype = dtype
        self._is_on_gpu = region.device.type == "cuda"
        self._start = piece.start
        self._bytes = _bytes_of(region) if strides == (1,) and region.dtype == dtype else None

    @property
    def takes_bytes(self) -> bool:
        """Whether its elements lie in the target as they do in the file, so that they can be read into it."""
        return self._bytes is not None

    @property
    def gpu(self) -> torch.device | None:
        """The CUDA device that `take` copies to; its copies are only submitted, on the current stream."""
        return self._region.device if self._is_on_gpu else None

    def memory(self, offset: int, num_bytes: int) -> memoryview:
        """The memory of some of the piece's bytes; only where it `takes_bytes`."""
        assert self._bytes is not None
        return self._bytes[offset : offset + num_bytes]

    def take(self, content: torch.Tensor, read: Read) -> None:
        """Copy, and cast, all elements of the piece that begin in `read`, whose bytes are `content`."""
        item_bytes = self._dtype.itemsize
        first = -((self._start - read.start) // item_bytes)
        stop = -((self._start - read.stop) // item_bytes)
        with torch.inference_mode(self._region.is_inference()):
            self._copy(content, read, first, stop)

    def _copy(self, content: torch.Tensor, read: Read, first: int, stop: int) -> None:
        item_bytes = self._dtype.itemsize
        for part in parts_between(self._sizes, self._strides, first, stop):
            start = self._start + part.first * item_bytes - read.start
            found = content[start : start + part.span * item_bytes]
            if start % item_bytes:
                found = found.clone()  # stock containers begin at any offset
            elements = found.view(self._dtype)
            if self._strides != (1,):
                elements = elements.as_strided(part.sizes, self._strides)
            place = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
            self._region[place].copy_(elements, non_blocking=self._is_on_gpu)


def _bytes_of(region: torch.Tensor) -> memoryview | None:
    """The memory of a flat region; None where it cannot be written to as it is."""
    if region.device.type != "cpu" or not region.is_contiguous() or region.is_conj() or region.is_neg():
        return None
    return region.detach().view(torch.uint8).numpy().data

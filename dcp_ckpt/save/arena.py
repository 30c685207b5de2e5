"""The arena: anonymous shared memory with the layout of the data file.

A memfd has no name that could leak, needs no /dev/shm, is handed to the writer as a file descriptor and
vanishes with its last holder. It is allocated once and reused: fresh pages cost more than the copy itself
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import StorageFull
from dcp_ckpt.save.host_copy import pin, unpin
from dcp_ckpt.save.layout import SEGMENT_BYTES, round_up

__all__ = ["Arena", "arena_bytes"]

_PART_BYTES = 256 << 20


def arena_bytes(num_bytes: int) -> int:
    """The size of an arena that holds `num_bytes`."""
    return max(round_up(num_bytes, SEGMENT_BYTES), SEGMENT_BYTES)


class Arena(Closing):
    """One mapped memfd. Owned by the saver; the writer maps it too.

    Making it takes all of its memory at once, at about 0.7 seconds per GiB: what is staged later neither runs
    out of memory nor waits for pages.

    Args:
        size_bytes: at least this many bytes; rounded up to whole pages.
        require: called with a number of bytes before so many are taken; raises when they are not there.

    Raises:
        StorageFull: the kernel has no memory for it.
    """

    def __init__(self, size_bytes: int, *, require: Callable[[int], None]) -> None:
        self.size_bytes = arena_bytes(size_bytes)
        require(self.size_bytes)
        self.descriptor = os.memfd_create("dcp_ckpt-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, self.size_bytes)
            self._map = mmap.mmap(self.descriptor, self.size_bytes)
            self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
            self._take_pages(require)
        except (OSError, ValueError) as error:
            self._give_up()
            raise StorageFull(
                f"no memory for a staging arena of {self.size_bytes} bytes: {error}; give the job more, or "
                "raise its limits (ulimit -v, ulimit -f)",
                phase="stage",
                errno=error.errno if isinstance(error, OSError) else None,
            ) from error
        except BaseException:
            self._give_up()
            raise
        self._closed = False
        self._is_pinned: bool | None = None

    def write(self, offset: int, data: bytes) -> None:
        """Lay bytes in at `offset`."""
        self._map[offset : offset + len(data)] = data

    def view(self, offset: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the arena's memory; `offset` is aligned to the dtype."""
        num_bytes = dtype.itemsize
        for size in sizes:
            num_bytes *= size
        return self.bytes[offset : offset + num_bytes].view(dtype).view(sizes)

    def pin_for(self, sources: Iterable[torch.Tensor]) -> None:
        """Make copies fast where any source is on a GPU. Called before each save; pins once, and blocks."""
        if self._is_pinned is None and any(source.device.type == "cuda" for source in sources):
            self._is_pinned = pin(self.bytes)

    def discard(self) -> None:
        """Give its memory back now, although the writer still maps it; what it held is zeros from here on.

        Nobody may be reading or writing it: a save in flight would be damaged.
        """
        # CUDA would go on copying to the pages that are given back.
        self._unpin()
        self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Give up this process's hold. Views must not be used any more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._unpin()
        os.close(self.descriptor)
        # Not unmapped by hand: tensors over the map may still be referenced, and unmapping under them would
        # crash. The map goes with the last of them.
        del self.bytes, self._map

    def _unpin(self) -> None:
        if self._is_pinned:
            unpin(self.bytes)
        self._is_pinned = False

    def _give_up(self) -> None:
        # The error holds on to the frames here, and so to the map: its memory goes back now.
        with suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)

    def _take_pages(self, require: Callable[[int], None]) -> None:
        """Take and map every page, in parts, so that signals and other threads get their turn."""
        for start in range(0, self.size_bytes, _PART_BYTES):
            part = min(_PART_BYTES, self.size_bytes - start)
            # Again for each part: other ranks may be taking theirs at the same time, and where memory has run
            # out the kernel does not refuse, it kills.
            require(part)
            os.posix_fallocate(self.descriptor, start, part)
            # Their first use from here costs as much again.
            self.bytes[start : start + part : mmap.PAGESIZE].zero_()

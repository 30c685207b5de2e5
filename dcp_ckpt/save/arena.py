"""The arena: anonymous shared memory with the layout of the data file.

A memfd has no name that could leak, needs no /dev/shm, is handed to the writer as a file descriptor and
vanishes with its last holder. It is allocated once and reused: fresh pages cost more than the copy itself
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import mmap
import os

import torch

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import StorageFull
from dcp_ckpt.save.layout import SEGMENT_BYTES, round_up

__all__ = ["Arena"]


class Arena(Closing):
    """One mapped memfd. Owned by the saver; the writer maps it too.

    Args:
        size_bytes: at least this many bytes; rounded up to whole pages.

    Raises:
        StorageFull: the kernel has no memory for it.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = max(round_up(size_bytes, SEGMENT_BYTES), SEGMENT_BYTES)
        self.descriptor = os.memfd_create("dcp_ckpt-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, self.size_bytes)
            self._map = mmap.mmap(self.descriptor, self.size_bytes)
        except (OSError, ValueError) as error:
            os.close(self.descriptor)
            raise StorageFull(
                f"no memory for a staging arena of {self.size_bytes} bytes", phase="stage"
            ) from error
        self._closed = False
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def write(self, offset: int, data: bytes) -> None:
        """Lay bytes in at `offset`."""
        self._map[offset : offset + len(data)] = data

    def view(self, offset: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the arena's memory; `offset` is aligned to the dtype."""
        num_bytes = dtype.itemsize
        for size in sizes:
            num_bytes *= size
        return self.bytes[offset : offset + num_bytes].view(dtype).view(sizes)

    def close(self) -> None:
        """Give up this process's hold. Views must not be used any more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        os.close(self.descriptor)
        # Not unmapped by hand: tensors over the map may still be referenced, and unmapping under them would
        # crash. The map goes with the last of them.
        del self.bytes, self._map

"""One data file, written front to back through page-aligned buffers, digested on its way.

For writers that have no arena of the whole file. Owns buffers and block digests; knows neither tensors' names
nor other ranks. Called by `save.dcp_write`; one thread uses one stream.
"""

from __future__ import annotations

import mmap
from types import TracebackType

import torch

from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.storage.base import ObjectWriter

__all__ = ["DataStream"]


class DataStream:
    """Use as a context manager: leaving it before `finish` removes what was written.

    Args:
        writer: of a new object of exactly `size_bytes` bytes.
    """

    def __init__(self, writer: ObjectWriter, *, size_bytes: int) -> None:
        self._writer = writer
        self._size_bytes = size_bytes
        self._segment_bytes = max(writer.segment_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES
        self._free: list[mmap.mmap] = []
        self._buffer: mmap.mmap | None = None
        self._segment_start = 0
        self._length = 0
        self._digests: list[str] = []
        self.position = 0

    def put_bytes(self, data: bytes) -> None:
        """Append bytes; for the short stretches between payloads."""
        view = memoryview(data)
        while view:
            buffer, used, room = self._room()
            count = min(room, len(view))
            buffer[used : used + count] = view[:count]
            view = view[count:]
            self._advance(count)

    def put_payload(self, payload: torch.Tensor) -> None:
        """Append a tensor of bytes: uint8, one-dimensional, on the CPU."""
        done = 0
        while done < payload.numel():
            buffer, used, room = self._room()
            count = min(room, payload.numel() - done)
            # A tensor's copy lets other threads run.
            torch.frombuffer(buffer, dtype=torch.uint8)[used : used + count].copy_(
                payload[done : done + count]
            )
            done += count
            self._advance(count)

    def pad_to(self, position: int) -> None:
        """Append zeros up to `position`."""
        while self.position < position:
            buffer, used, room = self._room()
            count = min(room, position - self.position)
            buffer[used : used + count] = bytes(count)
            self._advance(count)

    def finish(self) -> FileEntry:
        """Pad to the end, make everything durable, and say what is in the file."""
        self.pad_to(self._size_bytes)
        self._flush()
        self._writer.finish()
        return FileEntry(size_bytes=self._size_bytes, block_digests="".join(self._digests))

    def __enter__(self) -> DataStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._writer.abort()

    def _room(self) -> tuple[mmap.mmap, int, int]:
        """The buffer, how much of it is used, and how much is left."""
        if self._buffer is None:
            # Anonymous memory begins at a page, as direct I/O asks.
            self._buffer = self._free.pop() if self._free else mmap.mmap(-1, self._segment_bytes)
            self._length = min(self._segment_bytes, self._size_bytes - self._segment_start)
        used = self.position - self._segment_start
        return self._buffer, used, self._length - used

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position - self._segment_start == self._length:
            self._flush()

    def _flush(self) -> None:
        buffer = self._buffer
        if buffer is None:
            return
        segment = memoryview(buffer)[: self.position - self._segment_start]
        for start in range(0, len(segment), BLOCK_BYTES):
            self._digests.append(digest(segment[start : start + BLOCK_BYTES]))
        self._writer.write_segment(self._segment_start, segment)
        self._segment_start, self._buffer = self.position, None
        del segment
        try:
            # Refused while anybody holds a view: a store that still sends these bytes keeps them.
            buffer.resize(self._segment_bytes)
        except BufferError:
            return
        self._free.append(buffer)

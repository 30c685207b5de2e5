"""Bytes of a checkpoint from one storage to another: data files block by block, documents whole.

Knows files, sizes and digests, nothing of tensors. Called by `dcp_ckpt.ops.copy`.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dcp_ckpt.errors import CorruptCheckpoint, StorageExists, StorageTransient
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.storage.base import ByteRange, Storage

__all__ = ["create_same", "transfer"]

_WINDOWS_AHEAD = 4
"""A window is what the target's writer likes to get in one piece: one part of an upload."""

_READ_BYTES = 4 * BLOCK_BYTES
_TRIES = 3


def transfer(
    source: Storage,
    key: str,
    entry: FileEntry,
    target: Storage,
    target_key: str,
    *,
    advance: Callable[[int], None],
    held_in: Callable[[int, int], str],
) -> None:
    """Write a checked copy of one data file under a name that is free. Blocks.

    Memory: a few windows that are read, and whatever the writer has under way. Nothing stays of a copy that
    fails, as far as the target lets itself be cleaned up.

    Args:
        entry: size and digests of the file.
        advance: called with the number of bytes after each window; what it raises ends the transfer.
        held_in: names what is stored from one byte of the file to another, for the error message.

    Raises:
        CorruptCheckpoint: a block of the source differs from its digest.
        StorageNotFound: the source is missing.
        StorageExists: the name is taken.
        StorageError: a read or write failed, or the source ends early.
    """
    writer = target.open_writer(target_key, size_bytes=entry.size_bytes, direct=True)
    try:
        window_bytes = max(writer.segment_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES
        starts = iter(range(0, entry.size_bytes, window_bytes))
        with ThreadPoolExecutor(_WINDOWS_AHEAD, thread_name_prefix="dcp_ckpt-copy") as readers:
            windows: deque[tuple[int, Future[memoryview]]] = deque()

            def read_ahead() -> None:
                if (start := next(starts, None)) is not None:
                    stop = min(start + window_bytes, entry.size_bytes)
                    windows.append((start, readers.submit(_read, source, key, entry, start, stop, held_in)))

            for _ in range(_WINDOWS_AHEAD):
                read_ahead()
            try:
                while windows:
                    start, window = windows.popleft()
                    data = window.result()
                    writer.write_segment(start, data)
                    advance(len(data))
                    read_ahead()
            finally:
                for _, window in windows:
                    window.cancel()
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def create_same(target: Storage, key: str, data: bytes) -> None:
    """Create a document whole; one that is there with the same bytes is fine.

    Raises:
        StorageExists: something else has the name.
        StorageTransient: no answer; it may or may not be there.
        StorageError: it could not be written.
    """
    unanswered: StorageTransient | None = None
    for _ in range(_TRIES):
        try:
            target.create_exclusive(key, data)
        except StorageTransient as error:
            unanswered = error
            continue
        except StorageExists:
            if target.read(key) != data:
                raise
        return
    assert unanswered is not None, "every other way out of the loop returned or raised"
    raise unanswered


def _read(
    source: Storage,
    key: str,
    entry: FileEntry,
    start: int,
    stop: int,
    held_in: Callable[[int, int], str],
) -> memoryview:
    """One window, every block of it checked."""
    # New memory each time, since an upload may send it after the call; page-aligned, for writers that go past
    # the page cache.
    result = memoryview(mmap.mmap(-1, stop - start))
    ranges = [
        ByteRange(key=key, offset=offset, num_bytes=min(_READ_BYTES, stop - offset))
        for offset in range(start, stop, _READ_BYTES)
    ]

    def consume(index: int, data: memoryview) -> None:
        offset = ranges[index].offset
        for first in range(offset, offset + len(data), BLOCK_BYTES):
            block, last = first // BLOCK_BYTES, min(first + BLOCK_BYTES, stop)
            if digest(data[first - offset : last - offset]) != entry.block_digest(block):
                raise CorruptCheckpoint(
                    f"the source is damaged: block {block} (bytes {first} to {last}) differs from its "
                    f"digest; it holds {held_in(first, last)}",
                    phase="read",
                    path=f"{source.url}/{key}",
                )
        result[offset - start : offset - start + len(data)] = data

    source.read_ranges(ranges, consume, concurrency=1)
    return result

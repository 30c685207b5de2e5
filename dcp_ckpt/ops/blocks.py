"""Reads part of a data file, whole blocks at a time, and checks each against its digest.

Knows one file and its entry in a fragment, nothing of tensors. Called by `dcp_ckpt.ops.checkpoint`.
"""

from __future__ import annotations

from dcp_ckpt.errors import CorruptCheckpoint, StorageError, StorageNotFound
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.storage.base import ByteRange, Storage

__all__ = ["block_range", "read_verified"]

_CONCURRENCY = 4


def block_range(key: str, size_bytes: int, block: int) -> ByteRange:
    """The bytes of one block of a file of `size_bytes`."""
    start = block * BLOCK_BYTES
    return ByteRange(key=key, offset=start, num_bytes=min(BLOCK_BYTES, size_bytes - start))


def read_verified(
    storage: Storage, key: str, entry: FileEntry, *, offset: int, num_bytes: int
) -> bytearray:
    """`num_bytes` bytes from `offset`, out of blocks whose digests are right.

    Memory: the result and a few blocks.

    Raises:
        StorageNotFound: the file is missing.
        CorruptCheckpoint: the range is outside of the file, the file is too short, or a digest differs.
        StorageError: it could not be read.
    """
    if offset + num_bytes > entry.size_bytes:
        raise CorruptCheckpoint(
            f"bytes {offset} to {offset + num_bytes} lie outside of a file of {entry.size_bytes}",
            phase="read",
            path=key,
        )
    result = bytearray(num_bytes)
    if num_bytes == 0:
        return result
    target = memoryview(result)
    first = offset // BLOCK_BYTES
    last = (offset + num_bytes - 1) // BLOCK_BYTES
    ranges = [block_range(key, entry.size_bytes, block) for block in range(first, last + 1)]

    def consume(index: int, data: memoryview) -> None:
        if digest(data) != entry.block_digest(first + index):
            raise CorruptCheckpoint(
                f"block {first + index} differs from its digest", phase="read", path=key
            )
        block_start = ranges[index].offset
        start = max(block_start, offset)
        stop = min(block_start + len(data), offset + num_bytes)
        target[start - offset : stop - offset] = data[start - block_start : stop - block_start]

    try:
        storage.read_ranges(ranges, consume, concurrency=_CONCURRENCY)
    except StorageNotFound:
        raise
    except StorageError as error:
        _raise_if_short(storage, key, entry, error)
        raise
    return result


def _raise_if_short(storage: Storage, key: str, entry: FileEntry, cause: StorageError) -> None:
    size_bytes = storage.size(key)
    if size_bytes < entry.size_bytes:
        raise CorruptCheckpoint(
            f"the file is truncated: {size_bytes} of {entry.size_bytes} bytes", phase="read", path=key
        ) from cause

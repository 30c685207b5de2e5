"""Reads data files whole blocks at a time and checks each block against its digest.

Knows one file, its size and its digests, nothing of tensors. `read_verified` raises at the first wrong
block and serves `dcp_ckpt.ops.checkpoint`; `check_file` collects them all and serves `dcp_ckpt.ops.verify`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dcp_ckpt.errors import CorruptCheckpoint, StorageError, StorageNotFound
from dcp_ckpt.format.digests import BLOCK_BYTES, DIGEST_DIGITS, digest
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.storage.base import ByteRange, Storage

__all__ = ["BadBlock", "FileCheck", "check_file", "read_verified"]

_READ_CONCURRENCY = 4
_CHECK_CONCURRENCY = 2


@dataclass(frozen=True, kw_only=True)
class BadBlock:
    """A block whose digest is wrong, or that could not be read (`error` says why)."""

    block: int
    start: int
    stop: int
    error: StorageError | None = None


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """What is true of one data file.

    Args:
        size_bytes: the size that it should have.
        found_bytes: the size that it has; None when it is missing, or (with `error`) cannot be looked at.
        bad_blocks: in ascending order, of those blocks that lie whole in the file.
    """

    key: str
    size_bytes: int
    found_bytes: int | None
    bad_blocks: tuple[BadBlock, ...] = ()
    error: StorageError | None = None

    @property
    def lost_from(self) -> int:
        """First byte of a truncated file that is gone or that no digest covers any more."""
        return (self.found_bytes or 0) // BLOCK_BYTES * BLOCK_BYTES


def read_verified(storage: Storage, key: str, entry: FileEntry, *, offset: int, num_bytes: int) -> bytearray:
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
    target = memoryview(result)
    first, last = offset // BLOCK_BYTES, (offset + num_bytes - 1) // BLOCK_BYTES
    ranges = [_block_range(key, entry.size_bytes, block) for block in range(first, last + 1)]

    def consume(index: int, data: memoryview) -> None:
        block_start = ranges[index].offset
        if digest(data) != entry.block_digest(first + index):
            raise CorruptCheckpoint(
                f"block {first + index} (bytes {block_start} to {block_start + len(data)}) differs from its "
                "digest",
                phase="read",
                path=key,
            )
        start = max(block_start, offset)
        stop = min(block_start + len(data), offset + num_bytes)
        target[start - offset : stop - offset] = data[start - block_start : stop - block_start]

    try:
        storage.read_ranges(ranges, consume, concurrency=_READ_CONCURRENCY)
    except StorageNotFound:
        raise
    except StorageError as error:
        found_bytes = storage.size(key)
        if found_bytes >= entry.size_bytes:
            raise
        raise CorruptCheckpoint(
            f"truncated: {found_bytes} of {entry.size_bytes} bytes", phase="read", path=key
        ) from error
    return result


def check_file(
    storage: Storage,
    key: str,
    size_bytes: int,
    block_digests: str,
    *,
    checked: Callable[[int], None] | None = None,
) -> FileCheck:
    """Compare one data file with its size and its digests; reads every block, two at a time.

    Args:
        block_digests: concatenated; empty when they are not known, then only the size is checked.
        checked: called with the number of bytes of each block that was read, one call at a time, on any
            thread; what it raises ends the check.
    """
    try:
        found_bytes = storage.size(key)
    except StorageNotFound:
        return FileCheck(key=key, size_bytes=size_bytes, found_bytes=None)
    except StorageError as error:
        return FileCheck(key=key, size_bytes=size_bytes, found_bytes=None, error=error)
    blocks = [
        (block, one)
        for block in range(len(block_digests) // DIGEST_DIGITS)
        if (one := _block_range(key, size_bytes, block)).offset + one.num_bytes <= found_bytes
    ]
    entry = FileEntry(size_bytes=size_bytes, block_digests=block_digests)
    bad = _bad_blocks(storage, blocks, entry, checked)
    return FileCheck(key=key, size_bytes=size_bytes, found_bytes=found_bytes, bad_blocks=bad)


def _bad_blocks(
    storage: Storage,
    blocks: list[tuple[int, ByteRange]],
    entry: FileEntry,
    checked: Callable[[int], None] | None,
) -> tuple[BadBlock, ...]:
    seen: dict[int, BadBlock | None] = {}
    lock = threading.Lock()

    def read(wanted: list[tuple[int, ByteRange]]) -> None:
        def consume(index: int, data: memoryview) -> None:
            block, one = wanted[index]
            is_good = digest(data) == entry.block_digest(block)
            with lock:
                seen[block] = None if is_good else _bad(block, one)
                if checked is not None:
                    checked(one.num_bytes)

        storage.read_ranges([one for _, one in wanted], consume, concurrency=_CHECK_CONCURRENCY)

    try:
        read(blocks)
    except StorageError:
        # One unreadable place ends the whole call: ask again, block by block, for what is left.
        for block, one in blocks:
            if block not in seen:
                try:
                    read([(block, one)])
                except StorageError as error:
                    seen[block] = _bad(block, one, error)
    return tuple(bad for block in sorted(seen) if (bad := seen[block]) is not None)


def _bad(block: int, one: ByteRange, error: StorageError | None = None) -> BadBlock:
    return BadBlock(block=block, start=one.offset, stop=one.offset + one.num_bytes, error=error)


def _block_range(key: str, size_bytes: int, block: int) -> ByteRange:
    start = block * BLOCK_BYTES
    return ByteRange(key=key, offset=start, num_bytes=min(BLOCK_BYTES, size_bytes - start))

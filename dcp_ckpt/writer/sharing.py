"""Sharing one data file of an older checkpoint: a hard link, or a checked copy where there can be none.

Step 2 of the commit protocol for what has not changed (docs/format.md, section 14). Called by the engine;
does not decide what is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dcp_ckpt.errors import StorageError, StorageNotFound, StorageUnsuitable
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.storage.base import ByteRange, Storage

__all__ = ["share_file"]


def share_file(
    storage: Storage, key: str, new_key: str, entry: FileEntry, tell: Callable[..., None]
) -> FileEntry:
    """Give a data file one more name, durably. Blocks.

    Args:
        key: of the older checkpoint.
        new_key: in the step directory, which exists.
        entry: what the older checkpoint says of the file.
        tell: called with `bytes_done` and `bytes_total` when a part of a copy is done.

    Returns:
        The file's entry: without an origin where the bytes had to be copied.

    Raises:
        StorageNotFound: the older checkpoint is gone, or the step directory.
        StorageError: the file is another one, could not be linked or copied.
    """
    try:
        storage.link(key, new_key)
        found_bytes = storage.size(new_key)
    except StorageUnsuitable:
        _copy(storage, key, new_key, entry, tell)
        return replace(entry, origin=None)
    except StorageNotFound as error:
        error.message = (
            f"{key} holds what has not changed since it was written, and cannot be shared: {error.message}; "
            "the next save writes everything"
        )
        raise
    if found_bytes != entry.size_bytes:
        raise StorageError(
            f"{key} holds what has not changed since it was written, and is damaged: it has {found_bytes} "
            f"bytes instead of {entry.size_bytes}; the next save writes everything",
            path=f"{storage.url}/{key}",
        )
    return entry


def _copy(storage: Storage, key: str, new_key: str, entry: FileEntry, tell: Callable[..., None]) -> None:
    writer = storage.open_writer(new_key, size_bytes=entry.size_bytes, direct=False)
    try:
        part_bytes = max(writer.segment_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES
        for start in range(0, entry.size_bytes, part_bytes):
            stop = min(start + part_bytes, entry.size_bytes)
            writer.write_segment(start, memoryview(_read(storage, key, entry, start, stop)))
            tell(bytes_done=stop, bytes_total=entry.size_bytes)
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def _read(storage: Storage, key: str, entry: FileEntry, start: int, stop: int) -> bytes:
    """Some whole blocks, each checked."""
    parts: list[bytes] = []
    wanted = ByteRange(key=key, offset=start, num_bytes=stop - start)
    storage.read_ranges([wanted], lambda _, data: parts.append(bytes(data)), concurrency=1)
    for first in range(start, stop, BLOCK_BYTES):
        block = parts[0][first - start : first - start + BLOCK_BYTES]
        if digest(block) != entry.block_digest(first // BLOCK_BYTES):
            raise StorageError(
                f"{key} holds what has not changed since it was written, and is damaged: block "
                f"{first // BLOCK_BYTES} differs from its digest; the next save writes everything",
                path=f"{storage.url}/{key}",
            )
    return parts[0]

"""Sharing data files of an older checkpoint: hard links, or checked copies where there can be none.

Step 2 of the commit protocol for what has not changed (docs/format.md, section 14). Called by the engine;
does not decide what is shared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dcp_ckpt.errors import StorageError, StorageNotFound, StorageUnsuitable
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.storage.base import ByteRange, Storage
from dcp_ckpt.writer.progress import Tell

__all__ = ["SharedFile", "share_files"]


@dataclass(frozen=True, kw_only=True)
class SharedFile:
    """One file to share.

    Args:
        key: of the older checkpoint.
        new_key: in the step directory, which exists.
        entry: what the older checkpoint says of it.
    """

    key: str
    new_key: str
    entry: FileEntry


def share_files(storage: Storage, files: Sequence[SharedFile], tell: Tell) -> list[FileEntry]:
    """Give data files one more name each, durably. Blocks.

    Args:
        tell: called when a file is begun, and when a part of a copy is done.

    Returns:
        The files' entries: without an origin where the bytes had to be copied.

    Raises:
        StorageNotFound: the older checkpoint is gone, or the step directory.
        StorageError: a file is another one, could not be linked or copied.
    """
    if not files:
        return []
    tell(files[0].new_key, bytes_done=0, bytes_total=sum(file.entry.size_bytes for file in files))
    try:
        storage.link([(file.key, file.new_key) for file in files])
    except StorageUnsuitable:
        for file in files:
            _copy(storage, file, partial(tell, file.new_key))
        return [replace(file.entry, origin=None) for file in files]
    except StorageNotFound as error:
        raise StorageNotFound(
            f"what has not changed since {os.path.dirname(files[0].key)} cannot be shared with it: "
            f"{error.message}; the next save writes everything",
            path=error.path,
            errno=error.errno,
        ) from error
    for file in files:
        found_bytes = storage.size(file.new_key)
        if found_bytes != file.entry.size_bytes:
            raise _damaged(storage, file, f"it has {found_bytes} bytes instead of {file.entry.size_bytes}")
    return [file.entry for file in files]


def _copy(storage: Storage, file: SharedFile, tell: Callable[..., None]) -> None:
    size_bytes = file.entry.size_bytes
    writer = storage.open_writer(file.new_key, size_bytes=size_bytes, direct=False)
    try:
        part_bytes = max(writer.segment_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES
        for start in range(0, size_bytes, part_bytes):
            stop = min(start + part_bytes, size_bytes)
            writer.write_segment(start, memoryview(_read(storage, file, start, stop)))
            tell(bytes_done=stop, bytes_total=size_bytes)
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def _read(storage: Storage, file: SharedFile, start: int, stop: int) -> bytes:
    """Some whole blocks, each checked."""
    parts: list[bytes] = []
    wanted = ByteRange(key=file.key, offset=start, num_bytes=stop - start)
    storage.read_ranges([wanted], lambda _, data: parts.append(bytes(data)), concurrency=1)
    for first in range(start, stop, BLOCK_BYTES):
        block = parts[0][first - start : first - start + BLOCK_BYTES]
        if digest(block) != file.entry.block_digest(first // BLOCK_BYTES):
            raise _damaged(storage, file, f"block {first // BLOCK_BYTES} differs from its digest")
    return parts[0]


def _damaged(storage: Storage, file: SharedFile, problem: str) -> StorageError:
    return StorageError(
        f"{file.key} holds what has not changed since, and is damaged: {problem}; the next save writes "
        "everything",
        path=f"{storage.url}/{file.key}",
    )

"""Trying the storage out before it matters: one small object, written, read back and deleted as data is.

Owns what a probe does and what it says of a storage that other ranks do not share. Called by the writer
program, on behalf of `dcp_ckpt.save.opening`.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

from dcp_ckpt.errors import StorageError, StorageNotFound, StorageUnsuitable
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.writer.messages import Probe, Sight

__all__ = ["end_probe", "try_out"]

_BYTES = 4096
_TRIES = 3


def try_out(storage: Storage, probe: Probe) -> None:
    """Write the probe and read it back, then look for what another rank wrote. Blocks.

    Raises:
        StorageUnsuitable: the storage does not give back what was written, or is another one than rank 0's.
        StorageError: it refused. What was written is gone then, as far as it could be deleted.
    """
    try:
        _write_again_if_swept(storage, probe)
        if probe.sight is not None:
            _look_for(storage, probe.sight, rank=probe.rank)
        if not probe.stays:
            storage.delete([probe.key])
    except BaseException:
        with suppress(StorageError):
            _remove(storage, probe.key)
        raise


def end_probe(storage: Storage, key: str, *, failed: bool) -> None:
    """Delete the probe, and if others failed also the run directory that was made for it.

    Raises:
        StorageNotFound: others failed, and the probe was gone: their failure may have no other cause.
    """
    if not failed:
        storage.delete([key])
        return
    try:
        storage.size(key)
    finally:
        _remove(storage, key)


def _remove(storage: Storage, key: str) -> None:
    try:
        storage.delete([key])
    finally:
        storage.remove_own_root()


def _write_again_if_swept(storage: Storage, probe: Probe) -> None:
    """Another start of this run may sweep what it takes for the probe of a dead one, but not every time."""
    for tries_left in reversed(range(_TRIES)):
        try:
            _write(storage, probe)
        except StorageNotFound:
            if not tries_left:
                raise
            continue
        if _is_there(storage, probe):
            return
    raise _unfaithful(storage, probe.key)


def _write(storage: Storage, probe: Probe) -> None:
    # A mapping, since its address is aligned: the write goes the way of the data, past the page cache. Not
    # closed: the error of a failed write still holds it.
    memory = mmap.mmap(-1, _BYTES)
    memory[:] = _content(probe.key)
    writer = storage.open_writer(probe.key, size_bytes=_BYTES, direct=probe.direct_io)
    try:
        writer.write_segment(0, memoryview(memory))
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def _is_there(storage: Storage, probe: Probe) -> bool:
    """Whether it still stands; other bytes than were written are an error."""
    try:
        found = storage.read(probe.key)
    except StorageNotFound:
        return False
    if found != _content(probe.key):
        raise _unfaithful(storage, probe.key)
    return True


def _unfaithful(storage: Storage, key: str) -> StorageUnsuitable:
    return StorageUnsuitable(
        "the storage does not give back what was written to it; check the device or the mount before relying "
        "on it",
        path=f"{storage.url}/{key}",
    )


def _look_for(storage: Storage, sight: Sight, *, rank: int) -> None:
    """Find what rank 0 has written.

    The name was never asked for here before, so no cache of a network file system denies it; and our own
    probe has just made sure that the directory is looked up anew.
    """
    found: bytes | None = None
    with suppress(StorageNotFound):
        found = storage.read(sight.key)
    if found == _content(sight.key):
        return
    if sight.storage_url == storage.url:
        reason = (
            f"rank {rank} and rank 0 were both given {storage.url}, and rank {rank} does not see what rank 0 "
            "wrote there: a directory of that name on each node is not a shared file system"
        )
    else:
        reason = (
            f"rank {rank} was given {storage.url} and rank 0 {sight.storage_url}, and these are not the same "
            "storage"
        )
    raise StorageUnsuitable(
        f"{reason}; give all ranks one directory of a file system that all nodes share, or s3://BUCKET/PREFIX",
        path=storage.url,
    )


def _content(key: str) -> bytes:
    """The bytes of a probe: its name, which holds a random token, over and over."""
    line = encode_json({"dcp_ckpt": "probe", "key": key}) + b"\n"
    return (line * (_BYTES // len(line) + 1))[:_BYTES]

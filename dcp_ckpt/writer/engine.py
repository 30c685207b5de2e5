"""Writing one rank's part of one attempt: steps 1 to 6 of the commit protocol (docs/format.md, section 8).

Called by the writer process only. Knows storage and format; knows no torch, no other rank and no process
group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod

from dcp_ckpt.errors import StorageError, StorageUnsuitable
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.epoch import decode_epoch
from dcp_ckpt.format.fragment import Fragment, encode_fragment, payload_digest
from dcp_ckpt.format.manifest import FragmentRef
from dcp_ckpt.format.names import EPOCHS, data_file_name, epoch_name, fragment_name
from dcp_ckpt.storage.base import ObjectWriter, Storage
from dcp_ckpt.writer.messages import WriteJob
from dcp_ckpt.writer.progress import Tell
from dcp_ckpt.writer.sharing import SharedFile, share_files

__all__ = ["check_shared_storage", "write_attempt"]


def check_shared_storage(storage: Storage, fragment: Fragment) -> None:
    """Make sure that this host sees the owner's storage and not a directory of the same name.

    Raises:
        StorageUnsuitable: the epoch's claim is not here, or is another one.
    """
    key = f"{EPOCHS}/{epoch_name(fragment.epoch)}"
    try:
        epoch_id = decode_epoch(storage.read(key), path=key).epoch_id
    except StorageError as error:
        raise StorageUnsuitable(
            f"rank {fragment.rank} does not see the epoch that rank 0 claimed in {storage.url}; "
            "all ranks must see the same shared storage",
            path=key,
        ) from error
    if epoch_id != fragment.epoch_id:
        raise StorageUnsuitable(
            f"rank {fragment.rank} sees another run's storage at {storage.url}; "
            "all ranks must see the same one",
            path=key,
        )


def write_attempt(storage: Storage, job: WriteJob, arena: memoryview, tell: Tell) -> FragmentRef:
    """Write and share the data files, then publish the fragment that names them.

    Args:
        storage: the run directory.
        job: what to write.
        arena: holds what is written, each file as it is.
        tell: called when something is begun, and when a part of it is done.

    Returns:
        What the coordinator needs for the manifest. Everything is durable by then.

    Raises:
        StorageError: nothing of a data file that failed is left behind then.
    """
    fragment = job.fragment
    attempt = fragment.attempt_id
    storage.make_directory(job.directory)
    keys = [
        f"{job.directory}/{data_file_name(fragment.rank, index, attempt)}"
        for index in range(len(fragment.files))
    ]
    sources = list(zip(keys, fragment.files, job.sources, strict=True))
    # What is shared first: where that fails, nothing was written in vain.
    shared = [
        SharedFile(key=source.shared_key, new_key=key, entry=file)
        for key, file, source in sources
        if source.shared_key
    ]
    made = dict(zip((file.new_key for file in shared), share_files(storage, shared, tell), strict=True))
    for key, file, source in sources:
        if not source.shared_key:
            tell(key, bytes_done=0, bytes_total=file.size_bytes)
            writer = storage.open_writer(key, size_bytes=file.size_bytes, direct=job.direct_io)
            part = arena[source.arena_offset : source.arena_offset + file.size_bytes]
            made[key] = replace(file, block_digests=_write_file(writer, part, partial(tell, key)))
    files = [made[key] for key in keys]
    fragment = replace(fragment, files=files, payload_digests=_payload_digests(job, arena))
    data = encode_fragment(fragment)
    key = f"{job.directory}/{fragment_name(fragment.rank, attempt)}"
    tell(key, bytes_done=0, bytes_total=len(data))
    storage.create_exclusive(key, data)
    return FragmentRef.of(fragment, data)


def _payload_digests(job: WriteJob, arena: memoryview) -> str:
    """The digest of every chunk's payload, one after the other; empty where nobody asks for them."""
    digests = []
    for chunk, payload in zip(job.fragment.chunks, job.payloads, strict=bool(job.payloads)):
        start = job.sources[chunk.file].arena_offset + chunk.payload_offset
        stop = start + prod(chunk.sizes) * dtype_info(payload.dtype).item_bytes
        digests.append(payload.digest or payload_digest(payload.dtype, chunk.sizes, [arena[start:stop]]))
    return "".join(digests)


def _write_file(writer: ObjectWriter, data: memoryview, tell: Callable[..., None]) -> str:
    """Write and fsync one data file; returns its block digests."""
    digests: list[str] = []
    try:
        for offset in range(0, len(data), writer.segment_bytes):
            segment = data[offset : offset + writer.segment_bytes]
            # Digest first: the pass over the block is the one that brings it into the cache.
            digests.extend(
                digest(segment[start : start + BLOCK_BYTES]) for start in range(0, len(segment), BLOCK_BYTES)
            )
            writer.write_segment(offset, segment)
            tell(bytes_done=offset + len(segment), bytes_total=len(data))
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    return "".join(digests)

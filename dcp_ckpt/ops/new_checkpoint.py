"""A checkpoint that no training saved: written into a run by one process, by the protocol of every save.

Owns the epoch, the order of docs/format.md, section 8, and what is left when it fails: nothing, or a whole
checkpoint. Knows nothing of where the state comes from. Called by import and average; imports torch when it
writes.
"""

from __future__ import annotations

import ctypes
import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_ckpt.errors import (
    CheckpointError,
    CommitUnknown,
    ConfigError,
    Fenced,
    SaveFailed,
    StepAlreadySaved,
    StorageFull,
)
from dcp_ckpt.format.boxes import compress_ranks
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.fragment import (
    ChunkEntry,
    FileEntry,
    Fragment,
    TensorEntry,
    ValueEntry,
    encode_fragment,
    layout_digest,
    payload_digest,
)
from dcp_ckpt.format.manifest import build_manifest, summarize
from dcp_ckpt.format.names import MANIFEST, MAX_STEP, AttemptId, StepDir, data_file_name, fragment_name
from dcp_ckpt.format.stock_metadata import DCP_SAVE_TAG
from dcp_ckpt.lifecycle.catalogue import Catalogue, read_catalogue, step_directories
from dcp_ckpt.lifecycle.command_epoch import command_epoch
from dcp_ckpt.lifecycle.commit import check_layouts, publish_manifest
from dcp_ckpt.lifecycle.epochs import require_newest, utc_now
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.retract import retract
from dcp_ckpt.lifecycle.runs import read_run
from dcp_ckpt.ops.new_state import NewFile, NewState, plan_new_file
from dcp_ckpt.storage.base import Storage

if TYPE_CHECKING:
    import torch

__all__ = ["Windows", "WriteProgress", "Written", "write_checkpoint"]

log = logging.getLogger(__name__)

WriteProgress = Callable[[int, int], None]
"""Called with the bytes written so far and those in all."""

Windows = Callable[[Sequence[int]], "Iterator[torch.Tensor]"]
"""Given numbers of tensors: their contents in this order, each in contiguous windows on the CPU."""

_SAVE = 1
"""A command makes one attempt in its epoch."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A committed checkpoint: its directory in the run, its epoch, and the bytes of its data file."""

    directory: StepDir
    epoch: int
    num_bytes: int


def write_checkpoint(
    storage: Storage,
    state: NewState,
    windows: Windows,
    *,
    step: int,
    purpose: str,
    force: bool,
    wait_seconds: float,
    progress: WriteProgress | None = None,
) -> Written:
    """Write and commit one checkpoint. One process; blocks; claims an epoch, as every owner does.

    The run is made if nothing is there. Memory: what `windows` gives at a time, and a few MiB.

    Args:
        storage: the run.
        step: greater than that of every checkpoint of the run.
        purpose: of the claim.
        force: go on although the owner of the run lives; it is fenced then, and cannot save any more.
        wait_seconds: how long to wait for an owner that lives.
        progress: what it raises ends the write.

    Raises:
        ConfigError: `step` is none, the place is no run, or a live owner holds it; nothing was written.
        StepAlreadySaved: the step is not after the newest one.
        StorageFull: there is no room; found before anything is written.
        Fenced: another start took over the run meanwhile.
        CommitUnknown: the storage did not say whether it is committed.
        StorageError: a read or write failed; nothing of it counts.
    """
    if not 0 <= step <= MAX_STEP:
        raise ConfigError(f"step {step}: a step is a number from 0 to {MAX_STEP}")
    # Before anything is claimed: a slip of the pen must not fence anybody, nor make a run of another place.
    _require_run_or_nothing(storage)
    _require_later(read_catalogue(storage), step)
    file = plan_new_file(state)
    _require_room(storage, file.size_bytes)
    with command_epoch(storage, purpose=purpose, force=force, wait_seconds=wait_seconds) as claim:
        # Listed before dead attempts are sealed, as at every start.
        taken = step_directories(storage)
        catalogue, _ = recover_older_epochs(storage, epoch=claim.epoch)
        _require_later(catalogue, step)
        plain = StepDir(step)
        directory = StepDir(step, claim.epoch) if plain in taken else plain
        attempt = AttemptId(claim.epoch, _SAVE)
        try:
            storage.make_directory(str(directory))
            written = _write_data(
                storage, f"{directory}/{data_file_name(0, 0, attempt)}", state, file, windows, progress
            )
            _commit(storage, directory, _fragment(claim, attempt, step, state, file, *written))
        except (CommitUnknown, Fenced):
            raise
        except BaseException:
            retract(storage, directory, attempt, epoch=claim.epoch, all_done=True)
            raise
        _derive_metadata(storage, directory)
    return Written(directory=directory, epoch=claim.epoch, num_bytes=file.size_bytes)


def _require_run_or_nothing(storage: Storage) -> None:
    if read_run(storage) is not None or step_directories(storage):
        return
    names = storage.list_names("")
    if names:
        what = "a checkpoint" if MANIFEST in names else "not a run: it has no run.json, and it is not empty"
        raise ConfigError(f"{storage.url} is {what}; name a run, as in runs/run-001, or a new directory")


def _require_later(catalogue: Catalogue, step: int) -> None:
    newest = max((entry.step for entry in catalogue.entries), default=-1)
    if step <= newest:
        raise StepAlreadySaved(
            f"step {step} is not after step {newest}, which is committed; steps of a run grow, and a "
            "committed step is never replaced: choose a later step, or another run",
            step=step,
        )


def _require_room(storage: Storage, needed_bytes: int) -> None:
    free_bytes = storage.free_bytes()
    if free_bytes is not None and free_bytes < needed_bytes:
        raise StorageFull(
            f"no room for the checkpoint: {needed_bytes} bytes needed, {free_bytes} bytes free",
            path=storage.url,
            errno=errno.ENOSPC,
        )


def _write_data(
    storage: Storage,
    key: str,
    state: NewState,
    file: NewFile,
    windows: Windows,
    progress: WriteProgress | None,
) -> tuple[list[FileEntry], str]:
    """Write the data file, durably; what is in it, and the digest of each chunk's payload."""
    from dcp_ckpt.save.data_stream import DataStream

    if not file.size_bytes:
        return [], ""
    payload_digests = []
    contents = windows(file.numbers)
    writer = storage.open_writer(key, size_bytes=file.size_bytes, direct=True)
    with DataStream(writer, size_bytes=file.size_bytes) as stream:

        def put(num_bytes: int) -> Iterator[memoryview]:
            while num_bytes:
                window = _bytes_of(next(contents))
                stream.put_payload(window)
                num_bytes -= window.numel()
                yield _view(window)
                if progress is not None:
                    progress(stream.position, file.size_bytes)

        for chunk in file.layout.chunks:
            tensor = state.tensors[chunk.owned.tensor]
            stream.pad_to(chunk.container_offset)
            stream.put_bytes(chunk.framing.prefix)
            payload_digests.append(
                payload_digest(tensor.dtype, tensor.shape, put(chunk.framing.payload_bytes))
            )
            stream.put_bytes(chunk.framing.suffix)
        for offset, container in file.containers.values():
            stream.pad_to(offset)
            stream.put_bytes(container)
        return [stream.finish()], "".join(payload_digests)


def _bytes_of(window: torch.Tensor) -> torch.Tensor:
    import torch

    return window.view(-1).view(torch.uint8)


def _view(payload: torch.Tensor) -> memoryview:
    # Not by way of numpy, which is not required.
    return memoryview((ctypes.c_char * payload.numel()).from_address(payload.data_ptr())).cast("B")


def _fragment(
    claim: EpochClaim,
    attempt: AttemptId,
    step: int,
    state: NewState,
    file: NewFile,
    files: list[FileEntry],
    payload_digests: str,
) -> Fragment:
    """That of the one rank."""
    stored = set(file.numbers)
    tensors = [
        TensorEntry(
            path=list(tensor.path),
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            mesh=None,
            placements=[],
            owners=compress_ranks([0] if number in stored else []),
        )
        for number, tensor in enumerate(state.tensors)
    ]
    chunks = [
        ChunkEntry(
            tensor=tensors[chunk.owned.tensor].name,
            offsets=list(chunk.owned.box.offsets),
            sizes=list(chunk.owned.box.sizes),
            file=0,
            payload_offset=chunk.payload_offset,
            container_offset=chunk.container_offset,
            container_bytes=chunk.framing.container_bytes,
        )
        for chunk in file.layout.chunks
    ]
    return Fragment(
        run_id=claim.run_id,
        epoch=claim.epoch,
        epoch_id=claim.epoch_id,
        attempt=str(attempt),
        step=step,
        rank=0,
        world_size=1,
        files=files,
        meshes=[],
        tensors=tensors,
        chunks=chunks,
        layout=layout_digest([], tensors, chunks),
        aliases={
            tensor.name: [list(path) for path in tensor.aliases] for tensor in state.tensors if tensor.aliases
        },
        values=_value_entries(state, file),
        per_rank={},
        replicated=digest(encode_json({})),  # there is nobody to compare with
        payload_digests=payload_digests,
        created_at=utc_now(),
        metrics=dict(state.metrics),
        tags=[DCP_SAVE_TAG, *state.tags],
    )


def _value_entries(state: NewState, file: NewFile) -> dict[str, ValueEntry]:
    entries = {}
    for value in state.values:
        offset, container = file.containers.get(value.name, (None, None))
        entries[value.name] = ValueEntry(
            path=list(value.path),
            value=value.encoded,
            container_offset=offset,
            container_bytes=None if container is None else len(container),
        )
    return entries


def _commit(storage: Storage, directory: StepDir, fragment: Fragment) -> None:
    """Publish the fragment, then the manifest."""
    if problem := check_layouts([fragment]):
        raise SaveFailed(problem, step=fragment.step, phase="commit", path=f"{storage.url}/{directory}")
    data = encode_fragment(fragment)
    storage.create_exclusive(f"{directory}/{fragment_name(0, fragment.attempt_id)}", data)
    require_newest(storage, fragment.epoch)
    publish_manifest(storage, directory, build_manifest([summarize(fragment, data)]))


def _derive_metadata(storage: Storage, directory: StepDir) -> None:
    """For stock DCP readers; what fails here fails no checkpoint, which is committed."""
    from dcp_ckpt.save.dcp_metadata import AUTO_MAX_CHUNKS, derive_metadata

    try:
        derive_metadata(storage, directory, max_chunks=AUTO_MAX_CHUNKS)
    except CheckpointError as error:
        log.warning("%s is committed, and has no .metadata: %s", directory, error)

"""Rank 0's part of a plain `dcp.save`: claim the directory, then commit what all ranks wrote, or remove it.

The result is a checkpoint of the one format (docs/format.md) that belongs to no run: its run id, epoch id and
epoch 1 are its own. Runs in the process that calls `dcp.save`; knows no process group, since DCP gathers the
reports. Called by `dcp.Writer`.
"""

from __future__ import annotations

import logging
import pickle
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dcp_ckpt.coordination import error_from_fields
from dcp_ckpt.errors import CheckpointError, CommitUnknown, SaveFailed, StepAlreadySaved
from dcp_ckpt.format.boxes import compress_ranks
from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.dtypes import dtype_name
from dcp_ckpt.format.fragment import (
    ChunkEntry,
    FileEntry,
    Fragment,
    TensorEntry,
    ValueEntry,
    encode_fragment,
    layout_digest,
)
from dcp_ckpt.format.manifest import build_manifest, summarize
from dcp_ckpt.format.names import (
    DCP_METADATA,
    MANIFEST,
    AttemptId,
    data_file_name,
    fragment_name,
    parse_data_file_name,
    parse_fragment_name,
)
from dcp_ckpt.format.stock_metadata import DCP_SAVE_TAG
from dcp_ckpt.lifecycle.commit import check_layouts, publish_manifest
from dcp_ckpt.lifecycle.epochs import utc_now
from dcp_ckpt.save.data_stream import DataStream
from dcp_ckpt.save.dcp_items import SavedValue
from dcp_ckpt.save.dcp_metadata import build_metadata
from dcp_ckpt.save.dcp_write import RankReport
from dcp_ckpt.save.layout import SEGMENT_BYTES, round_up
from dcp_ckpt.storage.base import Storage

__all__ = ["claim_directory", "commit_reports"]

log = logging.getLogger(__name__)

_EPOCH = 1
_CONCURRENT_FRAGMENTS = 8


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What all fragments of one save have in common."""

    run_id: str
    epoch_id: str
    attempt: AttemptId
    step: int
    world_size: int


def claim_directory(storage: Storage, directory: str) -> AttemptId:
    """Make the directory and choose the attempt. Called on rank 0, before anything is written.

    What an earlier attempt left behind stays, under names of its own, until a save here has succeeded.

    Raises:
        StepAlreadySaved: a checkpoint is there, of this format or of stock DCP.
        StorageError: the storage cannot be used.
    """
    names = storage.list_names(f"{directory}/")
    for name in (MANIFEST, DCP_METADATA):
        if name in names:
            raise StepAlreadySaved(
                f"a checkpoint is there already: it has a {name}. Nothing is ever overwritten: save to "
                "another directory, or delete this one first",
                phase="plan",
                path=f"{storage.url}/{directory}",
            )
    storage.require_exclusive_create()
    storage.make_directory(directory)
    return AttemptId(
        _EPOCH, 1 + max((attempt.save for attempt in map(_attempt_of, names) if attempt), default=0)
    )


def commit_reports(
    storage: Storage, directory: str, reports: Sequence[RankReport], metadata: Metadata, *, step: int
) -> Metadata:
    """Make a checkpoint of what all ranks wrote. Called on rank 0; blocks; everything is durable on return.

    Args:
        reports: of all ranks.
        metadata: DCP's description of the state.

    Returns:
        The description for stock readers, which is also in `.metadata`.

    Raises:
        CheckpointError: the first failure of any rank, or of the commit; no manifest is there, and all files
            of the save were removed as far as the storage lets them.
        CommitUnknown: the storage did not say whether the manifest is there; nothing was removed.
    """
    attempt = reports[0].assignment.attempt_id
    try:
        _raise_failures(reports)
        _require_files(storage, directory, reports)
        fragments = _write_fragments(storage, directory, reports, metadata, step)
    except CommitUnknown:
        raise
    # Not after an interrupt: the manifest may be there, and then these are the files of a checkpoint.
    except Exception as error:
        _clear(storage, directory, attempt)
        if isinstance(error, CheckpointError):
            error.step = step if error.step is None else error.step
        raise
    derived = replace(build_metadata(fragments), planner_data=metadata.planner_data)
    try:
        storage.put(f"{directory}/{DCP_METADATA}", pickle.dumps(derived))
        leftovers = [
            f"{directory}/{name}"
            for name in storage.list_names(f"{directory}/")
            if (other := _attempt_of(name)) and other != attempt
        ]
        storage.delete(leftovers)
    except CheckpointError as error:
        # The checkpoint is committed: whoever is told that it failed would save it again.
        log.warning("%s is committed, but not tidy: %s", directory, error)
    return derived


def _raise_failures(reports: Sequence[RankReport]) -> None:
    failures = [error_from_fields(report.error) for report in reports if report.error is not None]
    if failures:
        if len(failures) > 1:
            others = ", ".join(str(failure.rank) for failure in failures[1:])
            failures[0].message += f" (rank(s) {others} failed too)"
        raise failures[0]


def _require_files(storage: Storage, directory: str, reports: Sequence[RankReport]) -> None:
    """See that all files are here, whole: a rank that writes elsewhere reports success, too.

    Raises:
        SaveFailed: a file is missing, or has another size.
    """
    attempts = {report.assignment.attempt for report in reports}
    ranks = [report.assignment.rank for report in reports]
    if len(attempts) != 1 or ranks != list(range(len(reports))):
        raise SaveFailed(f"ranks {ranks} wrote attempt(s) {sorted(attempts)}; save again", phase="commit")
    found = {info.key: info.size_bytes for info in storage.list(f"{directory}/")}
    for report in reports:
        for number, file in enumerate(report.files, report.assignment.first_file):
            key = (
                f"{directory}/{data_file_name(report.assignment.rank, number, report.assignment.attempt_id)}"
            )
            if found.get(key) != file.size_bytes:
                seen = "no such file" if key not in found else f"{found[key]} bytes"
                raise SaveFailed(
                    f"rank {report.assignment.rank} wrote {file.size_bytes} bytes, and rank 0 sees {seen}; "
                    "all ranks must save to the same directory of one shared storage",
                    rank=report.assignment.rank,
                    phase="commit",
                    path=f"{storage.url}/{key}",
                )


def _write_fragments(
    storage: Storage, directory: str, reports: Sequence[RankReport], metadata: Metadata, step: int
) -> list[Fragment]:
    """Write the values, the fragments and, last, the manifest."""
    identity = _Identity(
        run_id=secrets.token_hex(16),
        epoch_id=secrets.token_hex(16),
        attempt=reports[0].assignment.attempt_id,
        step=step,
        world_size=len(reports),
    )
    values = {name: value for report in reports for name, value in report.values.items()}
    entries, value_files = _write_values(storage, directory, identity.attempt, values, metadata)
    if len(value_files) != reports[0].assignment.first_file:
        raise SaveFailed("the ranks saved other values than were planned; save again", phase="commit")
    fragments = [
        _fragment(identity, rank, report.files if rank else [*value_files, *report.files], report.chunks)
        for rank, report in enumerate(reports)
    ]
    tensors = _tensor_entries(reports, metadata)
    fragments[0] = replace(
        fragments[0],
        tensors=tensors,
        layout=layout_digest([], tensors, fragments[0].chunks),
        values=entries,
        created_at=utc_now(),
        tags=[DCP_SAVE_TAG],
    )
    problem = check_layouts(fragments)
    if problem:
        raise SaveFailed(problem, phase="commit", path=f"{storage.url}/{directory}")
    encoded = [encode_fragment(fragment) for fragment in fragments]

    def publish(rank: int) -> None:
        name = fragment_name(rank, identity.attempt)
        storage.create_exclusive(f"{directory}/{name}", encoded[rank])

    with ThreadPoolExecutor(min(_CONCURRENT_FRAGMENTS, len(fragments))) as pool:
        list(pool.map(publish, range(len(fragments))))
    summaries = [summarize(fragment, data) for fragment, data in zip(fragments, encoded, strict=True)]
    publish_manifest(storage, directory, build_manifest(summaries))
    return fragments


def _fragment(identity: _Identity, rank: int, files: list[FileEntry], chunks: list[ChunkEntry]) -> Fragment:
    return Fragment(
        run_id=identity.run_id,
        epoch=_EPOCH,
        epoch_id=identity.epoch_id,
        attempt=str(identity.attempt),
        step=identity.step,
        rank=rank,
        world_size=identity.world_size,
        files=files,
        meshes=[],
        tensors=[],
        chunks=chunks,
        layout=layout_digest([], [], chunks),
        values={},
        per_rank={},
        # What DCP dedups is never compared between ranks.
        replicated=digest(encode_json({})),
    )


def _tensor_entries(reports: Sequence[RankReport], metadata: Metadata) -> list[TensorEntry]:
    owners: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        for chunk in report.chunks:
            holders = owners.setdefault(chunk.tensor, [])
            if not holders or holders[-1] != rank:
                holders.append(rank)
    return [
        TensorEntry(
            path=_path(name, metadata),
            dtype=dtype_name(described.properties.dtype),
            shape=list(described.size),
            mesh=None,
            placements=[],
            owners=compress_ranks(owners.get(name, ())),
        )
        for name, described in sorted(metadata.state_dict_metadata.items())
        if isinstance(described, TensorStorageMetadata)
    ]


def _path(name: str, metadata: Metadata) -> list[str]:
    """Where DCP found it in the nested state; the name alone for a state that was not flattened."""
    planned = metadata.planner_data.get(name) if isinstance(metadata.planner_data, dict) else None
    path = list(map(str, planned or ()))
    return path if ".".join(path) == name else [name]


def _write_values(
    storage: Storage,
    directory: str,
    attempt: AttemptId,
    values: Mapping[str, SavedValue],
    metadata: Metadata,
) -> tuple[dict[str, ValueEntry], list[FileEntry]]:
    """Data file 0 of rank 0: the containers of all values, for stock readers."""
    if not values:
        return {}, []
    entries: dict[str, ValueEntry] = {}
    position = 0
    for name, value in sorted(values.items()):
        entries[name] = ValueEntry(
            path=_path(name, metadata),
            value=value.encoded,
            container_offset=position,
            container_bytes=len(value.container),
        )
        position = round_up(position + len(value.container), SLAB_ALIGNMENT_BYTES)
    size_bytes = round_up(position, SEGMENT_BYTES)
    key = f"{directory}/{data_file_name(0, 0, attempt)}"
    writer = storage.open_writer(key, size_bytes=size_bytes, direct=True)
    with DataStream(writer, size_bytes=size_bytes) as stream:
        for name, entry in entries.items():
            assert entry.container_offset is not None, "set above"
            stream.pad_to(entry.container_offset)
            stream.put_bytes(values[name].container)
        return entries, [stream.finish()]


def _clear(storage: Storage, directory: str, attempt: AttemptId) -> None:
    """Remove the files of a failed attempt; what cannot be removed has no manifest and never counts."""
    try:
        names = storage.list_names(f"{directory}/")
        storage.delete(f"{directory}/{name}" for name in names if _attempt_of(name) == attempt)
        storage.remove_directory(directory)
    except CheckpointError as error:
        log.warning("the failed attempt %s in %s could not be cleared away: %s", attempt, directory, error)


def _attempt_of(name: str) -> AttemptId | None:
    """The attempt that a file belongs to; None for files of others."""
    if (data := parse_data_file_name(name)) is not None:
        return data[2]
    fragment = parse_fragment_name(name)
    return fragment[1] if fragment else None

"""One rank's part of a plain `dcp.save`: its data files, written by threads of the calling process.

Owns the threads, and that a failure of any of them is the failure of the rank, told and never lost. What is
written counts for nothing until rank 0 commits it (`save.dcp_commit`). Called by `dcp.Writer`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from dcp_ckpt.coordination import as_checkpoint_error, error_fields
from dcp_ckpt.format.fragment import ChunkEntry, FileEntry
from dcp_ckpt.format.names import AttemptId, data_file_name
from dcp_ckpt.save.data_stream import DataStream
from dcp_ckpt.save.dcp_items import (
    SavedValue,
    TensorItem,
    divide,
    lay_out,
    payload_of,
    tensor_items,
    value_items,
)
from dcp_ckpt.storage.base import Storage

__all__ = ["Assignment", "RankReport", "write_items"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What rank 0 tells a rank in its plan.

    Args:
        first_file: number of the rank's first data file; rank 0 leaves 0 free where there are values.
    """

    rank: int
    attempt: str
    first_file: int

    @property
    def attempt_id(self) -> AttemptId:
        attempt = AttemptId.parse(self.attempt)
        assert attempt is not None, "made by rank 0 of this save"
        return attempt


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank wrote, or why it could not; small enough to be gathered by rank 0.

    Args:
        error: as `coordination.error_fields`.
    """

    assignment: Assignment
    files: list[FileEntry] = field(default_factory=list)
    chunks: list[ChunkEntry] = field(default_factory=list)
    values: dict[str, SavedValue] = field(default_factory=dict)
    error: dict[str, Any] | None = None


class _Cancelled(Exception):
    """Another thread failed first."""


def write_items(
    storage: Storage,
    directory: str,
    assignment: Assignment,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    *,
    num_threads: int,
) -> RankReport:
    """Write all items of this rank's final plan. Blocks until all threads have ended; tells every failure.

    Args:
        directory: below the root of `storage`.
    """
    try:
        values = value_items(items, planner)
        files, chunks = _write_files(
            storage, directory, assignment, divide(tensor_items(items), num_threads), planner
        )
    # Raised here, it would reach all ranks as well, but rank 0 would never learn which files to remove.
    except Exception as error:
        log.debug("rank %d failed to write", assignment.rank, exc_info=True)
        ours = as_checkpoint_error(error, rank=assignment.rank)
        ours.phase = ours.phase or "write"
        return RankReport(assignment=assignment, error=error_fields(ours))
    return RankReport(assignment=assignment, files=files, chunks=chunks, values=values)


def _write_files(
    storage: Storage,
    directory: str,
    assignment: Assignment,
    parts: Sequence[Sequence[TensorItem]],
    planner: SavePlanner,
) -> tuple[list[FileEntry], list[ChunkEntry]]:
    """One file and one thread for each part."""
    if not parts:
        return [], []
    cancelled = threading.Event()
    failures: list[BaseException] = []

    def write(number: int) -> tuple[FileEntry, list[ChunkEntry]]:
        try:
            index = assignment.first_file + number
            key = f"{directory}/{data_file_name(assignment.rank, index, assignment.attempt_id)}"
            return _write_file(storage, key, index, parts[number], planner, cancelled)
        except BaseException as error:
            failures.append(error)
            cancelled.set()
            raise

    with ThreadPoolExecutor(len(parts), thread_name_prefix="dcp_ckpt-write") as pool:
        futures = [pool.submit(write, number) for number in range(len(parts))]
    if failures:
        raise failures[0]
    written = [future.result() for future in futures]
    return [entry for entry, _ in written], [chunk for _, chunks in written for chunk in chunks]


@torch.no_grad()
def _write_file(
    storage: Storage,
    key: str,
    index: int,
    items: Sequence[TensorItem],
    planner: SavePlanner,
    cancelled: threading.Event,
) -> tuple[FileEntry, list[ChunkEntry]]:
    layout = lay_out(items)
    chunks = []
    writer = storage.open_writer(key, size_bytes=layout.tensor_bytes, direct=True)
    with DataStream(writer, size_bytes=layout.tensor_bytes) as stream:
        for placed in layout.chunks:
            if cancelled.is_set():
                raise _Cancelled
            item = items[placed.owned.tensor]
            stream.pad_to(placed.container_offset)
            stream.put_bytes(placed.framing.prefix)
            stream.put_payload(payload_of(item, planner))
            stream.put_bytes(placed.framing.suffix)
            chunks.append(
                ChunkEntry(
                    tensor=item.name,
                    offsets=list(item.box.offsets),
                    sizes=list(item.box.sizes),
                    file=index,
                    payload_offset=placed.payload_offset,
                    container_offset=placed.container_offset,
                    container_bytes=placed.framing.container_bytes,
                )
            )
        return stream.finish(), chunks

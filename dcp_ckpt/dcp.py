"""`Writer` and `Reader`: this package's checkpoints in plain `torch.distributed.checkpoint`.

For programs that keep calling `dcp.save`, `dcp.async_save` and `dcp.load`. Owns what DCP asks of a storage
writer and reader; what they do is in `save` and `load`. Written against torch 2.13
(`torch/distributed/checkpoint/storage.py`, `state_dict_saver.py`, `state_dict_loader.py`).
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dcp_ckpt.errors import CheckpointError, ConfigError, StorageNotFound
from dcp_ckpt.format.manifest import decode_manifest
from dcp_ckpt.format.names import MANIFEST, StepDir
from dcp_ckpt.load.dcp_read import describe_source, read_items
from dcp_ckpt.load.stock import STOCK_UNVERIFIED, StockSource, open_stock
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.save.dcp_commit import claim_directory, commit_reports
from dcp_ckpt.save.dcp_items import tensor_items
from dcp_ckpt.save.dcp_write import Assignment, RankReport, write_items
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.paths import named_by_user

__all__ = ["Reader", "Writer"]

log = logging.getLogger(__name__)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Writer(StorageWriter):
    """Writes a checkpoint of this package's format with `dcp.save` or `dcp.async_save` (thread or process).

    The result has block digests and one manifest, created last and exclusively, so a directory holds a whole
    checkpoint or none. `Reader`, `load_checkpoint`, `open_checkpoint` and stock `dcp.load` read it.
    Everything is durable when `dcp.save` returns. A failure of any thread of any rank fails the save on all
    ranks: DCP raises its `CheckpointException`, in which the `CheckpointError` names rank, path and errno; no
    manifest is there then, and the files of the attempt are removed.

    A checkpoint that is made this way belongs to no run, also when its directory lies in one: it has a run id
    of its own, and the run's catalogue does not count it. Nothing is ever overwritten.

    Tensors of DCP's plan are stored as they are planned: plain tensors and DTensors. Other objects are stored
    as typed values and refused where only pickle could hold them. DCP decides which rank writes what several
    ranks have under one name, so of values that differ between ranks one is kept and the others are dropped
    without a word; `Checkpointer` compares them.

    Args:
        path: the checkpoint's directory or URL; the `checkpoint_id` of a save replaces it.
        num_threads: threads, and data files, of each rank.
        step: the training step; by default that of a directory named `step-NNNNNNNN`, else 0.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, num_threads: int = 2, step: int | None = None
    ) -> None:
        super().__init__()
        if type(num_threads) is not int or num_threads < 1:
            raise ConfigError(f"num_threads must be a whole number of at least 1, not {num_threads!r}")
        if step is not None and (type(step) is not int or step < 0):
            raise ConfigError(f"step must be a whole number of at least 0, not {step!r}")
        self._num_threads = num_threads
        self._step = step
        # No open storage here: the object travels to DCP's writer process.
        self._path = _absolute(path)
        self._save_id = str(uuid.uuid4())

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint goes."""
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins; to `checkpoint_id` if there is one."""
        if checkpoint_id:
            self._path = _absolute(checkpoint_id)
        self._save_id = str(uuid.uuid4())

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._path, save_id=self._save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks.

        Raises:
            ConfigError: without collectives nobody could commit.
        """
        if not kwargs.get("use_collectives", True):
            raise ConfigError(
                "use_collectives=False leaves nobody to commit the checkpoint; leave it at True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """All ranks: refuse what cannot be stored before anything is written.

        Raises:
            StateError: a tensor that cannot be stored, by name.
        """
        tensor_items(plan.items)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0: claim the directory, and tell every rank the names of its files.

        Raises:
            StepAlreadySaved: a checkpoint is there already.
            ConfigError: the planner has plans of some ranks cached, and of others not.
            StorageError: the storage cannot be used.
        """
        with self._storage() as (storage, directory):
            attempt = claim_directory(storage, directory)
        if not any(plan.usable for plan in plans):
            return plans  # cached by the planner on all ranks, with the names of the save that made them
        if not all(plan.usable for plan in plans):
            raise ConfigError(
                "the plans of some ranks changed while those of others are cached; use a planner with "
                "enable_plan_caching=False"
            )
        has_values = any(item.type == WriteItemType.BYTE_IO for plan in plans for item in plan.items)
        return [
            replace(
                plan,
                storage_data=Assignment(
                    rank=rank, attempt=str(attempt), first_file=int(has_values and rank == 0)
                ),
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """All ranks: write this rank's files. A failure is in the result, for rank 0 to raise for all."""
        assignment: Assignment = plan.storage_data
        with self._storage() as (storage, directory):
            report = write_items(
                storage, directory, assignment, plan.items, planner, num_threads=self._num_threads
            )
        num_bytes = sum(file.size_bytes for file in report.files)
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(
                    index=MetadataIndex(f"rank-{assignment.rank}"),
                    size_in_bytes=num_bytes,
                    storage_data=report,
                )
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0: commit what all ranks wrote.

        Raises:
            CheckpointError: any rank failed, or the commit did; no manifest is there.
            CommitUnknown: the storage did not say whether the manifest is there.
        """
        reports: list[RankReport] = [result.storage_data for rank in results for result in rank]
        with self._storage() as (storage, directory):
            derived = commit_reports(storage, directory, reports, metadata, step=self._step_of(directory))
        metadata.storage_data = derived.storage_data
        metadata.storage_meta = self.storage_meta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a storage that can be opened here."""
        return _can_open(checkpoint_id)

    @contextmanager
    def _storage(self) -> Iterator[tuple[Storage, str]]:
        """The parent of the checkpoint's directory, and its name in it."""
        root, directory = _split(self._path)
        with closing(open_storage(root)) as storage:
            yield storage, directory

    def _step_of(self, directory: str) -> int:
        if self._step is not None:
            return self._step
        named = StepDir.parse(directory)
        return named.step if named else 0


class Reader(StorageReader):
    """Reads a checkpoint of this package, or a stock DCP one, with `dcp.load`.

    Ours is read from its manifest and fragments, never from the pickled `.metadata`, and every block is
    checked against its digest. Of a stock one nothing can be verified but sizes and container structure. No
    stored pickle is executed in either. As in stock `dcp.load`, a target of another dtype is cast into.

    Args:
        path: the checkpoint's directory or URL; the `checkpoint_id` of a load replaces it.
        num_threads: threads that read, check and copy on each rank.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(self, path: str | os.PathLike[str], *, num_threads: int = 2) -> None:
        super().__init__()
        if type(num_threads) is not int or num_threads < 1:
            raise ConfigError(f"num_threads must be a whole number of at least 1, not {num_threads!r}")
        self._num_threads = num_threads
        self._path = _absolute(path)
        self._is_coordinator = False
        self._opened: StoredCheckpoint | StockSource | None = None

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint is."""
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins; from `checkpoint_id` if there is one."""
        self._close()
        if checkpoint_id:
            self._path = _absolute(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """All ranks: what the checkpoint holds.

        Raises:
            CheckpointNotFound, CorruptCheckpoint, FormatTooNew: it is not there, or cannot be used. Of these
                `dcp.load` shows the message only.
        """
        self._close()
        self._opened = _open_source(self._path)
        return replace(describe_source(self._opened), storage_meta=StorageMeta(checkpoint_id=self._path))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        self._is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """All ranks: fill the planner's tensors and values. Blocks.

        Raises:
            CorruptCheckpoint: a block differs from its digest, a file is missing or too short.
            LoadError: a stock value that only executing its pickle could restore, by name.
        """
        # The tables that were planned with are the ones to read by.
        source = self._opened or _open_source(self._path)
        try:
            cast = read_items(source, plan.items, planner, concurrency=self._num_threads)
        finally:
            source.storage.close()
            self._opened = None
        if self._is_coordinator and isinstance(source, StockSource):
            log.info("%s: %s", self._path, STOCK_UNVERIFIED)
        if cast:
            log.warning("%s: cast to the dtype of the target: %s", self._path, ", ".join(cast))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a storage that can be opened here."""
        return _can_open(checkpoint_id)

    def _close(self) -> None:
        """Give up what a load that failed half-way left open."""
        if self._opened is not None:
            self._opened.storage.close()
            self._opened = None


def _open_source(path: str) -> StoredCheckpoint | StockSource:
    """The tables of a checkpoint; its storage is the caller's to close."""
    root, directory = _split(path)
    storage = open_storage(root)
    try:
        key = f"{directory}/{MANIFEST}"
        try:
            manifest = decode_manifest(storage.read(key), path=key)
        except StorageNotFound:
            return open_stock(storage, directory)
        return StoredCheckpoint(storage, directory, manifest)
    except BaseException:
        storage.close()
        raise


def _absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same in another process; URLs stay as they are."""
    text = os.fspath(path)
    if not text:
        raise ConfigError("an empty path names no checkpoint")
    return text.rstrip("/") if _URL.match(text) else named_by_user(os.path.abspath(text))


def _split(path: str) -> tuple[str, str]:
    root, _, directory = path.rpartition("/")
    if not directory or root.endswith(":/"):
        raise ConfigError(f"{path} has no parent, so it cannot be a checkpoint's directory")
    return root or "/", directory


def _can_open(checkpoint_id: str | os.PathLike[str]) -> bool:
    try:
        root, _ = _split(_absolute(checkpoint_id))
        open_storage(root).close()
    except CheckpointError:
        return False
    return True

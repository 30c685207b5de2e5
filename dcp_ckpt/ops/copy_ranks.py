"""The files of all ranks of one checkpoint, copied some at a time: data files, then the rank's fragment.

Owns what happens when one of them cannot be copied, what is kept of an earlier attempt, and how far the copy
is. Publishes no manifest. Called by `dcp_ckpt.ops.copy`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    LoadError,
    StorageError,
    StorageExists,
    StorageNotFound,
)
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.format.manifest import Manifest, decode_listed_fragment
from dcp_ckpt.format.names import MANIFEST, data_file_name, fragment_name
from dcp_ckpt.ops.blocks import check_file
from dcp_ckpt.ops.touched import FileMap
from dcp_ckpt.ops.transfer import create_same, transfer
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.wording import shown_names

__all__ = ["CopyProgress", "RankCopier"]

CopyProgress = Callable[[int, int], None]
"""Called as `(done_bytes, total_bytes)` of data files, by one thread at a time."""

_CONCURRENT_RANKS = 4
_LARGE_FILE_BYTES = 32 << 20


class _Stopped(CheckpointError):
    """Another file could not be copied; that error is the one to show."""


class RankCopier:
    """One copy under way. Blocks; several threads of its own.

    Args:
        manifest: of the checkpoint in `source_directory`, decoded and valid.
        directory: in `target`; made by the caller.
        progress: told how far it is.
    """

    def __init__(
        self,
        source: Storage,
        source_directory: str,
        manifest: Manifest,
        target: Storage,
        directory: str,
        *,
        progress: CopyProgress | None,
    ) -> None:
        self._source = source
        self._source_directory = source_directory
        self._manifest = manifest
        self._target = target
        self._directory = directory
        self._progress = progress
        self._found: dict[str, int] = {}
        self._wrong: list[str] = []
        self._lock = threading.Lock()
        self._large = threading.Lock()
        self._stopped = False
        self.copied_bytes = 0
        self.kept_bytes = 0

    def run(self) -> None:
        """Copy what is missing and check what is there.

        Raises:
            StorageExists: some files are there and differ; the message names all, and the others are copied.
            CheckpointNotFound: the source was deleted meanwhile.
            CorruptCheckpoint: the source is damaged.
            StorageError: a read or write failed.
        """
        self._found = {info.key: info.size_bytes for info in self._target.list(f"{self._directory}/")}
        num_ranks = self._manifest.world_size
        num_threads = min(_CONCURRENT_RANKS, num_ranks)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="dcp_ckpt-copy") as workers:
            try:
                ranks = [workers.submit(self._copy_rank, rank) for rank in range(num_ranks)]
                errors = [error for rank in ranks if (error := rank.exception()) is not None]
            except BaseException:
                self._stopped = True
                raise
        for error in errors:
            if not isinstance(error, _Stopped):
                raise error
        if self._wrong:
            raise StorageExists(
                f"{', '.join(sorted(self._wrong))}: already there, and not as in the checkpoint; delete them "
                "(unless another copy is writing them just now)",
                path=f"{self._target.url}/{self._directory}",
            )

    def _copy_rank(self, rank: int) -> None:
        try:
            self._advance(0)
            name = fragment_name(rank, self._manifest.attempt_id)
            data = self._read_fragment(name)
            fragment = decode_listed_fragment(data, self._manifest, rank, path=self._path(name))
            for index, entry in enumerate(fragment.files):
                file_name = data_file_name(rank, index, self._manifest.attempt_id)
                self._copy_file(file_name, entry, FileMap(fragment, index))
            try:
                create_same(self._target, f"{self._directory}/{name}", data)
            except StorageExists:
                self._note_wrong(name)
        except BaseException:
            self._stopped = True
            raise

    def _copy_file(self, name: str, entry: FileEntry, file_map: FileMap) -> None:
        key = f"{self._directory}/{name}"
        if key not in self._found:
            # One large file at a time: each may have many parts under way.
            with self._large if entry.size_bytes > _LARGE_FILE_BYTES else nullcontext():
                self._transfer(name, entry, file_map)
            return
        found = check_file(self._target, key, entry.size_bytes, entry.block_digests)
        if found.error is not None or found.bad_blocks or found.found_bytes != entry.size_bytes:
            self._note_wrong(name)
            return
        self._advance(entry.size_bytes, copied=False)

    def _transfer(self, name: str, entry: FileEntry, file_map: FileMap) -> None:
        def held_in(start: int, stop: int) -> str:
            touched = file_map.touched(start, stop)
            return shown_names((*touched.tensors, *touched.values)) or "framing"

        try:
            transfer(
                self._source,
                f"{self._source_directory}/{name}",
                entry,
                self._target,
                f"{self._directory}/{name}",
                advance=self._advance,
                held_in=held_in,
            )
        except StorageError as error:
            if damage := self._damage(name, entry.size_bytes):
                raise damage from error
            raise

    def _read_fragment(self, name: str) -> bytes:
        try:
            return self._source.read(f"{self._source_directory}/{name}")
        except StorageNotFound as error:
            raise self._missing(name) from error

    def _damage(self, name: str, size_bytes: int) -> LoadError | None:
        """What a failed transfer says of the source; None when it says something of a storage only."""
        try:
            found_bytes = self._source.size(f"{self._source_directory}/{name}")
        except StorageNotFound:
            return self._missing(name)
        except StorageError:
            return None
        if found_bytes >= size_bytes:
            return None
        message = f"the source is damaged: truncated, {found_bytes} of {size_bytes} bytes"
        return CorruptCheckpoint(message, phase="read", path=self._path(name))

    def _missing(self, name: str) -> LoadError:
        """A missing file is damage, unless the manifest went first: then the checkpoint was removed."""
        try:
            self._source.size(f"{self._source_directory}/{MANIFEST}")
        except StorageNotFound:
            return CheckpointNotFound(
                "the checkpoint was deleted while it was copied",
                step=self._manifest.step,
                path=self._path(name),
            )
        return CorruptCheckpoint(
            "the source is damaged: a file of the checkpoint is missing", phase="read", path=self._path(name)
        )

    def _path(self, name: str) -> str:
        return f"{self._source.url}/{self._source_directory}/{name}"

    def _note_wrong(self, name: str) -> None:
        with self._lock:
            self._wrong.append(name)

    def _advance(self, num_bytes: int, *, copied: bool = True) -> None:
        if self._stopped:
            raise _Stopped("another file could not be copied")
        with self._lock:
            self.copied_bytes += num_bytes if copied else 0
            self.kept_bytes += 0 if copied else num_bytes
            if self._progress is not None:
                self._progress(self.copied_bytes + self.kept_bytes, self._manifest.total_bytes)

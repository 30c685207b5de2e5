"""The loader: rank 0 chooses, all ranks restore; a damaged checkpoint sends all to the next older one.

Runs on the main thread of every rank. Used by the Checkpointer, which owns the run, and by `load_checkpoint`,
which only reads.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, broadcast
from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    FormatTooNew,
    StateMismatch,
    StorageNotFound,
)
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.manifest import decode_manifest, encode_manifest
from dcp_ckpt.format.names import DCP_METADATA, MANIFEST, StepDir
from dcp_ckpt.lifecycle.catalogue import Catalogue
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.suspicion import suspect_warning
from dcp_ckpt.load.choose import Which, choose
from dcp_ckpt.load.report import LoadReport, RejectedCheckpoint
from dcp_ckpt.load.restore import Components, Restored, restore
from dcp_ckpt.load.selection import EVERYTHING, Selection
from dcp_ckpt.load.source import Source
from dcp_ckpt.load.stock import open_stock, stock_digest
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.storage.base import Storage

__all__ = ["Loader"]

log = logging.getLogger(__name__)

_MOST_READERS = 4
"""Threads that read, check and copy on each rank, where the host has the cores for it."""


class Loader:
    """One load from one storage root.

    Args:
        storage: a run, or the parent of a step directory.
        url: its name for messages.
        tag: unique in the life of the channel; names the messages of this load.
        selection: what to restore, and under which names.
    """

    def __init__(
        self,
        storage: Storage,
        url: str,
        channel: Channel,
        config: CheckpointConfig,
        tag: str,
        selection: Selection = EVERYTHING,
    ) -> None:
        self._storage = storage
        self._url = url
        self._channel = channel
        self._config = config
        self._selection = selection
        self._tag = tag
        self._started = time.monotonic()

    def load(
        self, components: Components, which: Which, catalogue: Callable[[], Catalogue]
    ) -> LoadReport | None:
        """Load what `which` names in this run; see `Checkpointer.load`.

        Args:
            catalogue: the checkpoints of the run; called on rank 0 only.
        """
        choice = self._choose(which, catalogue)
        rejected = [RejectedCheckpoint(path=path, reason=reason) for path, reason in choice["rejected"]]
        text = choice["manifest"]
        failure: CheckpointError | None = None
        for number, directory in enumerate(choice["directories"]):
            tag = f"{self._tag}/{number}"
            try:
                return self._load(
                    components, directory, rejected, tag, text or self._agreed_manifest(directory, tag)
                )
            except CorruptCheckpoint as error:
                failure = error
                if which != "latest":
                    break
                self._mark_bad(directory, error)
                rejected.append(RejectedCheckpoint(path=f"{self._url}/{directory}", reason=str(error)))
                text = None
            except (CheckpointNotFound, StateMismatch, FormatTooNew, ConfigError) as error:
                if failure is None:
                    raise
                # By itself it changes nothing; but what was tried before has.
                failure.message += f"; {directory}, the next older one, cannot be loaded: {error.message}"
                raise failure from error
        if failure is None:
            return None
        if which == "latest":
            failure.message += (
                "; no older checkpoint is left to fall back to, and training is not started over it"
            )
        raise failure

    def load_directory(self, components: Components, directory: str) -> LoadReport:
        """Load one checkpoint directory, of ours or of stock DCP, named by the caller: no falling back."""
        tag = f"{self._tag}/0"
        found = broadcast(
            self._channel,
            f"{tag}/directory",
            lambda: self._look_at(directory),
            timeout_seconds=self._config.timeout_seconds,
        )
        if found["manifest"] is not None:
            return self._load(components, directory, [], tag, found["manifest"])

        def open_source() -> Source:
            return open_stock(self._storage, directory, expected_digest=found["stock"])

        return self._restore(components, directory, [], tag, open_source)

    def _look_at(self, directory: str) -> dict[str, str | None]:
        """The manifest of a directory, or the digest of its `.metadata` where it is a stock checkpoint."""
        try:
            return {"manifest": self._read_manifest(directory), "stock": None}
        except CheckpointNotFound as error:
            stock = stock_digest(self._storage, directory)
            if stock is None:
                error.message += f", nor a {DCP_METADATA} of stock DCP"
                raise
            return {"manifest": None, "stock": stock}

    def _choose(self, which: Which, catalogue: Callable[[], Catalogue]) -> dict[str, Any]:
        """Rank 0's choice, told to all: directories to try, best first, and the first one's manifest."""

        def decide() -> dict[str, Any]:
            known = catalogue()
            found = choose(known, which, keep=self._config.keep, url=self._url)
            for rejected in found.rejected:
                log.warning("not loading %s: %s", rejected.path, rejected.reason)
            if found.entries and found.entries[0].is_suspect:
                log.warning("%s", suspect_warning(found.entries[0], known))
            directories = [str(entry.directory) for entry in found.entries]
            return {
                "directories": directories,
                "manifest": encode_manifest(found.entries[0].manifest).decode() if directories else None,
                "rejected": [[rejected.path, rejected.reason] for rejected in found.rejected],
            }

        timeout = self._config.timeout_seconds
        return broadcast(self._channel, f"{self._tag}/choose", decide, timeout_seconds=timeout)

    def _load(
        self,
        components: Components,
        directory: str,
        rejected: Sequence[RejectedCheckpoint],
        tag: str,
        text: str,
    ) -> LoadReport:
        manifest = decode_manifest(text.encode(), path=f"{directory}/{MANIFEST}")

        def open_source() -> Source:
            return StoredCheckpoint(self._storage, directory, manifest)

        return self._restore(components, directory, rejected, tag, open_source)

    def _restore(
        self,
        components: Components,
        directory: str,
        rejected: Sequence[RejectedCheckpoint],
        tag: str,
        open_source: Callable[[], Source],
    ) -> LoadReport:
        restored = restore(
            open_source,
            components,
            self._channel,
            selection=self._selection,
            tag=tag,
            verify=self._config.verify,
            concurrency=self._num_readers(),
            timeout_seconds=self._config.timeout_seconds,
        )
        report = self._report(directory, restored, rejected)
        if self._channel.rank == 0:
            log.info("%s", report)
        return report

    def _agreed_manifest(self, directory: str, tag: str) -> str:
        """The manifest as rank 0 reads it, so that all ranks load the same one."""
        return broadcast(
            self._channel,
            f"{tag}/manifest",
            lambda: self._read_manifest(directory),
            timeout_seconds=self._config.timeout_seconds,
        )

    def _read_manifest(self, directory: str) -> str:
        key = f"{directory}/{MANIFEST}"
        try:
            data = self._storage.read(key)
        except StorageNotFound as error:
            raise CheckpointNotFound(
                f"{self._url}/{directory} is not a checkpoint: it has no {MANIFEST}", path=error.path
            ) from error
        if is_tombstone(data, path=key):
            raise CheckpointNotFound(f"{self._url}/{directory} was removed", path=key)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint("the manifest is not text", phase="read", path=key) from error

    def _num_readers(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return max(1, min(_MOST_READERS, cores // len(self._channel.host_ranks)))

    def _report(
        self, directory: str, restored: Restored, rejected: Sequence[RejectedCheckpoint]
    ) -> LoadReport:
        return LoadReport(
            step=restored.origin.step,
            path=os.path.join(self._url, directory),
            epoch=restored.origin.epoch,
            saved_world_size=restored.origin.world_size,
            world_size=self._channel.world_size,
            restored=restored.names,
            reinitialised=restored.reinitialised,
            cast=restored.cast,
            notes=restored.notes,
            skipped=restored.skipped,
            rejected=tuple(rejected),
            metrics=dict(restored.origin.metrics),
            bytes_read=restored.bytes_read,
            seconds=time.monotonic() - self._started,
            unverified=restored.unverified,
        )

    def _mark_bad(self, directory: str, error: CorruptCheckpoint) -> None:
        """Remember the damage, so that no later start has to find it again."""
        if self._channel.rank != 0:
            return
        log.error("%s/%s is damaged and is left out from now on: %s", self._url, directory, error)
        step_dir = StepDir.parse(directory)
        assert step_dir is not None, "it came from the catalogue"
        try:
            key = f"{directory}/{MANIFEST}"
            manifest = decode_manifest(self._storage.read(key), path=key)
            write_mark(
                self._storage,
                step_dir,
                kind="bad",
                epoch=manifest.epoch,
                step=manifest.step,
                attempt=manifest.attempt,
                detail={"reason": str(error)},
            )
        except CheckpointError as failure:
            log.warning("the damage could not be marked: %s", failure)

"""Opening a run on all ranks together: the storage works everywhere and is one and the same, or none goes on.

Every rank's writer tries the storage out the way data goes, and looks for what rank 0's writer wrote. What is
wrong with paths, permissions, credentials, packages or mounts shows here and not at the first save. Called by
the Checkpointer, on the main thread of all ranks.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from functools import partial
from typing import Any

from dcp_ckpt.coordination import Channel, agree, as_checkpoint_error, broadcast, error_fields
from dcp_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    StorageError,
    StorageNotFound,
    StorageUnsuitable,
)
from dcp_ckpt.format.documents import converted
from dcp_ckpt.save.writer_link import WriterLink
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.keys import temporary_name
from dcp_ckpt.writer.messages import Probe, Sight

__all__ = ["open_together"]

_TRIES = 3
_START_SECONDS = 60.0


def open_together(
    path: str | os.PathLike[str], channel: Channel, link: WriterLink, *, timeout_seconds: float
) -> Storage:
    """Open the storage and try it out, on all ranks. Blocks.

    Args:
        path: the run; ranks may call it differently.
        link: this rank's writer.
        timeout_seconds: for each rank's answer; at least a minute is given, since processes start here.

    Raises:
        CheckpointError: what went wrong first on whichever rank, on every rank. Nothing is left behind then,
            not even a directory that was made for it.
    """
    timeout_seconds = max(timeout_seconds, _START_SECONDS)
    for number in range(1, _TRIES + 1):
        attempt = _Attempt(channel, link, tag=f"open/{number}", timeout_seconds=timeout_seconds)
        with ExitStack() as resources:
            storage, failures = agree(
                channel,
                f"open/{number}/tried",
                partial(attempt.act, path, resources),
                timeout_seconds=timeout_seconds,
            )
            is_swept = attempt.end(failed=bool(failures))
            if storage is not None and not failures:
                resources.pop_all()
                return storage
        if not is_swept:
            break
    failures.raise_first()
    raise AssertionError("whoever has no storage has failed")


class _Attempt:
    """One try of all ranks."""

    def __init__(self, channel: Channel, link: WriterLink, *, tag: str, timeout_seconds: float) -> None:
        self._channel = channel
        self._link = link
        self._tag = tag
        self._timeout_seconds = timeout_seconds
        self._key = temporary_name("probe", secrets.token_hex(8))
        self._url = ""
        self._stays = False

    def act(self, path: str | os.PathLike[str], resources: ExitStack) -> Storage:
        """This rank's part.

        Args:
            resources: closes the storage.
        """
        try:
            storage = open_storage(path)
            resources.callback(storage.close)
            _require_shared(storage)
            self._url = storage.url
            if self._channel.rank == 0:
                self._write_first()
            else:
                self._write_and_look()
        except BaseException as error:
            if self._channel.rank == 0:
                told = error_fields(as_checkpoint_error(error, rank=0))
                self._channel.put(f"{self._tag}/first", {"error": told})
            raise
        return storage

    def end(self, *, failed: bool) -> bool:
        """All ranks: let rank 0's writer delete what it wrote for the others.

        Returns:
            Whether somebody else has deleted it before, so that a failure may have no other cause.

        Raises:
            CheckpointError: it cannot be deleted, and nobody had failed before; on all ranks.
        """

        def delete() -> bool:
            if not self._stays:
                return False
            try:
                self._link.end_probe(
                    self._url, self._key, failed=failed, timeout_seconds=self._timeout_seconds
                )
            except StorageNotFound:
                return True
            except CheckpointError:
                if not failed:
                    raise
            return False

        return broadcast(self._channel, f"{self._tag}/ended", delete, timeout_seconds=self._timeout_seconds)

    def _write_first(self) -> None:
        """Rank 0 writes what the others look for; it makes the run directory where there is none."""
        self._try_out(sight=None, stays=self._channel.world_size > 1)
        self._channel.put(f"{self._tag}/first", {"sight": {"key": self._key, "storage_url": self._url}})

    def _write_and_look(self) -> None:
        first = self._first()
        if "sight" not in first:
            return  # rank 0 has failed, and says so itself
        sight = converted(Sight, first["sight"])
        try:
            self._try_out(sight=sight, stays=False)
        except StorageError as error:
            if not isinstance(error, StorageUnsuitable) and sight.storage_url != self._url:
                error.message += (
                    f" (rank {self._channel.rank} was given {self._url}, rank 0 {sight.storage_url})"
                )
            raise

    def _first(self) -> dict[str, Any]:
        try:
            first: dict[str, Any] = self._channel.get(
                f"{self._tag}/first", timeout_seconds=self._timeout_seconds
            )
        except TimeoutError as error:
            raise CoordinationError(
                f"rank 0 did not try the storage out within {self._timeout_seconds:.0f} s", phase="open"
            ) from error
        return first

    def _try_out(self, *, sight: Sight | None, stays: bool) -> None:
        probe = Probe(key=self._key, rank=self._channel.rank, direct_io=True, stays=stays, sight=sight)
        self._stays = stays
        self._link.try_out(self._url, probe, timeout_seconds=self._timeout_seconds)


def _require_shared(storage: Storage) -> None:
    if not storage.capabilities.shared:
        raise StorageUnsuitable(
            "the writers are processes of their own and would not see what is stored here; use a path or "
            "s3://",
            path=storage.url,
        )

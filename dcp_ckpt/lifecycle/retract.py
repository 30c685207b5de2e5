"""Taking back an attempt that has failed, before anybody is told so (docs/format.md, section 8).

Owns the order in which its files go. Does not decide what has failed. Called by the coordinator of a save.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from dcp_ckpt.errors import Fenced, LoadError, StorageError, StorageNotFound, StorageUnsuitable
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.manifest import decode_manifest
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir, fragment_name
from dcp_ckpt.lifecycle.epochs import require_newest
from dcp_ckpt.lifecycle.sweep import create_again
from dcp_ckpt.storage.base import Storage

__all__ = ["retract"]

log = logging.getLogger(__name__)


def retract(storage: Storage, directory: StepDir, attempt: AttemptId, *, epoch: int, all_done: bool) -> bool:
    """Make a failure durable, so that no later start completes what is reported as failed.

    Without rank 0's fragment the attempt can never be committed.

    Args:
        epoch: that of the caller.
        all_done: no rank works on it any more: the space of all of it is freed.

    Returns:
        False when it may still be committed, or is: the outcome is unknown then.
    """
    try:
        _require_newest(storage, epoch)
        names = storage.list_names(f"{directory}/")
        if MANIFEST in names and _holds(storage, directory, attempt):
            return False
        _delete_first_fragment(storage, f"{directory}/{fragment_name(0, attempt)}", epoch)
        if all_done:
            storage.delete(f"{directory}/{name}" for name in names if f".{attempt}." in name)
            storage.remove_directory(str(directory))
    except (Fenced, StorageError, LoadError) as error:
        log.warning("the failed attempt %s in %s could not be cleared away: %s", attempt, directory, error)
        return False
    return True


def _delete_first_fragment(storage: Storage, key: str, epoch: int) -> None:
    """Delete rank 0's fragment, unless a newer owner may have read it before: then it is put back.

    Raises:
        Fenced: a newer epoch exists; the attempt is as it was.
    """
    try:
        fragment = storage.read(key)
    except StorageNotFound:
        fragment = None
    storage.delete([key])
    try:
        _require_newest(storage, epoch)
    except Fenced:
        if fragment is not None:
            create_again(storage, key, fragment)
        raise


def _require_newest(storage: Storage, epoch: int) -> None:
    with suppress(StorageUnsuitable):  # a run that is gone has no other owner
        require_newest(storage, epoch)


def _holds(storage: Storage, directory: StepDir, attempt: AttemptId) -> bool:
    """Whether the directory's manifest is that of the attempt."""
    key = f"{directory}/{MANIFEST}"
    data = storage.read(key)
    return not is_tombstone(data, path=key) and decode_manifest(data, path=key).attempt == str(attempt)

"""Pins: a person's wish that one checkpoint stays, whatever retention says (docs/format.md, section 11).

Owns the two marks of it and the look at the manifest that has to follow a pin. Decides no removal; whoever
removes asks for pins itself. Called by the checkpointer and the command line.
"""

from __future__ import annotations

from dcp_ckpt.errors import CheckpointNotFound, StorageNotFound
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.names import MANIFEST
from dcp_ckpt.lifecycle.catalogue import CheckpointEntry
from dcp_ckpt.lifecycle.marks import active_marks, write_mark
from dcp_ckpt.storage.base import Storage

__all__ = ["pin", "pin_reason", "unpin"]


def pin(storage: Storage, entry: CheckpointEntry, *, reason: str | None = None) -> bool:
    """Keep a checkpoint until it is unpinned. Idempotent; one rank calls it; blocks on storage.

    Args:
        storage: the run.
        entry: from its catalogue, just read.
        reason: free text, kept with the pin.

    Returns:
        False when it was pinned before; then nothing is written and the reason stays the one it had.

    Raises:
        CheckpointNotFound: it was removed before the pin was there.
        StorageError: the pin could not be written.
    """
    if entry.is_pinned:
        return False
    manifest = entry.manifest
    write_mark(
        storage,
        entry.directory,
        kind="pin",
        epoch=manifest.epoch,
        step=manifest.step,
        attempt=manifest.attempt,
        detail={} if reason is None else {"reason": reason},
    )
    # Whoever looked for pins before this one was there may have removed the manifest since.
    if not _is_committed(storage, entry):
        raise CheckpointNotFound(
            "the checkpoint was removed before the pin was there; it is not a checkpoint any more",
            step=entry.step,
            phase="pin",
            path=f"{storage.url}/{entry.directory}",
        )
    return True


def unpin(storage: Storage, entry: CheckpointEntry) -> bool:
    """Take back every pin of a checkpoint: retention may remove it again. Idempotent; one rank calls it.

    Returns:
        False when it was not pinned.

    Raises:
        StorageError: that could not be written down.
    """
    pins = [mark.id for mark in active_marks(entry.marks, "pin")]
    if not pins:
        return False
    manifest = entry.manifest
    write_mark(
        storage,
        entry.directory,
        kind="unpin",
        epoch=manifest.epoch,
        step=manifest.step,
        attempt=manifest.attempt,
        cancels=pins,
    )
    return True


def pin_reason(entry: CheckpointEntry) -> str | None:
    """Why a checkpoint is pinned, where whoever pinned it said so."""
    reasons = [
        str(mark.detail["reason"]) for mark in active_marks(entry.marks, "pin") if "reason" in mark.detail
    ]
    return "; ".join(reasons) or None


def _is_committed(storage: Storage, entry: CheckpointEntry) -> bool:
    key = f"{entry.directory}/{MANIFEST}"
    try:
        return not is_tombstone(storage.read(key), path=key)
    except StorageNotFound:
        return False

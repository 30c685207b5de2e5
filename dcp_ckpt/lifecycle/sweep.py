"""Removing: un-commit, seal, delete.

The order is one in which a crash leaves a checkpoint or debris, never a third thing.
docs/format.md, sections 9 and 10. Only the holder of the newest epoch calls this.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable

from dcp_ckpt.errors import Fenced, StorageExists, StorageNotFound
from dcp_ckpt.format.epoch import Tombstone, encode_epoch
from dcp_ckpt.format.names import (
    DCP_METADATA,
    MANIFEST,
    TRASH,
    AttemptId,
    StepDir,
    parse_data_file_name,
    parse_fragment_name,
)
from dcp_ckpt.lifecycle.epochs import require_newest
from dcp_ckpt.lifecycle.marks import is_pinned, read_marks
from dcp_ckpt.storage.base import Storage

__all__ = ["delete_tree", "empty_trash", "foreign_files", "seal", "uncommit"]

log = logging.getLogger(__name__)


def uncommit(storage: Storage, directory: StepDir, *, epoch: int) -> bool:
    """Take a checkpoint back. Its data stays until `seal` and `delete_tree`, for readers that are under way.

    Returns:
        False when it is pinned or gone.

    Raises:
        Fenced: a newer epoch exists; the checkpoint is as it was.
    """
    require_newest(storage, epoch)
    key = f"{directory}/{MANIFEST}"
    try:
        manifest = storage.read(key)
    except StorageNotFound:
        return False
    if is_pinned(read_marks(storage).get(directory, ())):
        return False
    storage.delete([f"{directory}/{DCP_METADATA}", key])
    try:
        require_newest(storage, epoch)
    except Fenced:
        # The new owner may have chosen this very checkpoint between the two looks.
        storage.create_exclusive(key, manifest)
        raise
    return True


def seal(storage: Storage, directory: StepDir, *, epoch: int) -> str | None:
    """Close the name of a directory without manifest, so that a late publish cannot land in it.

    Returns:
        The key of the tree to delete, or None when a manifest turned up.

    Raises:
        Fenced: a newer epoch exists.
    """
    require_newest(storage, epoch)
    if not storage.capabilities.directories:
        tombstone = encode_epoch(Tombstone(by_epoch=epoch, attempt=""))
        try:
            storage.create_exclusive(f"{directory}/{MANIFEST}", tombstone)
        except StorageExists:
            return None
        return str(directory)
    if MANIFEST in storage.list_names(f"{directory}/"):
        return None
    sealed = f"{TRASH}/{directory}.{secrets.token_hex(8)}"
    try:
        storage.rename_directory(str(directory), sealed)
    except StorageNotFound:
        return None
    if MANIFEST in storage.list_names(f"{sealed}/"):
        # It was published between the look and the rename: a checkpoint after all.
        storage.rename_directory(sealed, str(directory))
        return None
    return sealed


def delete_tree(storage: Storage, key: str) -> None:
    """Delete a sealed directory and everything in it."""
    keys = [info.key for info in storage.list(f"{key}/") if not info.key.endswith(f"/{MANIFEST}")]
    storage.delete(keys)
    storage.remove_directory(key)


def empty_trash(storage: Storage) -> list[str]:
    """Delete what was sealed by anybody. Returns the names."""
    names = [name.removesuffix("/") for name in storage.list_names(f"{TRASH}/")]
    for name in names:
        delete_tree(storage, f"{TRASH}/{name}")
    return names


def foreign_files(storage: Storage, directory: StepDir, keep: AttemptId) -> Iterable[str]:
    """Keys in a committed directory that belong to attempts before the committed one."""
    for name in storage.list_names(f"{directory}/"):
        fragment, data = parse_fragment_name(name), parse_data_file_name(name)
        attempt = fragment[1] if fragment else data[2] if data else None
        if attempt is not None and attempt < keep:
            yield f"{directory}/{name}"

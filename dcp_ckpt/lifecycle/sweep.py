"""Removing: un-commit, seal, delete.

The order is one in which a crash leaves a checkpoint or debris, never a third thing.
docs/format.md, sections 9 and 10. Only the holder of the newest epoch calls this.
"""

from __future__ import annotations

import logging
import os

from dcp_ckpt.errors import Fenced, StorageExists, StorageNotFound
from dcp_ckpt.format.epoch import Tombstone, encode_epoch, is_tombstone
from dcp_ckpt.format.manifest import Manifest, decode_manifest
from dcp_ckpt.format.names import (
    DCP_METADATA,
    MANIFEST,
    TRASH,
    StepDir,
    data_file_name,
    fragment_name,
    parse_data_file_name,
    parse_fragment_name,
)
from dcp_ckpt.lifecycle.epochs import require_newest
from dcp_ckpt.lifecycle.marks import look_for_pin
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.keys import final_name

__all__ = [
    "create_again",
    "delete_files",
    "delete_tree",
    "empty_trash",
    "is_ours",
    "restore_sealed",
    "seal",
    "uncommit",
]

log = logging.getLogger(__name__)

_TRIES = 3


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
    if is_tombstone(manifest, path=key) or look_for_pin(storage, directory):
        return False
    storage.delete([f"{directory}/{DCP_METADATA}"])
    if storage.capabilities.directories:
        storage.delete([key])
    else:
        # The name stays taken, so that no late publish can fill it.
        storage.put(key, _tombstone(epoch))
    try:
        require_newest(storage, epoch)
        # Whoever pins looks for the manifest after writing the pin: of the two, one sees the other.
        is_pinned = look_for_pin(storage, directory)
    except Fenced:
        # The new owner may have chosen this very checkpoint between the two looks.
        _recommit(storage, directory, manifest)
        raise
    if is_pinned:
        _recommit(storage, directory, manifest)
    return not is_pinned


def _recommit(storage: Storage, directory: StepDir, manifest: bytes) -> None:
    """Put a manifest back, unless a newer owner has removed the checkpoint meanwhile."""
    key = f"{directory}/{MANIFEST}"
    if storage.capabilities.directories:
        create_again(storage, key, manifest)
    elif _is_whole(storage, directory, decode_manifest(manifest, path=key)):
        storage.put(key, manifest)


def create_again(storage: Storage, key: str, data: bytes) -> None:
    """Put back what was deleted too late, unless a newer owner has removed the directory."""
    for _ in range(_TRIES):
        try:
            storage.create_exclusive(key, data)
        except StorageExists:
            return
        except StorageNotFound:
            # Or only our temporary file is gone: a start takes it for a dead process's, once.
            continue
        return


def _is_whole(storage: Storage, directory: StepDir, manifest: Manifest) -> bool:
    """Whether all files of a checkpoint are there."""
    names = {info.key.rpartition("/")[2] for info in storage.list(f"{directory}/")}
    return names.issuperset(_file_names(manifest))


def seal(storage: Storage, directory: StepDir, *, epoch: int) -> str | None:
    """Close the name of a directory without manifest, so that a late publish cannot land in it.

    Returns:
        The key of the tree to delete, or None when a manifest turned up.

    Raises:
        Fenced: a newer epoch exists.
    """
    require_newest(storage, epoch)
    if not storage.capabilities.directories:
        return str(directory) if _close_name(storage, f"{directory}/{MANIFEST}", epoch) else None
    if MANIFEST in storage.list_names(f"{directory}/"):
        return None
    sealed = f"{TRASH}/{directory}.{os.urandom(8).hex()}"
    try:
        storage.rename_directory(str(directory), sealed)
    except StorageNotFound:
        return None
    if MANIFEST in storage.list_names(f"{sealed}/"):
        # It was published between the look and the rename: a checkpoint after all.
        storage.rename_directory(sealed, str(directory))
        return None
    return sealed


def _tombstone(epoch: int) -> bytes:
    return encode_epoch(Tombstone(by_epoch=epoch, attempt=""))


def _close_name(storage: Storage, key: str, epoch: int) -> bool:
    """Take the name of a manifest; False when a checkpoint has it."""
    try:
        storage.create_exclusive(key, _tombstone(epoch))
    except StorageExists:
        return is_tombstone(storage.read(key), path=key)
    return True


def delete_files(storage: Storage, directory: StepDir, manifest: Manifest) -> None:
    """Delete the files of a removed checkpoint, by name: on an object store that saves a listing."""
    storage.delete(f"{directory}/{name}" for name in [DCP_METADATA, *_file_names(manifest)])


def _file_names(manifest: Manifest) -> list[str]:
    attempt = manifest.attempt_id
    names = []
    for rank, ref in enumerate(manifest.fragments):
        names.append(fragment_name(rank, attempt))
        names += [data_file_name(rank, index, attempt) for index in range(len(ref.file_bytes))]
    return names


def delete_tree(storage: Storage, key: str) -> None:
    """Delete what is ours in a sealed directory, and the directory when nothing else is in it."""
    ours = [f"{key}/{name}" for name in storage.list_names(f"{key}/") if is_ours(name)]
    storage.delete(ours)
    left = [name for name in storage.list_names(f"{key}/") if name != MANIFEST]
    if left:
        log.warning("%s/%s stays: it holds %s, which is not ours", storage.url, key, ", ".join(left))
        return
    storage.remove_directory(key)


def is_ours(name: str) -> bool:
    """Whether a file in a step directory was made by this package; a manifest is never deleted here."""
    final = final_name(name) or name
    if final in (DCP_METADATA, MANIFEST):
        return name != MANIFEST
    return parse_fragment_name(final) is not None or parse_data_file_name(final) is not None


def restore_sealed(storage: Storage, *, epoch: int) -> None:
    """Put back what was sealed and is a checkpoint: whoever sealed it died before its second look.

    Raises:
        Fenced: a newer epoch exists; what it has sealed is its own to put back.
    """
    for sealed, directory in _sealed(storage):
        if MANIFEST not in storage.list_names(f"{sealed}/"):
            continue
        require_newest(storage, epoch)
        try:
            storage.rename_directory(sealed, str(directory))
        except StorageNotFound:
            log.debug("%s was put back by whoever sealed it", sealed)
        except StorageExists:
            log.warning("%s/%s holds a checkpoint, and its name is taken by another", storage.url, sealed)


def empty_trash(storage: Storage, *, epoch: int) -> list[str]:
    """Delete what was sealed by anybody and is no checkpoint. Returns the names.

    Raises:
        Fenced: a newer epoch exists; what it has sealed is its own to delete.
    """
    deleted = []
    for sealed, _ in _sealed(storage):
        require_newest(storage, epoch)
        if MANIFEST in storage.list_names(f"{sealed}/"):
            continue
        delete_tree(storage, sealed)
        deleted.append(sealed.removeprefix(f"{TRASH}/"))
    return deleted


def _sealed(storage: Storage) -> list[tuple[str, StepDir]]:
    """The directories in the trash, and what each was called before."""
    found = []
    for name in storage.list_names(f"{TRASH}/"):
        directory = StepDir.parse(name.removesuffix("/").rpartition(".")[0])
        if name.endswith("/") and directory is not None:
            found.append((f"{TRASH}/{name.removesuffix('/')}", directory))
    return found

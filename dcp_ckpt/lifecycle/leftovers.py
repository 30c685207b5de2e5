"""Leftovers: what a crash left in places that stay, and that no reader will ever ask for.

Temporary files, files of attempts that lost against the committed one, and what a removal on an object store
did not come to delete (docs/format.md, section 9). Directories that go as a whole are `sweep`'s. Called by
recover.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from dcp_ckpt.errors import StorageError
from dcp_ckpt.format.names import (
    EPOCHS,
    MARKS,
    RUN_JSON,
    AttemptId,
    StepDir,
    parse_data_file_name,
    parse_epoch_name,
    parse_fragment_name,
    parse_lease_name,
)
from dcp_ckpt.lifecycle.catalogue import Catalogue
from dcp_ckpt.lifecycle.epochs import require_newest
from dcp_ckpt.lifecycle.sweep import is_ours
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.keys import final_name, is_temporary

__all__ = ["sweep_leftovers"]

log = logging.getLogger(__name__)

_PROBE = "probe"
"""What a storage calls the file with which it tries out what it can do."""


def sweep_leftovers(storage: Storage, catalogue: Catalogue, *, epoch: int) -> list[str]:
    """Delete the leftovers of epochs before `epoch`, which the caller holds. Returns their keys.

    Raises:
        Fenced: a newer epoch exists.
    """
    deleted = _abandoned_uploads(storage, epoch)
    for keys in _leftovers(storage, catalogue, epoch):
        if keys:
            require_newest(storage, epoch)
            storage.delete(keys)
            deleted += keys
    return deleted


def _leftovers(storage: Storage, catalogue: Catalogue, epoch: int) -> Iterator[list[str]]:
    yield [name for name in storage.list_names("") if final_name(name) in (RUN_JSON, _PROBE)]
    yield [f"{EPOCHS}/{name}" for name in storage.list_names(f"{EPOCHS}/") if _is_old_claim(name, epoch)]
    # One that somebody is writing right now may be among them: `write_mark` tries again.
    marks = [info.key for info in storage.list(f"{MARKS}/")]
    yield [key for key in marks if is_temporary(key.rpartition("/")[2])]
    for entry in catalogue.entries:
        if entry.epoch < epoch:
            attempt = entry.manifest.attempt_id
            yield _foreign_files(storage, entry.directory, attempt, epoch)
    for rejected in catalogue.rejected:
        if rejected.state == "removed":
            names = storage.list_names(f"{rejected.directory}/")
            yield [f"{rejected.directory}/{name}" for name in names if is_ours(name)]


def _abandoned_uploads(storage: Storage, epoch: int) -> list[str]:
    """Discard what dead writers had begun to upload, and the leases that nobody gave up.

    A lease that was left behind is the sign of an end without `close`; without one nothing is asked.
    """
    if storage.capabilities.lease_ends_with_holder:
        return []
    leases = [
        name
        for name in storage.list_names(f"{EPOCHS}/")
        if (held := parse_lease_name(name)) is not None and held < epoch
    ]
    if not leases:
        return []

    def is_abandoned(key: str) -> bool:
        file = parse_data_file_name(key.rpartition("/")[2])
        return file is not None and file[2].epoch < epoch

    require_newest(storage, epoch)
    try:
        aborted = storage.abort_uploads("", is_abandoned)
        storage.delete(f"{EPOCHS}/{name}" for name in leases)
    except StorageError as error:
        # Some stores and permissions do not let uploads be listed. They cost space, and stop no start.
        log.warning("unfinished uploads of earlier starts stay behind: %s", error)
        return []
    return aborted


def _is_old_claim(name: str, epoch: int) -> bool:
    """Whether this is a draft of an older epoch's document; a newer start may be about to publish its own."""
    draft = final_name(name)
    claimed = parse_epoch_name(draft.replace(".resumed.", ".")) if draft else None
    return claimed is not None and claimed < epoch


def _foreign_files(storage: Storage, directory: StepDir, keep: AttemptId, epoch: int) -> list[str]:
    found = []
    for name in storage.list_names(f"{directory}/"):
        final = final_name(name)
        fragment, data = parse_fragment_name(final or name), parse_data_file_name(final or name)
        attempt = fragment[1] if fragment else data[2] if data else keep
        if attempt.epoch < epoch and (final is not None or attempt != keep):
            found.append(f"{directory}/{name}")
    return found

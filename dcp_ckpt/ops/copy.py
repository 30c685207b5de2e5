"""Copy: one committed checkpoint to another place, on the same kind of storage or another.

Owns the order, which is that of a save: data files, then fragments, then the manifest, created exclusively.
Every byte is checked on the way, so the copy is a checkpoint the moment its manifest is there, and nothing
before. Needs no torch. Called by the command line and by users' own backup jobs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    LoadError,
    StorageError,
    StorageExists,
    StorageNotFound,
)
from dcp_ckpt.format.manifest import Manifest, decode_manifest
from dcp_ckpt.format.names import (
    DCP_METADATA,
    MANIFEST,
    StepDir,
    parse_data_file_name,
    parse_fragment_name,
)
from dcp_ckpt.lifecycle.runs import read_run
from dcp_ckpt.ops.copy_ranks import CopyProgress, RankCopier
from dcp_ckpt.ops.refs import resolve_ref, split_location
from dcp_ckpt.ops.transfer import create_same
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage

__all__ = ["CopyReport", "copy_between", "copy_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """What was copied, and where it is now.

    Args:
        path: directory or URL of the copy.
        num_files: all files of the checkpoint but `.metadata`.
        copied_bytes: of data files, written now.
        kept_bytes: of data files that were there from an earlier attempt; they were read and checked.
        notes: what the run around the copy makes of it.
    """

    path: str
    step: int
    num_files: int
    copied_bytes: int
    kept_bytes: int
    notes: tuple[str, ...] = ()


def copy_checkpoint(
    ref: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    progress: CopyProgress | None = None,
) -> CopyReport:
    """Copy one committed checkpoint, byte for byte, checking every byte. One process; blocks.

    Never overwrites. Repeat it to continue one that failed: what is there already is read, checked and kept.
    A copy that was killed may leave files on a disk half-written; repeating it names them, to be deleted.
    Memory: about 256 MiB at most, however large the checkpoint is.

    Args:
        ref: as in `open_checkpoint`.
        destination: the directory or URL that the copy becomes. Where it ends in `/`, or is a directory that
            is not a checkpoint, the copy becomes `<destination>/<step directory>`, as with `cp`.
        progress: told how far it is.

    Raises:
        CheckpointNotFound: there is no such checkpoint, or it was deleted meanwhile.
        CorruptCheckpoint: the source is damaged; the copy has no manifest.
        StorageExists: files of these names are there and differ; the message names them.
        StorageError: a read or write failed; the copy has no manifest.
    """
    location = resolve_ref(ref)
    with closing(open_storage(location.root)) as source:
        manifest, _ = _read_manifest(source, location.directory)
        step_dir = StepDir.parse(location.directory) or StepDir(manifest.step)
        root, directory = _place(os.fspath(destination), str(step_dir))
        with closing(open_storage(root)) as target:
            return copy_between(source, location.directory, target, directory, progress=progress)


def copy_between(
    source: Storage,
    source_directory: str,
    target: Storage,
    directory: str,
    *,
    progress: CopyProgress | None = None,
) -> CopyReport:
    """As `copy_checkpoint`, between directories of two storages that are open."""
    manifest, manifest_data = _read_manifest(source, source_directory)
    _refuse_other(target, directory, manifest_data)
    ranks = RankCopier(source, source_directory, manifest, target, directory, progress=progress)
    try:
        target.make_directory(directory)
        ranks.run()
        create_same(target, f"{directory}/{MANIFEST}", manifest_data)
        _copy_dcp_metadata(source, source_directory, target, directory)
    except CheckpointError as error:
        with suppress(StorageError):
            target.remove_directory(directory)
        error.message += (
            f"; the copy {target.url}/{directory} is not finished: repeat it to that very destination to go "
            "on, what is there is kept"
        )
        raise
    return CopyReport(
        path=f"{target.url.rstrip('/')}/{directory}",
        step=manifest.step,
        num_files=1 + manifest.world_size + sum(len(ref.file_bytes) for ref in manifest.fragments),
        copied_bytes=ranks.copied_bytes,
        kept_bytes=ranks.kept_bytes,
        notes=tuple(_notes(target, directory, manifest)),
    )


def _read_manifest(storage: Storage, directory: str) -> tuple[Manifest, bytes]:
    key = f"{directory}/{MANIFEST}"
    try:
        data = storage.read(key)
    except StorageNotFound as error:
        path = f"{storage.url}/{directory}"
        raise CheckpointNotFound("not a checkpoint: it has no manifest", path=path) from error
    return decode_manifest(data, path=key), data


def _place(destination: str, step_name: str) -> tuple[str, str]:
    """The root of the target's storage, and the directory in it that the copy becomes."""
    if destination.endswith("/"):
        return destination.rstrip("/") or "/", step_name
    try:
        root, name = split_location(destination)
    except CheckpointNotFound:
        return destination, step_name  # a whole bucket
    with closing(open_storage(root)) as storage:
        names = storage.list_names(f"{name}/")
        # An empty directory shows in its parent only, where there are directories at all.
        exists = bool(names) or (storage.capabilities.directories and f"{name}/" in storage.list_names(""))
    if exists and not _holds_checkpoint(names):
        return destination, step_name
    return root, name


def _holds_checkpoint(names: Iterable[str]) -> bool:
    """Whether this is a checkpoint or a part of one: then a copy that failed is to be continued in it."""
    return any(name == MANIFEST or parse_fragment_name(name) or parse_data_file_name(name) for name in names)


def _refuse_other(target: Storage, directory: str, manifest_data: bytes) -> None:
    """Write nothing where another checkpoint is or was."""
    key = f"{directory}/{MANIFEST}"
    try:
        found = target.read(key)
    except StorageNotFound:
        return
    if found != manifest_data:
        raise StorageExists(
            "another checkpoint is there, or one was removed there, and a copy never overwrites; choose "
            "another destination",
            path=f"{target.url}/{key}",
        )


def _copy_dcp_metadata(source: Storage, source_directory: str, target: Storage, directory: str) -> None:
    """For stock DCP readers, where the source has it. It is derived, so replacing it overwrites nothing."""
    try:
        data = source.read(f"{source_directory}/{DCP_METADATA}")
    except StorageNotFound:
        return
    target.put(f"{directory}/{DCP_METADATA}", data)


def _notes(target: Storage, directory: str, manifest: Manifest) -> Iterator[str]:
    """What the run around the copy makes of it, where there is one."""
    try:
        run = read_run(target)
    except (LoadError, StorageError):
        return
    if run is None:
        return
    if run.run_id != manifest.run_id:
        yield (
            f"{target.url} is another run ({run.run_id}; the checkpoint is of {manifest.run_id}): the copy "
            f"is valid by itself and can be loaded as {target.url}/{directory}, but that run does not count "
            "it as its own"
        )
    elif StepDir.parse(directory) is None:
        yield f"the run {target.url} does not count it as its own: it is not in a directory step-NNNNNNNN"
    else:
        yield f"it is a checkpoint of the run {target.url} again, which may remove it: pin it to keep it"

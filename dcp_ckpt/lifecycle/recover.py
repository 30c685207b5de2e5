"""Recover: commit what earlier epochs finished but did not commit, clear away what can never be a checkpoint.

docs/format.md, section 9. `plan_recovery` decides and is pure; `recover_older_epochs` acts. Called by rank 0
at a start, after it has claimed its epoch, and by `dcp-ckpt recover`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dcp_ckpt.errors import (
    CheckpointError,
    CorruptCheckpoint,
    LoadError,
    SaveFailed,
    StorageError,
    StorageNotFound,
)
from dcp_ckpt.format.fragment import Fragment
from dcp_ckpt.format.manifest import build_manifest, summarize
from dcp_ckpt.format.names import (
    DCP_METADATA,
    AttemptId,
    StepDir,
    data_file_name,
    parse_data_file_name,
    parse_fragment_name,
)
from dcp_ckpt.lifecycle.catalogue import Catalogue, read_catalogue
from dcp_ckpt.lifecycle.command_epoch import command_epoch
from dcp_ckpt.lifecycle.commit import check_layouts, check_summaries, publish_manifest, read_fragments
from dcp_ckpt.lifecycle.leftovers import sweep_leftovers
from dcp_ckpt.lifecycle.runs import RunDocument
from dcp_ckpt.lifecycle.sweep import delete_tree, empty_trash, restore_sealed, seal
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.listed import listed_once

__all__ = ["AttemptFiles", "RecoverReport", "plan_recovery", "recover_older_epochs", "recover_run"]

log = logging.getLogger(__name__)

OnCommit = Callable[[Storage, StepDir], None]
"""Called for the newest checkpoint if it has no `.metadata`; derives it where torch is at hand."""


@dataclass(frozen=True, kw_only=True)
class AttemptFiles:
    """What a listing shows of one attempt: sizes of fragments by rank, of data files by rank and index."""

    directory: StepDir
    attempt: AttemptId
    fragments: Mapping[int, int]
    data: Mapping[tuple[int, int], int]


@dataclass(frozen=True, kw_only=True)
class RecoverReport:
    """What a recovery did: directories committed, debris with reasons, files deleted, under which epoch."""

    committed: list[str] = field(default_factory=list)
    debris: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    epoch: int = 0


def plan_recovery(
    attempts: Sequence[AttemptFiles], *, newest: tuple[int, int], epoch: int
) -> list[list[AttemptFiles]]:
    """Which attempts may be committed, in which order.

    Args:
        attempts: all attempts in directories without a manifest.
        newest: (epoch, step) of the newest checkpoint that is committed or unreadable.
        epoch: the epoch that recovers; only attempts of older epochs are touched.

    Returns:
        For each (epoch, step), ascending: its attempts, latest save first. Of each list the first that is
        complete is to be committed.
    """
    groups: dict[tuple[int, int], list[AttemptFiles]] = {}
    for files in attempts:
        order = (files.attempt.epoch, files.directory.step)
        if newest < order and files.attempt.epoch < epoch:
            groups.setdefault(order, []).append(files)
    return [sorted(groups[order], key=lambda files: files.attempt, reverse=True) for order in sorted(groups)]


def recover_older_epochs(
    storage: Storage, *, epoch: int, on_commit: OnCommit | None = None
) -> tuple[Catalogue, RecoverReport]:
    """Commit what can be committed and seal the rest. The caller holds the newest epoch.

    Returns:
        The catalogue afterwards, and what was done.
    """
    storage = listed_once(storage)
    # Before anything is decided: what comes back may be the newest.
    restore_sealed(storage, epoch=epoch)
    catalogue = read_catalogue(storage)
    absent = [rejected.directory for rejected in catalogue.rejected if rejected.is_absent]
    attempts = [files for directory in absent for files in _list_attempts(storage, directory)]
    report = RecoverReport(epoch=epoch)
    _refuse_newer_formats(catalogue)
    newest = _newest_order(storage, catalogue, epoch)
    committed = set()
    for group in plan_recovery(attempts, newest=newest, epoch=epoch):
        for files in group:
            reason = _commit_if_complete(storage, files, catalogue.run)
            if reason is None:
                log.info("recovered %s: committed attempt %s", files.directory, files.attempt)
                report.committed.append(str(files.directory))
                committed.add(files.directory)
                break
            report.debris.append(f"{files.directory} attempt {files.attempt}: {reason}")
    for directory in absent:
        if directory not in committed:
            _seal_debris(storage, directory, epoch, report)
    report.removed.extend(empty_trash(storage, epoch=epoch))
    if absent or report.removed:
        catalogue = read_catalogue(storage)
    report.removed.extend(sweep_leftovers(storage, catalogue, epoch=epoch))
    if on_commit is not None:
        _finish_commits(storage, catalogue, on_commit)
    return catalogue, report


def recover_run(storage: Storage, *, force: bool, wait_seconds: float) -> RecoverReport:
    """Recover a run from the command line: claims an epoch of its own.

    Args:
        force: go on although the owner of the run lives; it is fenced then.
        wait_seconds: how long to wait for writers that still work.

    Raises:
        ConfigError: a live owner holds the run and `force` is not given.
    """
    with command_epoch(storage, purpose="recover", force=force, wait_seconds=wait_seconds) as claim:
        return recover_older_epochs(storage, epoch=claim.epoch)[1]


def _refuse_newer_formats(catalogue: Catalogue) -> None:
    """A newer version's checkpoints may refer to files in ways that this version does not see."""
    for rejected in catalogue.rejected:
        if rejected.is_too_new:
            raise rejected.error


def _newest_order(storage: Storage, catalogue: Catalogue, epoch: int) -> tuple[int, int]:
    """(epoch, step) of the newest checkpoint of an epoch up to `epoch`, whether it can be read or not.

    One whose manifest is damaged counts too: else steps that were un-committed when it was committed would
    come back. One that was copied here from another run does not: its numbers mean nothing here.
    """
    orders = [entry.manifest.order for entry in catalogue.entries]
    for rejected in catalogue.rejected:
        if rejected.state == "unreadable":
            orders += [
                (files.attempt.epoch, rejected.directory.step)
                for files in _list_attempts(storage, rejected.directory)
                if files.attempt.epoch <= epoch and not _is_foreign(storage, files, catalogue.run)
            ]
    return max(orders, default=(0, 0))


def _is_foreign(storage: Storage, files: AttemptFiles, run: RunDocument | None) -> bool:
    """Whether a readable fragment says that the attempt is another run's; without proof it is ours."""
    if run is None:
        return False
    for rank, size in files.fragments.items():
        try:
            ((fragment, _),) = read_fragments(storage, files.directory, files.attempt, [rank], [size])
        except (StorageError, LoadError):
            continue
        return fragment.run_id != run.run_id
    return False


def _list_attempts(storage: Storage, directory: StepDir) -> list[AttemptFiles]:
    fragments: dict[AttemptId, dict[int, int]] = {}
    data: dict[AttemptId, dict[tuple[int, int], int]] = {}
    for info in storage.list(f"{directory}/"):
        name = info.key.rpartition("/")[2]
        if parsed := parse_fragment_name(name):
            fragments.setdefault(parsed[1], {})[parsed[0]] = info.size_bytes
        elif file := parse_data_file_name(name):
            data.setdefault(file[2], {})[file[0], file[1]] = info.size_bytes
    return [
        AttemptFiles(
            directory=directory,
            attempt=attempt,
            fragments=fragments.get(attempt, {}),
            data=data.get(attempt, {}),
        )
        for attempt in sorted({*fragments, *data})
    ]


def _commit_if_complete(storage: Storage, files: AttemptFiles, run: RunDocument | None) -> str | None:
    """Commit an attempt if it is complete; returns the reason why it is not."""
    if not files.fragments:
        return "no rank published a fragment"
    ranks = sorted(files.fragments)
    try:
        found = read_fragments(
            storage, files.directory, files.attempt, ranks, [files.fragments[rank] for rank in ranks]
        )
    except (CorruptCheckpoint, StorageNotFound) as error:
        # Nothing else says that it is incomplete: what could not be read now may be whole.
        return str(error)
    fragments = [fragment for fragment, _ in found]
    summaries = [summarize(fragment, data) for fragment, data in found]
    reason = (
        _identity_problem(files, ranks, fragments, run)
        or check_summaries(summaries)
        or _size_problem(files, fragments)
        or check_layouts(fragments)
    )
    if reason is None:
        try:
            publish_manifest(storage, files.directory, build_manifest(summaries))
        except (SaveFailed, StorageNotFound, ValueError) as error:
            return str(error)
    return reason


def _finish_commits(storage: Storage, catalogue: Catalogue, on_commit: OnCommit) -> None:
    """Do what follows a commit where the process that committed did not come to it.

    That can only be the newest: the next save begins after it.
    """
    for entry in catalogue.entries[-1:]:
        if DCP_METADATA in storage.list_names(f"{entry.directory}/"):
            continue
        try:
            on_commit(storage, entry.directory)
        except CheckpointError as error:
            log.warning("%s is committed, and what follows a commit failed: %s", entry.directory, error)


def _identity_problem(
    files: AttemptFiles, ranks: Sequence[int], fragments: Sequence[Fragment], run: RunDocument | None
) -> str | None:
    """Names are only names: each fragment must itself say that it is what its name says."""
    if run is not None and any(fragment.run_id != run.run_id for fragment in fragments):
        return "it belongs to another run"
    for rank, fragment in zip(ranks, fragments, strict=True):
        if (fragment.rank, fragment.attempt, fragment.step, fragment.epoch) != (
            rank, str(files.attempt), files.directory.step, files.attempt.epoch,
        ):  # fmt: skip
            return f"the fragment of rank {rank} is of another rank, attempt or step"
    return None


def _size_problem(files: AttemptFiles, fragments: Sequence[Fragment]) -> str | None:
    for fragment in fragments:
        for index, file in enumerate(fragment.files):
            found = files.data.get((fragment.rank, index))
            if found != file.size_bytes:
                name = data_file_name(fragment.rank, index, files.attempt)
                return f"{name} has {found} bytes instead of {file.size_bytes}"
    return None


def _seal_debris(storage: Storage, directory: StepDir, epoch: int, report: RecoverReport) -> None:
    sealed = seal(storage, directory, epoch=epoch)
    if sealed is None:
        return
    log.info("removing %s: it holds no checkpoint", directory)
    if not any(entry.startswith(f"{directory} ") for entry in report.debris):
        report.debris.append(f"{directory}: no attempt that may be committed")
    if not storage.capabilities.directories:
        report.removed.append(str(directory))
        delete_tree(storage, sealed)

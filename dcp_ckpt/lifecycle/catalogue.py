"""The catalogue: which checkpoints a run has, derived from manifests and marks each time.

A view, never a second truth: one listing, one read per step directory, and the marks. Says of every step
directory that is no checkpoint why it is none. Decides nothing. Called by the checkpointer, `recover`,
`load`, `ops` and the command line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    FormatTooNew,
    LoadError,
    StorageError,
    StorageNotFound,
    StorageTransient,
)
from dcp_ckpt.format.epoch import TOMBSTONE_MOST_BYTES, is_tombstone
from dcp_ckpt.format.manifest import Manifest, decode_manifest
from dcp_ckpt.format.names import MANIFEST, StepDir
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.lifecycle.marks import Mark, active_marks, is_pinned, read_marks
from dcp_ckpt.lifecycle.runs import RunDocument, read_run
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.listed import listed_once
from dcp_ckpt.storage.os_errors import is_no_file
from dcp_ckpt.storage.ranges import run_in_order

if TYPE_CHECKING:
    from dcp_ckpt.lifecycle.retention import Candidate
    from dcp_ckpt.policies import Mode

__all__ = ["Catalogue", "CheckpointEntry", "RejectedStep", "read_catalogue", "step_directories"]

log = logging.getLogger(__name__)

_CONCURRENT_READS = 16

_TRIED_READS = 8
_SLOW_READ_SECONDS = 0.0005
"""On a file system whose reads take less, threads would mostly wait for each other."""


@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """One committed checkpoint and what was learned about it since.

    Args:
        marks: those that name its attempt, oldest first.
    """

    directory: StepDir
    manifest: Manifest
    marks: tuple[Mark, ...] = ()

    @property
    def epoch(self) -> int:
        return self.manifest.epoch

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def is_bad(self) -> bool:
        return bool(active_marks(self.marks, "bad"))

    @property
    def is_pinned(self) -> bool:
        return is_pinned(self.marks)

    @property
    def is_suspect(self) -> bool:
        return bool(active_marks(self.marks, "suspect"))

    @property
    def created_at(self) -> datetime:
        """With a time zone. A time that cannot be read counts as 1970: a clock never hides a checkpoint."""
        try:
            moment = datetime.fromisoformat(self.manifest.created_at)
        except ValueError:
            return datetime.fromtimestamp(0, UTC)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    @cached_property
    def encoded_metrics(self) -> Mapping[str, Any]:
        """Metrics as typed JSON: those of the manifest, then those that marks added later."""
        metrics = dict(self.manifest.metrics)
        for mark in active_marks(self.marks, "metrics"):
            metrics.update(mark.detail)
        return metrics

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """The same, decoded. One that cannot be decoded is logged and left out."""
        decoded = {}
        for name, value in self.encoded_metrics.items():
            try:
                decoded[name] = decode_value(value, path=name)
            except CorruptCheckpoint as error:
                log.warning("leaving a metric of %s out: %s", self.directory, error)
        return decoded

    @property
    def candidate(self) -> Candidate:
        """What retention needs to know."""
        from dcp_ckpt.lifecycle.retention import Candidate  # listings do without it

        return Candidate(
            directory=self.directory,
            epoch=self.epoch,
            step=self.step,
            created_at=self.created_at,
            metrics=self.metrics,
            is_bad=self.is_bad,
            is_pinned=self.is_pinned,
            is_suspect=self.is_suspect,
        )


@dataclass(frozen=True, kw_only=True)
class RejectedStep:
    """A step directory that is not a checkpoint of this run.

    Args:
        state: "uncommitted": it has no manifest. "removed": a tombstone stands in its place. "unreadable":
            its manifest cannot be used, for whatever reason; such a directory is never deleted automatically.
        error: what opening it raises.
    """

    directory: StepDir
    state: Literal["uncommitted", "removed", "unreadable"]
    error: CheckpointError

    @property
    def reason(self) -> str:
        return self.error.message

    @property
    def is_absent(self) -> bool:
        """There is no manifest: the attempt is under way, was lost, or was taken back."""
        return self.state == "uncommitted"

    @property
    def is_too_new(self) -> bool:
        """Only a newer version can read it."""
        return isinstance(self.error, FormatTooNew)


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All step directories of a run.

    Args:
        run: `run.json`, or None when there is none that can be read.
        entries: committed checkpoints in ascending order of (epoch, step).
        rejected: all other step directories, in order of step.
    """

    run: RunDocument | None
    entries: tuple[CheckpointEntry, ...]
    rejected: tuple[RejectedStep, ...]

    @property
    def latest(self) -> CheckpointEntry | None:
        """The newest that is not marked bad."""
        return next((entry for entry in reversed(self.entries) if not entry.is_bad), None)

    def best(self, metric: str, mode: Mode) -> CheckpointEntry | None:
        """The best by a finite `metric` that is neither bad nor suspect; of equal ones the newest."""
        from dcp_ckpt.policies import BestN  # listings do without it

        valid = [entry for entry in self.entries if not entry.is_bad]
        ranked = BestN(1, metric, mode).ranked(valid)
        return valid[ranked[0]] if ranked else None

    def at_step(self, step: int) -> CheckpointEntry | None:
        """The newest checkpoint of that step, marked bad or not."""
        return next((entry for entry in reversed(self.entries) if entry.step == step), None)

    def require_step(self, step: int, *, url: str) -> CheckpointEntry:
        """As `at_step`.

        Args:
            url: of the run, for the message.

        Raises:
            CheckpointNotFound: there is none; the message lists those that there are.
            CheckpointError: there is one, and it is unreadable.
        """
        entry = self.at_step(step)
        if entry is not None:
            return entry
        for rejected in self.rejected:
            if rejected.directory.step == step and rejected.state == "unreadable":
                raise rejected.error
        known = ", ".join(str(other.step) for other in self.entries) or "none"
        raise CheckpointNotFound(
            f"no checkpoint of step {step}; there are: {known}", step=step, phase="choose", path=url
        )


def step_directories(storage: Storage) -> list[StepDir]:
    """All step directories of the run at the root of `storage`, committed or not."""
    names = [name.removesuffix("/") for name in storage.list_names("") if name.endswith("/")]
    return sorted(directory for name in names if (directory := StepDir.parse(name)) is not None)


def read_catalogue(storage: Storage) -> Catalogue:
    """Read what the run at the root of `storage` holds. Local to the process that calls it.

    Raises:
        StorageError: the run could not be listed, or its `run.json` or marks not read.
        StorageTransient: nothing was learned about some step; going on could resume from too old a one.
    """
    storage = listed_once(storage)
    run = _run_or_none(storage)
    marks = read_marks(storage)
    entries: list[CheckpointEntry] = []
    rejected: list[RejectedStep] = []
    directories = step_directories(storage)
    for directory, data in zip(directories, _read_manifests(storage, directories), strict=True):
        found = _judge(directory, data, run, marks.get(directory, ()))
        if isinstance(found, CheckpointEntry):
            entries.append(found)
        else:
            rejected.append(found)
    entries.sort(key=lambda entry: entry.manifest.order)
    return Catalogue(run=run, entries=tuple(entries), rejected=tuple(rejected))


def _run_or_none(storage: Storage) -> RunDocument | None:
    try:
        return read_run(storage)
    except (CorruptCheckpoint, FormatTooNew) as error:
        # Checkpoints are whole without it; only the check of their run_id is lost.
        log.warning("reading the run without its run.json: %s", error)
        return None


def _read_manifests(storage: Storage, directories: Sequence[StepDir]) -> list[bytes | RejectedStep]:
    """The manifest of each directory, or why there is none; several are read at a time."""
    found: list[bytes | RejectedStep] = [_uncommitted(directory) for directory in directories]

    def read(number: int) -> None:
        directory = directories[number]
        if not storage.capabilities.directories:
            sizes = {info.key: info.size_bytes for info in storage.list(f"{directory}/")}
            if f"{directory}/{MANIFEST}" not in sizes:
                return
            if len(sizes) == 1 and sizes[f"{directory}/{MANIFEST}"] <= TOMBSTONE_MOST_BYTES:
                # What stands alone and is so small is the tombstone of a checkpoint that was deleted.
                found[number] = _removed(directory)
                return
        try:
            found[number] = storage.read(f"{directory}/{MANIFEST}")
        except StorageNotFound:
            return
        except StorageTransient:
            raise
        except StorageError as error:
            found[number] = RejectedStep(directory=directory, state="unreadable", error=_unreadable(error))

    # An object store is always worth the threads; a file system may be in this host's memory.
    num_tried = min(len(directories), _TRIED_READS) if storage.capabilities.directories else 0
    started = time.monotonic()
    for number in range(num_tried):
        read(number)
    is_slow = time.monotonic() - started >= num_tried * _SLOW_READ_SECONDS
    run_in_order(
        len(directories) - num_tried,
        lambda: lambda number: read(num_tried + number),
        concurrency=_CONCURRENT_READS if is_slow else 1,
    )
    return found


def _unreadable(error: StorageError) -> CheckpointError:
    """What keeps a manifest from being read; what is no file is damage, and not the storage's fault."""
    if is_no_file(error):
        return CorruptCheckpoint(f"the manifest is no file: {error.message}", phase="read", path=error.path)
    return error


def _uncommitted(directory: StepDir) -> RejectedStep:
    reason = "no manifest: the save is not finished, has failed, or was removed"
    error = CheckpointNotFound(reason, phase="choose", path=str(directory))
    return RejectedStep(directory=directory, state="uncommitted", error=error)


def _removed(directory: StepDir) -> RejectedStep:
    error = CheckpointNotFound("it was removed", phase="choose", path=str(directory))
    return RejectedStep(directory=directory, state="removed", error=error)


def _judge(
    directory: StepDir, data: bytes | RejectedStep, run: RunDocument | None, marks: tuple[Mark, ...]
) -> CheckpointEntry | RejectedStep:
    key = f"{directory}/{MANIFEST}"
    if isinstance(data, RejectedStep):
        return data
    if is_tombstone(data, path=key):
        return _removed(directory)
    try:
        manifest = decode_manifest(data, path=key)
        _check_belongs(manifest, directory, run, key)
    except LoadError as load_error:
        return RejectedStep(directory=directory, state="unreadable", error=load_error)
    own = tuple(mark for mark in marks if mark.attempt == manifest.attempt)
    return CheckpointEntry(directory=directory, manifest=manifest, marks=own)


def _check_belongs(manifest: Manifest, directory: StepDir, run: RunDocument | None, key: str) -> None:
    """Refuse a manifest of another run, step or epoch: somebody copied or renamed a directory."""
    if run is not None and manifest.run_id != run.run_id:
        raise CorruptCheckpoint(
            f"belongs to another run: its run_id is {manifest.run_id}, not {run.run_id}",
            phase="read",
            path=key,
        )
    if manifest.step != directory.step:
        raise CorruptCheckpoint(
            f"the manifest is that of step {manifest.step}, not of this directory",
            phase="read",
            path=key,
        )
    if directory.epoch is not None and manifest.epoch != directory.epoch:
        raise CorruptCheckpoint(
            f"the manifest is that of epoch {manifest.epoch}, not of this directory",
            phase="read",
            path=key,
        )

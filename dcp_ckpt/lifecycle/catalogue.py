"""The catalogue: which checkpoints a run has, derived from manifests and marks each time.

A view, never a second truth: one listing, one read per step directory, and the marks. Says of every step directory that is
no checkpoint why it is none. Decides nothing. Called by the checkpointer, `load`, `ops` and the
command line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    FormatTooNew,
    LoadError,
    StorageNotFound,
)
from dcp_ckpt.format.manifest import Manifest, decode_manifest
from dcp_ckpt.format.names import MANIFEST, StepDir
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.lifecycle.marks import Mark, is_bad, is_pinned, read_marks
from dcp_ckpt.lifecycle.retention import Candidate
from dcp_ckpt.lifecycle.runs import RunDocument, read_run
from dcp_ckpt.policies import BestN, Mode
from dcp_ckpt.storage.base import Storage

__all__ = ["Catalogue", "CheckpointEntry", "RejectedStep", "read_catalogue", "step_directories"]

log = logging.getLogger(__name__)


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
        return is_bad(self.marks)

    @property
    def is_pinned(self) -> bool:
        return is_pinned(self.marks)

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
        for mark in self.marks:
            if mark.kind == "metrics":
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
        return Candidate(
            directory=self.directory,
            epoch=self.epoch,
            step=self.step,
            created_at=self.created_at,
            metrics=self.metrics,
            is_bad=self.is_bad,
            is_pinned=self.is_pinned,
        )


@dataclass(frozen=True, kw_only=True)
class RejectedStep:
    """A step directory that is not a checkpoint of this run, and the error that opening it gives."""

    directory: StepDir
    error: LoadError

    @property
    def reason(self) -> str:
        return self.error.message


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
        """The best that is not marked bad and has a finite value of `metric`; of equal ones the newest."""
        valid = [entry for entry in self.entries if not entry.is_bad]
        ranked = BestN(1, metric, mode).ranked(valid)
        return valid[ranked[0]] if ranked else None

    def at_step(self, step: int) -> CheckpointEntry | None:
        """The newest checkpoint of that step, marked bad or not."""
        return next((entry for entry in reversed(self.entries) if entry.step == step), None)


def step_directories(storage: Storage) -> list[StepDir]:
    """All step directories of the run at the root of `storage`, committed or not."""
    names = [name.removesuffix("/") for name in storage.list_names("") if name.endswith("/")]
    return sorted(directory for name in names if (directory := StepDir.parse(name)) is not None)


def read_catalogue(storage: Storage) -> Catalogue:
    """Read what the run at the root of `storage` holds. Local to the process that calls it.

    Raises:
        StorageError: it could not be listed or read. An unreadable manifest is not a missing one: going on
            without it could resume from too old a step.
    """
    run = _run_or_none(storage)
    marks = read_marks(storage)
    entries, rejected = [], []
    for directory in step_directories(storage):
        try:
            manifest = _read_manifest(storage, directory, run)
        except LoadError as error:
            rejected.append(RejectedStep(directory=directory, error=error))
            continue
        own = tuple(mark for mark in marks.get(directory, ()) if mark.attempt == manifest.attempt)
        entries.append(CheckpointEntry(directory=directory, manifest=manifest, marks=own))
    entries.sort(key=lambda entry: entry.manifest.order)
    return Catalogue(run=run, entries=tuple(entries), rejected=tuple(rejected))


def _run_or_none(storage: Storage) -> RunDocument | None:
    try:
        return read_run(storage)
    except (CorruptCheckpoint, FormatTooNew) as error:
        # Checkpoints are whole without it; only the check of their run_id is lost.
        log.warning("reading the run without its run.json: %s", error)
        return None


def _read_manifest(storage: Storage, directory: StepDir, run: RunDocument | None) -> Manifest:
    """The manifest, checked to be one of this directory and this run."""
    key = f"{directory}/{MANIFEST}"
    try:
        data = storage.read(key)
    except StorageNotFound as error:
        raise CheckpointNotFound(
            "no manifest: the save is not finished, has failed, or was removed", path=str(directory)
        ) from error
    manifest = decode_manifest(data, path=key)
    problem: CheckpointError | None = None
    if run is not None and manifest.run_id != run.run_id:
        problem = CheckpointNotFound(
            f"belongs to another run: run_id {manifest.run_id}, not {run.run_id}", path=key
        )
    elif manifest.step != directory.step:
        problem = CorruptCheckpoint(
            f"the manifest is that of step {manifest.step}, not of this directory", path=key
        )
    elif directory.epoch is not None and manifest.epoch != directory.epoch:
        problem = CorruptCheckpoint(
            f"the manifest is that of epoch {manifest.epoch}, not of this directory", path=key
        )
    if problem is not None:
        raise problem
    return manifest

"""Runs at a glance: what each has, and its best checkpoint by what it monitors. Reads only.

Called by the command line and by programs that list their runs.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.lifecycle.catalogue import Catalogue, read_catalogue
from dcp_ckpt.lifecycle.runs import Run, RunDocument, list_runs
from dcp_ckpt.policies import Mode
from dcp_ckpt.storage import open_storage

__all__ = ["BestCheckpoint", "RunSummary", "monitored", "summarize_runs"]


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The best checkpoint of a run, by the metric that its `config` names as `monitor`, with its `mode`."""

    step: int
    metric: str
    mode: Mode
    value: Any


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run.

    Args:
        num_checkpoints: committed ones.
        latest_step: of the newest that is not bad.
        best: None where the run names no metric, or no checkpoint has it.
        num_bytes, written_bytes: of all data files; without those that are shared.
    """

    run: Run
    num_checkpoints: int
    latest_step: int | None
    best: BestCheckpoint | None
    num_bytes: int
    written_bytes: int


def summarize_runs(base: str | os.PathLike[str]) -> tuple[RunSummary, ...]:
    """All runs under `base`, in ascending order of number. Local to the process; reads every manifest.

    Raises:
        StorageError: a run could not be read.
    """
    summaries = []
    for run in list_runs(base):
        with closing(open_storage(run.path)) as storage:
            summaries.append(_summary(run, read_catalogue(storage)))
    return tuple(summaries)


def _summary(run: Run, catalogue: Catalogue) -> RunSummary:
    latest = catalogue.latest
    return RunSummary(
        run=run,
        num_checkpoints=len(catalogue.entries),
        latest_step=latest.step if latest else None,
        best=_best(run, catalogue),
        num_bytes=sum(entry.manifest.total_bytes for entry in catalogue.entries),
        written_bytes=sum(entry.manifest.written_bytes for entry in catalogue.entries),
    )


def monitored(document: RunDocument | None) -> tuple[str, Mode] | None:
    """The metric that a run's `config` names as `monitor`, and its `mode`; None where it names none."""
    config = document.config if document is not None else {}
    metric, mode = config.get("monitor"), config.get("mode")
    if not isinstance(metric, str) or mode not in ("min", "max"):
        return None
    return metric, mode


def _best(run: Run, catalogue: Catalogue) -> BestCheckpoint | None:
    wanted = monitored(run.document)
    entry = catalogue.best(*wanted) if wanted else None
    if wanted is None or entry is None:
        return None
    metric, mode = wanted
    return BestCheckpoint(step=entry.step, metric=metric, mode=mode, value=entry.metrics[metric])

"""Suspicion: marking checkpoints whose metrics say that the training had gone wrong.

Owns the mark `suspect` (docs/format.md, section 11). What is wrong is the policy's to say; what follows from
it is the business of retention and of whoever looks for the best. Called by the owner of a run after a
commit, and when metrics arrive late.
"""

from __future__ import annotations

import logging

from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry
from dcp_ckpt.lifecycle.marks import Mark, active_marks, write_mark
from dcp_ckpt.policies import SuspectPolicy
from dcp_ckpt.storage.base import Storage

__all__ = ["mark_if_suspect", "suspect_reason", "suspect_warning"]

log = logging.getLogger(__name__)


def mark_if_suspect(
    storage: Storage, entry: CheckpointEntry, catalogue: Catalogue, policy: SuspectPolicy | None
) -> Mark | None:
    """Mark a checkpoint if the policy finds it suspect and nobody has yet. One rank calls it; blocks.

    Args:
        entry: of `catalogue`, or newer than it, with all metrics that are known.

    Raises:
        StorageError: the mark could not be written.
    """
    if policy is None or entry.is_suspect:
        return None
    order = entry.manifest.order
    before = [
        other.metrics
        for other in catalogue.entries
        if other.manifest.order < order and not other.is_suspect and not other.is_bad
    ]
    reason = policy.reason(entry.metrics, before)
    if reason is None:
        return None
    log.warning(
        "checkpoint %s is suspect: %s; it takes no other's place and is never the best",
        entry.directory, reason,
    )  # fmt: skip
    manifest = entry.manifest
    return write_mark(
        storage,
        entry.directory,
        kind="suspect",
        epoch=manifest.epoch,
        step=manifest.step,
        attempt=manifest.attempt,
        detail={"reason": reason},
    )


def suspect_reason(entry: CheckpointEntry) -> str | None:
    """Why a checkpoint is suspect; None if it is not."""
    marks = active_marks(entry.marks, "suspect")
    return "; ".join(str(mark.detail.get("reason", "no reason given")) for mark in marks) or None


def suspect_warning(entry: CheckpointEntry, catalogue: Catalogue) -> str:
    """What to tell whoever loads a checkpoint that is suspect: why, and where the newest good one is."""
    good = [other for other in catalogue.entries if not other.is_suspect and not other.is_bad]
    other = f"; the newest that is not suspect is step {good[-1].step}" if good else ""
    return f"loading {entry.directory}, which is suspect: {suspect_reason(entry)}{other}"

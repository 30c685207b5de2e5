"""Retention: which checkpoints to keep and which to remove, decided and explained.

Pure: takes what is there, returns a plan with a reason for every checkpoint. Removing is somebody else's
work (docs/format.md, section 10). Called by the janitor after each commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dcp_ckpt.format.names import StepDir
from dcp_ckpt.policies import KeepPolicy

__all__ = ["Candidate", "Decision", "RetentionPlan", "plan_retention"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One committed checkpoint, as retention sees it.

    Args:
        created_at: with a time zone.
        metrics: decoded.
        is_bad: known to be damaged.
        is_pinned: kept by the user's wish.
        is_suspect: its metrics say that the training had gone wrong.
    """

    directory: StepDir
    epoch: int
    step: int
    created_at: datetime
    metrics: Mapping[str, Any] = field(default_factory=dict)
    is_bad: bool = False
    is_pinned: bool = False
    is_suspect: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One checkpoint and why it is kept or removed."""

    directory: StepDir
    reason: str


@dataclass(frozen=True, kw_only=True)
class RetentionPlan:
    """What to keep and what to remove, each in ascending order of (epoch, step)."""

    kept: tuple[Decision, ...]
    removed: tuple[Decision, ...]


def plan_retention(
    checkpoints: Sequence[Candidate],
    keep: KeepPolicy | None,
    *,
    protected: Mapping[StepDir, str] | None = None,
) -> RetentionPlan:
    """Decide about every checkpoint.

    Kept whatever the policy says: the newest that is not bad, the newest of those that is not suspect,
    pinned ones, `protected` ones. Bad ones are not counted by the policy and never removed. Suspect ones are
    counted by themselves, so none of them takes the place of a good one, and are never the best.

    Args:
        checkpoints: all committed checkpoints of the run, in any order.
        keep: the policy; None keeps everything.
        protected: directory -> reason, such as "in flight" or "resumed from".
    """
    ordered = sorted(checkpoints, key=lambda candidate: (candidate.epoch, candidate.step))
    counted = [candidate for candidate in ordered if not candidate.is_bad]
    good = [candidate for candidate in counted if not candidate.is_suspect]
    suspect = [candidate for candidate in counted if candidate.is_suspect]
    wanted = _wanted(good, keep) | {
        directory: f"{reason} of the suspect ones" for directory, reason in _wanted(suspect, keep).items()
    }
    newest = counted[-1].directory if counted else None
    newest_good = good[-1].directory if good else None

    kept, removed = [], []
    for candidate in ordered:
        directory = candidate.directory
        reasons = (
            "marked bad, kept for inspection" if candidate.is_bad else None,
            "newest valid" if directory == newest else None,
            "newest that is not suspect" if directory == newest_good != newest else None,
            "pinned" if candidate.is_pinned else None,
            (protected or {}).get(directory),
            wanted.get(directory),
        )
        reason = ", ".join(reason for reason in reasons if reason)
        if reason:
            kept.append(Decision(directory=directory, reason=reason))
        else:
            removed.append(Decision(directory=directory, reason=f"not kept by {keep}"))
    return RetentionPlan(kept=tuple(kept), removed=tuple(removed))


def _wanted(counted: Sequence[Candidate], keep: KeepPolicy | None) -> dict[StepDir, str]:
    if keep is None:
        return {candidate.directory: "no keep policy" for candidate in counted}
    return {counted[position].directory: reason for position, reason in keep.keeps(counted).items()}

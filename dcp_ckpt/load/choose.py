"""Which checkpoint to load: rank 0's decision from the catalogue. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from dcp_ckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry
from dcp_ckpt.load.report import RejectedCheckpoint
from dcp_ckpt.policies import AnyOf, BestN, KeepPolicy, SavePolicy

__all__ = ["Candidates", "Which", "best_policy", "choose", "path_of"]

Which = str | int | PurePath


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What may be loaded, best first; more than one only when falling back is allowed.

    Args:
        rejected: newer ones that are out of the question, and why.
    """

    entries: tuple[CheckpointEntry, ...]
    rejected: tuple[RejectedCheckpoint, ...] = ()


def path_of(which: Which) -> str | None:
    """The path that `which` is, or None when it names a checkpoint of the run."""
    if isinstance(which, os.PathLike):
        return os.fspath(which)
    return which if isinstance(which, str) and which not in ("latest", "best") else None


def choose(catalogue: Catalogue, which: Which, *, keep: KeepPolicy | None, url: str) -> Candidates:
    """Decide what to load.

    Args:
        which: "latest" (may fall back to older ones), "best" (by the BestN of `keep`), or a step.
        url: of the run, for messages.

    Returns:
        The candidates; none when nothing was ever committed and `which` is "latest".

    Raises:
        CheckpointNotFound: no such step, or nothing to be best of.
        CorruptCheckpoint: there are checkpoints, but all are known to be damaged.
        ConfigError: `which` is not understood, or "best" without a BestN.
    """
    if which == "latest":
        return _latest(catalogue, url)
    if which == "best":
        ranking = best_policy(keep)
        entry = catalogue.best(ranking.metric, ranking.mode)
        if entry is None:
            raise CheckpointNotFound(
                f"no checkpoint has a value of {ranking.metric!r}", phase="choose", path=url
            )
        return Candidates(entries=(entry,))
    if isinstance(which, bool) or not isinstance(which, int):
        raise ConfigError(f"which must be 'latest', 'best', a step or a checkpoint's path, not {which!r}")
    return Candidates(entries=(catalogue.require_step(which, url=url),))


def _latest(catalogue: Catalogue, url: str) -> Candidates:
    rejected = [
        RejectedCheckpoint(path=f"{url}/{rejected.directory}", reason=rejected.reason)
        for rejected in catalogue.rejected
        if rejected.state == "unreadable"
    ]
    rejected += [
        RejectedCheckpoint(path=f"{url}/{entry.directory}", reason="marked bad by an earlier load")
        for entry in catalogue.entries
        if entry.is_bad
    ]
    entries = tuple(entry for entry in reversed(catalogue.entries) if not entry.is_bad)
    if not entries and rejected:
        listed = "; ".join(f"{item.path}: {item.reason}" for item in rejected)
        raise CorruptCheckpoint(
            f"every checkpoint of this run is damaged, so training is not started over it ({listed}); "
            "repair one, or start a new run",
            phase="choose",
            path=url,
        )
    return Candidates(entries=entries, rejected=tuple(rejected))


def best_policy(keep: KeepPolicy | SavePolicy | None) -> BestN:
    """The ranking that says which checkpoint is the best.

    Raises:
        ConfigError: the policy has none.
    """
    members: Sequence[object] = keep.policies if isinstance(keep, AnyOf) else (keep,)
    for member in members:
        if isinstance(member, BestN):
            return member
    raise ConfigError('which="best" needs a BestN in CheckpointConfig.keep, which says best by what')

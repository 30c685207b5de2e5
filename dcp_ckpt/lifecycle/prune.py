"""Prune: retention applied by a person's command instead of by the run itself.

`plan_prune` looks, decides and changes nothing; `prune_run` claims an epoch, clears up after the ones before
as every owner does, and removes what the plan removes (docs/format.md, sections 9 and 10). A crash anywhere
leaves checkpoints and debris; pruning again, like the next start, finishes it. Called by the command line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.documents import decode_document
from dcp_ckpt.format.epoch import RESUMED_FORMAT, Resumed
from dcp_ckpt.format.names import EPOCHS, StepDir, parse_epoch_name, resumed_name
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry, read_catalogue
from dcp_ckpt.lifecycle.command_epoch import command_epoch
from dcp_ckpt.lifecycle.recover import RecoverReport, recover_older_epochs
from dcp_ckpt.lifecycle.retention import Decision, plan_retention
from dcp_ckpt.lifecycle.sweep import delete_tree, seal, uncommit
from dcp_ckpt.policies import AnyOf, BestN, KeepPolicy
from dcp_ckpt.storage.base import Storage

__all__ = ["PruneItem", "PrunePlan", "PruneReport", "plan_prune", "prune_run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PruneItem:
    """One checkpoint, and why it is kept, removed or spared.

    Args:
        size_bytes: of the data files that were written for it, and of its fragments.
        shared_bytes: of the data files that older checkpoints wrote.
    """

    directory: StepDir
    epoch: int
    step: int
    size_bytes: int
    reason: str
    shared_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """What would happen to every checkpoint, each list in ascending order of (epoch, step)."""

    kept: tuple[PruneItem, ...]
    removed: tuple[PruneItem, ...]

    @property
    def freed_bytes(self) -> int:
        """At most: a file that a checkpoint that stays shares with one that goes stays, too."""
        return sum(item.size_bytes for item in self.removed)

    @property
    def shares(self) -> bool:
        """Whether a checkpoint that stays shares files."""
        return any(item.shared_bytes for item in self.kept)


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What happened.

    Args:
        kept: as planned.
        removed: un-committed and deleted.
        spared: were to be removed, and turned out to be pinned or gone at the last look.
        recovered: what was cleared up first, as at every start.
        epoch: the one that was claimed for it.
    """

    kept: tuple[PruneItem, ...]
    removed: tuple[PruneItem, ...]
    spared: tuple[PruneItem, ...]
    recovered: RecoverReport
    epoch: int

    @property
    def freed_bytes(self) -> int:
        """At most, as in `PrunePlan`."""
        return sum(item.size_bytes for item in self.removed)

    @property
    def shares(self) -> bool:
        """As in `PrunePlan`."""
        return any(item.shared_bytes for item in (*self.kept, *self.spared))


def plan_prune(storage: Storage, keep: KeepPolicy) -> PrunePlan:
    """What `prune_run` would do now. Reads only; claims nothing.

    Raises:
        ConfigError: `keep` asks for the best by a metric that no checkpoint has.
        CorruptCheckpoint, StorageError: the run could not be read.
    """
    return _plan(storage, read_catalogue(storage), keep)


def prune_run(
    storage: Storage,
    keep: KeepPolicy,
    *,
    grace_seconds: float,
    force: bool = False,
    wait_seconds: float = 0.0,
) -> PruneReport:
    """Remove every checkpoint that neither `keep` nor the rules of retention keep. One process; blocks.

    Idempotent: what an earlier call left behind half-deleted is deleted by the next.

    Args:
        storage: the run.
        grace_seconds: between taking checkpoints back and deleting their files, for readers under way.
        force: go on although the owner of the run lives; it is fenced then, and cannot save any more.
        wait_seconds: how long to wait for an owner that lives.

    Raises:
        ConfigError: the owner of the run lives and `force` is not given, or `keep` asks for the best by a
            metric that no checkpoint has; nothing was removed.
        FormatTooNew: a newer version wrote to the run; nothing was removed.
        Fenced: another start took over meanwhile; what was taken back so far stays so.
        StorageError: the run could not be read or changed.
    """
    # Before anything is claimed: a mistyped metric must not fence anybody.
    _require_metrics(read_catalogue(storage), keep)
    with command_epoch(storage, purpose="prune", force=force, wait_seconds=wait_seconds) as claim:
        catalogue, recovered = recover_older_epochs(storage, epoch=claim.epoch)
        plan = _plan(storage, catalogue, keep)
        removed, spared = _take_back(storage, plan.removed, epoch=claim.epoch)
        if removed:
            time.sleep(grace_seconds)
        for item in removed:
            sealed = seal(storage, item.directory, epoch=claim.epoch)
            if sealed is not None:
                delete_tree(storage, sealed)
    return PruneReport(
        kept=plan.kept,
        removed=tuple(removed),
        spared=tuple(spared),
        recovered=recovered,
        epoch=claim.epoch,
    )


def _plan(storage: Storage, catalogue: Catalogue, keep: KeepPolicy) -> PrunePlan:
    _require_metrics(catalogue, keep)
    entries = {entry.directory: entry for entry in catalogue.entries}
    candidates = [entry.candidate for entry in catalogue.entries]
    plan = plan_retention(candidates, keep, protected=_resumed_from(storage))

    def items(decisions: Sequence[Decision]) -> tuple[PruneItem, ...]:
        return tuple(_item(entries[decision.directory], decision.reason) for decision in decisions)

    return PrunePlan(kept=items(plan.kept), removed=items(plan.removed))


def _item(entry: CheckpointEntry, reason: str) -> PruneItem:
    manifest = entry.manifest
    return PruneItem(
        directory=entry.directory,
        epoch=manifest.epoch,
        step=manifest.step,
        size_bytes=manifest.written_bytes + sum(ref.size_bytes for ref in manifest.fragments),
        reason=reason,
        shared_bytes=manifest.shared_bytes,
    )


def _take_back(
    storage: Storage, planned: Sequence[PruneItem], *, epoch: int
) -> tuple[list[PruneItem], list[PruneItem]]:
    removed, spared = [], []
    for item in planned:
        if uncommit(storage, item.directory, epoch=epoch):
            log.info("removed checkpoint %s: %s", item.directory, item.reason)
            removed.append(item)
        else:
            spared.append(replace(item, reason="pinned or gone at the last look"))
    return removed, spared


def _require_metrics(catalogue: Catalogue, keep: KeepPolicy) -> None:
    """Refuse a ranking by a metric that no checkpoint has: it would keep none, by a slip of the pen."""
    members = keep.policies if isinstance(keep, AnyOf) else (keep,)
    valid = [entry for entry in catalogue.entries if not entry.is_bad]
    for member in members:
        if isinstance(member, BestN) and valid and not member.ranked(valid):
            known = sorted({name for entry in valid for name in entry.metrics})
            raise ConfigError(
                f"no checkpoint has a finite value of {member.metric!r}, so none is the best by it; "
                f"metrics: {', '.join(known) or 'none'}"
            )


def _resumed_from(storage: Storage) -> dict[StepDir, str]:
    """What the newest training went on from; commands that claimed epochs since do not change that."""
    epochs = []
    for name in storage.list_names(f"{EPOCHS}/"):
        epoch = parse_epoch_name(name.replace(".resumed.", "."))
        if epoch is not None and name == resumed_name(epoch):
            epochs.append(epoch)
    if not epochs:
        return {}
    key = f"{EPOCHS}/{resumed_name(max(epochs))}"
    resumed = decode_document(storage.read(key), Resumed, format=RESUMED_FORMAT, path=key)
    directory = StepDir.parse(resumed.directory)
    return {} if directory is None else {directory: f"resumed from by epoch {resumed.epoch}"}

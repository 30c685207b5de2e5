"""The janitor: applies retention after each commit, and deletes what was un-committed after its grace period.

Runs on rank 0's background thread. What to keep is decided by `plan_retention`; a failure here never fails a
save.
"""

from __future__ import annotations

import logging
import time

from dcp_ckpt.errors import CheckpointError, Fenced
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.retention import plan_retention
from dcp_ckpt.lifecycle.sweep import delete_tree, seal, uncommit
from dcp_ckpt.policies import KeepPolicy
from dcp_ckpt.storage.base import Storage

__all__ = ["Janitor"]

log = logging.getLogger(__name__)


class Janitor:
    """Owns the deletions of one epoch.

    Args:
        keep: what to keep besides what is never touched; None keeps everything.
        grace_seconds: how long files stay after their checkpoint was taken back.
    """

    def __init__(
        self, storage: Storage, *, epoch: int, keep: KeepPolicy | None, grace_seconds: float
    ) -> None:
        self._storage = storage
        self._epoch = epoch
        self._keep = keep
        self._grace_seconds = grace_seconds
        self._protected: dict[StepDir, str] = {}
        self._waiting: dict[StepDir, float] = {}

    def protect(self, directory: StepDir, reason: str) -> None:
        """Never take this checkpoint back in this epoch."""
        self._protected[directory] = reason

    def tidy(self) -> None:
        """Apply retention now, and delete what is over its grace period. Logs what fails."""
        try:
            if self._keep is not None:
                self._take_back()
            self._delete_expired(time.monotonic())
        except Fenced as error:
            log.warning("retention stops: %s", error)
        except CheckpointError as error:
            log.warning("retention failed and is tried again after the next save: %s", error)

    def close(self) -> None:
        """Wait out the grace period of what is waiting (at most `grace_seconds`) and delete it."""
        if not self._waiting:
            return
        time.sleep(max(max(self._waiting.values()) - time.monotonic(), 0.0))
        try:
            self._delete_expired(time.monotonic())
        except CheckpointError as error:
            log.warning("the next start deletes what is left: %s", error)

    def _take_back(self) -> None:
        candidates = [entry.candidate for entry in read_catalogue(self._storage).entries]
        plan = plan_retention(candidates, self._keep, protected=self._protected)
        for decision in plan.removed:
            if uncommit(self._storage, decision.directory, epoch=self._epoch):
                log.info("removed checkpoint %s: %s", decision.directory, decision.reason)
                self._waiting[decision.directory] = time.monotonic() + self._grace_seconds

    def _delete_expired(self, now: float) -> None:
        for directory in [directory for directory, expires in self._waiting.items() if expires <= now]:
            sealed = seal(self._storage, directory, epoch=self._epoch)
            del self._waiting[directory]
            if sealed is not None:
                delete_tree(self._storage, sealed)

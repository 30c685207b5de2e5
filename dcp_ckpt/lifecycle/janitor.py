"""The janitor: applies retention after each commit, and deletes what was un-committed after its grace period.

Runs on rank 0's background thread, and on its main thread when the user asks. What to keep is decided by
`plan_retention`; a failure here never fails a save.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from dcp_ckpt.errors import CheckpointError, Fenced
from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.known import KnownRun
from dcp_ckpt.lifecycle.retention import plan_retention
from dcp_ckpt.lifecycle.sweep import delete_files, delete_tree, seal, uncommit
from dcp_ckpt.policies import KeepPolicy
from dcp_ckpt.storage.base import Storage

__all__ = ["Janitor"]

log = logging.getLogger(__name__)

_REQUEST_SECONDS = 5.0
"""How much longer a store is asked for what was begun in time."""
_TIDY_SECONDS = 5.0
"""How long tidying may keep the thread that the next save needs; what is left waits for the next commit."""


class Janitor:
    """Owns the deletions of one epoch.

    Args:
        keep: what to keep besides what is never touched; None keeps everything.
        grace_seconds: how long files stay after their checkpoint was taken back.
        is_in_use: told a checkpoint that was taken back, says whether a save under way may still share its
            files; then they stay longer.
        on_removed: told what was taken back, and why.
    """

    def __init__(
        self,
        storage: Storage,
        known: KnownRun,
        *,
        epoch: int,
        keep: KeepPolicy | None,
        grace_seconds: float,
        is_in_use: Callable[[StepDir], bool] = lambda directory: False,
        on_removed: Callable[[StepDir, str], None] = lambda directory, reason: None,
    ) -> None:
        self._storage = storage
        self._known = known
        self._epoch = epoch
        self._keep = keep
        self._grace_seconds = grace_seconds
        self._is_in_use = is_in_use
        self._on_removed = on_removed
        self._protected: dict[StepDir, str] = {}
        self._waiting: dict[StepDir, tuple[float, Manifest]] = {}
        self._lock = threading.Lock()

    def protect(self, directory: StepDir, reason: str) -> None:
        """Never take this checkpoint back in this epoch."""
        self._protected[directory] = reason

    def protects(self, directory: StepDir) -> bool:
        """Whether it is never taken back in this epoch."""
        return directory in self._protected

    @property
    def waiting_bytes(self) -> int:
        """What was written for what was taken back and is not deleted yet."""
        return sum(manifest.written_bytes for _, manifest in list(self._waiting.values()))

    def tidy(self) -> None:
        """Apply retention now, and delete what is over its grace period. Logs what fails."""
        try:
            self.take_back(budget_seconds=_TIDY_SECONDS)
            with self._lock:
                self._delete_expired(time.monotonic())
        except Fenced as error:
            log.warning("retention stops: %s", error)
        except CheckpointError as error:
            log.warning("retention failed and is tried again after the next save: %s", error)

    def take_back(self, *, budget_seconds: float = math.inf) -> list[StepDir]:
        """Apply retention now. The files stay for the grace period, and go at a later `tidy` or `close`.

        Args:
            budget_seconds: nothing more is taken back after so long; the rest waits for the next call.

        Returns:
            What was taken back, oldest first.

        Raises:
            Fenced: a newer epoch exists.
            CheckpointError: the run could not be read or changed.
        """
        if self._keep is None:
            return []
        with self._lock:
            return self._take_back(time.monotonic() + budget_seconds)

    def delete_removed(self, *, wait_seconds: float) -> int:
        """Delete what was taken back and is over its grace period; a save needs the space.

        Args:
            wait_seconds: wait for grace periods that end within so long.

        Returns:
            The size of what was deleted, in bytes.

        Raises:
            Fenced: a newer epoch exists.
            CheckpointError: something could not be deleted.
        """
        with self._lock:
            now = time.monotonic()
            expiring = [expires for expires, _ in self._waiting.values() if expires <= now + wait_seconds]
        if not expiring:
            return 0
        time.sleep(max(max(expiring) - now, 0.0))
        with self._lock:
            return self._delete_expired(time.monotonic())

    def close(self, *, waits: bool = True) -> None:
        """Delete what is over its grace period.

        Args:
            waits: for all that was taken back, at most `grace_seconds`; else the next start deletes the rest.
        """
        if not self._waiting:
            return
        if waits:
            latest = max(expires for expires, _ in self._waiting.values())
            time.sleep(max(latest - time.monotonic(), 0.0))
        try:
            self._delete_expired(time.monotonic())
        except CheckpointError as error:
            log.warning("the next start deletes what is left: %s", error)

    def _take_back(self, deadline: float) -> list[StepDir]:
        # Later than the last removal begins: what was begun should end, but with the store gone soon.
        last = deadline + _REQUEST_SECONDS
        storage = self._storage.until(last)
        entries = {entry.directory: entry for entry in self._known.catalogue(deadline=last).entries}
        candidates = [entry.candidate for entry in entries.values()]
        plan = plan_retention(candidates, self._keep, protected=self._protected)
        taken: list[StepDir] = []
        for decision in plan.removed:
            if time.monotonic() > deadline:
                break
            if uncommit(storage, decision.directory, epoch=self._epoch):
                log.info("removed checkpoint %s: %s", decision.directory, decision.reason)
                self._known.removed(decision.directory)
                expires = time.monotonic() + self._grace_seconds
                self._waiting[decision.directory] = expires, entries[decision.directory].manifest
                taken.append(decision.directory)
                self._on_removed(decision.directory, decision.reason)
        return taken

    def _delete_expired(self, now: float) -> int:
        """Returns the size of what was deleted, in bytes."""
        num_bytes = 0
        storage = self._storage.until(now + _REQUEST_SECONDS)
        for directory, (expires, manifest) in list(self._waiting.items()):
            if expires > now or self._is_in_use(directory):
                continue
            sealed = seal(storage, directory, epoch=self._epoch)
            del self._waiting[directory]
            if sealed is None:
                continue
            if storage.capabilities.directories:
                delete_tree(storage, sealed)
            else:
                delete_files(storage, directory, manifest)
            num_bytes += manifest.written_bytes
        return num_bytes

"""The handle of one save: what the caller holds while the bytes become durable."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from dcp_ckpt.errors import CheckpointError, SaveFailed
from dcp_ckpt.lifecycle.catalogue import CheckpointEntry

__all__ = ["CheckpointInfo", "SaveHandle", "info_of"]


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One committed checkpoint.

    Args:
        step: the training step.
        path: URL or path of its directory.
        bytes: size of all data files.
        shared_bytes: of those that an older checkpoint wrote and that were not written again (`reuse`).
        stall_seconds: how long the save held this rank's training thread: the call of `save()` and the wait
            at its fence; 0.0 when it was not saved by this process.
        durable_seconds: from the call of `save()` until the manifest was durable, on this rank's clock.
        metrics: as given to `save()`.
        tags: as given to `save()`.
        world_size: the number of ranks that saved.
        created_at: RFC 3339 UTC.
    """

    step: int
    path: str
    bytes: int
    stall_seconds: float
    durable_seconds: float
    metrics: dict[str, object]
    tags: tuple[str, ...]
    world_size: int
    created_at: str
    shared_bytes: int = 0


def info_of(entry: CheckpointEntry, url: str) -> CheckpointInfo:
    """A checkpoint of the run at `url`, as it was found there."""
    manifest = entry.manifest
    return CheckpointInfo(
        step=manifest.step,
        path=os.path.join(url, str(entry.directory)),
        bytes=manifest.total_bytes,
        stall_seconds=0.0,
        durable_seconds=0.0,
        metrics=dict(entry.metrics),
        tags=tuple(manifest.tags),
        world_size=manifest.world_size,
        created_at=manifest.created_at,
        shared_bytes=manifest.shared_bytes,
    )


class SaveHandle:
    """The progress of one save, on one rank. Thread-safe.

    Made by `Checkpointer.save`; `step` is that of the save.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._staged = threading.Event()
        self._is_staged = False
        self._done = threading.Event()
        self._outcome = "pending"
        self._info: CheckpointInfo | None = None
        self._error: CheckpointError | None = None
        self._seen = False

    @property
    def outcome(self) -> str:
        """`pending`, then one of `committed`, `failed`, `unknown`, `skipped`, the same on all ranks."""
        return self._outcome

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed, or None. Does not count as having been told: `result()` does."""
        return self._error

    @property
    def failure_seen(self) -> bool:
        """Whether the caller was told of the failure."""
        return self._seen or self._error is None

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until this rank's bytes are owned by the writer; from then on the save survives this process.

        Returns:
            False when `timeout` seconds passed first, and when the save failed or was skipped before.
        """
        self._staged.wait(timeout)
        return self._is_staged

    def wait_done(self, timeout: float | None = None) -> bool:
        """Wait for the outcome, whatever it is. Does not count as having been told of a failure.

        Returns:
            False when `timeout` seconds passed first.
        """
        return self._done.wait(timeout)

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """Wait for the outcome.

        Args:
            timeout: in seconds; None waits as long as the save's own deadline lets it.

        Raises:
            CheckpointError: the save did not become a checkpoint: what failed first, on whichever rank;
                SaveFailed when it was skipped.
            CommitUnknown: it may have become one.
            TimeoutError: it is still under way.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the save of step {self.step} is still under way after {timeout} s")
        if self._error is not None:
            self._seen = True
            raise self._error
        if self._info is None:
            raise SaveFailed(
                "the save was skipped, because the one before it was still under way", step=self.step
            )
        return self._info

    def mark_failure_seen(self) -> None:
        """Called by the Checkpointer when it told the caller in another way."""
        self._seen = True

    def mark_staged(self) -> None:
        self._is_staged = True
        self._staged.set()

    def resolve(
        self, outcome: str, *, info: CheckpointInfo | None = None, error: CheckpointError | None = None
    ) -> None:
        """Set the final outcome, once."""
        assert not self._done.is_set(), "an outcome is final"
        self._outcome, self._info, self._error = outcome, info, error
        self._staged.set()
        self._done.set()

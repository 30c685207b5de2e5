"""Whether storage has room for the next checkpoint: looked at before each save, on rank 0.

Owns what a checkpoint took last, the look at free space and the freeing of what retention has taken back. A
storage that does not say how much is free is never full here; each rank's writer asks again when it opens its
file, and what it meets counts. Called by the saver on the main thread, and told by the session what was
committed.
"""

from __future__ import annotations

import errno
import logging
import threading

from dcp_ckpt.errors import CheckpointError, StorageFull
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.policies import AnyOf, BestN, KeepPolicy, LatestN
from dcp_ckpt.save.handle import SaveHandle
from dcp_ckpt.storage.base import Storage

__all__ = ["Space", "full", "most_kept", "retention_shortage"]

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
"""How long a save waits to learn what is free; a file server that does not answer must not hold training."""

_GRACE_SECONDS = 30.0
"""How long a save waits for the grace period of what was taken back, where there is no room otherwise."""


def full(needed_bytes: int, free_bytes: int, path: str, *, when: str) -> StorageFull:
    """The error for too little room, the same before the first step and before a save."""
    return StorageFull(
        f"no room for a checkpoint: {needed_bytes} bytes needed, {free_bytes} bytes free{when}; delete "
        "something, prune checkpoints or use a larger disk",
        rank=0,
        phase="stage",
        path=path,
        errno=errno.ENOSPC,
    )


def most_kept(keep: KeepPolicy | None) -> int | None:
    """How many checkpoints a policy keeps at most; None when that grows with the training."""
    policies = keep.policies if isinstance(keep, AnyOf) else (keep,)
    bounded = [policy for policy in policies if isinstance(policy, (LatestN, BestN))]
    if len(bounded) < len(policies):
        return None
    # The newest is kept whatever the policy says.
    has_newest = any(isinstance(policy, LatestN) for policy in bounded)
    return sum(policy.n for policy in bounded) + (0 if has_newest else 1)


def retention_shortage(
    keep: KeepPolicy | None, *, needed_bytes: int, free_bytes: int, removable_bytes: int
) -> str | None:
    """Why a run will run out of room although the next checkpoint fits; None when it will not. Pure.

    Args:
        needed_bytes: of one checkpoint.
        free_bytes: now.
        removable_bytes: of committed checkpoints that retention may remove in time.
    """
    num_kept = most_kept(keep)
    if num_kept is None:
        return None
    most_bytes = (num_kept + 1) * needed_bytes
    if most_bytes <= free_bytes + removable_bytes:
        return None
    return (
        f"{keep} keeps up to {num_kept} checkpoints and one more while saving, {most_bytes} bytes; only "
        f"{free_bytes} bytes are free and {removable_bytes} bytes in checkpoints that will be removed: saves "
        "will fail for lack of space"
    )


class Space:
    """Rank 0's knowledge of the room on storage.

    Args:
        storage: the run; only asked how much is free.
        janitor: holds what was taken back and waits for its grace period.
        timeout_seconds: deadline of the wait for a save in flight.
    """

    def __init__(self, storage: Storage, janitor: Janitor, *, timeout_seconds: float) -> None:
        self._storage = storage
        self._janitor = janitor
        self._timeout_seconds = timeout_seconds
        self._needed_bytes: int | None = None
        self._settled = threading.Condition()
        self._settled_step = -1
        self._look = _Look(storage)

    def expect(self, needed_bytes: int | None) -> None:
        """The next checkpoint takes so much, on all ranks together; None: nobody knows."""
        self._needed_bytes = needed_bytes

    def settled(self, step: int) -> None:
        """Everything that follows the commit of this step is done, retention included."""
        with self._settled:
            self._settled_step = step
            self._settled.notify_all()

    def shortage(self, step: int, last: SaveHandle | None) -> StorageFull | None:
        """Why a save cannot succeed now, as far as is known; None lets it try.

        One look at free space. Where it is too little, blocks for the outcome of the save before and its
        retention, and deletes what was taken back, waiting for its grace period if that ends soon.

        Args:
            last: the save before.
        """
        needed = self._needed_bytes
        if needed is None:
            return None
        # A save in flight may not have taken its space yet.
        in_flight = needed if last is not None and last.outcome == "pending" else 0
        free = self._look.free_bytes()
        if free is None or free >= needed + in_flight:
            return None
        self._wait_for(last)
        free = self._make_room(needed)
        if free is None or free >= needed:
            return None
        error = full(needed, free, self._storage.url, when="")
        error.step = step
        return error

    def _wait_for(self, last: SaveHandle | None) -> None:
        """Let retention after the save before come to its end: it may be about to free a checkpoint."""
        if last is None or not last.wait_done(self._timeout_seconds) or last.outcome != "committed":
            return
        with self._settled:
            self._settled.wait_for(lambda: self._settled_step >= last.step, self._timeout_seconds)

    def _make_room(self, needed_bytes: int) -> int | None:
        """Delete what was taken back, as far as needed; what is free then, None where that is not known."""
        free = before = self._look.free_bytes()
        freed = 0
        for wait_seconds in (0.0, _GRACE_SECONDS):
            if before is None or free is None or free >= needed_bytes:
                break
            try:
                freed += self._janitor.delete_removed(wait_seconds=wait_seconds)
            except CheckpointError as error:
                log.warning("the files of removed checkpoints could not be deleted: %s", error)
                break
            # Some file systems free space a while after a deletion.
            free = max(self._look.free_bytes() or 0, before + freed)
        return free


class _Look:
    """One look at a time, by a thread of its own, given up on soon: a look may hang with its file server."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._thread: threading.Thread | None = None
        self._found: int | None = None

    def free_bytes(self) -> int | None:
        """None where nobody says, or not in time."""
        if self._thread is not None and self._thread.is_alive():
            return None
        self._found = None
        self._thread = threading.Thread(target=self._ask, name="dcp_ckpt-space", daemon=True)
        self._thread.start()
        self._thread.join(_LOOK_SECONDS)
        return None if self._thread.is_alive() else self._found

    def _ask(self) -> None:
        self._found = self._storage.free_bytes()

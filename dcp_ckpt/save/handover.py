"""The way of one save from live tensors to the writer, on one rank: copied, handed over, or failed. Once.

Three threads meet here: the one that copies tells how far it is, training waits at the fence until every late
tensor is copied, the pilot waits for the end. Whoever finds that it takes too long fails the save; nobody is
left waiting. Knows no tensor.
"""

from __future__ import annotations

import threading
import time

from dcp_ckpt.errors import CheckpointError, SaveFailed
from dcp_ckpt.format.fragment import Fragment
from dcp_ckpt.save.replicas import ReplicaSet

__all__ = ["Handover"]


class Handover:
    """Thread-safe. It ends exactly once: `finish` or `fail`, and what comes later has no effect.

    Args:
        rank, step: for messages.
        deadline: monotonic seconds; nothing waits for copies any longer.
        patience_seconds: how long the fence waits without any copy making progress.
    """

    def __init__(self, *, rank: int, step: int, deadline: float, patience_seconds: float) -> None:
        self._rank = rank
        self._step = step
        self._deadline = deadline
        self._patience_seconds = patience_seconds
        self._condition = threading.Condition()
        self._copied = False
        self._ended = False
        self._last_progress = 0.0
        self._num_at_fence = 0
        self._fence_seconds = 0.0
        self._error: CheckpointError | None = None
        self._fragment: Fragment | None = None
        self._replicas: tuple[ReplicaSet, ...] = ()

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed; None before its end, and when the writer has the bytes."""
        return self._error

    @property
    def fragment(self) -> Fragment | None:
        """What the writer was given."""
        return self._fragment

    @property
    def replicas(self) -> tuple[ReplicaSet, ...]:
        """What must be equal on several ranks; empty before the end and after a failure."""
        return self._replicas

    @property
    def fence_seconds(self) -> float:
        """How long `wait_copied` held its callers; final once `wait` has returned."""
        return self._fence_seconds

    def go_on(self) -> bool:
        """The copying thread has done another part: whether it shall do the next, or the save has failed."""
        with self._condition:
            self._last_progress = time.monotonic()
            return not self._ended

    def mark_copied(self) -> bool:
        """All late tensors are copied, and were not changed meanwhile: lets training through the fence.

        Returns:
            False when the save has failed before; it must not be handed over then.
        """
        with self._condition:
            if self._ended:
                return False
            self._copied = True
            self._condition.notify_all()
            return True

    def finish(self, fragment: Fragment, replicas: tuple[ReplicaSet, ...]) -> None:
        """The writer has the bytes."""
        with self._condition:
            if not self._ended:
                self._fragment, self._replicas = fragment, replicas
                self._end()

    def fail(self, error: CheckpointError) -> None:
        """The save is not handed over; told by the thread that would have done it."""
        with self._condition:
            if not self._ended:
                # Its frames hold on to tensors, and the error is kept for as long as the handle.
                self._error = error.with_traceback(None)
                self._end()

    def give_up(self, error: CheckpointError) -> None:
        """Fail the save from another thread. Without effect once all is copied: it may be with the writer."""
        with self._condition:
            if not self._copied:
                self.fail(error)

    def wait_copied(self) -> None:
        """The fence: block until the late tensors are copied or the save has failed. Raises nothing.

        It fails the save itself when copies make no progress, or its deadline comes.
        """
        with self._condition:
            started = time.monotonic()
            self._num_at_fence += 1
            try:
                while not (self._copied or self._ended):
                    patience = max(self._last_progress, started) + self._patience_seconds
                    self._wait_or_fail(min(patience, self._deadline), started)
            finally:
                self._num_at_fence -= 1
                self._fence_seconds += time.monotonic() - started
                self._condition.notify_all()

    def wait(self) -> None:
        """Block until the end, and until training has left the fence. Fails the save at its deadline."""
        with self._condition:
            started = time.monotonic()
            while not self._ended or self._num_at_fence:
                if self._copied or self._ended:
                    # What is left does not wait for tensors, other ranks or storage: it ends by itself.
                    self._condition.wait()
                else:
                    self._wait_or_fail(self._deadline, started)

    def _wait_or_fail(self, until: float, started: float) -> None:
        left = until - time.monotonic()
        if left > 0:
            self._condition.wait(left)
            return
        waited = time.monotonic() - started
        error = SaveFailed(
            f"parameters and moments were not copied in time, after a wait of {waited:.1f} s; training goes "
            "on and may change them",
            rank=self._rank,
            step=self._step,
            phase="stage",
        )
        self.fail(error)

    def _end(self) -> None:
        self._ended = True
        self._condition.notify_all()

"""Watching whether something moves: when to say that it does not, and a thread that looks meanwhile.

Knows nothing of what is watched. Called by the writer's link and by the coordinator.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import CheckpointError

__all__ = ["WATCH_SECONDS", "Watch", "Watchdog"]

WATCH_SECONDS = 30.0
"""Nothing has moved for so long: it is said, and again at doubling intervals."""

_LOOKS = 6
"""How often one looks in that time."""

_State = TypeVar("_State")


class Watch:
    """When to say that nothing moves.

    Args:
        state: how it is at the beginning.
        now: monotonic seconds.
        first_seconds: how long nothing has moved when it is said first; None: `WATCH_SECONDS`.
    """

    def __init__(self, state: object, *, now: float, first_seconds: float | None = None) -> None:
        self._first_seconds = WATCH_SECONDS if first_seconds is None else first_seconds
        self._state = state
        self._since = now
        self._next_seconds = self._first_seconds

    @property
    def look_seconds(self) -> float:
        """How long to wait between two looks."""
        return self._first_seconds / _LOOKS

    def still_seconds(self, now: float) -> float:
        """For how long nothing had moved at the last look."""
        return now - self._since

    def look(self, state: object, *, now: float) -> float | None:
        """See how it is.

        Returns:
            For how many seconds nothing has moved, when it is time to say so.
        """
        if state != self._state:
            self._state, self._since = state, now
            self._next_seconds = self._first_seconds
        still = self.still_seconds(now)
        if still < self._next_seconds:
            return None
        self._next_seconds = 2.0 * still
        return still


class Watchdog(Closing, Generic[_State]):
    """A thread that looks while the one that made it is blocked, until it is closed.

    Args:
        look: how it is now; called on the thread, now and then.
        tell: called there when nothing has moved for `seconds`.
    """

    def __init__(self, look: Callable[[], _State], tell: Callable[[_State, float], None]) -> None:
        self._look = look
        self._tell = tell
        self._watch = Watch(None, now=time.monotonic())
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dcp_ckpt-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._watch.look_seconds):
            try:
                state = self._look()
            except CheckpointError:
                return  # nobody is left to look at; whoever is blocked learns it by itself
            still = self._watch.look(state, now=time.monotonic())
            if still is not None:
                self._tell(state, still)

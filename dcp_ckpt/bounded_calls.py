"""Calls that may never return, made on a thread of their own, so that whoever makes them can give up.

Knows nothing of what is called. Called by the channel between ranks, whose store does not answer while rank
0's process is stopped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["BoundedCalls"]

_Result = TypeVar("_Result")
_Queue = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class BoundedCalls:
    """Owns one daemon thread, which makes one call after the other.

    A call that was given up goes on there, and those after it wait for its end.
    """

    def __init__(self, name: str) -> None:
        self._queue: _Queue = queue.SimpleQueue()
        # It does not hold on to this object.
        threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True).start()

    def call(self, function: Callable[[], _Result], *, patience_seconds: float) -> _Result:
        """Make a call, and wait for its end. Signal handlers run meanwhile, also on the main thread.

        Raises:
            TimeoutError: it has not ended in time. One that had not begun is never made.
            BaseException: what it raised.
        """
        future: Future[_Result] = Future()
        self._queue.put((future, function))
        try:
            return future.result(max(patience_seconds, 0.0))
        finally:
            future.cancel()

    def close(self) -> None:
        """End the thread after the calls that were made. Idempotent; does not block."""
        self._queue.put(None)


def _serve(calls: _Queue) -> None:
    while (item := calls.get()) is not None:
        future, function = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            # Whoever waits for it gets it.
            except BaseException as error:
                future.set_exception(error)
        # Nothing that was called is held until the next call.
        del item, future, function

"""Signals that ask a training to stop: the first is noted, a second one does what it always did.

Called by the checkpointer on the main thread; `ignore_stop_signals` by processes that load data.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from dcp_ckpt.closing import Closing

__all__ = ["SignalWatch", "ignore_stop_signals"]

log = logging.getLogger(__name__)

_SAME_SIGNAL_SECONDS = 1.0
"""A scheduler signals every process of a job, and the launcher passes its own on: that is one signal."""


class SignalWatch(Closing):
    """Handles `signals` until it is closed. Made on the main thread; elsewhere Python can handle none.

    Args:
        signals: names such as "SIGTERM".
        ask: called with the name of the first one, from inside of the handler, so it must only take a note.
    """

    def __init__(self, signals: Sequence[str], ask: Callable[[str], None]) -> None:
        self._ask = ask
        self._first: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            log.warning("should_stop() is not called on the main thread: signals are not watched for")
            return
        for name in signals:
            number = signal.Signals[name]
            self._before[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Put back what handled the signals before. Idempotent."""
        for number, handler in self._before.items():
            # None stands for one that was not installed from Python, and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Between two bytecodes of the main thread, whatever that holds: nothing here may take a lock or log.
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._ask(signal.Signals(number).name)
        elif now - self._first > _SAME_SIGNAL_SECONDS:
            self.close()
            os.kill(os.getpid(), number)


def ignore_stop_signals(worker_id: int = 0) -> None:
    """Let SIGTERM and SIGINT pass by this process: the `worker_init_fn` of a DataLoader.

    torchrun signals a trainer together with its data-loading processes. Without this they end at once, and
    the training fails for want of data before it can save.

    Args:
        worker_id: given by the DataLoader; not used.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

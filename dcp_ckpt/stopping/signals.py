"""Signals that ask a training to stop: the first is noted, a second one does what it always did.

Called by the checkpointer on the main thread; `ignore_stop_signals` by processes that load data.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from dcp_ckpt.closing import Closing

__all__ = ["SignalWatch", "ignore_stop_signals"]

log = logging.getLogger(__name__)

_SAME_SIGNAL_SECONDS = 1.0
"""A scheduler signals every process of a job, and the launcher passes its own on: that is one signal."""
_HANDLER_SECONDS = 1.0
_NO_SIGNAL = 0
_TRAINER_SECONDS = 1.0
"""How often a data-loading process looks whether its trainer is there."""


class SignalWatch(Closing):
    """Handles `signals` until it is closed. Made on the main thread; elsewhere Python can handle none.

    Args:
        signals: names such as "SIGTERM".
        ask: called with the name of the first one, from inside of the handler, so it must only take a note.
    """

    def __init__(self, signals: Sequence[str], ask: Callable[[str], None]) -> None:
        self._ask = ask
        self._first: tuple[float, int] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._masks: dict[int, set[int]] = {}
        self._alarm: _SecondSignal | None = None
        if threading.current_thread() is not threading.main_thread():
            log.warning("should_stop() is not called on the main thread: signals are not watched for")
            return
        numbers = [signal.Signals[name] for name in signals]
        self._alarm = _SecondSignal(numbers)
        for number in numbers:
            self._before[number] = signal.signal(number, self._handle)
        _follow_forks(weakref.ref(self))

    def close(self, *, is_heard: bool = True) -> None:
        """Put back what handled the signals before. Idempotent.

        Args:
            is_heard: whether the training stopped for the first signal; else it is raised again.
        """
        self._put_back()
        if self._alarm is not None:
            self._alarm.close()
        first, self._first = self._first, None
        if first is not None and not is_heard:
            signal.raise_signal(first[1])

    def hold_back(self) -> None:
        """Called by a thread before it forks: the watched signals wait."""
        self._masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)

    def let_through(self) -> None:
        """Called by the same thread after it, also in the child: only what was blocked before is, still."""
        mask = self._masks.pop(threading.get_ident(), None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def leave_child(self) -> None:
        """Called in a process forked from this one: its signals are its own business."""
        self._put_back()
        if self._alarm is not None:
            self._alarm.forget()
        self.let_through()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            # Whoever has installed another one since then keeps it.
            if signal.getsignal(number) == self._handle:
                # None stands for one that was not installed from Python, and cannot be put back from it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Between two bytecodes of the main thread, whatever that holds: nothing here may take a lock or log.
        now = time.monotonic()
        if self._first is None:
            self._first = now, number
            self._ask(signal.Signals(number).name)
        elif now - self._first[0] > _SAME_SIGNAL_SECONDS:
            assert self._alarm is not None
            self._alarm.is_handled = True
            self._put_back()
            # In the background of a shell script SIGINT was ignored before, which would ignore this one, too.
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _follow_forks(watch: weakref.ref[SignalWatch]) -> None:
    """Keep a child from swallowing its signals, also those that come before it has put the handlers back."""

    def tell(act: Callable[[SignalWatch], None]) -> None:
        if (found := watch()) is not None:
            act(found)

    os.register_at_fork(
        before=partial(tell, SignalWatch.hold_back),
        after_in_parent=partial(tell, SignalWatch.let_through),
        after_in_child=partial(tell, SignalWatch.leave_child),
    )


class _SecondSignal(Closing):
    """Ends the process at a second signal also where the main thread runs no handler: in a collective, say.

    Watches the descriptor to which the interpreter writes each signal at once; another's is left alone.
    `is_handled` is set where a handler did run.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = frozenset(numbers)
        self.is_handled = False
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._reader, True)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread: threading.Thread | None = None
        if self._before != -1:
            signal.set_wakeup_fd(self._before)
            return
        self._thread = threading.Thread(target=self._watch, name="dcp_ckpt-signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        if self._writer == -1:
            return
        thread, self._thread = self._thread, None
        if thread is not None:
            signal.set_wakeup_fd(-1)
            # Its end of the pipe tells the thread nothing: a forked child may hold a copy of it.
            with suppress(BlockingIOError):  # full: the thread is ending the process
                os.write(self._writer, bytes([_NO_SIGNAL]))
            thread.join()
        self._close_pipe()

    def forget(self) -> None:
        """The same in a forked child, which has no thread; its signals must not be counted in the parent."""
        if self._thread is not None:
            self._thread = None
            signal.set_wakeup_fd(-1)
        if self._writer != -1:
            self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._writer)
        os.close(self._reader)
        self._writer = -1

    def _watch(self) -> None:
        first: float | None = None
        while (data := os.read(self._reader, 1)) and data[0] != _NO_SIGNAL:
            if data[0] not in self._numbers:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > _SAME_SIGNAL_SECONDS:
                # The handler is better, where it runs: it ends the process by the signal itself.
                time.sleep(_HANDLER_SECONDS)
                if not self.is_handled:
                    os._exit(128 + data[0])


def ignore_stop_signals(worker_id: int = 0) -> None:
    """Let SIGTERM and SIGINT pass by this process: the `worker_init_fn` of a DataLoader.

    torchrun signals a trainer together with its data-loading processes. Without this they end at once, and
    the training fails for want of data before it can save. They still leave with their trainer: when it ends
    them, and within a second when it is gone, also where they wait for it to take what they have made.

    Args:
        worker_id: given by the DataLoader; not used.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is None:
        return
    # What is blocked is not lost: the thread takes it, and sees who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(
        target=_leave_with, args=(trainer.pid, os.getppid()), name="dcp_ckpt-trainer", daemon=True
    ).start()


def _leave_with(trainer: int | None, parent: int) -> None:
    """End this process when `trainer` asks for it, or when `parent`, itself or its fork server, is gone."""
    while os.getppid() == parent:
        received = signal.sigtimedwait([signal.SIGTERM], _TRAINER_SECONDS)
        if received is not None and received.si_pid == trainer:
            break
    # torch's own handler leaves with 0, too: its loader takes anything else for a failure.
    os._exit(0)

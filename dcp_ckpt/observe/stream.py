"""The way from whoever tells an event to the sinks: a bounded queue and one thread.

Telling costs a microsecond and never blocks or raises, whatever sinks do. Called on rank 0.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence

from dcp_ckpt.observe.events import Event, EventSink

__all__ = ["EventStream"]

log = logging.getLogger(__name__)

_MOST_WAITING = 10_000
_END_SECONDS = 10.0


class EventStream:
    """Owns the thread, and closes the sinks; without sinks there is no thread.

    A sink that fails is told of the next event all the same; the first failure of each is logged.
    """

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        self._sinks = tuple(sinks)
        self._failed: set[int] = set()
        self._num_lost = 0
        self._closed = False
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if self._sinks:
            self._thread = threading.Thread(target=self._run, name="dcp_ckpt-events", daemon=True)
            self._thread.start()

    def emit(self, event: Event) -> None:
        """Tell the sinks. Thread-safe. An event that finds 10,000 waiting is lost, and counted in the log."""
        if self._thread is None or self._closed:
            return
        if self._events.qsize() >= _MOST_WAITING:
            self._num_lost += 1
            return
        self._events.put(event)

    def close(self) -> None:
        """Let the sinks take what is waiting, for 10 seconds at most. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            return
        self._events.put(None)
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive():
            log.warning("a sink of events hangs; about %d events were not taken", self._events.qsize())
        if self._num_lost:
            log.warning("%d events were lost: the sinks are too slow", self._num_lost)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            for number, sink in enumerate(self._sinks):
                try:
                    sink.handle(event)
                except Exception as error:
                    self._note(number, sink, error)
        for number, sink in enumerate(self._sinks):
            try:
                sink.close()
            except Exception as error:
                self._note(number, sink, error)

    def _note(self, number: int, sink: EventSink, error: Exception) -> None:
        if number not in self._failed:
            log.warning("%s failed; training and saves go on without it: %r", type(sink).__name__, error)
        self._failed.add(number)

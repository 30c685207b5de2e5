"""Many small jobs on a few threads, in order, with the first failure deciding.

Owns the concurrency of `read_ranges`. Must not know where bytes come from. Called by the storages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.keys import check_key

__all__ = ["check_ranges", "run_in_order"]


def check_ranges(ranges: Sequence[ByteRange], *, concurrency: int) -> None:
    """Refuse what no object can have.

    Raises:
        ConfigError: a key is none, an offset or length is negative, or `concurrency` is below 1.
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1, not {concurrency}")
    for item in ranges:
        check_key(item.key)
        if item.offset < 0 or item.num_bytes < 0:
            raise ConfigError(f"a range of {item.key} has offset {item.offset} and {item.num_bytes} bytes")


def run_in_order(
    num_jobs: int, make_worker: Callable[[], Callable[[int], None]], *, concurrency: int
) -> None:
    """Run jobs 0 to `num_jobs` - 1, started in ascending order; blocks until all threads are done.

    Args:
        num_jobs: how many there are.
        make_worker: called once per thread; what it returns is called with job numbers.
        concurrency: most threads, the calling one included; with 1 everything runs in it.

    Raises:
        BaseException: whatever a job raised first; the jobs not yet started are not run.
    """
    queue = _Queue(num_jobs)
    num_helpers = min(concurrency, num_jobs) - 1
    if num_helpers < 1:
        _drain(queue, make_worker)
    else:
        from concurrent.futures import (
            ThreadPoolExecutor,  # most calls need no threads, and commands start fast
        )

        with ThreadPoolExecutor(num_helpers, thread_name_prefix="dcp_ckpt-read") as pool:
            try:
                for _ in range(num_helpers):
                    pool.submit(_drain, queue, make_worker)
                _drain(queue, make_worker)
            except BaseException as error:
                queue.fail(error)
                raise
    if queue.failure is not None:
        raise queue.failure


class _Queue:
    """Job numbers, handed out in order until one fails."""

    def __init__(self, num_jobs: int) -> None:
        self._lock = threading.Lock()
        self._numbers = iter(range(num_jobs))
        self.failure: BaseException | None = None

    def next(self) -> int | None:
        with self._lock:
            return None if self.failure is not None else next(self._numbers, None)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self.failure is None:
                self.failure = error


def _drain(queue: _Queue, make_worker: Callable[[], Callable[[int], None]]) -> None:
    try:
        worker = make_worker()
        while (number := queue.next()) is not None:
            worker(number)
    except BaseException as error:
        queue.fail(error)

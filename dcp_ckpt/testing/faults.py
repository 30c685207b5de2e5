"""A storage that fails, or kills the process, at a chosen operation.

Owns the counting of everything that changes the storage, so that a test can go through all moments at which a
crash leaves something different behind. Must not know what is stored. Used by crash tests, also those of
users.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType

from dcp_ckpt.closing import Closing
from dcp_ckpt.storage.base import Buffer, Lease, ObjectWriter, Storage
from dcp_ckpt.storage.forwarding import ForwardingStorage

__all__ = ["FailAt", "FaultyStorage", "fail_nth", "kill_nth"]

FailAt = Callable[[int, str, str], Exception | None]
"""Called as `(number, operation, key)` at every operation; returns what to raise, or None to go on."""


def fail_nth(number: int, error: Exception) -> FailAt:
    """Raise `error` at operation `number`, counted from 1; the others succeed."""
    return lambda count, operation, key: error if count == number else None


def kill_nth(number: int) -> FailAt:
    """Kill this process (SIGKILL) at operation `number`, counted from 1."""

    def fail_at(count: int, operation: str, key: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fail_at


class FaultyStorage(ForwardingStorage):
    """Does what `inner` does, and asks `fail_at` at every operation that changes something.

    Operations are the methods that change something, those of writers (`write_segment`, `finish`, `abort`),
    and `close_lease`; each key of `delete` and each name of `link` is an operation of its own. An `abort`
    must not raise: one that is to fail is left out instead, and what was written stays.

    Args:
        inner: the storage.
        fail_at: called from the thread of the operation.
        answer_lost: ask after the operation instead of before it: it took effect, and its caller hears an
            error.
    """

    def __init__(self, inner: Storage, fail_at: FailAt, *, answer_lost: bool = False) -> None:
        super().__init__(inner)
        self._faults = _Faults(fail_at, answer_lost=answer_lost)

    @property
    def num_operations(self) -> int:
        """How many operations were asked for so far, failed ones included."""
        return self._faults.num_operations

    def create_exclusive(self, key: str, data: Buffer) -> None:
        with self._faults.at("create_exclusive", key):
            self._inner.create_exclusive(key, data)

    def put(self, key: str, data: Buffer) -> None:
        with self._faults.at("put", key):
            self._inner.put(key, data)

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectWriter:
        with self._faults.at("open_writer", key):
            writer = self._inner.open_writer(key, size_bytes=size_bytes, direct=direct)
        return _FaultyWriter(writer, self._faults, key)

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        for key, new_key in names:
            with self._faults.at("link", new_key):
                self._inner.link([(key, new_key)])

    def make_directory(self, key: str) -> None:
        with self._faults.at("make_directory", key):
            self._inner.make_directory(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._faults.at("delete", key):
                self._inner.delete([key])

    def remove_directory(self, key: str) -> None:
        with self._faults.at("remove_directory", key):
            self._inner.remove_directory(key)

    def rename_directory(self, key: str, new_key: str) -> None:
        with self._faults.at("rename_directory", key):
            self._inner.rename_directory(key, new_key)

    def hold_lease(self, key: str) -> Lease:
        with self._faults.at("hold_lease", key):
            lease = self._inner.hold_lease(key)
        return _FaultyLease(lease, self._faults, key)


class _Faults:
    """Counts operations, and decides at each whether it fails."""

    def __init__(self, fail_at: FailAt, *, answer_lost: bool) -> None:
        self._lock = threading.Lock()
        self._fail_at = fail_at
        self._answer_lost = answer_lost
        self.num_operations = 0

    def at(self, operation: str, key: str) -> _Operation:
        with self._lock:
            self.num_operations += 1
            number = self.num_operations
        return _Operation(lambda: self._fail_at(number, operation, key), answer_lost=self._answer_lost)


class _Operation:
    """Around one operation: the fault strikes on the way in, or on the way out."""

    def __init__(self, decide: Callable[[], Exception | None], *, answer_lost: bool) -> None:
        self._decide = decide
        self._answer_lost = answer_lost

    def __enter__(self) -> None:
        if not self._answer_lost:
            self._strike()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._answer_lost and error is None:
            self._strike()

    def _strike(self) -> None:
        failure = self._decide()
        if failure is not None:
            raise failure


class _FaultyWriter:
    def __init__(self, inner: ObjectWriter, faults: _Faults, key: str) -> None:
        self._inner = inner
        self._faults = faults
        self._key = key

    @property
    def segment_bytes(self) -> int:
        return self._inner.segment_bytes

    def write_segment(self, offset: int, data: memoryview) -> None:
        with self._faults.at("write_segment", self._key):
            self._inner.write_segment(offset, data)

    def finish(self) -> None:
        with self._faults.at("finish", self._key):
            self._inner.finish()

    def abort(self) -> None:
        with suppress(Exception), self._faults.at("abort", self._key):
            self._inner.abort()


class _FaultyLease(Closing):
    def __init__(self, inner: Lease, faults: _Faults, key: str) -> None:
        self._inner = inner
        self._faults = faults
        self._key = key

    def let_run_out(self) -> None:
        self._inner.let_run_out()

    def close(self) -> None:
        with self._faults.at("close_lease", self._key):
            self._inner.close()

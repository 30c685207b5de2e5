"""Running several processes of a model one storage operation at a time, in an order that the test chooses.

An operation is whatever one process does to the storage at one moment; what others do comes before or after
it. Each task runs on a thread of its own, of which only one runs at any time, so a history repeats exactly.
Must not know checkpoints.
"""

from __future__ import annotations

import builtins
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TypeVar

import pytest

from dcp_ckpt.closing import Closing
from dcp_ckpt.lifecycle import catalogue, commit, epochs, janitor, known, prune
from dcp_ckpt.save import coordinator
from dcp_ckpt.storage.base import ByteRange, Lease, ObjectInfo, ObjectWriter
from dcp_ckpt.storage.forwarding import ForwardingStorage
from tests.model.places import Place, PlaceLease

__all__ = ["Died", "Process", "SteppedStorage", "Task", "make_time_and_chance_repeat", "touches"]

Buffer = bytes | bytearray | memoryview

_T = TypeVar("_T")
_HANG_SECONDS = 60.0


class Died(BaseException):
    """The process is dead: nothing that unwinds takes any effect. No `Exception`: nobody handles it."""


_READS = ("read", "size", "list", "names", "ask", "hear")


def touches(one: str, other: str) -> bool:
    """Whether the order of two operations can matter: one changes what the other looks at."""
    kind, *keys = one.partition(" #")[0].split(" ")
    other_kind, *other_keys = other.partition(" #")[0].split(" ")
    if kind in _READS and other_kind in _READS:
        return False
    if "tell" in (kind, other_kind):
        return {kind, other_kind} != {"tell"} and "hear" in (kind, other_kind)
    return any(_overlap(key, other_key) for key in keys for other_key in other_keys)


def _overlap(key: str, other: str) -> bool:
    shorter, longer = sorted((key.rstrip("/"), other.rstrip("/")), key=len)
    return not shorter or longer == shorter or longer.startswith(f"{shorter}/")


class Process:
    """One process of the model: its view of the place, its leases, and how it dies.

    Args:
        is_settled: told a key, says whether its object never changes once it is there.
        is_watched: told a key, says whether others may meet its object half created.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        *,
        is_settled: Callable[[str], bool],
        is_watched: Callable[[str], bool],
    ) -> None:
        self.name = name
        self.is_settled = is_settled
        self.is_watched = is_watched
        self.is_dead = False
        self.leases: list[PlaceLease] = []
        self.storage = SteppedStorage(place, self)

    def beat(self) -> None:
        """It lives, and others can see it again."""
        for lease in self.leases:
            lease.beat()

    def expire(self) -> None:
        """Nobody has heard of it for long, whether it is dead or stopped."""
        for lease in self.leases:
            lease.expire()

    def die(self) -> None:
        """The kernel releases what it held; elsewhere a lease runs out by itself."""
        self.is_dead = True
        for lease in self.leases:
            lease.let_run_out()


class Task:
    """Something that goes on, stopped before each of its operations.

    Args:
        run: what it does. An `Exception` is its result; it ends the task.
    """

    def __init__(self, name: str, run: Callable[[], object]) -> None:
        self.name = name
        self.result: object = None
        self.is_done = False
        self.pending = ""
        self.seconds = 0.0
        self.num_tokens = 0
        self._run = run
        self._history: Hashable = ()
        self._killed = False
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread = _TaskThread(self, self._live)
        self._thread.start()
        self._wait()

    @property
    def key(self) -> Hashable:
        """Equal tasks with equal keys will do the same on equal storages: all it has seen so far."""
        return self.name, self.is_done, self.pending, self._history

    def step(self) -> None:
        """Do the operation that comes next, and go on to the one after it."""
        assert not self.is_done
        self._go.release()
        self._wait()

    def finish(self) -> object:
        """Do the rest without a stop; returns or raises what the task did."""
        while not self.is_done:
            self.step()
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def kill(self) -> None:
        """End it where it stands. Idempotent."""
        self._killed = True
        while not self.is_done:
            self.step()

    def perform(self, operation: str, act: Callable[[], _T]) -> _T:
        """Called on the task's own thread: stop, then do one operation."""
        self.pending = operation
        self._stopped.release()
        self._go.acquire()
        if self._killed:
            raise Died(self.name)
        try:
            result = act()
        except Exception as error:
            self._note(operation, type(error).__name__)
            raise
        self._note(operation, result)
        return result

    def _note(self, operation: str, result: object) -> None:
        if isinstance(result, list):
            seen: Hashable = repr(result)
        else:
            seen = result if isinstance(result, str | bytes | int) else type(result).__name__
        self._history = hash((self._history, operation, seen))

    def _live(self) -> None:
        try:
            self.result = self._run()
        except Exception as error:
            self.result = error
        except Died:
            self.result = None
        except BaseException as error:
            self.result = error
        self.is_done = True
        self.pending = ""
        self._stopped.release()

    def _wait(self) -> None:
        if not self._stopped.acquire(timeout=_HANG_SECONDS):
            raise AssertionError(f"{self.name} hangs after {self.pending}")
        if self.is_done:
            self._thread.join()


class _TaskThread(threading.Thread):
    def __init__(self, task: Task, run: Callable[[], None]) -> None:
        super().__init__(target=run, name=f"model-{task.name}", daemon=True)
        self.task = task


def _current_task() -> Task | None:
    thread = threading.current_thread()
    return thread.task if isinstance(thread, _TaskThread) else None


class SteppedStorage(ForwardingStorage):
    """What one process sees of the place; each operation is one step of the task that asks for it."""

    def __init__(self, place: Place, process: Process) -> None:
        super().__init__(place)
        self._place = place
        self._process = process

    @property
    def process(self) -> Process:
        return self._process

    def at(self, operation: str, act: Callable[[], _T]) -> _T:
        """Do something that others see at one moment."""

        def alive() -> _T:
            if self._process.is_dead:
                raise Died(self._process.name)
            return act()

        task = _current_task()
        return alive() if task is None else task.perform(operation, alive)

    def read(self, key: str) -> bytes:
        if self._process.is_settled(key) and key in self._place.objects and not self._process.is_dead:
            # The same at any later moment: not worth a stop.
            return self._place.read(key)
        return self.at(f"read {key}", lambda: self._place.read(key))

    def read_ranges(
        self, ranges: Sequence[ByteRange], consume: Callable[[int, memoryview], None], *, concurrency: int
    ) -> None:
        for number, item in enumerate(ranges):

            def read_one(number: int = number, item: ByteRange = item) -> bytes:
                found: list[bytes] = []
                self._place.read_ranges([item], lambda _, data: found.append(bytes(data)), concurrency=1)
                return found[0]

            consume(number, memoryview(self.at(f"read {item.key}", read_one)))

    def size(self, key: str) -> int:
        return self.at(f"size {key}", lambda: self._place.size(key))

    def create_exclusive(self, key: str, data: Buffer) -> None:
        if not self._process.is_watched(key):
            self.at(f"create {key}", lambda: self._place.create_exclusive(key, data))
            return
        parts = self._place.creating(key, data)
        number = 0
        while not self.at(f"create {key} #{number}", lambda: next(parts)):
            number += 1

    def put(self, key: str, data: Buffer) -> None:
        self.at(f"put {key}", lambda: self._place.put(key, data))

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectWriter:
        writer = self.at(
            f"open {key}", lambda: self._place.open_writer(key, size_bytes=size_bytes, direct=direct)
        )
        return _SteppedWriter(self, writer, key)

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        for key, new_key in names:
            self.at(f"link {key} {new_key}", lambda name=(key, new_key): self._place.link([name]))  # type: ignore[misc]

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        return self.at(f"list {prefix}", lambda: self._place.list(prefix))

    def list_names(self, prefix: str) -> builtins.list[str]:
        return self.at(f"names {prefix}", lambda: self._place.list_names(prefix))

    def make_directory(self, key: str) -> None:
        if self._place.capabilities.directories:
            self.at(f"mkdir {key}", lambda: self._place.make_directory(key))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.at(f"delete {key}", lambda key=key: self._place.delete([key]))  # type: ignore[misc]

    def remove_directory(self, key: str) -> None:
        if self._place.capabilities.directories:
            self.at(f"rmdir {key}", lambda: self._place.remove_directory(key))

    def rename_directory(self, key: str, new_key: str) -> None:
        self.at(f"rename {key} {new_key}", lambda: self._place.rename_directory(key, new_key))

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        return self.at(f"abort {prefix}", lambda: self._place.abort_uploads(prefix, is_abandoned))

    def hold_lease(self, key: str) -> Lease:
        def hold() -> PlaceLease:
            lease = self._place.hold_lease(key)
            self._process.leases.append(lease)
            return lease

        return _SteppedLease(self, self._process, self.at(f"hold {key}", hold), key)

    def lease_is_held(self, key: str) -> bool:
        return self.at(f"ask {key}", lambda: self._place.lease_is_held(key))


class _SteppedWriter:
    def __init__(self, storage: SteppedStorage, inner: ObjectWriter, key: str) -> None:
        self._storage = storage
        self._inner = inner
        self._key = key

    @property
    def segment_bytes(self) -> int:
        return self._inner.segment_bytes

    def write_segment(self, offset: int, data: memoryview) -> None:
        # Seen by nobody before `finish`, so no step of its own.
        self._inner.write_segment(offset, data)

    def finish(self) -> None:
        self._storage.at(f"finish {self._key}", self._inner.finish)

    def abort(self) -> None:
        self._storage.at(f"drop {self._key}", self._inner.abort)


class _SteppedLease(Closing):
    def __init__(self, storage: SteppedStorage, process: Process, inner: PlaceLease, key: str) -> None:
        self._storage = storage
        self._process = process
        self._inner = inner
        self._key = key

    def let_run_out(self) -> None:
        self._end(self._inner.let_run_out)

    def close(self) -> None:
        self._end(self._inner.close)

    def _end(self, act: Callable[[], None]) -> None:
        if self._inner in self._process.leases:
            self._process.leases.remove(self._inner)
            self._storage.at(f"release {self._key}", act)


class _Clock:
    """Time as one task sees it: it passes while the task sleeps, and at no other time."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def monotonic(self) -> float:
        task = _current_task()
        return self._seconds if task is None else task.seconds

    def sleep(self, seconds: float) -> None:
        task = _current_task()
        if task is None:
            self._seconds += seconds
        elif seconds > 0:
            task.seconds += seconds
            task.perform("sleep", lambda: None)


class _Calendar:
    """A date that never changes: documents of equal content are equal."""

    @staticmethod
    def now(zone: tzinfo | None = None) -> datetime:
        return datetime(2026, 1, 1, tzinfo=zone or UTC) + timedelta(microseconds=1)


def make_time_and_chance_repeat(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Clocks stand, names that are drawn come in a fixed order for each task, and nothing reads on threads.

    Returns:
        What begins the order anew.
    """
    clock = _Clock()
    for module in (epochs, janitor, known, prune):
        patch.setattr(module, "time", clock)
    patch.setattr(epochs, "datetime", _Calendar)
    for module in (catalogue, commit):
        patch.setattr(module, "_CONCURRENT_READS", 1)
    patch.setattr(coordinator, "Watchdog", lambda *_: nullcontext())
    drawn = [0]

    def token_hex(num_bytes: int = 32) -> str:
        task = _current_task()
        if task is None:
            drawn[0] += 1
            seed = f"set-up {drawn[0]}"
        else:
            task.num_tokens += 1
            seed = f"{task.name} {task.num_tokens}"
        return hashlib.blake2b(seed.encode(), digest_size=num_bytes).hexdigest()

    def begin() -> None:
        drawn[0] = 0

    patch.setattr(secrets, "token_hex", token_hex)
    patch.setattr(os, "urandom", lambda num_bytes: bytes.fromhex(token_hex(num_bytes)))
    return begin

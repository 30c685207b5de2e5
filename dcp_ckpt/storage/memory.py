"""Checkpoints in memory: the reference for what a storage does, and a place for tests.

Owns the shortest exact statement of the protocol, as an object store would keep it (no directories). Lives
and dies with the object; other processes cannot see it. Called by tests, also those of users.
"""

from __future__ import annotations

import builtins
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import ConfigError, StorageError, StorageExists, StorageNotFound, StorageUnsuitable
from dcp_ckpt.storage.base import Buffer, ByteRange, ObjectInfo, StorageCapabilities
from dcp_ckpt.storage.keys import check_key, check_prefix, is_listed, names_below
from dcp_ckpt.storage.ranges import check_ranges, run_in_order

__all__ = ["MemoryLease", "MemoryObjectWriter", "MemoryStorage"]


class MemoryStorage:
    """Objects in a dictionary; see `Storage` for the methods.

    Args:
        name: for messages.
    """

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, bytes] = {}
        self._unfinished: set[str] = set()
        self._holders: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    @property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(
            exclusive_create=True,
            directories=False,
            direct_io=False,
            lease_ends_with_holder=True,
            shared=False,
            links=False,
        )

    def read(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            if key not in self._objects:
                raise StorageNotFound("there is no such object", path=self._where(key))
            return self._objects[key]

    def read_ranges(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        *,
        concurrency: int,
    ) -> None:
        check_ranges(ranges, concurrency=concurrency)

        def read_one(number: int) -> None:
            item = ranges[number]
            data = self.read(item.key)[item.offset : item.offset + item.num_bytes]
            if len(data) < item.num_bytes:
                raise StorageError(
                    f"the object ends early: {item.num_bytes} bytes at offset {item.offset} were asked for, "
                    f"and it ends at {item.offset + len(data)}",
                    path=self._where(item.key),
                )
            consume(number, memoryview(bytearray(data)))

        run_in_order(len(ranges), lambda: read_one, concurrency=concurrency)

    def size(self, key: str) -> int:
        return len(self.read(key))

    def create_exclusive(self, key: str, data: Buffer) -> None:
        with self._lock:
            self._check_free(key)
            self._objects[key] = bytes(data)

    def require_exclusive_create(self) -> None:
        """It holds: there is one lock."""

    def put(self, key: str, data: Buffer) -> None:
        check_key(key)
        with self._lock:
            self._objects[key] = bytes(data)

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> MemoryObjectWriter:
        with self._lock:
            self._check_free(key)
            self._unfinished.add(key)
        return MemoryObjectWriter(self._settle, path=self._where(key), key=key, size_bytes=size_bytes)

    def list(self, prefix: str) -> list[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            return [
                ObjectInfo(key=key, size_bytes=len(data))
                for key, data in sorted(self._objects.items())
                if key.startswith(prefix) and all(map(is_listed, key[len(prefix) :].split("/")))
            ]

    def list_names(self, prefix: str) -> builtins.list[str]:
        return names_below((info.key for info in self.list(prefix)), prefix)

    def make_directory(self, key: str) -> None:
        check_key(key)

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        for key in chain.from_iterable(names):
            check_key(key)
        raise StorageUnsuitable("an object has one name only here", path=self.url)

    def delete(self, keys: Iterable[str]) -> None:
        for key in [check_key(key) for key in keys]:
            with self._lock:
                self._objects.pop(key, None)

    def remove_directory(self, key: str) -> None:
        check_key(key)

    def rename_directory(self, key: str, new_key: str) -> None:
        check_key(key)
        check_key(new_key)
        raise StorageUnsuitable("there are no directories to rename here", path=self._where(key))

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        check_prefix(prefix)
        return []

    def remove_own_root(self) -> None:
        """There is none."""

    def until(self, deadline: float) -> MemoryStorage:
        """Nothing takes time here."""
        return self

    def free_bytes(self) -> int | None:
        """None: this process's memory has no share of its own."""
        return None

    def hold_lease(self, key: str) -> MemoryLease:
        check_key(key)
        with self._lock:
            self._objects.setdefault(key, b"")
            self._holders[key] += 1
        return MemoryLease(lambda: self._release(key))

    def lease_is_held(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            return self._holders[key] > 0

    def close(self) -> None:
        """Nothing to release."""

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _check_free(self, key: str) -> None:
        check_key(key)
        if key in self._objects or key in self._unfinished:
            raise StorageExists("the name is taken", path=self._where(key))

    def _settle(self, key: str, data: bytes | None) -> None:
        with self._lock:
            self._unfinished.discard(key)
            if data is not None:
                self._objects[key] = data

    def _release(self, key: str) -> None:
        with self._lock:
            self._holders[key] -= 1


class MemoryObjectWriter:
    """Collects segments; the object appears, whole, at `finish`."""

    segment_bytes = 8 << 20

    def __init__(
        self, settle: Callable[[str, bytes | None], None], *, path: str, key: str, size_bytes: int
    ) -> None:
        self._settle = settle
        self._path = path
        self._key = key
        self._data = bytearray(size_bytes)
        self._end = 0
        self._state = "open"

    def write_segment(self, offset: int, data: memoryview) -> None:
        self._check_open("write to")
        view = memoryview(data).cast("B")
        end = offset + len(view)
        if offset < self._end or end > len(self._data):
            raise ConfigError(
                f"segment [{offset}, {end}) of {self._path} must start at {self._end} or later and end at "
                f"{len(self._data)} or before"
            )
        self._data[offset:end] = view
        self._end = end

    def finish(self) -> None:
        if self._state == "finished":
            return
        self._check_open("finish")
        if self._end != len(self._data):
            raise StorageError(
                f"cannot finish the object: {self._end} of {len(self._data)} bytes were written",
                path=self._path,
            )
        self._settle(self._key, bytes(self._data))
        self._state = "finished"

    def abort(self) -> None:
        if self._state == "open":
            self._settle(self._key, None)
            self._state = "aborted"

    def _check_open(self, action: str) -> None:
        if self._state != "open":
            raise StorageError(f"cannot {action} the object: it was {self._state}", path=self._path)


class MemoryLease(Closing):
    """One holder of a lease; held until closed, or until the storage is gone."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._release: Callable[[], None] | None = release

    def let_run_out(self) -> None:
        self.close()

    def close(self) -> None:
        """Give it up. Idempotent."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

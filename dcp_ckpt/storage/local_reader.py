"""Ranges of local files, read in parallel: into the memory that they offer, or into reused memory.

Owns open files and bounce buffers for the length of one call. Must not know what the bytes mean. Called by
`LocalStorage.read_ranges`.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from dcp_ckpt.errors import StorageError
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.os_errors import reading
from dcp_ckpt.storage.paths import open_regular, path_below
from dcp_ckpt.storage.ranges import run_in_order

__all__ = ["read_file", "read_file_ranges"]

_THREAD_BYTES = 8 << 20

_READ_AHEAD_FROM_BYTES = 8 << 20
"""From so much of one file on, the kernel is asked to read further ahead: half the time where the page cache
is cold (benchmarks/NOTES.md), and of no use to a few small ranges."""

_MOST_PARTS = 1024
"""Linux takes no more parts in one call (IOV_MAX)."""


def read_file(path: str, *, root: str) -> bytes:
    """The whole file; raises `StorageNotFound` if there is none."""
    with reading(path, root=root), open(open_regular(path, root=root), "rb", buffering=0) as file:
        return file.readall()


def read_file_ranges(
    ranges: Sequence[ByteRange],
    consume: Callable[[int, memoryview], None],
    *,
    concurrency: int,
    root: str,
) -> None:
    """As `Storage.read_ranges`, for checked ranges of files below `root`."""
    wanted_bytes: Counter[str] = Counter()
    for item in ranges:
        wanted_bytes[item.key] += item.num_bytes
    files = _OpenFiles(Counter(item.key for item in ranges), wanted_bytes, root)
    # Starting a thread costs more than reading a few small files.
    worthwhile = 1 + sum(item.num_bytes for item in ranges) // _THREAD_BYTES

    def make_worker() -> Callable[[int], None]:
        buffer = memoryview(b"")

        def read_one(number: int) -> None:
            nonlocal buffer
            item = ranges[number]
            path = os.path.join(root, item.key)
            fd = files.acquire(item.key)
            try:
                if item.into is not None:
                    view = buffer[:0]
                    _read_into(fd, item.into(), item, path=path, root=root)
                else:
                    if item.num_bytes > len(buffer):
                        # Only for what is there: a damaged document may ask for any number of bytes.
                        _require_range(fd, item, path=path, root=root)
                        buffer = memoryview(bytearray(item.num_bytes))
                    view = buffer[: item.num_bytes]
                    _read_into(fd, [view], item, path=path, root=root)
            finally:
                files.release(item.key)
            consume(number, view)

        return read_one

    try:
        run_in_order(len(ranges), make_worker, concurrency=min(concurrency, worthwhile))
    finally:
        files.close()


class _OpenFiles:
    """Each file is opened at its first range and closed after its last, so few are open at a time."""

    def __init__(self, uses: Counter[str], wanted_bytes: Counter[str], root: str) -> None:
        self._lock = threading.Lock()
        self._uses = uses
        self._wanted_bytes = wanted_bytes
        self._root = root
        self._fds: dict[str, int] = {}

    def acquire(self, key: str) -> int:
        with self._lock:
            if key not in self._fds:
                self._fds[key] = fd = open_regular(path_below(self._root, key), root=self._root)
                if self._wanted_bytes[key] >= _READ_AHEAD_FROM_BYTES:
                    with suppress(OSError):  # only advice
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._fds[key]

    def release(self, key: str) -> None:
        with self._lock:
            self._uses[key] -= 1
            if not self._uses[key]:
                os.close(self._fds.pop(key))

    def close(self) -> None:
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])


def _require_range(fd: int, item: ByteRange, *, path: str, root: str) -> None:
    with reading(path, root=root):
        size_bytes = os.fstat(fd).st_size
    if item.offset + item.num_bytes > size_bytes:
        raise _ends_early(item.num_bytes, item.offset, size_bytes, path)


def _ends_early(num_bytes: int, offset: int, end: int, path: str) -> StorageError:
    return StorageError(
        f"the object ends early: {num_bytes} bytes at offset {offset} were asked for, and it ends at {end}",
        path=path,
    )


def _read_into(fd: int, parts: Sequence[memoryview], item: ByteRange, *, path: str, root: str) -> None:
    left = [part for part in parts if len(part)]
    done = 0
    while done < item.num_bytes:
        with reading(path, root=root):
            num_read = os.preadv(fd, left[:_MOST_PARTS], item.offset + done)
        if num_read == 0:
            raise _ends_early(item.num_bytes, item.offset, item.offset + done, path)
        done += num_read
        left = _behind(left, num_read)


def _behind(parts: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `parts` after the first `num_bytes` bytes."""
    for number, part in enumerate(parts):
        if num_bytes < len(part):
            return [part[num_bytes:], *parts[number + 1 :]]
        num_bytes -= len(part)
    return []

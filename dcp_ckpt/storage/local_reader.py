"""Ranges of local files, read in parallel into reused memory.

Owns open files and bounce buffers for the length of one call. Must not know what the bytes mean. Called by
`LocalStorage.read_ranges`.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from dcp_ckpt.errors import StorageError
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.os_errors import reading
from dcp_ckpt.storage.ranges import run_in_order

__all__ = ["read_file", "read_file_ranges"]

_THREAD_BYTES = 8 << 20


def read_file(path: str, *, root: str) -> bytes:
    """The whole file; raises `StorageNotFound` if there is none."""
    with reading(path, root=root), open(path, "rb", buffering=0) as file:
        return file.readall()


def read_file_ranges(
    ranges: Sequence[ByteRange],
    consume: Callable[[int, memoryview], None],
    *,
    concurrency: int,
    root: str,
) -> None:
    """As `Storage.read_ranges`, for checked ranges of files below `root`."""
    files = _OpenFiles(Counter(item.key for item in ranges), root)
    buffer_bytes = max((item.num_bytes for item in ranges), default=0)
    # Starting a thread costs more than reading a few small files.
    worthwhile = 1 + sum(item.num_bytes for item in ranges) // _THREAD_BYTES

    def make_worker() -> Callable[[int], None]:
        buffer = memoryview(bytearray(buffer_bytes))

        def read_one(number: int) -> None:
            item = ranges[number]
            view = buffer[: item.num_bytes]
            fd = files.acquire(item.key)
            try:
                _read_into(fd, view, item.offset, path=os.path.join(root, item.key), root=root)
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

    def __init__(self, uses: Counter[str], root: str) -> None:
        self._lock = threading.Lock()
        self._uses = uses
        self._root = root
        self._fds: dict[str, int] = {}

    def acquire(self, key: str) -> int:
        with self._lock:
            if key not in self._fds:
                self._fds[key] = _open_regular(os.path.join(self._root, key), root=self._root)
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


def _open_regular(path: str, *, root: str) -> int:
    with reading(path, root=root):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _read_into(fd: int, view: memoryview, offset: int, *, path: str, root: str) -> None:
    done = 0
    while done < len(view):
        with reading(path, root=root):
            num_read = os.preadv(fd, [view[done:]], offset + done)
        if num_read == 0:
            raise StorageError(
                f"the object ends early: {len(view)} bytes at offset {offset} were asked for, and it ends at "
                f"{offset + done}",
                path=path,
            )
        done += num_read

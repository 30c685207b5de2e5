"""One large local file, written in segments past the page cache.

Owns how bytes reach the disk: O_DIRECT for what is aligned, the page cache for the rest, and the fallback
where the file system or the memory does not suit. Must not know what the bytes mean. Made by
`LocalStorage.open_writer`.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress

from dcp_ckpt.errors import ConfigError, StorageError
from dcp_ckpt.storage.directories import sync_directory
from dcp_ckpt.storage.os_errors import free_bytes, full_error, storage_error
from dcp_ckpt.storage.system_calls import SystemCalls

__all__ = ["LocalObjectWriter"]

log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 4096
_NOT_HERE = frozenset({errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.ESPIPE})
"""How a kernel, a file system or a sandbox says that it does not do this at all."""


class LocalObjectWriter:
    """Writes `path`, which it creates; another file of that name is an error.

    The file stands under its final name while it is written. That is safe because nothing reads a data file
    that no fragment names, and saves a rename of every file.

    Args:
        path: absolute path, in an existing directory.
        size_bytes: exact final size; the space is reserved now.
        direct: bypass the page cache where possible.
        calls: the system calls.

    Raises:
        FileExistsError: the name is taken.
        FileNotFoundError: there is no such directory.
        StorageFull: there is no room.
    """

    # Large enough for the disk, small enough to be digested while in cache.
    segment_bytes = 8 << 20

    def __init__(self, path: str, *, size_bytes: int, direct: bool, calls: SystemCalls) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._calls = calls
        self._end = 0
        self._failure: StorageError | None = None
        self._finished = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o666)
        try:
            self._reserve()
            # Switched on afterwards: some kernels create the file and then refuse to open it with O_DIRECT.
            self._direct = direct and self._can_be_direct()
            self._direct_now = self._direct
        except BaseException:
            self.abort()
            raise

    def write_segment(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`; segments ascend and do not overlap."""
        self._check_usable("write to")
        view = memoryview(data).cast("B")
        if offset < self._end or offset + len(view) > self._size_bytes:
            raise ConfigError(
                f"segment [{offset}, {offset + len(view)}) of {self._path} must start at {self._end} or "
                f"later and end at {self._size_bytes} or before"
            )
        start, end = offset, offset + len(view)
        try:
            while view:
                written = self._write_some(offset, view)
                view = view[written:]
                offset += written
            if not self._direct:
                self._begin_writeback(start, end - start)
        except OSError as error:
            self._failure = storage_error(error, "write", self._path, needed_bytes=self._size_bytes - offset)
            raise self._failure from error
        self._end = end

    def finish(self) -> None:
        """Sync the file and its name, and close it."""
        if self._finished:
            return
        self._check_usable("finish")
        try:
            os.fsync(self._fd)
            size = os.fstat(self._fd).st_size
            if not size == self._end == self._size_bytes:
                raise OSError(errno.EIO, f"{min(size, self._end)} of {self._size_bytes} bytes were written")
            sync_directory(os.path.dirname(self._path))
        except OSError as error:
            # Remembered: after a failed fsync the kernel drops the bytes, and a second fsync succeeds.
            self._failure = storage_error(error, "finish writing", self._path, needed_bytes=self._size_bytes)
            raise self._failure from error
        self._finished = True
        self._close()

    def abort(self) -> None:
        """Remove the file, unless it was finished."""
        if self._finished or self._fd < 0:
            return
        self._close()
        with suppress(OSError):
            os.unlink(self._path)
            sync_directory(os.path.dirname(self._path))

    def _check_usable(self, action: str) -> None:
        if self._failure is not None:
            message = f"cannot {action} the file: an earlier write failed ({self._failure.message})"
            raise StorageError(message, path=self._path, errno=self._failure.errno) from self._failure
        if self._finished or self._fd < 0:
            raise StorageError(f"cannot {action} the file: it was finished or aborted", path=self._path)

    def _reserve(self) -> None:
        """Find too little space now rather than after minutes of writing."""
        action = "create the file"
        free = free_bytes(os.path.dirname(self._path))
        # Asked first: a reservation that cannot succeed may take all free space from others before it fails.
        if free is not None and free < self._size_bytes:
            raise full_error(action, self._path, needed_bytes=self._size_bytes, code=errno.ENOSPC)
        if self._size_bytes == 0:
            return
        try:
            self._calls.reserve_space(self._fd, self._size_bytes)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise storage_error(error, action, self._path, needed_bytes=self._size_bytes) from error

    def _write_some(self, offset: int, view: memoryview) -> int:
        """Write a first part of `view`; return its length, at least 1."""
        misaligned = offset % ALIGNMENT_BYTES
        whole_pages = len(view) - len(view) % ALIGNMENT_BYTES
        if self._direct and not misaligned and whole_pages:
            try:
                self._use_direct(True)
                return self._pwrite(view[:whole_pages], offset)
            except OSError as error:
                # The address of the memory, or a file system that accepts the flag and not the write.
                if error.errno != errno.EINVAL:
                    raise
        elif self._direct and misaligned:
            view = view[: ALIGNMENT_BYTES - misaligned]
        self._use_direct(False)
        return self._pwrite(view, offset)

    def _begin_writeback(self, offset: int, num_bytes: int) -> None:
        """Keep the disk busy from the first segment on, where the kernel would wait for the fsync."""
        try:
            self._calls.start_writeback(self._fd, offset, num_bytes)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise

    def _pwrite(self, view: memoryview, offset: int) -> int:
        written = self._calls.pwrite(self._fd, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepts no more bytes")
        return written

    def _use_direct(self, direct: bool) -> None:
        if direct != self._direct_now:
            self._calls.set_direct(self._fd, direct)
            self._direct_now = direct

    def _can_be_direct(self) -> bool:
        try:
            self._calls.set_direct(self._fd, True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            log.debug("%s: the file system does no direct I/O; writing through the page cache", self._path)
            return False
        return True

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

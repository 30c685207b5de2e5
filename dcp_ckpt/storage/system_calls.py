"""The system calls that some file systems refuse, as values.

Python lacks two of them, so they are made through ctypes. They are gathered in one value so that the
fallbacks can be tested on any file system. Each function raises `OSError` like its relatives in `os`. Called
by the local storage only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["SystemCalls", "rename_without_replacing", "reserve_space", "set_direct", "start_writeback"]

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_FALLOC_FL_KEEP_SIZE = 1
_SYNC_FILE_RANGE_WRITE = 2


def rename_without_replacing(source: str, target: str) -> None:
    """Rename atomically; `FileExistsError` if `target` exists (renameat2, RENAME_NOREPLACE)."""
    arguments = (
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(source)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(target)),
        ctypes.c_uint(_RENAME_NOREPLACE),
    )
    _call("renameat2", arguments, target)


def reserve_space(fd: int, size_bytes: int) -> None:
    """Reserve blocks for the first `size_bytes` bytes, without changing the size (fallocate).

    Not `os.posix_fallocate`: where the file system cannot, the C library writes to every block instead.
    """
    arguments = (
        ctypes.c_int(fd),
        ctypes.c_int(_FALLOC_FL_KEEP_SIZE),
        ctypes.c_int64(0),
        ctypes.c_int64(size_bytes),
    )
    _call("fallocate", arguments, None)


def set_direct(fd: int, direct: bool) -> None:
    """Switch O_DIRECT of an open file on or off; EINVAL where the file system does not do direct I/O."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)


def start_writeback(fd: int, offset: int, num_bytes: int) -> None:
    """Have the kernel begin now to write these bytes from the page cache to the disk; do not wait for it.

    Says nothing about durability (sync_file_range, SYNC_FILE_RANGE_WRITE): a later fsync waits, and reports
    what failed.
    """
    arguments = (
        ctypes.c_int(fd),
        ctypes.c_int64(offset),
        ctypes.c_int64(num_bytes),
        ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
    )
    _call("sync_file_range", arguments, None)


@dataclass(frozen=True, kw_only=True)
class SystemCalls:
    """What the local storage calls where file systems differ; the defaults are the real calls."""

    link: Callable[[str, str], None] = os.link
    rename_without_replacing: Callable[[str, str], None] = rename_without_replacing
    reserve_space: Callable[[int, int], None] = reserve_space
    set_direct: Callable[[int, bool], None] = set_direct
    pwrite: Callable[[int, memoryview, int], int] = os.pwrite
    start_writeback: Callable[[int, int, int], None] = start_writeback


def _call(name: str, arguments: tuple[Any, ...], path: str | None) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, f"the C library has no {name}", path)
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), path)
